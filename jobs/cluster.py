"""Ray: connecting, and what an actor may ask for."""

import dataclasses
import math
import os
import re

from pipeline.config import ExecutionConfig, RunConfig


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


def actor_resources(config: RunConfig, shards: int) -> Resources:
    """CPUs and GPUs of each actor: as configured, otherwise a fair share of the nodes that are up.

    Where both are configured nothing is compared with the nodes: an autoscaler may still bring them.

    Args:
        shards: of the index; 0 where none is searched.

    Raises:
        ValueError: the cluster's nodes do not hold all actors.
    """
    import ray

    execution = config.execution
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [node["Resources"] for node in alive]
    servers = server_count(nodes, config, shards)
    if execution.cpus_per_actor is not None and execution.gpus_per_actor is not None:
        return Resources(execution.cpus_per_actor, execution.gpus_per_actor, (None,) * servers)
    left, homes = beside_servers(nodes, execution, servers)
    return dataclasses.replace(share_of(left, config), servers=tuple(alive[home]["NodeID"] for home in homes))


def server_count(nodes: list[dict[str, float]], config: RunConfig, shards: int) -> int:
    """Shard servers of a run: as configured, otherwise one for each node that has CPUs; at most one for each shard."""
    if config.retrieval.topology == "local":
        return 0
    nodes_with_cpus = sum(1 for node in nodes if node.get("CPU"))
    return min(config.execution.shard_servers or max(1, nodes_with_cpus), shards)


def beside_servers(
    nodes: list[dict[str, float]], execution: ExecutionConfig, servers: int
) -> tuple[list[dict[str, float]], list[int]]:
    """What the nodes have left when the servers are spread over them, and the place of each server's node.

    Raises:
        ValueError: the nodes do not hold them.
    """
    left = [dict(node) for node in nodes]
    homes: list[int] = []
    needs = {"CPU": execution.cpus_per_server, "GPU": execution.gpus_per_server}
    for _ in range(servers):
        fitting = [n for n, node in enumerate(left) if all(node.get(name, 0.0) >= needs[name] for name in needs)]
        if not fitting:
            raise ValueError(
                f"{servers} shard servers, each with {execution.cpus_per_server:g} CPUs and "
                f"{execution.gpus_per_server:g} GPUs, do not fit on the cluster's {len(nodes)} node(s); set "
                "execution.shard_servers, cpus_per_server or gpus_per_server lower"
            )
        home = min(fitting, key=lambda n: (homes.count(n), -left[n].get("CPU", 0.0)))
        homes.append(home)
        left[home] |= {name: left[home].get(name, 0.0) - needs[name] for name in needs}
    return left, homes


def share_of(nodes: list[dict[str, float]], config: RunConfig) -> Resources:
    """CPUs and GPUs of each actor on nodes with these resources left.

    Raises:
        ValueError: they do not hold all actors.
    """
    execution = config.execution
    gpus = execution.gpus_per_actor
    if gpus is None:
        has_gpus = any(node.get("GPU", 0) for node in nodes)
        gpus = float(config.model.engine.get("tensor_parallel_size", 1)) if has_gpus else 0.0
    most_cpus = max(node.get("CPU", 0.0) for node in nodes)
    share = sum(node.get("CPU", 0.0) for node in nodes) / execution.actors
    cpus = execution.cpus_per_actor or max(1.0, math.floor(min(most_cpus, share)))
    room = sum(_room(node, cpus, gpus) for node in nodes)
    if room < execution.actors:
        raise ValueError(
            f"execution.actors is {execution.actors}, each with {cpus:g} CPUs and {gpus:g} GPUs, and the cluster's "
            f"{len(nodes)} node(s) hold {room}; lower it, or set both execution.cpus_per_actor and "
            "execution.gpus_per_actor if an autoscaler will bring more nodes"
        )
    return Resources(cpus, gpus)


def _room(node: dict[str, float], cpus: float, gpus: float) -> int:
    by_cpus = node.get("CPU", 0.0) // cpus
    return int(min(by_cpus, node.get("GPU", 0.0) // gpus) if gpus else by_cpus)
