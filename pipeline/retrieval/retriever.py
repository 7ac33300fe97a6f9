"""Retrieves passages for concurrent queries, which are encoded, searched and reranked in batches."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from pipeline.config.sections import RetrievalConfig
from pipeline.decoding.types import Retrieved, RetrievedPassage
from pipeline.gpus import lock_gpus
from pipeline.retrieval.batching import Batcher
from pipeline.retrieval.encoder import Encoder
from pipeline.retrieval.filters import Conditions, check_condition
from pipeline.retrieval.fusion import QueryBatch, SearchableIndex, retrieve_fused
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.manifest import IndexManifest, check_encoder, check_index_manifest, choose_encoder
from pipeline.retrieval.passage_columns import extend_schema
from pipeline.retrieval.reranker import Reranker
from pipeline.retrieval.shard_servers import IndexLostError, PartitionedIndex
from pipeline.retrieval.words import WordSplitter
from pipeline.storage.location import Location


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
Search = tuple[str, int, Conditions]  # a query, the number of passages, and their conditions


class IndexRetriever:
    """A retriever that encodes and searches concurrent requests in batches, and reranks what they find likewise.

    Attributes:
        on_search: callback with the latency of each batch in seconds, called in the search thread.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        index: SearchableIndex,
        retrieval: RetrievalConfig,
        reranker: Reranker | None = None,
    ) -> None:
        if encoder is not None:
            check_encoder(encoder, index.manifest)
        self._encoder = encoder
        form = index.manifest.lexical if retrieval.searches_words else None
        self._splitter = WordSplitter(form) if form else None
        self._retrieval = retrieval
        columns = extend_schema(index.manifest.metadata)
        self._check_condition = lru_cache(lambda condition: check_condition(condition, columns))
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

        A search by words alone needs no encoder. The reranker is loaded, too, if ``retrieval.rerank`` has one.

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
        encoder = _load_encoder(manifest, retrieval) if retrieval.searches_vectors else None
        reranker = Reranker.load(retrieval, digests.reranker) if retrieval.rerank.model else None
        if servers:
            return cls(encoder, PartitionedIndex(manifest, servers), retrieval, reranker)
        index = PassageIndex.open(folder, retrieval, None, engine_share, digests.index)
        return cls(encoder, index, retrieval, reranker)

    async def retrieve(self, query: str, k: int, condition: str | None = None) -> Retrieved:
        """Retrieve the k best passages that meet the condition; fewer if the search finds no more.

        Raises:
            FilterError: it is no condition on the passages of the index.
            IndexLostError: a shard server is lost, whatever the query.
            Exception: the encoder, FAISS or the reranker raised it for this query alone.
        """
        if condition is not None:  # before it joins a batch, so that it fails alone
            self._check_condition(condition)
        conditions = tuple(one for one in (self._retrieval.filter, condition) if one is not None)
        if self._reranker is None or self._reranking is None:
            return Retrieved(await self._searching.ask((query, k, conditions)))
        found = await self._searching.ask((query, max(k, self._reranker.candidates), conditions))
        began = time.monotonic()
        ordered = await self._reranking.ask((query, found))
        return Retrieved(ordered[:k], time.monotonic() - began)

    def close(self) -> None:
        """End the threads after their current batches."""
        self._searching.close()
        if self._reranking is not None:
            self._reranking.close()

    def _search(self, batch: list[Search]) -> list[list[RetrievedPassage]]:
        """Search for a batch of queries, each with its k."""
        began = time.monotonic()
        queries, wanted, conditions = (list(column) for column in zip(*batch, strict=True))
        prepared = replace(self._prepare(queries), conditions=conditions)
        found = retrieve_fused(self._index, prepared, wanted, self._retrieval)
        if self.on_search is not None:
            self.on_search(time.monotonic() - began)
        return found

    def _prepare(self, queries: list[str]) -> QueryBatch:
        """Encode queries, split them into words, or both, as the search needs."""
        vectors = self._encoder.encode_queries(queries) if self._encoder else None
        words = [self._splitter.split(query) for query in queries] if self._splitter else None
        return QueryBatch(vectors, words)


def _load_encoder(manifest: IndexManifest, retrieval: RetrievalConfig) -> Encoder:
    """Load the encoder of the queries, and check that it is the one of the passages."""
    name, revision = choose_encoder(manifest, retrieval)
    with lock_gpus():
        encoder = Encoder.load(name, retrieval.device, revision, manifest.encoder.style)
    check_encoder(encoder, manifest)
    return encoder
