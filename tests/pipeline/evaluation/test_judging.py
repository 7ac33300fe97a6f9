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


@pytest.mark.parametrize(
    ("gold", "recall", "is_gold"), [("a", (1, 1), True), ("c#1", (0, 1), True), ("d", (0, 0), False)]
)
def test_candidate_is_judged_by_all_passages_that_it_read(
    gold: str, recall: tuple[float, float], is_gold: bool
) -> None:
    row = read("a")
    row["candidates"][0] |= {
        "beside": [{"passage_id": "b", "rank": 2}, {"passage_id": "c#1", "rank": 3}],
        "is_sup": 0.7,
    }
    row["evidence"] = [{"id": name, "text": text} for name, text in [("a", "y"), ("b", "an x"), ("c#1", "z")]]
    judged = judge({**row, "gold_passage_id": gold, "answers": ["x", "y"]})
    assert (judged.metrics["recall@1"], judged.metrics["recall@k"]) == recall
    assert judged.relevance == ((is_gold, 0.5),)
    assert judged.support == ((True, 0.7),)


def test_answer_that_no_passage_contains_is_not_borne() -> None:
    row = read("a")
    row["candidates"][0] |= {"beside": [{"passage_id": "b", "rank": 2}], "is_sup": 0.7}
    row["evidence"] = [{"id": name, "text": "y"} for name in "ab"]
    assert judge({**row, "answers": ["x", "y"]}).support == ((False, 0.7),)
