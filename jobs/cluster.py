"""Ray: connecting, and what an actor may ask for."""

import math
from dataclasses import dataclass

from pipeline.config import ExecutionConfig, RunConfig


@dataclass(frozen=True)
class Resources:
    """What one actor gets."""

    cpus: float
    gpus: float


def connect(execution: ExecutionConfig) -> None:
    """Connect to a cluster (``ray_address``, ``RAY_ADDRESS``), or start Ray in this process."""
    import ray

    if not ray.is_initialized():
        ray.init(address=execution.ray_address, include_dashboard=False, logging_level="WARNING")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None  # Ray Data would cut a large unit in two, and a unit is one file


def actor_resources(config: RunConfig) -> Resources:
    """CPUs and GPUs of each actor: as configured, otherwise a fair share of the nodes that are up.

    Where both are configured nothing is compared with the nodes: an autoscaler may still bring them.

    Raises:
        ValueError: the cluster's nodes do not hold all actors.
    """
    import ray

    execution = config.execution
    if execution.cpus_per_actor is not None and execution.gpus_per_actor is not None:
        return Resources(execution.cpus_per_actor, execution.gpus_per_actor)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return share_of(nodes, config)


def share_of(nodes: list[dict[str, float]], config: RunConfig) -> Resources:
    """CPUs and GPUs of each actor on nodes with these resources.

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
