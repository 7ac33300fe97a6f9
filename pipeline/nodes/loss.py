"""Asks Ray for the nodes of the cluster: where this process runs, and which nodes are lost."""

import ray

# Seconds after which Ray has noticed that a node is gone: five failed health checks, 3 s apart, and a margin. A process
# of the node that ended before the others may have been replaced by then.
NODE_LOSS_S = 30.0


def get_node() -> str:
    """Return the id of the node that this process runs on; empty outside of Ray."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def list_lost_nodes() -> frozenset[str]:
    """Return the ids of the nodes that are dead, or that are being drained: a spot machine about to be reclaimed."""
    return frozenset(node["NodeID"] for node in ray.nodes() if not node["Alive"]) | list_draining_nodes().keys()


def list_draining_nodes() -> dict[str, int]:
    """Return when each node that is being drained will be gone, in milliseconds since the epoch; 0 if unknown."""
    return dict(ray._private.state.state.get_draining_nodes())
