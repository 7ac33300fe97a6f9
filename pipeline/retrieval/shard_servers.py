"""Searches an index that is partitioned over shard servers, Ray actors with some of its shards each.

A batch of queries is sent to all servers. Each returns the best hits of its own shards, and merging them gives the same
hits in the same order as a single index over all passages. Ray restarts a server that dies, on another node if
necessary, and retries its unfinished searches.
"""

import heapq
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from pipeline.config.sections import ExecutionConfig, RetrievalConfig, StorageConfig
from pipeline.decoding.types import Passage
from pipeline.nodes.access import Access
from pipeline.retrieval.filters import FilterError
from pipeline.retrieval.fusion import QueryBatch
from pipeline.retrieval.hits import Hit
from pipeline.retrieval.index import PassageIndex
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

    def rank(self, batch: QueryBatch, depths: Sequence[int]) -> list[list[list[Hit]]]:
        """Return what :meth:`PassageIndex.rank` finds in its shards."""
        return self._index.rank(batch, depths)

    def read(self, hits: Sequence[Hit]) -> list[Passage]:
        """Return the passages of hits in its shards."""
        (passages,) = self._index.read([hits])
        return passages


class PartitionedIndex:
    """All shards of an index, in shard servers.

    Args:
        manifest: manifest of the index.
        servers: Ray handles that :func:`start_servers` returned.
    """

    def __init__(self, manifest: IndexManifest, servers: Sequence[Any]) -> None:
        self.manifest = manifest
        self._servers = servers
        dealt = assign_shards(len(manifest.shards), len(servers))
        self._server_of = {shard: server for server, shards in enumerate(dealt) for shard in shards}

    def rank(self, batch: QueryBatch, depths: Sequence[int]) -> list[list[list[Hit]]]:
        """Search all shards as :meth:`PassageIndex.rank`; waits while a server restarts.

        Raises:
            IndexLostError: a server cannot be restarted.
            FilterError: a query has a condition that is none on these passages.
            ray.exceptions.RayTaskError: the search itself failed on a server.
        """
        import ray

        shared = ray.put(batch)
        answers = _await_search([server.rank.remote(shared, depths) for server in self._servers])
        return [
            [merge_hits(parts, k) for parts, k in zip(zip(*of_servers, strict=True), depths, strict=True)]
            for of_servers in zip(*answers, strict=True)
        ]

    def read(self, hits: Sequence[Sequence[Hit]]) -> list[list[Passage]]:
        """Read the passages of the hits of each query from the servers; waits and raises as :meth:`rank`."""
        by_server: dict[int, list[Hit]] = defaultdict(list)
        for hit in chain.from_iterable(hits):
            by_server[self._server_of[hit.shard]].append(hit)
        answers = _await_search([self._servers[number].read.remote(asked) for number, asked in by_server.items()])
        passages = {
            hit.place: passage
            for asked, read in zip(by_server.values(), answers, strict=True)
            for hit, passage in zip(asked, read, strict=True)
        }
        return [[passages[hit.place] for hit in of_query] for of_query in hits]


def _await_search(references: list[Any]) -> list[Any]:
    """Wait for the servers' answers to a search, and tell lost servers from queries that they cannot answer."""
    import ray

    try:
        return _await_results(references, "a search") if references else []
    except ray.exceptions.RayTaskError as error:  # caused by these queries, not by a lost server
        if isinstance(error.cause, FilterError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise IndexLostError(f"a shard server was lost: {' '.join(str(error).split())}") from error


def _await_results(references: list[Any], who: str) -> list[Any]:
    """Wait without limit for the servers' results, with a warning every ``WARN_EVERY_S`` that names the waiter."""
    import ray

    _, missing = ray.wait(references, num_returns=len(references), timeout=WARN_EVERY_S)
    while missing:
        log.warning("%s waits for %d of %d shard servers", who, len(missing), len(references))
        _, missing = ray.wait(references, num_returns=len(references), timeout=WARN_EVERY_S)
    results: list[Any] = ray.get(references)
    return results


def merge_hits(parts: Sequence[Sequence[Hit]], k: int) -> list[Hit]:
    """Merge sorted lists of hits and return the k best; ties are ordered by shard, then row."""
    return list(islice(heapq.merge(*parts, key=lambda hit: hit.order), k))


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
