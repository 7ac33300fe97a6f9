"""Search over the shards of an index as if they were one."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from pipeline.config.sections import RetrievalConfig
from pipeline.decoding.types import Passage, RetrievedPassage
from pipeline.gpus import exclusive_start
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.faiss_device import Device, set_search
from pipeline.retrieval.index_cache import DamagedIndexError, obtain, room_for
from pipeline.retrieval.manifest import IndexManifest, ShardEntry, read_manifest
from pipeline.retrieval.shard_files import PassageFile, read_faiss
from pipeline.storage.location import Location

# Equal scores beyond this many places keep the order FAISS gives them. Its GPU search stops at 2,048.
_MOST_PLACES = 1024


@dataclass(frozen=True)
class Hit:
    """A vector found: its inner product with the query, its shard and its row there."""

    score: float
    shard: int
    row: int

    @property
    def order(self) -> tuple[float, int, int]:
        """Sort key: best first; equal scores in the order of the passages, as one index over all would have it."""
        return -self.score, self.shard, self.row


Found = tuple[Hit, Passage]


class Shard:
    """An opened shard.

    Attributes:
        index: FAISS's, on the CPU until it is placed elsewhere.
    """

    def __init__(self, index: Any, passages: PassageFile) -> None:
        self.index = index
        self.passages = passages
        self._space = faiss.ParameterSpace()

    @classmethod
    def open(cls, folder: Location, entry: ShardEntry, dimension: int, retrieval: RetrievalConfig) -> "Shard":
        """Fetch the files where they are remote, check them, map them.

        Raises:
            ValueError: a file is missing or is not what the manifest says.
        """
        index_file, passages_file = (
            obtain(folder / name, size, sha256, retrieval) for name, size, sha256 in entry.files()
        )
        index, passages = read_faiss(index_file), PassageFile(passages_file)
        if (index.d, index.ntotal, len(passages)) != (dimension, entry.rows, entry.rows):
            raise DamagedIndexError(
                f"{(folder / entry.file).uri}: {index.ntotal} vectors of {index.d} dimensions and {len(passages)} "
                f"passages where index.json says {entry.rows} and {dimension}; build the index anew"
            )
        return cls(index, passages)

    def place(self, device: Device) -> None:
        """Put the vectors on a device.

        Raises:
            ValueError: they have no place there.
        """
        self.index, self._space = device.place(self.index)

    def tune(self, search: str) -> None:
        """Set search parameters, as ``retrieval.search``.

        Raises:
            ValueError: this kind of index has no such parameter.
        """
        set_search(self.index, self._space, search)

    def top(self, queries: Vectors, k: int) -> tuple[Vectors, npt.NDArray[np.int64]]:
        """The best rows: scores float32 and rows int64, both [queries, k or fewer]; row -1 where FAISS found none.

        FAISS leaves open which of several equal scores it returns. Looking one place beyond k shows whether the
        last place is contested; then the search widens until all who contest it are there, and the first rows win.
        """
        total = self.index.ntotal
        width = min(k + 1, total)
        while True:
            scores, rows = self.index.search(queries, width)
            contested = (scores[:, min(k, width) - 1] == scores[:, -1]) & (rows[:, -1] >= 0)
            if width <= k or width == total or width >= _MOST_PLACES or not contested.any():
                break
            width = min(2 * width, total, _MOST_PLACES)
        order = np.lexsort((rows, -scores))[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


class PassageIndex:
    """Shards of an index, all of them or some, searched as if they were one.

    Args:
        shards: by their number in the manifest.
        threads: of FAISS.
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
        """Open an index: in place from a local disk, by way of ``retrieval.cache`` from elsewhere.

        Args:
            numbers: of the shards to open; all by default.
            engine_share: of the GPU's memory, that vLLM takes on the same card.
            digest: that the manifest must have.

        Raises:
            ValueError: no usable index; one line that names the file.
            StorageError: storage does not answer.
        """
        manifest = read_manifest(folder, digest)
        chosen = sorted(range(len(manifest.shards)) if numbers is None else numbers)
        with _in_cache(folder, manifest, retrieval, chosen):
            entries = {number: manifest.shards[number] for number in chosen}
            shards = {n: Shard.open(folder, entry, manifest.dimension, retrieval) for n, entry in entries.items()}
        with exclusive_start():
            device = Device.choose(retrieval, manifest, chosen, engine_share)
            for shard in shards.values():
                shard.place(device)
                shard.tune(retrieval.search)
        return cls(manifest, shards, retrieval.threads)

    def search(self, queries: Vectors, k: int) -> list[list[Hit]]:
        """The k best of these shards for each query, best first; equal scores by shard, then row.

        Args:
            queries: float32 [n, dimension].

        Returns:
            n lists of k hits, or fewer where the index has or finds no more.
        """
        # OpenMP keeps this number per thread, so it has to be set in the thread that searches.
        faiss.omp_set_num_threads(self.threads)
        found = [self.shards[number].top(queries, k) for number in self._numbers]
        scores = np.concatenate([scores for scores, _ in found], axis=1)
        rows = np.concatenate([rows for _, rows in found], axis=1)
        shards = np.repeat(self._numbers, [scores.shape[1] for scores, _ in found])
        # Within a shard equal scores are in the order of their rows already.
        best = np.argsort(-scores, axis=1, kind="stable")
        return [
            [Hit(float(scores[n, i]), int(shards[i]), int(rows[n, i])) for i in best[n] if rows[n, i] >= 0][:k]
            for n in range(len(queries))
        ]

    def find(self, queries: Vectors, k: int) -> list[list[Found]]:
        """As ``search``, with the passages."""
        return [
            [(hit, self.shards[hit.shard].passages.passage(hit.row)) for hit in hits]
            for hits in self.search(queries, k)
        ]

    def retrieve(self, queries: Vectors, k: int) -> list[list[RetrievedPassage]]:
        """As ``search``, with the passages and their ranks from 1."""
        return [ranked(found) for found in self.find(queries, k)]


def _in_cache(
    folder: Location, manifest: IndexManifest, retrieval: RetrievalConfig, chosen: Sequence[int]
) -> AbstractContextManager[None]:
    """Room in the cache for some shards, where they come from elsewhere."""
    if folder.local:
        return nullcontext()
    wanted = [file for number in chosen for file in manifest.shards[number].files()]
    every = [file for entry in manifest.shards for file in entry.files()]
    return room_for(retrieval, wanted, [file for file in every if file not in wanted])


def ranked(found: Sequence[Found]) -> list[RetrievedPassage]:
    """Hits with their passages, best first, as what a query gets."""
    return [RetrievedPassage(passage, hit.score, rank) for rank, (hit, passage) in enumerate(found, start=1)]
