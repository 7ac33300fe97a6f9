"""Connects to Ray, and divides the cluster's CPUs and GPUs among actors and shard servers."""

import dataclasses
import math
import os
import re
import signal
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pipeline.config.paths import is_writable
from pipeline.config.run import RunConfig
from pipeline.config.sections import ExecutionConfig
from pipeline.engine.arguments import count_replica_gpus, get_gpu_share

# Share of a GPU, with some margin, for the CUDA contexts of an actor and of its engine in addition to vLLM's share.
CONTEXTS = 0.05
# Ray counts resources in ten-thousandths, so three actors of 0.3333 fill a GPU.
ROUNDING = 1e-4
# Longest path of a socket on Linux, in bytes (man 7 unix).
SOCKET_BYTES = 107


@dataclasses.dataclass(frozen=True)
class Resources:
    """The resources of each actor, and the placement of the shard servers.

    Attributes:
        cpus: CPUs of each actor.
        gpus: GPUs of each actor; below 1 it is a share of one GPU.
        servers: Ray node id for each shard server; None lets Ray choose the node.
    """

    cpus: float
    gpus: float
    servers: tuple[str | None, ...] = ()

    def describe(self) -> list[str]:
        """Describe the resources, one line for the actors and one for the shard servers, if any."""
        lines = [f"actors   {self.cpus:g} CPUs and {self.gpus:g} GPUs each"]
        if self.servers:
            lines.append(f"shards   {len(self.servers)} shard server(s) in addition to the actors")
        return lines


def connect(execution: ExecutionConfig) -> None:
    """Connect to the cluster at ``ray_address`` or ``RAY_ADDRESS``; without either, start a local Ray instance.

    Without an address, ``ray.init`` would join any Ray instance on the machine, such as another run's, and end with it.
    """
    import ray

    if not ray.is_initialized():
        address = find_address(execution)
        if address == "local":
            check_temporary_folders()
        with _keep_sigterm_handler():
            ray.init(address=address, include_dashboard=False, logging_level="WARNING")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def find_address(execution: ExecutionConfig) -> str:
    """Return the address of the cluster; ``local`` if the run starts Ray itself."""
    return execution.ray_address or os.environ.get("RAY_ADDRESS") or "local"


def check_temporary_folders() -> None:
    """Check that a local Ray instance and its engines can create files and sockets in their temporary folders.

    Raises:
        ValueError: the folder is read-only, or paths of sockets are too long; the message names the variables to set.
    """
    # https://docs.ray.io/en/latest/ray-core/configure.html: Ray prefers RAY_TMPDIR.
    session = f"/ray/session_2026-01-31_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    ray_folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108
    if not is_writable(Path(ray_folder).absolute() / "ray"):
        raise ValueError(
            f"temporary folder {ray_folder}: Ray cannot write to ray in it; set TMPDIR and RAY_TMPDIR to another one"
        )
    for folder, socket in ((ray_folder, session), (tempfile.gettempdir(), f"/{uuid.UUID(int=0)}")):
        excess = len(os.fsencode(folder)) + len(socket) - SOCKET_BYTES
        if excess > 0:
            raise ValueError(
                f"temporary folder {folder}: its path is {excess} bytes too long for the sockets of Ray and vLLM; set "
                "TMPDIR and RAY_TMPDIR to a folder with a short path, such as /tmp"
            )


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Keep this program's handler of SIGTERM while the body starts Ray, whose own handlers abort the process.

    A signal that arrives meanwhile is handled at the end of the body: Ray may swallow the exception of a handler.
    """
    handler = signal.getsignal(signal.SIGTERM)
    # A program without one keeps Ray's, which Ray sets in the main thread only.
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    received, noting = os.pipe()
    os.set_blocking(noting, False)
    before, numbers = signal.set_wakeup_fd(noting), list[int]()
    forwarding = threading.Thread(target=_forward_signals, args=(received, before, numbers), daemon=True)
    forwarding.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, handler)
        os.write(noting, b"\0")
        forwarding.join()
        os.close(noting)
        os.close(received)
        if signal.SIGTERM in numbers:
            signal.alarm(0)  # with which Ray's handler would abort the process after three seconds
            handler(signal.SIGTERM, None)


def _forward_signals(received: int, before: int, numbers: list[int]) -> None:
    """Note the numbers of signals until a 0, and pass them on to the program's own wakeup file descriptor, if any."""
    while number := os.read(received, 1)[0]:
        numbers.append(number)
        if before >= 0:
            os.write(before, bytes([number]))


# The line of a traceback that names the exception and its message.
_RAISED = re.compile(r"^(?P<kind>[A-Za-z_][\w.]*(?:Error|Exception)): (?P<message>.+)$", re.MULTILINE)

