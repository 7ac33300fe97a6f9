"""Counts the words of passages and scores them by BM25, with the statistics of the whole corpus.

The score of a word t in a passage of l words is Lucene's variant of BM25 (Kamphuis et al. 2020,
https://cs.uwaterloo.ca/~jimmylin/publications/Kamphuis_etal_ECIR2020_preprint.pdf, table 1):

    ln(1 + (N - n_t + 0.5) / (n_t + 0.5)) · f / (f + k1 (1 - b + b l / l_mean))

for f occurrences, n_t of N passages with the word, and passages of l_mean words on average. A query's score is the sum
over its words, so that it can be computed from scores stored by word.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.retrieval.lexical import Postings
from pipeline.retrieval.words import WordForm


@dataclass
class WordCounts:
    """The words of the passages of a shard, counted.

    Attributes:
        vocabulary: number of each word, in the order in which words were first seen.
        words, rows, counts: for each pair of word and passage that occurs: number of the word, row of the passage, and
            occurrences.
        lengths: number of words of each passage.
    """

    vocabulary: dict[str, int] = field(default_factory=dict)
    words: "array[int]" = field(default_factory=lambda: array("i"))
    rows: "array[int]" = field(default_factory=lambda: array("i"))
    counts: "array[int]" = field(default_factory=lambda: array("i"))
    lengths: "array[int]" = field(default_factory=lambda: array("i"))

    def add(self, words: Sequence[str]) -> None:
        """Add a passage with its words."""
        row = len(self.lengths)
        self.lengths.append(len(words))
        for word, count in Counter(words).items():
            self.words.append(self.vocabulary.setdefault(word, len(self.vocabulary)))
            self.rows.append(row)
            self.counts.append(count)

    def summarize(self) -> "WordStatistics":
        """Return the statistics of these passages."""
        found = np.bincount(self.words, minlength=len(self.vocabulary))
        table = pa.table(
            {"word": pa.array(self.vocabulary, pa.large_string()), "passages": pa.array(found, pa.int64())}
        )
        return WordStatistics(len(self.lengths), sum(self.lengths), table)


@dataclass(frozen=True)
class WordStatistics:
    """The statistics of a corpus or of a part of it.

    Attributes:
        passages: number of passages.
        words: number of words of all passages.
        frequencies: for each word (``word``) the number of passages that have it (``passages``).
    """

    passages: int
    words: int
    frequencies: pa.Table

    @property
    def mean_length(self) -> float:
        """Mean number of words of a passage; 1 if there are none."""
        return self.words / self.passages if self.words else 1.0

    def extend(self, other: "WordStatistics") -> "WordStatistics":
        """Return these statistics with the words that only another corpus has, in at most as many passages as here."""
        new = other.frequencies.filter(pc.invert(pc.is_in(other.frequencies["word"], self.frequencies["word"])))
        counts = pc.min_element_wise(new["passages"], pa.scalar(self.passages, pa.int64()))
        added = pa.table({"word": new["word"], "passages": counts})
        return WordStatistics(self.passages, self.words, pa.concat_tables([self.frequencies, added]))

    def count_passages(self, words: pa.Array) -> npt.NDArray[np.int64]:
        """Return the number of passages that have each of the words, all of which are known: int64 [words]."""
        places = pc.index_in(words, value_set=self.frequencies["word"])
        return np.asarray(self.frequencies["passages"].take(places).to_numpy(), np.int64)


def merge_statistics(parts: Iterable[WordStatistics]) -> WordStatistics:
    """Add up the statistics of the parts of a corpus."""
    parts = list(parts)
    tables = pa.concat_tables(part.frequencies for part in parts)
    summed = tables.group_by("word").aggregate([("passages", "sum")]).rename_columns(["word", "passages"])
    return WordStatistics(sum(part.passages for part in parts), sum(part.words for part in parts), summed)


def score_postings(counted: WordCounts, corpus: WordStatistics, form: WordForm) -> Postings:
    """Score the words of a shard with the statistics of the whole corpus."""
    words = pa.array(counted.vocabulary, pa.large_string())
    order = pc.array_sort_indices(words).to_numpy()
    place = np.empty(len(order), np.int32)  # of each word of the vocabulary, in ascending order
    place[order] = np.arange(len(order), dtype=np.int32)
    of, rows = place[np.frombuffer(counted.words, np.int32)], np.frombuffer(counted.rows, np.int32)
    words = words.take(pa.array(order))
    rarity = compute_rarity(corpus.count_passages(words), corpus.passages).astype(np.float32)
    lengths = (np.frombuffer(counted.lengths, np.int32) / corpus.mean_length).astype(np.float32)
    occurrences = np.frombuffer(counted.counts, np.int32).astype(np.float32)
    scores = compute_saturation(occurrences, lengths[rows], form)
    scores *= rarity[of]
    starts = np.concatenate([[0], np.cumsum(np.bincount(of, minlength=len(words)))]).astype(np.int64)
    by_word = np.argsort(of, kind="stable")  # rows are ascending already
    return Postings(words, starts, rows[by_word], scores[by_word], len(counted.lengths))


def compute_rarity(found: npt.NDArray[np.int64], passages: int) -> npt.NDArray[np.float64]:
    """Return the inverse document frequency of words that occur in ``found`` of so many passages: float64 [words]."""
    return np.log1p((passages - found + 0.5) / (found + 0.5))


def compute_saturation(
    occurrences: npt.NDArray[np.float32], length: npt.NDArray[np.float32], form: WordForm
) -> npt.NDArray[np.float32]:
    """Return the part of BM25 that grows with the occurrences of a word.

    Args:
        occurrences: float32 [n], occurrences of the word in the passage.
        length: float32 [n], length of the passage divided by the mean length.
        form: parameters of BM25.
    """
    norm = np.float32(form.k1 * (1 - form.b)) + np.float32(form.k1 * form.b) * length
    return np.divide(occurrences, occurrences + norm, dtype=np.float32)
