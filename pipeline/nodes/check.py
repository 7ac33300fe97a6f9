"""Check that every machine of a cluster reads the files of a run and writes to its output.

A local path is another folder on each machine, unless it is shared: without this check, an index or a whole run would
end on the disk of a worker.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pipeline.cluster import Room
from pipeline.config.sections import StorageConfig
from pipeline.nodes.access import Access, NodeAccessError, Packed
from pipeline.nodes.environment import Environment
from pipeline.nodes.places import SHARE, Output, Refusal, Source
from pipeline.storage.clouds import AZURE_SCHEMES, resolve_azure
from pipeline.storage.s3 import resolve_storage

log = logging.getLogger(__name__)

# Seconds in which a node answers: it may have to start a Python process on a busy machine, or wait for its disk.
PATIENCE_S = 300.0
# Seconds between two looks at the nodes that are alive.
POLL_S = 2.0


@contextmanager
def check_nodes(
    sources: Sequence[Source], output: str, storage: StorageConfig, cpus: float = 1.0, gpus: float = 0.0
) -> Iterator[Access]:
    """Check that every live machine that can run a worker reads the sources and writes to the output.

    Call it while Ray is connected, and the output is leased. Workers check it again when they start, since machines may
    join: pass them the access, or arguments that are packed with it. It holds while the body runs.

    Args:
        sources: files to read.
        output: path or URI of the folder to write to.
        cpus, gpus: resources of a worker; smaller machines run none.

    Raises:
        NodeAccessError: a machine does not; the message names it.
    """
    import ray

    folder, home = Output(output), ray.get_runtime_context().get_node_id()
    access = Access(tuple(sources), folder, _resolve(sources, output, storage), Environment.read(), home)
    nodes = {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != home and Room.of(node["Resources"]).count(cpus, gpus) >= 1
    }
    folder.prepare()
    try:
        _try_nodes(access, folder, nodes)
        yield access
    finally:
        folder.clear()


def _resolve(sources: Sequence[Source], output: str, storage: StorageConfig) -> StorageConfig:
    uris = [output, *(uri for source in sources for uri in source.files)]
    if any(uri.startswith(AZURE_SCHEMES) for uri in uris):
        storage = resolve_azure(storage)
    return resolve_storage(storage) if any(uri.startswith("s3://") for uri in uris) else storage


def _try_nodes(access: Access, folder: Output, nodes: Mapping[str, str]) -> None:
    """Let every node try its access at the same time.

    Args:
        nodes: name and address of each node by Ray's id.

    Raises:
        NodeAccessError: one of them is refused, or does not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    trial = ray.remote(num_cpus=0, max_retries=0)(_try_this_node)
    content = Packed.pack(access, replace(access, sources=(), output=None))
    tried = {
        node: trial.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(content, node)
        for node in nodes
    }
    for node, refusal in _collect_answers(tried, nodes):
        if refusal is None and not folder.has_reply(node):
            refusal = folder.refuse("writes to another folder there", SHARE)
        if refusal is not None:
            raise NodeAccessError(refusal.explain(nodes[node]))


def _collect_answers(tried: Mapping[str, Any], nodes: Mapping[str, str]) -> Iterator[tuple[str, Refusal | None]]:
    """Yield the answers of the nodes as they arrive; nodes that leave the cluster meanwhile have none.

    Raises:
        NodeAccessError: a node does not answer.
    """
    import ray

    lost = (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError, ray.exceptions.WorkerCrashedError)
    waiting, until = {reference: node for node, reference in tried.items()}, time.monotonic() + PATIENCE_S
    while waiting:
        answered, _ = ray.wait(list(waiting), timeout=POLL_S)
        # Ray does not end the task of a node that vanishes before it has begun.
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for reference in [reference for reference, node in waiting.items() if node not in alive]:
            log.warning("node %s has left the cluster", nodes[waiting.pop(reference)])
        for reference in waiting.keys() & set(answered):
            node = waiting.pop(reference)
            try:
                yield node, ray.get(reference)
            except lost:
                log.warning("node %s has left the cluster", nodes[node])
        if waiting and time.monotonic() > until:
            late = nodes[next(iter(waiting.values()))]
            raise NodeAccessError(f"node {late} does not answer within {PATIENCE_S:.0f} s; remove it, or rerun")


def _try_this_node(content: Packed[Access], node: str) -> Refusal | None:
    return content.unpack().find_refusal(node)
