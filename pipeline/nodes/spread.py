"""Spread work over the machines of a cluster before a run begins."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.cluster import connect, find_address
from pipeline.config.sections import ExecutionConfig, StorageConfig
from pipeline.nodes.access import Access, Packed
from pipeline.nodes.environment import Environment
from pipeline.storage.location import join_lines
from pipeline.storage.parquet import map_in_threads

Item = TypeVar("Item")
Found = TypeVar("Found")
Result = TypeVar("Result")

log = logging.getLogger(__name__)

# Seconds without a result after which a warning says so.
PATIENCE_S = 60.0
# Tasks given to Ray for each CPU of the cluster: the next one waits where the last one ends.
TASKS_PER_CPU = 2


@dataclass(frozen=True)
class ClusterSpread:
    """Maps functions over items in Ray tasks on all machines, in the environment of the driver.

    Attributes:
        execution: address of the cluster.
    """

    execution: ExecutionConfig

    @classmethod
    def of(cls, execution: ExecutionConfig) -> "ClusterSpread | None":
        """Return the spread over a cluster that is running; None if the run starts Ray itself."""
        return None if find_address(execution) == "local" else cls(execution)

    def __call__(
        self, work: Callable[[Item], Found], items: Sequence[Item], then: Callable[[Found], Result]
    ) -> list[Result]:
        """Call ``work`` for each item on any machine, and ``then`` for each result in this process.

        Args:
            work: function that can be pickled.
            items: items that can be pickled; a location carries the access to its store.
            then: reduces a result, so that only a few whole ones are in memory.

        Returns:
            What ``then`` has returned, in the order of the items.

        Raises:
            Exception: what ``work`` raises.
            RuntimeError: machines were lost again and again.
        """
        import ray

        connect(self.execution)
        if sum(node["Alive"] for node in ray.nodes()) == 1:
            return map_in_threads(lambda item: then(work(item)), items)
        access = Access((), None, StorageConfig(), Environment.read())
        task = ray.remote(num_cpus=1)(_work_on)
        packed = [Packed.pack(functools.partial(work, item), access) for item in items]
        room = TASKS_PER_CPU * int(ray.cluster_resources().get("CPU", 1))
        results: dict[int, Result] = {}
        running: dict[Any, int] = {}
        for number, content in enumerate(packed):
            running[task.remote(content)] = number
            if len(running) >= room:
                _take_one(running, results, then)
        while running:
            _take_one(running, results, then)
        return [results[number] for number in range(len(items))]


def _take_one(running: dict[Any, int], results: dict[int, Any], then: Callable[[Any], Any]) -> None:
    import ray

    while not (done := ray.wait(list(running), timeout=PATIENCE_S)[0]):
        log.warning("no task has ended for %.0f s; are the CPUs of the cluster in use? (ray status)", PATIENCE_S)
    try:
        found, error = ray.get(done[0])
    except ray.exceptions.RayError as lost:
        raise RuntimeError(f"a task of the cluster failed: {join_lines(lost)}") from lost
    if error is not None:
        raise error
    results[running.pop(done[0])] = then(found)


def _work_on(content: Packed[Callable[[], Any]]) -> tuple[Any, Exception | None]:
    # Ray would wrap what is raised, and print the errors of all other tasks when the first one ends the work.
    try:
        return content.unpack()(), None
    except Exception as error:  # noqa: BLE001  raised by the driver
        return None, error
