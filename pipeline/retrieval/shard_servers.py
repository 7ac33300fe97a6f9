"""The partitioned topology: shard servers, each with some shards of the index, searched as if they were one.

A query batch is sent to all servers, each answers with the best of its own shards, and the best of those are kept:
the same ones in the same order as one index over all passages would give. Ray restarts a server that dies, on
another node if need be, and sends it again what it had not answered.
"""

import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.config.sections import ExecutionConfig, RetrievalConfig, StorageConfig
from pipeline.decoding.types import RetrievedPassage
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.index import Found, PassageIndex, ranked
from pipeline.retrieval.manifest import IndexManifest
from pipeline.storage.location import locate

log = logging.getLogger(__name__)

# Seconds between two lines of who waits for a server.
WARN_EVERY_S = 60.0


class IndexLostError(RuntimeError):
    """A shard server is gone for good; no row is to blame."""


@dataclass(frozen=True)
class ServedIndex:
    """What a server has to know of an index, also when it is restarted.

    Attributes:
        digest: of the manifest that the run began with.
        shards: how many there are.
    """

    uri: str
    digest: str
    shards: int
    retrieval: RetrievalConfig
    storage: StorageConfig


class ShardServer:
    """A Ray actor that holds some shards.

    Args:
        numbers: of its shards.
    """

    def __init__(self, index: ServedIndex, numbers: Sequence[int]) -> None:
        folder = locate(index.uri, index.storage)
        self._index = PassageIndex.open(folder, index.retrieval, numbers, digest=index.digest)

    def vectors(self) -> int:
        """How many it holds; answers once they are loaded."""
        return sum(len(shard.passages) for shard in self._index.shards.values())

    def find(self, queries: Vectors, k: int) -> list[list[Found]]:
        """The k best of its shards for each query, best first."""
        return self._index.find(queries, k)


class PartitionedIndex:
    """All shards of an index, in servers.

    Args:
        servers: Ray handles that hold every shard once.
    """

    def __init__(self, manifest: IndexManifest, servers: Sequence[Any]) -> None:
        self.manifest = manifest
        self._servers = servers

    def retrieve(self, queries: Vectors, k: int) -> list[list[RetrievedPassage]]:
        """The k best of all shards for each query, best first; waits while a server is restarted.

        Args:
            queries: float32 [n, dimension].

        Raises:
            IndexLostError: a server cannot be restarted.
        """
        import ray

        batch = ray.put(queries)
        try:
            answers = _answers([server.find.remote(batch, k) for server in self._servers], "a search")
        except ray.exceptions.RayTaskError:
            raise  # what is wrong with these queries, not with the server
        except ray.exceptions.RayError as error:
            raise IndexLostError(f"a shard server is gone: {' '.join(str(error).split())}") from error
        return [ranked(merge_hits(parts, k)) for parts in zip(*answers, strict=True)]


def _answers(references: list[Any], who: str) -> list[Any]:
    """What servers answer, however long that takes; the log says who is waiting."""
    import ray

    while missing := len(references) - len(ray.wait(references, num_returns=len(references), timeout=WARN_EVERY_S)[0]):
        log.warning("%s waits for %d of %d shard servers", who, missing, len(references))
    answers: list[Any] = ray.get(references)
    return answers


def merge_hits(parts: Sequence[Sequence[Found]], k: int) -> list[Found]:
    """The k best of several lists that are in order themselves; equal scores by shard, then row."""
    return list(islice(heapq.merge(*parts, key=lambda found: found[0].order), k))


def assign_shards(shards: int, servers: int) -> list[list[int]]:
    """Shard numbers for each server, whose counts differ by one at most."""
    return [list(range(first, shards, servers)) for first in range(servers)]


def start_servers(index: ServedIndex, nodes: Sequence[str | None], execution: ExecutionConfig) -> list[Any]:
    """Start shard servers and wait until all shards are loaded; they end with the job.

    Args:
        nodes: for each server the id of the Ray node that has room for it; None leaves it to Ray. After the death of
            its node a server goes to any other.

    Raises:
        ray.exceptions.RayError: one cannot open its shards; its message says why.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    resources = {"num_cpus": execution.cpus_per_server, "num_gpus": execution.gpus_per_server}
    server = ray.remote(max_restarts=-1, max_task_retries=-1, **resources)(ShardServer)
    handles = []
    for node, numbers in zip(nodes, assign_shards(index.shards, len(nodes)), strict=True):
        where = NodeAffinitySchedulingStrategy(node, soft=True) if node else "SPREAD"
        handles.append(server.options(scheduling_strategy=where).remote(index, numbers))
    loaded = _answers([handle.vectors.remote() for handle in handles], "the job")
    log.info("%d shard servers hold %s vectors", len(nodes), " + ".join(map(str, loaded)))
    return handles
