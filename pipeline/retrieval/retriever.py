"""Retrieves passages for concurrent queries, which are encoded, searched and reranked in batches."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.config.sections import RetrievalConfig
from pipeline.decoding.types import Retrieved, RetrievedPassage
from pipeline.gpus import lock_gpus
from pipeline.retrieval.batching import Batcher
from pipeline.retrieval.encoder import Encoder, Vectors
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.manifest import IndexManifest, check_encoder, check_index_manifest, choose_encoder
from pipeline.retrieval.reranker import Reranker
from pipeline.retrieval.shard_servers import IndexLostError, PartitionedIndex
from pipeline.storage.location import Location


class SearchableIndex(Protocol):
    """All shards of an index, in this process or in shard servers."""

    @property
    def manifest(self) -> IndexManifest:
        """Manifest of the index."""
        ...

    def retrieve(self, queries: Vectors, k: int) -> list[list[RetrievedPassage]]:
        """Retrieve the k best passages of each query, best first; may block."""
        ...


@dataclass(frozen=True)
class SearchDigests:
    """Digests that the files of a search must have, those at the start of the run; None accepts any.

    Attributes:
        index: digest of the index's manifest.
        reranker: digest of the reranker.
    """

    index: str | None = None
    reranker: str | None = None


ANY_DIGESTS = SearchDigests()
Search = tuple[str, int]


class IndexRetriever:
    """A retriever that encodes and searches concurrent requests in batches, and reranks what they find likewise.

    Attributes:
        on_search: callback with the latency of each batch in seconds, called in the search thread.
    """

    def __init__(
        self, encoder: Encoder, index: SearchableIndex, retrieval: RetrievalConfig, reranker: Reranker | None = None
    ) -> None:
        check_encoder(encoder, index.manifest)
        self._encoder = encoder
        self._index = index
        self._reranker = reranker
        wait_s = retrieval.wait_ms / 1000
        self._searching: Batcher[Search, list[RetrievedPassage]] = Batcher(
            "retrieve", self._search, retrieval.batch_size, wait_s, shared=(IndexLostError,)
        )
        self._reranking: Batcher[tuple[str, list[RetrievedPassage]], list[RetrievedPassage]] | None = None
        if reranker is not None:
            self._reranking = Batcher("rerank", reranker.rerank, reranker.queries_per_call, wait_s)
        self.on_search: Callable[[float], None] | None = None

    @classmethod
    def open(
        cls,
        folder: Location,
        retrieval: RetrievalConfig,
        engine_share: float = 0.0,
        servers: Sequence[Any] = (),
        digests: SearchDigests = ANY_DIGESTS,
    ) -> "IndexRetriever":
        """Open an index with ``retrieval.encoder``, or else with the encoder that it was built with.

        The reranker is loaded, too, if ``retrieval.rerank`` has one.

        Args:
            engine_share: share of the GPU's memory that vLLM takes on the same GPU.
            servers: Ray handles of the shard servers; if empty, all shards are opened in this process.
            digests: digests that index and reranker must have.

        Raises:
            ValueError: the index, the encoder, the reranker or the required device cannot be used, or index and encoder
                do not match.
            StorageError: the storage cannot be read.
        """
        manifest = check_index_manifest(folder, retrieval, digests.index)
        name, revision = choose_encoder(manifest, retrieval)
        with lock_gpus():
            encoder = Encoder.load(name, retrieval.device, revision, manifest.encoder.style)
        check_encoder(encoder, manifest)
        reranker = Reranker.load(retrieval, digests.reranker) if retrieval.rerank.model else None
        if servers:
            return cls(encoder, PartitionedIndex(manifest, servers), retrieval, reranker)
        index = PassageIndex.open(folder, retrieval, None, engine_share, digests.index)
        return cls(encoder, index, retrieval, reranker)

    async def retrieve(self, query: str, k: int) -> Retrieved:
        """Retrieve the k best passages; fewer if the search finds no more.

        Raises:
            IndexLostError: a shard server is lost, whatever the query.
            Exception: the encoder, FAISS or the reranker raised it for this query alone.
        """
        if self._reranker is None or self._reranking is None:
            return Retrieved(await self._searching.ask((query, k)))
        found = await self._searching.ask((query, max(k, self._reranker.candidates)))
        began = time.monotonic()
        ordered = await self._reranking.ask((query, found))
        return Retrieved(ordered[:k], time.monotonic() - began)

    def close(self) -> None:
        """End the threads after their current batches."""
        self._searching.close()
        if self._reranking is not None:
            self._reranking.close()

    def _search(self, batch: list[Search]) -> list[list[RetrievedPassage]]:
        """Encode and search a batch of queries, each with its k."""
        began = time.monotonic()
        vectors = self._encoder.encode_queries([query for query, _ in batch])
        found = self._index.retrieve(vectors, max(k for _, k in batch))
        if self.on_search is not None:
            self.on_search(time.monotonic() - began)
        return [passages[:k] for passages, (_, k) in zip(found, batch, strict=True)]
