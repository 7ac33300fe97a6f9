"""Searches an index that is partitioned over shard servers, Ray actors with some of its shards each.

A batch of queries is sent to all servers. Each returns the best hits of its own shards, and merging them gives the same
hits in the same order as a single index over all passages. Ray restarts a server that dies, on another node if
necessary, and retries its unfinished searches.
"""

import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.config.sections import ExecutionConfig, RetrievalConfig, StorageConfig
from pipeline.decoding.types import RetrievedPassage
from pipeline.nodes.access import Access
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.index import Found, PassageIndex, rank_hits
from pipeline.retrieval.manifest import IndexManifest
from pipeline.storage.location import locate

log = logging.getLogger(__name__)

# Seconds between two warnings about waiting for servers.
WARN_EVERY_S = 60.0


class IndexLostError(RuntimeError):
    """Permanent loss of a shard server, not caused by any row."""


@dataclass(frozen=True)
class ServedIndex:
    """The data from which a shard server opens its shards when it is started or restarted.

    Attributes:
        uri: URI of the index folder.
        digest: digest of the manifest at the start of the run.
        shards: number of shards of the index.
        retrieval: search settings.
        storage: access to the storage of the index.
        access: environment of the servers, and what their machines must read; None if nothing is checked.
    """

    uri: str
    digest: str
    shards: int
    retrieval: RetrievalConfig
    storage: StorageConfig
    access: Access | None = None


class ShardServer:
    """A Ray actor that searches some shards.

    Args:
        index: the index that the shards belong to.
        numbers: numbers of its shards.
    """

    def __init__(self, index: ServedIndex, numbers: Sequence[int]) -> None:
        if index.access is not None:
            index.access.prepare()
        folder = locate(index.uri, index.storage)
        self._index = PassageIndex.open(folder, index.retrieval, numbers, digest=index.digest)

    def count_vectors(self) -> int:
        """Return the number of vectors; a call returns only after all shards are loaded."""
        return sum(len(shard.passages) for shard in self._index.shards.values())

    def find(self, queries: Vectors, k: int) -> list[list[Found]]:
        """Return the k best hits of each query in its shards with their passages, best first."""
        return self._index.find(queries, k)


class PartitionedIndex:
    """All shards of an index, in shard servers.

    Args:
        manifest: manifest of the index.
        servers: Ray handles of servers that together hold every shard exactly once.
    """

    def __init__(self, manifest: IndexManifest, servers: Sequence[Any]) -> None:
        self.manifest = manifest
        self._servers = servers

    def retrieve(self, queries: Vectors, k: int) -> list[list[RetrievedPassage]]:
        """Retrieve the k best passages of each query from all shards, best first; waits while a server restarts.

        Args:
            queries: float32 [n, dimension].

        Raises:
            IndexLostError: a server cannot be restarted.
            ray.exceptions.RayTaskError: the search itself failed on a server.
        """
        import ray

        batch = ray.put(queries)
        try:
            answers = _await_results([server.find.remote(batch, k) for server in self._servers], "a search")
        except ray.exceptions.RayTaskError:
            raise  # caused by these queries, not by a lost server
        except ray.exceptions.RayError as error:
            raise IndexLostError(f"a shard server was lost: {' '.join(str(error).split())}") from error
        return [rank_hits(merge_hits(parts, k)) for parts in zip(*answers, strict=True)]


def _await_results(references: list[Any], who: str) -> list[Any]:
    """Wait without limit for the servers' results, with a warning every ``WARN_EVERY_S`` that names the waiter."""
    import ray

    _, missing = ray.wait(references, num_returns=len(references), timeout=WARN_EVERY_S)
    while missing:
        log.warning("%s waits for %d of %d shard servers", who, len(missing), len(references))
        _, missing = ray.wait(references, num_returns=len(references), timeout=WARN_EVERY_S)
    results: list[Any] = ray.get(references)
    return results


def merge_hits(parts: Sequence[Sequence[Found]], k: int) -> list[Found]:
    """Merge sorted lists of hits and return the k best; ties are ordered by shard, then row."""
    return list(islice(heapq.merge(*parts, key=lambda found: found[0].order), k))


def assign_shards(shards: int, servers: int) -> list[list[int]]:
    """Return the shard numbers of each server; their counts differ by at most one."""
    return [list(range(first, shards, servers)) for first in range(servers)]


def start_servers(index: ServedIndex, nodes: Sequence[str | None], execution: ExecutionConfig) -> list[Any]:
    """Start shard servers, which end with the job, and wait until all shards are loaded.

    Args:
        nodes: Ray node id for each server; None lets Ray choose the node. If the node dies, the server restarts on any
            other node.

    Raises:
        ray.exceptions.RayError: a server cannot open its shards; the message gives the reason.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    resources = {"num_cpus": execution.cpus_per_server, "num_gpus": execution.gpus_per_server}
    server = ray.remote(max_restarts=-1, max_task_retries=-1, **resources)(ShardServer)
    handles = []
    for node, numbers in zip(nodes, assign_shards(index.shards, len(nodes)), strict=True):
        where = NodeAffinitySchedulingStrategy(node, soft=True) if node else "SPREAD"
        handles.append(server.options(scheduling_strategy=where).remote(index, numbers))
    loaded = _await_results([handle.count_vectors.remote() for handle in handles], "the job")
    log.info("%d shard servers hold %s vectors", len(nodes), " + ".join(map(str, loaded)))
    return handles
