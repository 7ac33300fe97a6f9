"""Reads, writes and searches the lexical part of a shard: the BM25 scores of its passages by word."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import bm25s.scoring
import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.filters import RowSelection
from pipeline.retrieval.index_cache import REMEDY, DamagedIndexError

POSTINGS_SCHEMA = pa.schema(
    [
        pa.field("words", pa.large_list(pa.large_string())),
        pa.field("starts", pa.large_list(pa.int64())),
        pa.field("rows", pa.large_list(pa.int32())),
        pa.field("scores", pa.large_list(pa.float32())),
        pa.field("passages", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Postings:
    """The scores of a shard, by word.

    Attributes:
        words: words in ascending order of their code points.
        starts: int64 [words + 1], where the postings of each word begin, and the end of the last.
        rows: int32 [postings], rows of the passages that have the word, ascending.
        scores: float32 [postings], BM25 scores of the word in these passages.
        passages: number of passages.
    """

    words: pa.LargeStringArray
    starts: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    passages: int

    def write(self, file: Path) -> None:
        """Write an Arrow IPC file with one row, which can be mapped into memory."""
        values = [self.words, pa.array(self.starts), pa.array(self.rows), pa.array(self.scores)]
        lists = [pa.LargeListArray.from_arrays(pa.array([0, len(part)], pa.int64()), part) for part in values]
        columns = [*lists, pa.array([self.passages], pa.int64())]
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, POSTINGS_SCHEMA) as writer:
            writer.write_batch(pa.record_batch(columns, schema=POSTINGS_SCHEMA))

    @classmethod
    def open(cls, file: Path, passages: int) -> "Postings":
        """Map a file into memory; its pages are loaded when their words are searched.

        Args:
            file: the file.
            passages: number of passages of the shard.

        Raises:
            DamagedIndexError: it is not such a file, or not of this shard.
        """
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(file)))
        except pa.ArrowInvalid as error:
            raise DamagedIndexError(f"{file}: not an Arrow IPC file ({error}); {REMEDY}") from None
        if reader.schema != POSTINGS_SCHEMA or reader.num_record_batches != 1:
            raise DamagedIndexError(f"{file}: not the lexical part of a shard; {REMEDY}")
        batch = reader.get_batch(0)
        words, *arrays = (batch.column(name).values for name in POSTINGS_SCHEMA.names[:-1])
        starts, rows, scores = (array.to_numpy(zero_copy_only=True) for array in arrays)
        postings = cls(words, starts, rows, scores, batch.column("passages")[0].as_py())
        sizes = len(words) + 1, len(scores), len(scores), passages
        if (len(starts), starts[-1], len(rows), postings.passages) != sizes:  # the compiled scorer checks no bounds
            raise DamagedIndexError(f"{file}: its parts do not fit each other, or not the shard; {REMEDY}")
        return postings


@cache
def _compile_scorer() -> Any:
    """Compile bm25s's function that adds up scores, once for all shards of this process.

    It releases the GIL, which the engine in this process needs meanwhile.
    """
    return numba.njit(nogil=True)(bm25s.scoring._compute_relevance_from_scores_jit_ready)


class LexicalShard:
    """The lexical part of a shard, searched by bm25s.

    Args:
        postings: scores by word.
    """

    def __init__(self, postings: Postings) -> None:
        self._postings = postings
        self._model: Any = bm25s.BM25()
        self._model._compute_relevance_from_scores = _compile_scorer()
        self._model.scores = {
            "data": postings.scores,
            "indices": postings.rows,
            "indptr": postings.starts,
            "num_docs": postings.passages,
        }
        self._model.nonoccurrence_array = None

    def find_words(self, words: Iterable[str]) -> dict[str, int]:
        """Return the numbers of those of the words that any passage has."""
        asked = pa.array(set(words), pa.large_string())
        places = pc.search_sorted(self._postings.words, asked).to_numpy()
        within = pa.array(places < len(self._postings.words))
        asked, places = asked.filter(within), pa.array(places).filter(within)
        known = pc.equal(self._postings.words.take(places), asked)
        return dict(zip(asked.filter(known).to_pylist(), places.filter(known).to_pylist(), strict=True))

    def search_top(
        self, queries: Sequence[Sequence[str]], k: int, selection: RowSelection | None = None
    ) -> tuple[Vectors, npt.NDArray[np.int64]]:
        """Search for the k passages with the highest scores of each query; ties go to the lowest rows.

        Args:
            queries: words of each query, n lists.
            k: number of passages.
            selection: the passages that are searched; all by default.

        Returns:
            Scores, float32, and rows, int64, both [n, k]; the row is -1 where no further passage has a word.
        """
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        mask = selection.mask if selection else None
        numbers = self.find_words(chain.from_iterable(queries))
        for number, words in enumerate(queries):
            known = [numbers[word] for word in words if word in numbers]
            if not known:
                continue
            every = self._model.get_scores_from_ids(known, weight_mask=mask)
            best = select_top(every, k)
            scores[number, : len(best)], rows[number, : len(best)] = every[best], best
        return scores, rows


def select_top(scores: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Return the rows of the k highest scores above 0, best first; ties are ordered by row."""
    if k < len(scores):
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        rows = np.flatnonzero(scores >= max(least, np.finfo(np.float32).tiny))
    else:
        rows = np.flatnonzero(scores > 0)
    best: npt.NDArray[np.int64] = rows[np.lexsort((rows, -scores[rows]))][:k]
    return best
