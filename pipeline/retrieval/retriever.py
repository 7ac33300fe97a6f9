"""Retrieves passages for concurrent queries, which are encoded and searched in batches."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.config.sections import RetrievalConfig
from pipeline.decoding.types import RetrievedPassage
from pipeline.gpus import lock_gpus
from pipeline.retrieval.encoder import Encoder, Vectors
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.manifest import IndexManifest, check_encoder, check_index_manifest, choose_encoder
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
class _Request:
    query: str
    k: int
    answer: asyncio.Future[list[RetrievedPassage]]


Outcome = list[RetrievedPassage] | Exception


class IndexRetriever:
    """A retriever that encodes and searches concurrent requests in batches, in a thread of its own.

    The first request of a batch waits up to ``retrieval.wait_ms`` for others. While a batch is being searched, new
    requests are collected for the next one.

    Attributes:
        on_search: callback with the latency of each batch in seconds, called in the search thread.
    """

    def __init__(self, encoder: Encoder, index: SearchableIndex, retrieval: RetrievalConfig) -> None:
        check_encoder(encoder, index.manifest)
        self._encoder = encoder
        self._index = index
        self._batch_size = retrieval.batch_size
        self._wait_s = retrieval.wait_ms / 1000
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="retrieve")
        self._waiting: list[_Request] = []
        self._timer: asyncio.TimerHandle | None = None
        self._searching = False
        self.on_search: Callable[[float], None] | None = None

    @classmethod
    def open(
        cls,
        folder: Location,
        retrieval: RetrievalConfig,
        engine_share: float = 0.0,
        servers: Sequence[Any] = (),
        digest: str | None = None,
    ) -> "IndexRetriever":
        """Open an index with ``retrieval.encoder``, or else with the encoder that it was built with.

        Args:
            engine_share: share of the GPU's memory that vLLM takes on the same GPU.
            servers: Ray handles of the shard servers; if empty, all shards are opened in this process.
            digest: required digest of the index's manifest; any by default.

        Raises:
            ValueError: the index, the encoder or the required device cannot be used, or index and encoder do not match.
            StorageError: the storage cannot be read.
        """
        manifest = check_index_manifest(folder, retrieval, digest)
        name, revision = choose_encoder(manifest, retrieval)
        with lock_gpus():
            encoder = Encoder.load(name, retrieval.device, revision, manifest.encoder.style)
        check_encoder(encoder, manifest)
        if servers:
            return cls(encoder, PartitionedIndex(manifest, servers), retrieval)
        return cls(encoder, PassageIndex.open(folder, retrieval, None, engine_share, digest), retrieval)

    async def retrieve(self, query: str, k: int) -> list[RetrievedPassage]:
        """Retrieve the k best passages, best first; fewer if the search finds no more.

        Raises:
            IndexLostError: a shard server is lost, whatever the query.
            Exception: the encoder or FAISS raised it for this query alone.
        """
        loop = asyncio.get_running_loop()
        request = _Request(query, k, loop.create_future())
        self._waiting.append(request)
        if len(self._waiting) >= self._batch_size:
            self._start()
        elif self._timer is None:
            self._timer = loop.call_later(self._wait_s, self._start)
        return await request.answer

    def close(self) -> None:
        """End the thread after the current batch."""
        self._thread.shutdown()

    def _start(self) -> None:
        """Start to search the next batch, unless one is being searched; its end then starts the next."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # Drop requests that were canceled while they waited.
        self._waiting = [request for request in self._waiting if not request.answer.done()]
        if self._searching or not self._waiting:
            return
        batch, self._waiting = self._waiting[: self._batch_size], self._waiting[self._batch_size :]
        self._searching = True
        found = asyncio.get_running_loop().run_in_executor(self._thread, self._search, batch)
        found.add_done_callback(lambda done: self._deliver(batch, done))

    def _search(self, batch: list[_Request]) -> list[Outcome]:
        """Search a batch; if that fails, search its requests one by one, so that only faulty queries fail."""
        try:
            began = time.monotonic()
            vectors = self._encoder.encode_queries([request.query for request in batch])
            found = self._index.retrieve(vectors, max(request.k for request in batch))
            if self.on_search is not None:
                self.on_search(time.monotonic() - began)
        except IndexLostError as error:
            return [error] * len(batch)
        except Exception as error:  # noqa: BLE001  raised again in retrieve
            if len(batch) == 1:
                return [error]
            return [self._search([request])[0] for request in batch]
        return [passages[: request.k] for request, passages in zip(batch, found, strict=True)]

    def _deliver(self, batch: list[_Request], done: asyncio.Future[list[Outcome]]) -> None:
        self._searching = False
        for request, outcome in zip(batch, done.result(), strict=True):
            if request.answer.done():
                continue
            if isinstance(outcome, Exception):
                request.answer.set_exception(outcome)
            else:
                request.answer.set_result(outcome)
        self._start()
