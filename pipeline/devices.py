"""How FAISS searches: on the CPU or on a GPU that it may share with vLLM, and with which parameters."""

import logging
from dataclasses import dataclass
from typing import Any

import faiss

from pipeline.config import RetrievalConfig
from pipeline.manifest import IndexManifest
from pipeline.settings import parse_search
from pipeline.shards import empty_index, faiss_reason

log = logging.getLogger(__name__)

# FAISS's working memory on a card. Its own default takes up to 1.5 GiB for each set of resources.
WORKING_BYTES = 512 << 20
# What starts after the index has been placed: the CUDA context of vLLM's process.
RESERVED_BYTES = 1 << 30
# A product quantiser's tables must fit into a block's shared memory: 256 numbers for each part of a vector.
SHARED_MEMORY = 48 << 10
# GPU lists hold multiples of this many vectors.
LIST_PADDING = 32
GB = 1e9


def gpu_form(index: Any, float16: bool) -> bool:
    """Whether FAISS has this kind of index on GPUs: flat, and inverted lists of plain, scalar or product codes.

    Args:
        float16: whether tables of product quantisers are in half precision.
    """
    kind = faiss.downcast_index(index)
    if isinstance(kind, faiss.IndexPreTransform):
        return gpu_form(kind.index, float16)
    if isinstance(kind, faiss.IndexIVFPQ):
        tables = kind.pq.M * kind.pq.ksub * (2 if float16 else 4)
        return type(kind) is faiss.IndexIVFPQ and kind.pq.nbits == 8 and tables <= SHARED_MEMORY
    if isinstance(kind, faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer):
        return isinstance(faiss.downcast_index(kind.quantizer), faiss.IndexFlat)
    return isinstance(kind, faiss.IndexFlat)


def gpu_bytes(manifest: IndexManifest, numbers: list[int], float16: bool) -> int:
    """Memory that shards take on a card, with FAISS's working memory.

    Vectors are as on disk; lists are padded. Half precision halves ``Flat`` ones, and takes a shard and a half in
    single precision on the way there.
    """
    stored = [manifest.shards[number].bytes for number in numbers]
    ivf = faiss.try_extract_index_ivf(index := empty_index(manifest.factory, manifest.dimension))
    if ivf is not None:
        padding = ivf.nlist * LIST_PADDING // 2 * ivf.code_size
        return sum(stored) + len(stored) * padding + WORKING_BYTES
    if float16 and isinstance(index, faiss.IndexFlat):
        return sum(stored) // 2 + 3 * max(stored, default=0) // 2 + WORKING_BYTES
    return sum(stored) + WORKING_BYTES


def check_gpu_memory(needed: int, free: int, card: int, engine_share: float) -> None:
    """Refuse shards that do not fit on a card beside the engine, which starts after them.

    Args:
        needed, free, card: bytes of the shards, of what is free on the card now, and of the card.
        engine_share: vLLM's ``gpu_memory_utilization`` of the same card; 0 where there is none.

    Raises:
        ValueError: names what is needed and what is left.
    """
    left = free - int(card * engine_share) - RESERVED_BYTES
    if needed > left:
        raise ValueError(
            f"the index needs {needed / GB:.1f} GB on the GPU, and of its {card / GB:.1f} GB, {free / GB:.1f} GB free, "
            f"vLLM's share of {engine_share:g} leaves {max(left, 0) / GB:.1f} GB: set retrieval.device=cpu, lower "
            "model.engine.gpu_memory_utilization, choose a smaller factory, or retrieval.topology=partitioned"
        )


@dataclass(frozen=True)
class Device:
    """Where the shards of one process are searched.

    Attributes:
        resources: FAISS's, one for all shards since each has working memory of its own; None on the CPU.
    """

    resources: Any | None
    float16: bool = False

    @classmethod
    def choose(
        cls, retrieval: RetrievalConfig, manifest: IndexManifest, numbers: list[int], engine_share: float
    ) -> "Device":
        """The device that a configuration asks for.

        Args:
            numbers: shards that will be placed on it.
            engine_share: see :func:`check_gpu_memory`.

        Raises:
            ValueError: no GPU where one is asked for, no GPU form of such an index, or too little memory.
        """
        # The CPU build of FAISS has none of the GPU names.
        gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
        if retrieval.device == "gpu" and gpus == 0:
            raise ValueError("retrieval.device gpu: FAISS sees none; install the gpu extra, or set auto or cpu")
        if retrieval.device == "cpu" or gpus == 0:
            return cls(None)
        if not gpu_form(empty_index(manifest.factory, manifest.dimension), retrieval.float16):
            if retrieval.device == "gpu":
                raise ValueError(f"retrieval.device gpu: FAISS has no {manifest.factory} on GPUs; set auto or cpu")
            log.warning("FAISS has no %s on GPUs; it is searched on the CPU", manifest.factory)
            return cls(None)
        import torch

        free, card = torch.cuda.mem_get_info()
        check_gpu_memory(gpu_bytes(manifest, numbers, retrieval.float16), free, card, engine_share)
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(WORKING_BYTES)
        return cls(resources, retrieval.float16)

    def place(self, index: Any) -> tuple[Any, Any]:
        """An index on this device, with the FAISS parameter space that belongs to it.

        Raises:
            ValueError: FAISS cannot place it.
        """
        if self.resources is None:
            return index, faiss.ParameterSpace()
        options = faiss.GpuClonerOptions()
        options.useFloat16 = self.float16
        try:
            return faiss.index_cpu_to_gpu(self.resources, 0, index, options), faiss.GpuParameterSpace()
        except RuntimeError as error:
            raise ValueError(f"retrieval.device: no place on the GPU ({faiss_reason(error)}); set cpu") from None


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
