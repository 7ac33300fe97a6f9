"""Chooses the device of FAISS, a CPU or a GPU that vLLM may share, and sets search parameters."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import faiss

from pipeline.config.loading import parse_search
from pipeline.config.sections import RetrievalConfig
from pipeline.gpus import decide_gpu_use, get_assigned_gpus
from pipeline.retrieval.manifest import IndexManifest
from pipeline.retrieval.selected_search import needs_selection
from pipeline.retrieval.shard_files import create_empty_index, extract_faiss_message

log = logging.getLogger(__name__)

# FAISS's working memory on a GPU, in bytes. Its own default takes up to 1.5 GiB for each set of resources.
WORKING_BYTES = 512 << 20
# Bytes left free for the CUDA context of vLLM's process, which starts after the index has been placed.
RESERVED_BYTES = 1 << 30
# Shared memory of a CUDA block, in bytes. A product quantizer's tables, 256 numbers per subquantizer, must fit into it.
SHARED_MEMORY = 48 << 10
# FAISS pads inverted lists on GPUs to a multiple of this many vectors.
LIST_PADDING = 32
# A killed actor's engine is assumed to have released all its memory once free memory has not grown for this long.
RELEASE_SECONDS = 5.0
GB = 1e9


def supports_gpu(index: Any, float16: bool) -> bool:
    """Whether FAISS supports this kind of index on GPUs: flat, or IVF with flat, scalar or product codes.

    Args:
        index: a FAISS index; it may be empty.
        float16: whether the tables of product quantizers are in half precision.
    """
    kind = faiss.downcast_index(index)
    if isinstance(kind, faiss.IndexPreTransform):
        return supports_gpu(kind.index, float16)
    if isinstance(kind, faiss.IndexIVFPQ):
        tables = kind.pq.M * kind.pq.ksub * (2 if float16 else 4)
        return type(kind) is faiss.IndexIVFPQ and kind.pq.nbits == 8 and tables <= SHARED_MEMORY
    if isinstance(kind, faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer):
        return isinstance(faiss.downcast_index(kind.quantizer), faiss.IndexFlat)
    return isinstance(kind, faiss.IndexFlat)


def check_gpu_support(manifest: IndexManifest, float16: bool) -> None:
    """Reject an index that FAISS cannot search on GPUs.

    Raises:
        ValueError: FAISS does not support the index on GPUs; the message names its factory string.
    """
    if not supports_gpu(create_empty_index(manifest.factory, manifest.dimension), float16):
        raise ValueError(
            f"FAISS does not support {manifest.factory} on GPUs: set retrieval.device=cpu, or use another factory"
        )


def estimate_gpu_bytes(manifest: IndexManifest, numbers: list[int], float16: bool) -> int:
    """Estimate the bytes that shards take on a GPU, including FAISS's working memory.

    Vectors take as much as on disk; inverted lists are padded in addition. With half precision ``Flat`` vectors take
    half as much, but the conversion temporarily needs 1.5 times the size of the largest shard on disk.
    """
    stored = [manifest.shards[number].bytes for number in numbers]
    index = create_empty_index(manifest.factory, manifest.dimension)
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        padding = ivf.nlist * LIST_PADDING // 2 * ivf.code_size
        return sum(stored) + len(stored) * padding + WORKING_BYTES
    if float16 and isinstance(index, faiss.IndexFlat):
        return sum(stored) // 2 + 3 * max(stored, default=0) // 2 + WORKING_BYTES
    return sum(stored) + WORKING_BYTES


@dataclass(frozen=True)
class CardMemory:
    """The memory of a GPU, and the part of it that an index may take in addition to an engine.

    Attributes:
        free, total: free bytes at the time of reading, and all bytes of the GPU.
        share: share of the GPU that belongs to this process.
        engine: ``gpu_memory_utilization`` of this process's vLLM engine, which starts after the index has been placed;
            0 without an engine.
    """

    free: int
    total: int
    share: float = 1.0
    engine: float = 0.0

    @property
    def budget(self) -> int:
        """Bytes that this process's share of the GPU leaves for the index, whatever is free now."""
        return int(self.total * (self.share - self.engine)) - RESERVED_BYTES

    @property
    def left(self) -> int:
        """Bytes that the index may take now: the budget, or less if too little memory is free."""
        return min(self.budget, self.free - int(self.total * self.engine) - RESERVED_BYTES)

    def check(self, needed: int) -> None:
        """Reject an index that does not fit.

        Args:
            needed: bytes that the index takes.

        Raises:
            ValueError: the index does not fit; the message gives the needed and the remaining memory.
        """
        if needed > self.left:
            raise ValueError(
                f"the index needs {needed / GB:.1f} GB on the GPU, but {max(self.left, 0) / GB:.1f} GB are left: of "
                f"{self.total / GB:.1f} GB, {self.free / GB:.1f} GB are free, this process may use {self.share:g}, "
                f"and vLLM takes {self.engine:g}; set retrieval.device=cpu, lower model.engine.gpu_memory_utilization, "
                "choose a smaller factory, or retrieval.topology=partitioned"
            )


