"""How FAISS searches: on the CPU or on a GPU that it may share with vLLM, and with which parameters."""

from dataclasses import dataclass
from typing import Any

import faiss

from pipeline.config import RetrievalConfig, parse_search
from pipeline.manifest import IndexManifest
from pipeline.shards import faiss_reason

# FAISS's working memory on a card. Its own default takes up to 1.5 GiB for each set of resources.
WORKING_BYTES = 512 << 20
# CUDA contexts of two processes, and the encoder.
RESERVED_BYTES = 1536 << 20
GB = 1e9


def gpu_bytes(manifest: IndexManifest, numbers: list[int], float16: bool) -> int:
    """Memory that shards take on a card: their vectors as on disk, half of that for ``Flat`` in half precision."""
    stored = sum(manifest.shards[number].bytes for number in numbers)
    halved = float16 and manifest.factory == "Flat"
    return (stored // 2 if halved else stored) + WORKING_BYTES


def check_gpu_memory(needed: int, card: int, engine_share: float) -> None:
    """Refuse shards that do not fit on a card beside the engine.

    Args:
        needed, card: bytes of the shards with FAISS's working memory, and of the card.
        engine_share: vLLM's ``gpu_memory_utilization`` of the same card; 0 where there is none.

    Raises:
        ValueError: names what is needed and what is left.
    """
    left = int(card * (1 - engine_share)) - RESERVED_BYTES
    if needed > left:
        raise ValueError(
            f"the index needs {needed / GB:.1f} GB on the GPU, and of its {card / GB:.1f} GB vLLM's share of "
            f"{engine_share:g} leaves {max(left, 0) / GB:.1f} GB: set retrieval.device=cpu, lower "
            "model.engine.gpu_memory_utilization, choose a smaller factory, or retrieval.topology=partitioned"
        )


@dataclass(frozen=True)
class Device:
    """Where the shards of one process are searched.

    Attributes:
        resources: FAISS's, one for all shards since each has working memory of its own; None on the CPU.
        required: whether an index without a GPU form is an error rather than searched on the CPU.
    """

    resources: Any | None
    required: bool
    float16: bool

    @classmethod
    def choose(
        cls, retrieval: RetrievalConfig, manifest: IndexManifest, numbers: list[int], engine_share: float
    ) -> "Device":
        """The device that a configuration asks for.

        Args:
            numbers: shards that will be placed on it.
            engine_share: see :func:`check_gpu_memory`.

        Raises:
            ValueError: no GPU where one is asked for, or too little memory on it.
        """
        # The CPU build of FAISS has none of the GPU names.
        gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
        if retrieval.device == "gpu" and gpus == 0:
            raise ValueError("retrieval.device gpu: FAISS sees none; install the gpu extra, or set auto or cpu")
        if retrieval.device == "cpu" or gpus == 0:
            return cls(None, False, False)
        import torch

        card = torch.cuda.mem_get_info()[1]
        check_gpu_memory(gpu_bytes(manifest, numbers, retrieval.float16), card, engine_share)
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(WORKING_BYTES)
        return cls(resources, retrieval.device == "gpu", retrieval.float16)

    def place(self, index: Any) -> tuple[Any, Any]:
        """An index on this device, with the FAISS parameter space that belongs to it.

        Raises:
            ValueError: it has no GPU form and must have one.
        """
        if self.resources is not None:
            options = faiss.GpuClonerOptions()
            options.useFloat16 = self.float16
            try:
                return faiss.index_cpu_to_gpu(self.resources, 0, index, options), faiss.GpuParameterSpace()
            except RuntimeError as error:  # graph indexes, for one, have no GPU form
                if self.required:
                    raise ValueError(f"retrieval.device gpu: {faiss_reason(error)}; set auto or cpu") from None
        return index, faiss.ParameterSpace()


def set_search(index: Any, space: Any, search: str) -> None:
    """Set search parameters on an index.

    Args:
        space: FAISS's ``ParameterSpace`` for the device that the index is on.
        search: as ``retrieval.search``.

    Raises:
        ValueError: the index has no such parameter.
    """
    for name, value in parse_search(search).items():
        try:
            space.set_index_parameter(index, name, value)
        except RuntimeError:
            kind = type(faiss.downcast_index(index)).__name__
            raise ValueError(f"retrieval.search {search}: a {kind} has no parameter {name}; leave it out") from None
