"""Spread work over the machines of a cluster before a run begins."""

import functools
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.cluster import connect, find_address
from pipeline.config.sections import ExecutionConfig, StorageConfig
from pipeline.nodes.access import Access, Packed
from pipeline.nodes.environment import Environment
from pipeline.storage.location import Location, join_lines
from pipeline.storage.parquet import map_in_threads

Found = TypeVar("Found")
Result = TypeVar("Result")

log = logging.getLogger(__name__)

# Seconds without a result after which a warning says so.
PATIENCE_S = 60.0
# Tasks given to Ray for each CPU of the cluster: the next one waits where the last one ends.
TASKS_PER_CPU = 2


@dataclass(frozen=True)
class ClusterSpread:
    """Maps functions over files in Ray tasks on all machines, in the environment of the driver.

    Attributes:
        execution: address of the cluster.
    """

    execution: ExecutionConfig

    @classmethod
    def of(cls, execution: ExecutionConfig) -> "ClusterSpread | None":
        """Return the spread over a cluster that is running; None if the run starts Ray itself."""
        return None if find_address(execution) == "local" else cls(execution)

    def __call__(
        self, work: Callable[[Location], Found], files: Sequence[Location], then: Callable[[Found], Result]
    ) -> list[Result]:
        """Call ``work`` for each file on any machine, and ``then`` for each result in this process.

        While only one machine is there, it does the work.

        Args:
            work: function that can be pickled.
            files: files, which carry the access to their store.
            then: reduces a result, so that only a few whole ones are in memory.

        Returns:
            What ``then`` has returned, in the order of the files.

        Raises:
            Exception: what ``work`` raises.
            RuntimeError: machines were lost again and again.
        """
        import ray

        connect(self.execution)
        if sum(node["Alive"] for node in ray.nodes()) == 1:
            return map_in_threads(lambda file: then(work(file)), files)
        access = Access((), None, StorageConfig(), Environment.read())
        task = ray.remote(num_cpus=1)(_work_on)
        room = TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 0)))
        results: dict[str, Result] = {}
        running: dict[Any, Location] = {}
        waiting = list(reversed(files))
        while waiting or running:
            while waiting and len(running) < room:
                file = waiting.pop()
                running[task.remote(Packed.pack(functools.partial(work, file), access))] = file
            done = _await_task(running)
            file = running.pop(done)
            results[file.uri] = then(_get_result(done, file))
        return [results[file.uri] for file in files]


def _await_task(running: Collection[Any]) -> Any:
    import ray

    while not (done := ray.wait(list(running), timeout=PATIENCE_S)[0]):
        log.warning("no task has ended for %.0f s; are the CPUs of the cluster in use? (ray status)", PATIENCE_S)
    return done[0]


def _get_result(task: Any, file: Location) -> Any:
    import ray

    try:
        found, error = ray.get(task)
    except ray.exceptions.RayError as lost:
        raise RuntimeError(f"{file.uri}: reading it on the cluster failed: {join_lines(lost)}") from lost
    if error is not None:
        raise error
    return found


def _work_on(content: Packed[Callable[[], Any]]) -> tuple[Any, Exception | None]:
    # Ray would wrap what is raised, and print the errors of all other tasks when the first one ends the work.
    try:
        return content.unpack()(), None
    except Exception as error:  # noqa: BLE001  raised by the driver
        return None, error
