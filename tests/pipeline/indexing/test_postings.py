import math

import bm25s
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.indexing.postings import (
    WordCounts,
    WordStatistics,
    compute_rarity,
    compute_saturation,
    merge_statistics,
    score_postings,
)
from pipeline.retrieval.lexical import LexicalShard, Postings
from pipeline.retrieval.words import WordForm

FORM = WordForm()
passages = st.lists(st.lists(st.sampled_from("abcdefg"), max_size=8), min_size=1, max_size=12)


def score(*shards: list[list[str]], form: WordForm = FORM) -> list[Postings]:
    counted = []
    for shard in shards:
        counted.append(WordCounts())
        for words in shard:
            counted[-1].add(words)
    corpus = merge_statistics([counts.summarize() for counts in counted])
    return [score_postings(counts, corpus, form) for counts in counted]


def test_scores_by_hand() -> None:
    (postings,) = score([["sea", "sea", "gold"], ["sea"], ["iron", "iron"]])
    assert postings.words.to_pylist() == ["gold", "iron", "sea"]
    assert postings.starts.tolist() == [0, 1, 2, 4]
    assert postings.rows.tolist() == [0, 2, 0, 1]
    # Three passages of two words on average; gold and iron are in one of them, sea is in two.
    rare, common = math.log(1 + 2.5 / 1.5), math.log(1 + 1.5 / 2.5)
    wanted = [
        rare * 1 / (1 + 1.5 * (0.25 + 0.75 * 1.5)),
        rare * 2 / (2 + 1.5 * (0.25 + 0.75 * 1.0)),
        common * 2 / (2 + 1.5 * (0.25 + 0.75 * 1.5)),
        common * 1 / (1 + 1.5 * (0.25 + 0.75 * 0.5)),
    ]
    assert postings.scores == pytest.approx(wanted, rel=1e-6)


def test_parts_of_the_formula_by_hand() -> None:
    assert compute_rarity(np.array([1, 3]), 3) == pytest.approx([math.log(1 + 2.5 / 1.5), math.log(1 + 0.5 / 3.5)])
    flat = WordForm(k1=0)
    assert compute_saturation(np.array([1.0, 5.0]), np.array([1.0, 9.0]), flat).tolist() == [1, 1]
    without_length = WordForm(k1=1, b=0)
    assert compute_saturation(np.array([1.0, 3.0]), np.array([1.0, 9.0]), without_length).tolist() == [0.5, 0.75]


@given(passages, st.lists(st.sampled_from("abcdefgx"), max_size=5), st.integers(0, 12), st.integers(1, 14))
def test_shards_score_as_one_corpus(words: list[list[str]], query: list[str], cut: int, k: int) -> None:
    (one,) = score(words)
    parts = [part for part in (words[:cut], words[cut:]) if part]
    scores, rows = LexicalShard(one).search_top([query], k)
    found = [LexicalShard(part).search_top([query], k) for part in score(*parts)]
    starts = [0, len(parts[0])]
    together = [
        (-float(value), int(row) + start)
        for start, (values, at) in zip(starts, found, strict=False)
        for value, row in zip(values[0], at[0], strict=True)
        if row >= 0
    ]
    assert sorted(together)[:k] == [(-float(v), int(r)) for v, r in zip(scores[0], rows[0], strict=True) if r >= 0]


@given(passages.filter(lambda p: any(p)), st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=5))
def test_scores_are_those_of_bm25s(words: list[list[str]], query: list[str]) -> None:
    (postings,) = score(words)
    bare = bm25s.BM25(k1=FORM.k1, b=FORM.b, method="lucene")
    bare.index(words, show_progress=False)
    known = [word for word in query if word in postings.words.to_pylist()]
    wanted = bare.get_scores(known) if known else np.zeros(len(words))
    scores, rows = LexicalShard(postings).search_top([query], len(words))
    found = np.zeros(len(words))
    found[rows[0][rows[0] >= 0]] = scores[0][rows[0] >= 0]
    assert found == pytest.approx(wanted, abs=1e-5)


def test_statistics_of_parts_add_up() -> None:
    first, second = WordCounts(), WordCounts()
    first.add(["a", "a", "b"])
    second.add(["a"])
    second.add([])
    corpus = merge_statistics([first.summarize(), second.summarize()])
    assert (corpus.passages, corpus.words, corpus.mean_length) == (3, 4, 4 / 3)
    assert corpus.count_passages(pa.array(["b", "a"], pa.large_string())).tolist() == [1, 2]
    empty = WordCounts()
    empty.add([])
    (nothing,) = score([[]])
    assert (empty.summarize().mean_length, nothing.passages, len(nothing.words)) == (1.0, 1, 0)


def test_added_words_leave_those_of_the_first_build_as_they_are():
    """New words count at most as many passages as the first build had, so that their inverse frequency is positive."""
    first = WordStatistics(3, 9, pa.table({"word": ["a", "b"], "passages": [2, 1]}))
    added = WordStatistics(5, 50, pa.table({"word": ["b", "c", "d"], "passages": [5, 4, 1]}))
    both = first.extend(added)
    assert (both.passages, both.words) == (3, 9)
    assert both.frequencies.to_pydict() == {"word": ["a", "b", "c", "d"], "passages": [2, 1, 3, 1]}