# Exceptions that Ray wraps around the original one.
_WRAPPERS = ("ray.exceptions.RayTaskError", "ray.exceptions.UserCodeException")


def extract_cause(error: BaseException) -> str:
    """Return the cause of an error in one line.

    Ray's messages contain the worker's whole traceback, the original error first, followed by Ray's own advice.
    """
    text = re.sub(r"\x1b\[\d+m", "", str(error)).strip() or repr(error)
    found = list(_RAISED.finditer(text))
    theirs = [match for match in found if match["kind"] not in _WRAPPERS]
    raised = [match for match in found if not match["kind"].startswith("ray.")] or theirs
    if not raised:
        return text.splitlines()[-1].strip()
    # Errors of this project give advice; in a traceback they follow the exceptions that caused them.
    first = next((match for match in raised if match["kind"].startswith("pipeline.")), raised[0])
    kind, message = first["kind"], first["message"].strip()
    ours = kind == "ValueError" or kind.startswith("pipeline.")
    return message if ours else f"{kind}: {message}"


@dataclasses.dataclass(frozen=True)
class Room:
    """The free resources of a node.

    Attributes:
        cpus: free CPUs.
        cards: free share of each GPU.
    """

    cpus: float
    cards: tuple[float, ...] = ()

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Self:
        """Return the room of an empty node from its ``Resources`` in ``ray.nodes``."""
        return cls(resources.get("CPU", 0.0), (1.0,) * int(resources.get("GPU", 0)))

    def count(self, cpus: float, gpus: float) -> float:
        """Count the actors that fit: a share of a GPU must fit on one GPU; whole GPUs must be entirely free."""
        by_cpus = math.floor(self.cpus / cpus + ROUNDING) if cpus else math.inf
        if not gpus:
            return by_cpus
        if gpus < 1:
            return min(by_cpus, sum(math.floor(card / gpus + ROUNDING) for card in self.cards))
        return min(by_cpus, self.cards.count(1.0) // math.ceil(gpus))

    def subtract(self, cpus: float, gpus: float) -> Self:
        """Subtract the resources of an actor, which must fit.

        A share of a GPU comes from the fullest GPU with enough room, as in Ray.
        """
        cards = sorted(self.cards)
        if 0 < gpus < 1:
            card = next(n for n, free in enumerate(cards) if free + ROUNDING >= gpus)
            cards[card] = max(0.0, cards[card] - gpus)
        elif gpus:
            cards[-math.ceil(gpus) :] = [0.0] * math.ceil(gpus)
        return dataclasses.replace(self, cpus=self.cpus - cpus, cards=tuple(cards))


def allocate_resources(config: RunConfig, shards: int) -> Resources:
    """Compute the CPUs and GPUs of each actor: as configured, otherwise a fair share of the live nodes.

    If both are configured, nothing is checked against the nodes, since an autoscaler may still add some.

    Args:
        shards: number of shards of the index; 0 if no index is searched.

    Raises:
        ValueError: the settings contradict each other, or the actors and shard servers do not fit on the nodes.
    """
    import ray

    execution = config.execution
    alive = [node for node in ray.nodes() if node["Alive"]]
    rooms = [Room.of(node["Resources"]) for node in alive]
    gpus = choose_actor_gpus(rooms, config)
    servers = count_servers(rooms, config, shards)
    if shards:
        check_device(config, gpus, servers)
    check_sharing(config, gpus)
    if execution.cpus_per_actor is not None and execution.gpus_per_actor is not None:
        return Resources(execution.cpus_per_actor, gpus, (None,) * servers)
    left, homes = place_servers(rooms, execution, servers)
    nodes = tuple(alive[home]["NodeID"] for home in homes)
    return dataclasses.replace(fit_actors(left, config, gpus), servers=nodes)


def choose_actor_gpus(rooms: Sequence[Room], config: RunConfig) -> float:
    """Return the GPUs of an actor: as configured, otherwise those of a replica, or 0 if no node has GPUs.

    Raises:
        ValueError: ``execution.gpus_per_actor`` is neither 0, nor the GPUs of a replica, nor, for a replica of one GPU,
            a share of it.
    """
    asked, needed = config.execution.gpus_per_actor, count_replica_gpus(config.model)
    if asked is None:
        return float(needed) if any(room.cards for room in rooms) else 0.0
    if asked in (0, needed) or (asked < 1 and needed == 1):
        return asked
    sharing = ", or below 1 to share a GPU" if needed == 1 else ""
    raise ValueError(
        f"execution.gpus_per_actor is {asked:g}, but a replica of the model takes {needed} GPU(s) "
        f"(tensor × pipeline × data parallel); set it to {needed}{sharing}"
    )


def check_device(config: RunConfig, gpus: float, servers: int) -> None:
    """Reject ``retrieval.device=gpu`` if the processes that need one get no GPU.

    Args:
        gpus: GPUs of an actor.
        servers: number of shard servers of the run.

    Raises:
        ValueError: the actors or the shard servers get no GPU; the message names the settings to change.
    """
    if config.retrieval.device != "gpu":
        return
    if not gpus:
        raise ValueError(
            "retrieval.device is gpu, but the actors get no GPU: the cluster has none, or execution.gpus_per_actor "
            "is 0; set retrieval.device to auto, or give them one"
        )
    if servers and not config.execution.gpus_per_server:
        raise ValueError(
            "retrieval.device is gpu, but execution.gpus_per_server is 0: set it above 0, or retrieval.device to auto"
        )


def check_sharing(config: RunConfig, gpus: float) -> None:
    """Reject an engine whose share of a GPU's memory exceeds its actor's share of the GPU.

    vLLM starts only if its whole share is free in addition to all memory already in use on the GPU.

    Args:
        gpus: GPUs of an actor; checked only if it is a share of one GPU.

    Raises:
        ValueError: the actor's share is too small; the message names the settings and the sum.
    """
    if not 0 < gpus < 1:
        return
    if gpus <= CONTEXTS:
        raise ValueError(
            f"execution.gpus_per_actor is {gpus:g}, but an actor's processes alone need {CONTEXTS:g}; increase it"
        )
    engine, most = get_gpu_share(config.model), gpus - CONTEXTS
    if engine > most + ROUNDING:
        raise ValueError(
            f"execution.gpus_per_actor is {gpus:g}, but the engine takes {engine:g} of the GPU's memory and its "
            f"processes {CONTEXTS:g} ({engine:g} + {CONTEXTS:g} = {engine + CONTEXTS:g}); set "
            f"model.engine.gpu_memory_utilization to {most:.2f} or less"
        )


def count_servers(rooms: Sequence[Room], config: RunConfig, shards: int) -> int:
    """Count the shard servers of a run: as configured, otherwise one per node with CPUs, and at most one per shard.

    The local topology has none.
    """
    if config.retrieval.topology == "local":
        return 0
    nodes_with_cpus = sum(1 for room in rooms if room.cpus)
    return min(config.execution.shard_servers or max(1, nodes_with_cpus), shards)


def place_servers(rooms: Sequence[Room], execution: ExecutionConfig, servers: int) -> tuple[list[Room], list[int]]:
    """Spread the shard servers evenly over the nodes.

    Returns:
        The room left on each node, and for each server the position of its node in ``rooms``.

    Raises:
        ValueError: the servers do not fit on the nodes.
    """
    left, homes = list(rooms), list[int]()
    cpus, gpus = execution.cpus_per_server, execution.gpus_per_server
    for _ in range(servers):
        fitting = [n for n, room in enumerate(left) if room.count(cpus, gpus) >= 1]
        if not fitting:
            raise ValueError(
                f"{servers} shard servers, each with {cpus:g} CPUs and {gpus:g} GPUs, do not fit on the cluster's "
                f"{len(rooms)} node(s); lower execution.shard_servers, cpus_per_server or gpus_per_server"
            )
        home = min(fitting, key=lambda n: (homes.count(n), -left[n].cpus))
        homes.append(home)
        left[home] = left[home].subtract(cpus, gpus)
    return left, homes


def fit_actors(rooms: Sequence[Room], config: RunConfig, gpus: float) -> Resources:
    """Compute the CPUs of each actor, given its GPUs and the room on the nodes.

    Raises:
        ValueError: the actors do not fit on the nodes.
    """
    execution = config.execution
    cpus = execution.cpus_per_actor or find_max_cpus(rooms, execution.actors, gpus)
    count = _count_fitting(rooms, cpus, gpus)
    if count < execution.actors:
        raise ValueError(
            f"execution.actors is {execution.actors}, each with {cpus:g} CPUs and {gpus:g} GPUs, but the cluster's "
            f"{len(rooms)} node(s) have room for {count:g}; lower execution.actors or the resources of each, or set "
            "both execution.cpus_per_actor and execution.gpus_per_actor if an autoscaler will add nodes"
        )
    return Resources(cpus, gpus)


def find_max_cpus(rooms: Sequence[Room], actors: int, gpus: float) -> float:
    """Return the maximum whole CPUs that each actor can have; 1 if the actors do not fit with more."""
    largest = int(max(room.cpus for room in rooms))
    for cpus in range(largest, 1, -1):
        if _count_fitting(rooms, cpus, gpus) >= actors:
            return float(cpus)
    return 1.0


def _count_fitting(rooms: Sequence[Room], cpus: float, gpus: float) -> float:
    """Count the actors that fit on the nodes together."""
    return sum(room.count(cpus, gpus) for room in rooms)
