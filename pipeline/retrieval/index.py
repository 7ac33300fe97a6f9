"""Opens the shards of an index and searches them as one."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config.sections import RetrievalConfig
from pipeline.decoding.types import Passage
from pipeline.gpus import lock_gpus
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.faiss_device import Device, set_search
from pipeline.retrieval.filters import Conditions, RowSelection
from pipeline.retrieval.fusion import QueryBatch
from pipeline.retrieval.hits import Hit
from pipeline.retrieval.index_cache import DamagedIndexError, obtain_file, reserve_room
from pipeline.retrieval.lexical import LexicalShard, Postings
from pipeline.retrieval.manifest import IndexManifest, ShardEntry, read_manifest
from pipeline.retrieval.selected_search import search_selected
from pipeline.retrieval.shard_files import PassageFile, read_faiss, read_removed_rows
from pipeline.storage.location import Location

log = logging.getLogger(__name__)

# Maximum results per query when breaking ties: equal scores beyond keep FAISS's order. Its GPU search allows 2,048.
_MOST_PLACES = 1024
# Conditions whose selections are kept, one bit for each passage.
_MOST_SELECTIONS = 64


class Shard:
    """An opened shard.

    Attributes:
        index: FAISS index, on the CPU until :meth:`place` moves it; None if vectors are not searched.
        passages: passages of the shard by row.
        lexical: scores of words; None if they are not searched.
        kept: the passages that have not been removed; None if none has.
    """

    def __init__(
        self,
        index: Any,
        passages: PassageFile,
        lexical: LexicalShard | None = None,
        kept: RowSelection | None = None,
    ) -> None:
        self.index = index
        self.passages = passages
        self.lexical = lexical
        self.kept = kept
        self._space = faiss.ParameterSpace()
        self._selections: dict[str, RowSelection] = {}

    @classmethod
    def open(cls, folder: Location, entry: ShardEntry, manifest: IndexManifest, retrieval: RetrievalConfig) -> "Shard":
        """Fetch the files if they are remote, check them, and map them into memory.

        Raises:
            DamagedIndexError: a file is missing, or differs from the manifest.
            StorageError: a file cannot be fetched.
        """
        files = {
            name: obtain_file(folder / name, size, sha256, retrieval)
            for name, size, sha256 in entry.list_files(retrieval.searches_vectors, retrieval.searches_words)
        }
        passages = PassageFile(files[entry.passages_file], manifest.metadata)
        index = read_faiss(files[entry.file]) if retrieval.searches_vectors else None
        lexical = kept = None
        if entry.lexical and retrieval.searches_words:
            lexical = LexicalShard(Postings.open(files[entry.lexical.file], entry.rows))
        if entry.removed:
            file = str(files[entry.removed.file])
            kept = RowSelection.without(entry.rows, read_removed_rows(pa.memory_map(file), file))
        dimension, vectors = (index.d, index.ntotal) if index else (manifest.dimension, entry.rows)
        if (dimension, vectors, len(passages)) != (manifest.dimension, entry.rows, entry.rows):
            raise DamagedIndexError(
                f"{(folder / entry.file).uri}: {vectors} vectors of {dimension} dimensions and {len(passages)} "
                f"passages, but index.json records {entry.rows} and {manifest.dimension}; rebuild the index"
            )
        return cls(index, passages, lexical, kept)

    def list_rows(self, first: int = 0, end: int | None = None) -> npt.NDArray[np.int64]:
        """Return the rows of the passages that have not been removed, of a range or of all: int64 [rows], ascending."""
        rows = np.arange(first, len(self.passages) if end is None else end)
        return rows if self.kept is None else rows[self.kept.mask[rows]]

    def place(self, device: Device) -> None:
        """Place the vectors on a device.

        Raises:
            ValueError: a GPU is required, and FAISS cannot place them on it.
        """
        self.index, self._space = device.place(self.index)

    def tune(self, search: str) -> None:
        """Set search parameters, given as in ``retrieval.search``.

        Raises:
            ValueError: this kind of index has no such parameter.
        """
        set_search(self.index, self._space, search)

    def select(self, conditions: Conditions) -> RowSelection | None:
        """Select the passages that are kept and that all conditions hold for; None if these are all passages.

        Raises:
            FilterError: one is no condition on these passages.
        """
        selection = self.kept
        for condition in conditions:
            selection = self._select(condition).intersect(selection)
        return selection if selection and selection.count < selection.rows else None

    def _select(self, condition: str) -> RowSelection:
        if condition not in self._selections:
            while len(self._selections) >= _MOST_SELECTIONS:
                del self._selections[next(iter(self._selections))]
            self._selections[condition] = self.passages.select(condition)
        return self._selections[condition]

    def search_top(
        self, queries: Vectors, k: int, selection: RowSelection | None = None
    ) -> tuple[Vectors, npt.NDArray[np.int64]]:
        """Search for the k best rows of each query; ties go to the lowest rows.

        FAISS does not define which of several equal scores it returns. One result beyond k shows whether the last score
        is tied; if so, the search is widened until it includes all ties, up to ``_MOST_PLACES`` results.

        Args:
            queries: float32 [n, dimension].
            k: number of rows.
            selection: the rows that are searched; all by default.

        Returns:
            Scores, float32, and rows, int64, both [n, k or fewer]; the row is -1 where FAISS found none.
        """
        total = self.index.ntotal
        width = min(k + 1, total)
        while True:
            scores, rows = self._search(queries, width, k, selection)
            contested = (scores[:, min(k, width) - 1] == scores[:, -1]) & (rows[:, -1] >= 0)
            if width <= k or width == total or width >= _MOST_PLACES or not contested.any():
                break
            width = min(2 * width, total, _MOST_PLACES)
        order = np.lexsort((rows, -scores))[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def _search(self, queries: Vectors, width: int, k: int, selection: RowSelection | None) -> Any:
        if selection is not None:
            return search_selected(self.index, queries, width, selection, k)
        return self.index.search(queries, width)


class PassageIndex:
    """Some or all shards of an index, searched as one.

    Args:
        manifest: manifest of the whole index.
        shards: opened shards by their number in the manifest.
        threads: number of FAISS threads.
    """

    def __init__(self, manifest: IndexManifest, shards: dict[int, Shard], threads: int = 1) -> None:
        self.manifest = manifest
        self.shards = shards
        self._numbers = np.array(sorted(shards))
        self.threads = threads

    @classmethod
    def open(
        cls,
        folder: Location,
        retrieval: RetrievalConfig,
        numbers: Sequence[int] | None = None,
        engine_share: float = 0.0,
        digest: str | None = None,
    ) -> "PassageIndex":
        """Open an index: in place on a local disk, otherwise through ``retrieval.cache``.

        Args:
            numbers: numbers of the shards to open; all by default.
            engine_share: share of the GPU's memory that vLLM takes on the same GPU.
            digest: required digest of the manifest; any by default.

        Raises:
            ValueError: the index or the required device cannot be used, ``retrieval.search`` does not apply to the
                index, or the files exceed ``retrieval.cache_gb``; the message is one line.
            StorageError: the storage cannot be read.
        """
        manifest = read_manifest(folder, digest)
        chosen = sorted(range(len(manifest.shards)) if numbers is None else numbers)
        with _reserve_cache(folder, manifest, retrieval, chosen):
            entries = {number: manifest.shards[number] for number in chosen}
            shards = {n: Shard.open(folder, entry, manifest, retrieval) for n, entry in entries.items()}
        if retrieval.searches_vectors:
            with lock_gpus():
                device = Device.choose(retrieval, manifest, chosen, engine_share)
                for shard in shards.values():
                    shard.place(device)
                    shard.tune(retrieval.search)
        opened = cls(manifest, shards, retrieval.threads)
        if retrieval.filter is not None and not opened.count_passages((retrieval.filter,)):
            log.warning("retrieval.filter %r holds for no passage of %d shards", retrieval.filter, len(shards))
        return opened

    def count_passages(self, conditions: Conditions) -> int:
        """Return the number of passages of these shards that all conditions hold for."""
        selections = ((shard.select(conditions), len(shard.passages)) for shard in self.shards.values())
        return sum(rows if selection is None else selection.count for selection, rows in selections)

    def search(self, queries: Vectors, k: int, conditions: Conditions = ()) -> list[list[Hit]]:
        """Search for the k best hits of each query, best first; ties are ordered by shard, then row.

        Args:
            queries: float32 [n, dimension].
            k: number of hits.
            conditions: conditions on the passages; none by default.

        Returns:
            n lists of k hits, or of fewer if the search finds no more.

        Raises:
            FilterError: one is no condition on these passages.
        """
        # OpenMP keeps this setting per calling thread, so it must be set in the thread that searches.
        faiss.omp_set_num_threads(self.threads)
        shards = [self.shards[number] for number in self._numbers]
        return self._merge([shard.search_top(queries, k, shard.select(conditions)) for shard in shards], k)

    def search_words(self, queries: Sequence[Sequence[str]], k: int, conditions: Conditions = ()) -> list[list[Hit]]:
        """Search for the k hits with the highest BM25 scores of each query, as :meth:`search`.

        Args:
            queries: words of each query, n lists.
            k: number of hits.
            conditions: conditions on the passages; none by default.
        """
        found = []
        for shard in (self.shards[number] for number in self._numbers):
            assert shard.lexical is not None, "the index was opened without its lexical part"
            found.append(shard.lexical.search_top(queries, k, shard.select(conditions)))
        return self._merge(found, k)

    def _merge(self, found: Sequence[tuple[Vectors, npt.NDArray[np.int64]]], k: int) -> list[list[Hit]]:
        """Merge the scores and rows that each shard has found."""
        scores = np.concatenate([scores for scores, _ in found], axis=1)
        rows = np.concatenate([rows for _, rows in found], axis=1)
        shards = np.repeat(self._numbers, [scores.shape[1] for scores, _ in found])
        # Ties within a shard are already ordered by row.
        best = np.argsort(-scores, axis=1, kind="stable")
        results = []
        for n, order in enumerate(best):
            hits = [Hit(float(scores[n, i]), int(shards[i]), int(rows[n, i])) for i in order if rows[n, i] >= 0]
            results.append(hits[:k])
        return results

    def rank(self, batch: QueryBatch, depths: Sequence[int]) -> list[list[list[Hit]]]:
        """Search by vectors, by words, or by both; queries with the same conditions share a search.

        A query's hits do not depend on the others of its batch.

        Args:
            batch: the queries, n.
            depths: number of hits of each query, n.

        Returns:
            For each of the searches, the best hits of each query, best first.

        Raises:
            FilterError: a query has a condition that is none on these passages.
        """
        hits: dict[int, list[list[Hit]]] = {}
        selective = any(shard.kept is not None for shard in self.shards.values())
        for (conditions, depth), places in batch.group(depths, selective).items():
            found = self._rank(batch.take(places), depth, conditions)
            hits |= {
                place: [ranking[: depths[place]] for ranking in rankings]
                for place, rankings in zip(places, found, strict=True)
            }
        return [list(of_search) for of_search in zip(*(hits[place] for place in range(len(batch))), strict=True)]

    def _rank(self, batch: QueryBatch, k: int, conditions: Conditions) -> list[tuple[list[Hit], ...]]:
        """Return for each query the hits of each search."""
        searches = []
        if batch.vectors is not None:
            searches.append(self.search(batch.vectors, k, conditions))
        if batch.words is not None:
            searches.append(self.search_words(batch.words, k, conditions))
        return list(zip(*searches, strict=True))

    def read(self, hits: Sequence[Sequence[Hit]]) -> list[list[Passage]]:
        """Return the passages of the hits of each query."""
        return [[self.shards[hit.shard].passages.read_passage(hit.row) for hit in of_query] for of_query in hits]


def _reserve_cache(
    folder: Location, manifest: IndexManifest, retrieval: RetrievalConfig, chosen: Sequence[int]
) -> AbstractContextManager[None]:
    """Reserve room in the cache for the chosen shards; a local index needs none."""
    if folder.local:
        return nullcontext()
    kinds = retrieval.searches_vectors, retrieval.searches_words
    wanted = [file for number in chosen for file in manifest.shards[number].list_files(*kinds)]
    every = [file for entry in manifest.shards for file in entry.list_files()]
    return reserve_room(retrieval, wanted, [file for file in every if file not in wanted])
