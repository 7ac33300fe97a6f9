"""The GPUs that this process may use: those that Ray assigned to it.

The GPUs that CUDA lists do not count. Ray 2.60 hides no GPU from an actor that requested none
(``RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO``), so such an actor could take memory that an engine relies on.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AssignedGpus:
    """The GPUs of a Ray task or actor.

    Attributes:
        ids: Ray's ids of the GPUs, sorted.
        amount: requested number of GPUs; below 1 it is a share of one GPU.
    """

    ids: tuple[str, ...]
    amount: float

    @property
    def share(self) -> float:
        """Share of each GPU that belongs to this process."""
        return min(self.amount, 1.0)


def get_assigned_gpus() -> AssignedGpus | None:
    """Return the GPUs that Ray assigned to this task or actor; None outside of both."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.get_task_id() is None and context.get_actor_id() is None:
        return None  # the driver
    ids = tuple(sorted(context.get_accelerator_ids()["GPU"]))
    return AssignedGpus(ids, float(context.get_assigned_resources().get("GPU", len(ids))))


def decide_gpu_use(device: str) -> bool:
    """Whether this process may use a GPU; outside of Ray tasks and actors, it may unless ``device`` is ``cpu``.

    Args:
        device: ``auto``, ``cpu`` or ``gpu``, as ``retrieval.device``.

    Raises:
        ValueError: a GPU is required, and Ray assigned none to this process.
    """
    if device == "cpu":
        return False
    assigned = get_assigned_gpus()
    if assigned is None or assigned.ids:
        return True
    if device == "gpu":
        raise ValueError(
            "retrieval.device is gpu, but Ray assigned no GPU to this process: set execution.gpus_per_actor "
            "(execution.gpus_per_server for shard servers) above 0, or retrieval.device to auto or cpu"
        )
    return False


@contextmanager
def lock_gpus() -> Iterator[None]:
    """Hold a lock on each assigned GPU while the body allocates memory there; calls cannot be nested.

    vLLM measures free memory before and after it profiles a model. It fails or takes too much memory if another process
    allocates or frees memory in between (vllm-project/vllm#9198).
    """
    assigned = get_assigned_gpus()
    numbers = assigned.ids if assigned else ()
    with ExitStack() as locks:
        for number in numbers:
            locks.enter_context(_acquire_lock(number))
        yield


def _acquire_lock(number: str) -> AbstractContextManager[Any]:
    """Take the lock of a GPU; the operating system releases it when this process ends in any way."""
    name = f"selfrag-{os.getuid()}-gpu-{number.replace('/', '-')}.lock"
    lock = filelock.FileLock(Path(tempfile.gettempdir()) / name)
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("waiting for GPU %s, where another process is starting", number)
        return lock.acquire()