def read_memory(engine_share: float) -> CardMemory:
    """Read the memory of the GPU that this process searches on."""
    import torch

    free, total = torch.cuda.mem_get_info()
    assigned = get_assigned_gpus()
    return CardMemory(free, total, assigned.share if assigned else 1.0, engine_share)


def await_memory(needed: int, engine_share: float) -> None:
    """Wait until the GPU has room for an index, since a killed predecessor of this actor may still occupy memory.

    Raises:
        ValueError: the index exceeds the budget, or free memory has stopped growing before the index fits; the message
            gives the needed and the remaining memory.
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
    """Whether FAISS can use a GPU; checks PyTorch first, since FAISS aborts the process if the driver is too old."""
    import torch

    # The CPU build of FAISS lacks all names of its GPU classes.
    return hasattr(faiss, "StandardGpuResources") and torch.cuda.is_available() and faiss.get_num_gpus() > 0


@dataclass(frozen=True)
class Device:
    """The device that the shards of one process are searched on.

    Attributes:
        resources: FAISS's GPU resources, shared by all shards since each such object allocates its own working memory;
            None on the CPU.
        float16: half precision on the GPU, as ``retrieval.float16``.
        required: whether failing to place a shard on the GPU is an error; otherwise it is searched on the CPU.
    """

    resources: Any | None
    float16: bool = False
    required: bool = False

    @classmethod
    def choose(
        cls, retrieval: RetrievalConfig, manifest: IndexManifest, numbers: list[int], engine_share: float
    ) -> "Device":
        """Choose the device as ``retrieval.device`` requires.

        Args:
            numbers: numbers of the shards to be placed on the device.
            engine_share: share of the GPU's memory for vLLM, as ``engine`` of :class:`CardMemory`.

        Raises:
            ValueError: ``retrieval.device`` is ``gpu``, but there is no GPU, FAISS does not support the index on GPUs,
                or too little memory is left.
        """
        if not decide_gpu_use(retrieval.device):
            return cls(None)
        required = retrieval.device == "gpu"
        if needs_selection(manifest, retrieval):
            return cls(None)  # FAISS cannot leave out passages on GPUs; a required one is refused before the run
        if not has_gpu():
            if required:
                raise ValueError("retrieval.device gpu: FAISS finds no GPU; install the gpu extra, or set auto or cpu")
            return cls(None)
        try:
            check_gpu_support(manifest, retrieval.float16)
            await_memory(estimate_gpu_bytes(manifest, numbers, retrieval.float16), engine_share)
        except ValueError as error:
            if required:
                raise
            log.warning("the index is searched on the CPU: %s", error)
            return cls(None)
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(WORKING_BYTES)
        return cls(resources, retrieval.float16, required)

    def place(self, index: Any) -> tuple[Any, Any]:
        """Place an index on this device.

        Returns:
            The placed index, and the FAISS parameter space for its device.

        Raises:
            ValueError: the GPU is required, and FAISS cannot place the index on it.
        """
        if self.resources is None:
            return index, faiss.ParameterSpace()
        options = faiss.GpuClonerOptions()
        options.useFloat16 = self.float16
        try:
            return faiss.index_cpu_to_gpu(self.resources, 0, index, options), faiss.GpuParameterSpace()
        except RuntimeError as error:
            reason = extract_faiss_message(error)
        if self.required:
            raise ValueError(f"retrieval.device gpu: a shard cannot be placed on the GPU ({reason}); set auto or cpu")
        log.warning("a shard is searched on the CPU: it cannot be placed on the GPU (%s)", reason)
        return index, faiss.ParameterSpace()


def set_search(index: Any, space: Any, search: str) -> None:
    """Set search parameters on an index.

    Args:
        index: a FAISS index.
        space: FAISS's ``ParameterSpace`` for the device of the index.
        search: parameters, as in ``retrieval.search``.

    Raises:
        ValueError: the index has no such parameter.
    """
    for name, value in parse_search(search).items():
        try:
            space.set_index_parameter(index, name, value)
        except RuntimeError:
            kind = type(faiss.downcast_index(index)).__name__
            raise ValueError(f"retrieval.search {search}: a {kind} has no parameter {name}; leave it out") from None
