import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
import ray

from pipeline.gpus import AssignedGpus, decide_gpu_use, get_assigned_gpus, lock_gpus


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray with two declared GPUs, in a process of its own: another test may have started one in this process."""
    was_running = ray.is_initialized()
    if was_running:
        ray.shutdown()
    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


class Probe:
    """Says what it may use."""

    def assigned(self) -> AssignedGpus | None:
        return get_assigned_gpus()

    def chosen(self, device: str) -> Any:
        try:
            return decide_gpu_use(device)
        except ValueError as error:
            return str(error)


def probe(gpus: float) -> Any:
    return ray.remote(num_cpus=0.1, num_gpus=gpus)(Probe).remote()


@pytest.mark.usefixtures("cluster")
def test_actor_uses_only_gpus_assigned_by_ray() -> None:
    actors = [probe(gpus) for gpus in (0, 0.5, 1)]
    none, half, one = ray.get([actor.assigned.remote() for actor in actors])
    assert none == AssignedGpus((), 0.0)
    assert (len(half.ids), half.amount, half.share) == (1, 0.5, 0.5)
    assert (len(one.ids), one.amount, one.share) == (1, 1.0, 1.0)
    assert ray.get([actor.chosen.remote("auto") for actor in actors]) == [False, True, True]
    assert ray.get([actor.chosen.remote("cpu") for actor in actors]) == [False, False, False]
    refusal, *accepted = ray.get([actor.chosen.remote("gpu") for actor in actors])
    assert "Ray assigned no GPU to this process: set execution.gpus_per_actor" in refusal
    assert accepted == [True, True]


@pytest.mark.usefixtures("cluster")
def test_driver_without_assignment_may_use_a_gpu() -> None:
    assert get_assigned_gpus() is None
    assert decide_gpu_use("auto")
    assert not decide_gpu_use("cpu")


def lock_file(number: str) -> Path:
    return Path(tempfile.gettempdir()) / f"selfrag-{os.getuid()}-gpu-{number}.lock"


def test_engine_starts_on_one_gpu_are_serialized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.gpus.get_assigned_gpus", lambda: AssignedGpus(("test/7", "test/8"), 2.0))
    with lock_gpus():
        for number in ("test-7", "test-8"):
            with pytest.raises(filelock.Timeout):
                filelock.FileLock(lock_file(number)).acquire(timeout=0.1)
    with filelock.FileLock(lock_file("test-7")).acquire(timeout=1):
        pass


_STARTS = """
    import sys, time
    import pipeline.gpus
    from pipeline.gpus import AssignedGpus, lock_gpus
    pipeline.gpus.get_assigned_gpus = lambda: AssignedGpus(("test-9",), 0.5)
    with lock_gpus():
        print("begins", flush=True)
        sys.stdin.read()
"""


def test_process_killed_during_start_releases_the_gpu_lock(caplog: pytest.LogCaptureFixture) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_STARTS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starting:
        assert starting.stdout is not None
        assert starting.stdout.readline() == "begins\n"
        waiting = filelock.FileLock(lock_file("test-9"))
        with pytest.raises(filelock.Timeout):
            waiting.acquire(timeout=0.1)
        starting.kill()
    with waiting.acquire(timeout=5):
        pass


def test_process_without_gpus_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    for assigned in (None, AssignedGpus((), 0.0)):
        monkeypatch.setattr("pipeline.gpus.get_assigned_gpus", lambda assigned=assigned: assigned)
        with lock_gpus():
            pass
