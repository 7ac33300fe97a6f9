"""How FAISS searches: on the CPU or on a GPU that it may share with vLLM, and with which parameters."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import faiss

from pipeline.config.loading import parse_search
from pipeline.config.sections import RetrievalConfig
from pipeline.gpus import assigned_gpus, choose_gpu
from pipeline.retrieval.manifest import IndexManifest
from pipeline.retrieval.shard_files import empty_index, faiss_reason

log = logging.getLogger(__name__)

# FAISS's working memory on a card. Its own default takes up to 1.5 GiB for each set of resources.
WORKING_BYTES = 512 << 20
# What starts after the index has been placed: the CUDA context of vLLM's process.
RESERVED_BYTES = 1 << 30
# A product quantiser's tables must fit into a block's shared memory: 256 numbers for each part of a vector.
SHARED_MEMORY = 48 << 10
# GPU lists hold multiples of this many vectors.
LIST_PADDING = 32
# An engine whose actor was killed is gone when free memory has not grown for so long.
RELEASE_SECONDS = 5.0
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


def check_gpu_form(manifest: IndexManifest, float16: bool) -> None:
    """Refuse an index that FAISS cannot search on GPUs.

    Raises:
        ValueError: names its factory string.
    """
    if not gpu_form(empty_index(manifest.factory, manifest.dimension), float16):
        raise ValueError(
            f"FAISS has no {manifest.factory} on GPUs: set retrieval.device=cpu, or build with another factory"
        )


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


@dataclass(frozen=True)
class CardMemory:
    """The memory of a card, and how much of it an index may take beside an engine.

    Attributes:
        free, total: bytes that are free now, and bytes of the card.
        share: share of the card that belongs to this process.
        engine: vLLM's ``gpu_memory_utilization`` of this process's engine, which starts after the index has been
            placed; 0 where there is none.
    """

    free: int
    total: int
    share: float = 1.0
    engine: float = 0.0

    @property
    def budget(self) -> int:
        """Bytes for the index once everything else on the card has ended or taken its own share."""
        return int(self.total * (self.share - self.engine)) - RESERVED_BYTES

    @property
    def left(self) -> int:
        """Bytes for the index now."""
        return min(self.budget, self.free - int(self.total * self.engine) - RESERVED_BYTES)

    def check(self, needed: int) -> None:
        """Refuse an index that does not fit.

        Args:
            needed: bytes.

        Raises:
            ValueError: names what is needed and what is left.
        """
        if needed > self.left:
            raise ValueError(
                f"the index needs {needed / GB:.1f} GB on the GPU, but {max(self.left, 0) / GB:.1f} GB are left: of "
                f"its {self.total / GB:.1f} GB {self.free / GB:.1f} GB are free, this process may use {self.share:g}, "
                f"and vLLM takes {self.engine:g}; set retrieval.device=cpu, lower model.engine.gpu_memory_utilization, "
                "choose a smaller factory, or retrieval.topology=partitioned"
            )


def read_memory(engine_share: float) -> CardMemory:
    """Read the memory of the card that this process searches on."""
    import torch

    free, total = torch.cuda.mem_get_info()
    assigned = assigned_gpus()
    return CardMemory(free, total, assigned.share if assigned else 1.0, engine_share)


def await_memory(needed: int, engine_share: float) -> None:
    """Wait until the card has room for an index; an actor's predecessor that was killed may still hold memory there.

    Raises:
        ValueError: it has no room, or none becomes free any more; names what is needed and what is left.
    """
    memory = read_memory(engine_share)
    give_up = time.monotonic() + RELEASE_SECONDS
    while memory.left < needed <= memory.budget and time.monotonic() < give_up:
        time.sleep(1)
        before, memory = memory, read_memory(engine_share)
        if memory.free > before.free:
            give_up = time.monotonic() + RELEASE_SECONDS
    memory.check(needed)


def has_gpu() -> bool:
    """Ask whether FAISS can use a GPU: PyTorch first, since FAISS aborts the process where the driver is too old."""
    import torch

    # The CPU build of FAISS has none of the GPU names.
    return hasattr(faiss, "StandardGpuResources") and torch.cuda.is_available() and faiss.get_num_gpus() > 0


@dataclass(frozen=True)
class Device:
    """Where the shards of one process are searched.

    Attributes:
        resources: FAISS's, one for all shards since each has working memory of its own; None on the CPU.
        required: whether a shard without a place on the GPU is an error; otherwise the CPU searches it.
    """

    resources: Any | None
    float16: bool = False
    required: bool = False

    @classmethod
    def choose(
        cls, retrieval: RetrievalConfig, manifest: IndexManifest, numbers: list[int], engine_share: float
    ) -> "Device":
        """Choose the device that a configuration asks for.

        Args:
            numbers: shards that will be placed on it.
            engine_share: see :class:`CardMemory`.

        Raises:
            ValueError: ``retrieval.device`` is ``gpu``, and there is none, or FAISS has no such index on GPUs, or too
                little memory is left.
        """
        if not choose_gpu(retrieval.device):
            return cls(None)
        required = retrieval.device == "gpu"
        if not has_gpu():
            if required:
                raise ValueError("retrieval.device gpu: FAISS sees none; install the gpu extra, or set auto or cpu")
            return cls(None)
        try:
            check_gpu_form(manifest, retrieval.float16)
            await_memory(gpu_bytes(manifest, numbers, retrieval.float16), engine_share)
        except ValueError as error:
            if required:
                raise
            log.warning("the index is searched on the CPU: %s", error)
            return cls(None)
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(WORKING_BYTES)
        return cls(resources, retrieval.float16, required)

    def place(self, index: Any) -> tuple[Any, Any]:
        """Put an index on this device; returns it with the FAISS parameter space that belongs to it.

        Raises:
            ValueError: FAISS cannot place it on a GPU that is required.
        """
        if self.resources is None:
            return index, faiss.ParameterSpace()
        options = faiss.GpuClonerOptions()
        options.useFloat16 = self.float16
        try:
            return faiss.index_cpu_to_gpu(self.resources, 0, index, options), faiss.GpuParameterSpace()
        except RuntimeError as error:
            reason = faiss_reason(error)
        if self.required:
            raise ValueError(f"retrieval.device gpu: no place on the GPU ({reason}); set auto or cpu")
        log.warning("a shard is searched on the CPU: no place on the GPU (%s)", reason)
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
