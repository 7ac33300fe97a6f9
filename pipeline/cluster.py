"""Ray: connecting, and the resources that an actor asks for."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Self

from pipeline.config.run import RunConfig
from pipeline.config.sections import ExecutionConfig
from pipeline.engine.arguments import gpu_share, replica_gpus

# Share of a card that the CUDA contexts of an actor and of its engine take beside vLLM's own share, with room to spare.
CONTEXTS = 0.05
# Ray counts resources in ten-thousandths, so three actors of 0.3333 fill a card.
ROUNDING = 1e-4


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one actor gets, and where the shard servers beside the actors go.

    Attributes:
        servers: for each of them the id of its node; None leaves that to Ray.
    """

    cpus: float
    gpus: float
    servers: tuple[str | None, ...] = ()

    def lines(self) -> list[str]:
        """The same in words."""
        servers = [f"shards   {len(self.servers)} shard server(s) beside the actors"] if self.servers else []
        return [f"actors   {self.cpus:g} CPUs and {self.gpus:g} GPUs each", *servers]


def connect(execution: ExecutionConfig) -> None:
    """Connect to a cluster (``ray_address``, ``RAY_ADDRESS``), or start Ray in this process.

    Left alone, ``ray.init`` joins whatever Ray runs on the machine, such as another run's, and ends with it.
    """
    import ray

    if not ray.is_initialized():
        address = execution.ray_address or os.environ.get("RAY_ADDRESS") or "local"
        ray.init(address=address, include_dashboard=False, logging_level="WARNING")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


# A line of a traceback that says what was raised.
_RAISED = re.compile(r"^(?P<kind>[A-Za-z_][\w.]*(?:Error|Exception)): (?P<message>.+)$", re.MULTILINE)

# What Ray puts around an error.
_WRAPPERS = ("ray.exceptions.RayTaskError", "ray.exceptions.UserCodeException")


def reason(error: BaseException) -> str:
    """What went wrong, in one line.

    Ray puts a worker's whole traceback into the message, the first error first, and advice of its own behind it.
    """
    text = re.sub(r"\x1b\[\d+m", "", str(error)).strip() or repr(error)
    found = list(_RAISED.finditer(text))
    theirs = [match for match in found if match["kind"] not in _WRAPPERS]
    raised = [match for match in found if not match["kind"].startswith("ray.")] or theirs
    if not raised:
        return text.splitlines()[-1].strip()
    # Our own errors say what to do, and stand behind what they were made of.
    first = next((match for match in raised if match["kind"].startswith("pipeline.")), raised[0])
    kind, message = first["kind"], first["message"].strip()
    ours = kind == "ValueError" or kind.startswith("pipeline.")
    return message if ours else f"{kind}: {message}"


