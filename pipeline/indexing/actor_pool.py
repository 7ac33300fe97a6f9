"""Maps the work of a build over a pool of Ray actors, with progress."""

import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.cluster import Room, find_max_cpus
from pipeline.indexing.build import BuildPlan
from pipeline.nodes.access import Packed

log = logging.getLogger(__name__)

# Seconds between the progress lines of the log.
LINE_INTERVAL = 10.0
# Retries of a shard whose process dies; after these, the build fails.
SHARD_RETRIES = 2


class BuildProgress:
    """A Ray actor that counts passages, for progress within long shards."""

    def __init__(self) -> None:
        self.rows = 0

    def add(self, rows: int) -> None:
        """Add passages to the count."""
        self.rows += rows

    def get_total(self) -> int:
        """Return the number of passages so far."""
        return self.rows


@contextmanager
def map_over_actors(
    plan: BuildPlan, worker: type, argument: Any, numbers: Iterable[int], passages: int, encodes: bool = True
) -> Iterator[Any]:
    """Map numbered work items over a pool of actors and yield the lazy Ray dataset of the results.

    While the body reads the dataset, progress lines are logged.

    Args:
        plan: plan of the build.
        worker: class of the actors; constructed with the packed plan, ``argument`` and the handle of a
            :class:`BuildProgress`.
        argument: second argument of the class.
        numbers: numbers of the work items.
        passages: total number of passages in all work items.
        encodes: whether the actors encode passages, on GPUs if there are any; otherwise each takes one CPU.
    """
    import ray

    pieces = list(numbers)
    rooms = [Room.of(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    choose = choose_pool if encodes else choose_cpu_pool
    actors, cpus, gpus = choose(rooms, plan.request.actors, len(pieces))
    log.info("starting %d actor(s), each with %g CPUs and %g GPUs", actors, cpus, gpus)
    tally = ray.remote(num_cpus=0)(BuildProgress).remote()
    dataset = ray.data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(
        worker,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        fn_constructor_args=[Packed.pack(plan, plan.access), argument, tally],
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=-1,
        max_task_retries=SHARD_RETRIES,
    )
    with log_progress(tally, passages):
        yield dataset


def choose_pool(rooms: Sequence[Room], asked: int | None, pieces: int) -> tuple[int, float, float]:
    """Choose the number of actors, and the CPUs and GPUs of each.

    With GPUs, the default is one actor per GPU, and more actors share the GPUs; without, it is one per machine.

    Args:
        rooms: resources of the nodes that are up.
        asked: requested number of actors; None for the default.
        pieces: number of work items, which limits the number of actors.

    Returns:
        Number of actors, CPUs of each, GPUs of each (at most 1).
    """
    machines = [room for room in rooms if room.cpus]
    gpus = sum(len(room.cards) for room in machines)
    actors = max(1, min(asked or gpus or len(machines), pieces))
    if not gpus:
        per_machine = math.ceil(actors / len(machines))
        return actors, max(1.0, min(room.cpus for room in machines) // per_machine), 0.0
    share = 1 / math.ceil(actors / gpus)
    return actors, find_max_cpus(machines, actors, share), share


def choose_cpu_pool(rooms: Sequence[Room], asked: int | None, pieces: int) -> tuple[int, float, float]:
    """Choose actors with one CPU and no GPU each, by default as many as there are CPUs, as :func:`choose_pool`."""
    cpus = sum(int(room.cpus) for room in rooms)
    return max(1, min(asked or cpus, pieces)), 1.0, 0.0


@contextmanager
def log_progress(tally: Any, passages: int) -> Iterator[None]:
    """Log progress, throughput and remaining time every ``LINE_INTERVAL`` seconds while the body runs."""
    import ray

    begun, over = time.monotonic(), threading.Event()

    def report() -> None:
        while not over.wait(LINE_INTERVAL):
            try:
                done = min(ray.get(tally.get_total.remote()), passages)  # retried work items count twice
            except ray.exceptions.RayError:
                return  # the actor's node is gone; the build continues without progress lines
            rate = done / (time.monotonic() - begun)
            left = f", {(passages - done) / rate:.0f} s left" if done else ""
            log.info("%d/%d passages, %.1f passages/s%s", done, passages, rate, left)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
