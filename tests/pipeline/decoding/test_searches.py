from dataclasses import replace
from typing import Any

import pytest

from pipeline.decoding.searches import digest_passages, record_searches
from pipeline.decoding.types import Passage, RetrievedPassage

ONE = RetrievedPassage(Passage("p1", "Title", "Text", '{"year": 2000}'), 0.9, 1)
TWO = RetrievedPassage(Passage("p2", "", "Té\ud800xt"), 0.8, 2, 1.5)
DIGEST = digest_passages([ONE, TWO])


def test_scores_and_ranks_do_not_count() -> None:
    assert len(DIGEST) == 32
    assert digest_passages([replace(ONE, score=0.1, rank=7, rerank_score=3.0), TWO]) == DIGEST


@pytest.mark.parametrize("change", [{"id": "p3"}, {"title": "title"}, {"text": "Text."}, {"metadata": None}])
def test_every_field_of_a_passage_counts(change: dict[str, Any]) -> None:
    assert digest_passages([replace(ONE, passage=replace(ONE.passage, **change)), TWO]) != DIGEST


def test_order_and_number_count() -> None:
    found = [[], [ONE], [TWO], [TWO, ONE], [ONE, TWO, TWO]]
    assert len({DIGEST, *map(digest_passages, found)}) == 6


def test_fields_are_not_run_together() -> None:
    parted = [RetrievedPassage(Passage("a", "b", text), None, 1) for text in ("", 'c"]')]
    joined = [RetrievedPassage(Passage('a","b', "", 'c"]'), None, 1)]
    assert digest_passages(parted[1:]) != digest_passages(joined)


def test_searches_are_listed_by_text() -> None:
    records = record_searches({"Who? Later": [TWO], "Who?": [ONE, TWO], "Why?": []})
    assert [(one.text, one.digest) for one in records] == [
        ("Who?", DIGEST),
        ("Who? Later", digest_passages([TWO])),
        ("Why?", digest_passages([])),
    ]
