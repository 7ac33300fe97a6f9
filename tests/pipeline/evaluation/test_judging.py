from typing import Any

import pytest

from pipeline.evaluation.judging import judge


def read(*passage_ids: str) -> dict[str, Any]:
    """A row whose first search found these passages."""
    candidates = [
        {"passage_id": name, "rank": rank, "parent": None, "is_rel": 0.5, "is_sup": None, "text": "x"}
        for rank, name in enumerate(passage_ids, 1)
    ]
    return {"answer": "x", "retrieved": True, "segments": [], "candidates": candidates, "evidence": []}


@pytest.mark.parametrize(
    ("found", "gold", "recall", "relevance"),
    [
        (["a", "b"], "a", (1, 1), [True, False]),
        (["b", "a"], "a", (0, 1), [False, True]),
        (["a#2", "b"], "a", (1, 1), [True, False]),
        (["b", "a#2", "a#1"], "a", (0, 1), [False, True, True]),
        (["a#2", "a#1"], "a#1", (0, 1), [False, True]),
        (["b#1", "ab#1"], "a", (0, 0), [False, False]),
        (["a#1#3"], "a#1", (1, 1), [True]),
        (["a"], "a#1", (0, 0), [False]),
    ],
)
def test_part_of_the_gold_passage_counts_as_the_gold_passage(
    found: list[str], gold: str, recall: tuple[float, float], relevance: list[bool]
) -> None:
    judged = judge({**read(*found), "gold_passage_id": gold})
    assert (judged.metrics["recall@1"], judged.metrics["recall@k"]) == recall
    assert [is_gold for is_gold, _ in judged.relevance] == relevance