@dataclasses.dataclass(frozen=True)
class Room:
    """The resources that a node has left.

    Attributes:
        cpus: CPUs.
        cards: free share of each GPU.
    """

    cpus: float
    cards: tuple[float, ...] = ()

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Self:
        """Read a node's ``Resources``, as ``ray.nodes`` lists them."""
        return cls(resources.get("CPU", 0.0), (1.0,) * int(resources.get("GPU", 0)))

    def count(self, cpus: float, gpus: float) -> float:
        """Count the actors that fit: a share of a GPU must fit on one card, whole GPUs must be untouched."""
        by_cpus = math.floor(self.cpus / cpus + ROUNDING) if cpus else math.inf
        if not gpus:
            return by_cpus
        if gpus < 1:
            return min(by_cpus, sum(math.floor(card / gpus + ROUNDING) for card in self.cards))
        return min(by_cpus, self.cards.count(1.0) // math.ceil(gpus))

    def without(self, cpus: float, gpus: float) -> Self:
        """Take an actor's resources away, which must fit; a share comes from the fullest card with room, as in Ray."""
        cards = sorted(self.cards)
        if 0 < gpus < 1:
            card = next(n for n, free in enumerate(cards) if free + ROUNDING >= gpus)
            cards[card] = max(0.0, cards[card] - gpus)
        elif gpus:
            cards[-math.ceil(gpus) :] = [0.0] * math.ceil(gpus)
        return dataclasses.replace(self, cpus=self.cpus - cpus, cards=tuple(cards))


def actor_resources(config: RunConfig, shards: int) -> Resources:
    """Find the CPUs and GPUs of each actor: as configured, otherwise a fair share of the nodes that are up.

    Where both are configured nothing is compared with the nodes: an autoscaler may still bring them.

    Args:
        shards: of the index; 0 where none is searched.

    Raises:
        ValueError: the settings contradict each other, or the cluster's nodes do not hold all actors.
    """
    import ray

    execution = config.execution
    alive = [node for node in ray.nodes() if node["Alive"]]
    rooms = [Room.of(node["Resources"]) for node in alive]
    gpus = actor_gpus(rooms, config)
    servers = server_count(rooms, config, shards)
    if shards:
        check_device(config, gpus, servers)
    check_sharing(config, gpus)
    if execution.cpus_per_actor is not None and execution.gpus_per_actor is not None:
        return Resources(execution.cpus_per_actor, gpus, (None,) * servers)
    left, homes = beside_servers(rooms, execution, servers)
    return dataclasses.replace(share_of(left, config, gpus), servers=tuple(alive[home]["NodeID"] for home in homes))


def actor_gpus(rooms: Sequence[Room], config: RunConfig) -> float:
    """Find the GPUs of an actor: those of a replica, all on one node; 0 where the engine runs on CPUs.

    Raises:
        ValueError: ``execution.gpus_per_actor`` is neither that, nor a share of one card, nor 0.
    """
    asked, needed = config.execution.gpus_per_actor, replica_gpus(config.model)
    if asked is None:
        return float(needed) if any(room.cards for room in rooms) else 0.0
    if asked in (0, needed) or (asked < 1 and needed == 1):
        return asked
    raise ValueError(
        f"execution.gpus_per_actor is {asked:g}, but a replica of the model takes {needed} GPU(s) "
        f"(tensor × pipeline × data parallel); set it to {needed}"
        + (", or below 1 to share a GPU" if needed == 1 else "")
    )


def check_device(config: RunConfig, gpus: float, servers: int) -> None:
    """Refuse to require a GPU for a search whose process gets none.

    Args:
        gpus: of an actor.
        servers: shard servers of the run.

    Raises:
        ValueError: says what to set.
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
    """Refuse engines that would take more of a card's memory than their actors have of the card.

    vLLM starts only where its whole share is free, beside everything that is on the card already.

    Args:
        gpus: of an actor.

    Raises:
        ValueError: names the settings, with the sum that is wrong.
    """
    if not 0 < gpus < 1:
        return
    if gpus <= CONTEXTS:
        raise ValueError(
            f"execution.gpus_per_actor is {gpus:g}, and an actor's processes need {CONTEXTS:g}; set it higher"
        )
    engine, most = gpu_share(config.model), gpus - CONTEXTS
    if engine > most + ROUNDING:
        raise ValueError(
            f"execution.gpus_per_actor is {gpus:g}, but the engine takes {engine:g} of the GPU's memory and its "
            f"processes {CONTEXTS:g} ({engine:g} + {CONTEXTS:g} = {engine + CONTEXTS:g}); set "
            f"model.engine.gpu_memory_utilization to {most:.2f} or less"
        )


def server_count(rooms: Sequence[Room], config: RunConfig, shards: int) -> int:
    """Count a run's shard servers: as configured, otherwise one for each node with CPUs; at most one for each shard."""
    if config.retrieval.topology == "local":
        return 0
    nodes_with_cpus = sum(1 for room in rooms if room.cpus)
    return min(config.execution.shard_servers or max(1, nodes_with_cpus), shards)


def beside_servers(rooms: Sequence[Room], execution: ExecutionConfig, servers: int) -> tuple[list[Room], list[int]]:
    """Spread the servers over the nodes; returns the room that is left, and the place of each server's node.

    Raises:
        ValueError: the nodes do not hold them.
    """
    left, homes = list(rooms), list[int]()
    cpus, gpus = execution.cpus_per_server, execution.gpus_per_server
    for _ in range(servers):
        fitting = [n for n, room in enumerate(left) if room.count(cpus, gpus) >= 1]
        if not fitting:
            raise ValueError(
                f"{servers} shard servers, each with {cpus:g} CPUs and {gpus:g} GPUs, do not fit on the cluster's "
                f"{len(rooms)} node(s); set execution.shard_servers, cpus_per_server or gpus_per_server lower"
            )
        home = min(fitting, key=lambda n: (homes.count(n), -left[n].cpus))
        homes.append(home)
        left[home] = left[home].without(cpus, gpus)
    return left, homes


def share_of(rooms: Sequence[Room], config: RunConfig, gpus: float) -> Resources:
    """Find the CPUs of each actor on nodes with this room, beside its GPUs.

    Raises:
        ValueError: the nodes do not hold all actors.
    """
    execution = config.execution
    cpus = execution.cpus_per_actor or most_cpus(rooms, execution.actors, gpus)
    count = sum(room.count(cpus, gpus) for room in rooms)
    if count < execution.actors:
        raise ValueError(
            f"execution.actors is {execution.actors}, each with {cpus:g} CPUs and {gpus:g} GPUs, and the cluster's "
            f"{len(rooms)} node(s) hold {count:g}; lower execution.actors or what each gets, or set both "
            "execution.cpus_per_actor and execution.gpus_per_actor if an autoscaler will bring more nodes"
        )
    return Resources(cpus, gpus)


def most_cpus(rooms: Sequence[Room], actors: int, gpus: float) -> float:
    """Find the most whole CPUs that each of some actors can have; 1 where the nodes do not hold so many actors."""
    largest = int(max(room.cpus for room in rooms))
    fitting = (c for c in range(largest, 1, -1) if sum(room.count(c, gpus) for room in rooms) >= actors)
    return float(next(fitting, 1))
