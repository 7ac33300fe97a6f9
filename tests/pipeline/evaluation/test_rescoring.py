import asyncio
import random
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config.sections import DecodingConfig, Weights
from pipeline.decoding.profiles import Tasks, limit_segments
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.decoding.self_rag import SelfRag
from pipeline.decoding.types import Query
from pipeline.evaluation.rescoring import to_recorded
from pipeline.output.schema import build_data_schema, to_answer_row
from tests.support.fakes import DrawingGenerator, DrawingRetriever, word_tokenizer

SCHEMA = build_data_schema(pa.schema([]), keep_candidates=True)
FORMS: list[dict[str, Any]] = [
    {},
    {"segments": 5, "citations": True},
    {"segments": 4, "citations": True, "reading": "together"},
    {"segments": 4, "beam_width": 1, "mode": "always", "passages": 2},
    {"segments": 4, "constraint": "no_contradiction"},
    {"segments": 3, "constraint": "full_support", "search": "static"},
    {"segments": 3, "explore": True},
    {"mode": "never"},
]


def annotated(config: DecodingConfig, choices: tuple[str, ...] = (), rows: int = 12) -> list[dict[str, Any]]:
    """Rows as they come back from Parquet."""
    tokenizer = word_tokenizer()
    generator = DrawingGenerator(tokenizer, random.Random(0), choices or ("w1", "w2", "w3"))
    rag = SelfRag(generator, ReflectionCritic(tokenizer), Tasks(config), DrawingRetriever())
    answers = [asyncio.run(rag.answer(Query(str(n), f"Tell {n}", choices=choices))) for n in range(rows)]
    return list(pa.Table.from_pylist([to_answer_row(answer) for answer in answers], schema=SCHEMA).to_pylist())


def rechosen(row: dict[str, Any], config: DecodingConfig, choices: tuple[str, ...] = ()) -> dict[str, Any]:
    """The row as rescoring leaves it: it does not touch the searches."""
    answer = asyncio.run(to_recorded(row).rechoose(config, choices))
    (found,) = pa.Table.from_pylist([to_answer_row(answer)], schema=SCHEMA).to_pylist()
    return {**found, "searches": row["searches"]}


@pytest.mark.parametrize("choices", [(), ("yes", "no")])
@pytest.mark.parametrize("form", FORMS)
def test_rescoring_with_the_settings_of_the_run_changes_nothing(form: dict[str, Any], choices: tuple[str, ...]) -> None:
    config = DecodingConfig(keep_candidates=True, **form)
    for row in annotated(config, choices):
        assert rechosen(row, limit_segments(config, choices), choices) == row


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_explored_rows_give_the_answers_of_a_run_at_any_threshold(threshold: float) -> None:
    explored = DecodingConfig(keep_candidates=True, explore=True)
    other = explored.model_copy(update={"threshold": threshold})
    for before, run in zip(annotated(explored), annotated(other), strict=True):
        found = rechosen(before, other)
        assert {**found, "usage": None, "searches": None} == {**run, "usage": None, "searches": None}


def test_rescoring_with_new_weights_matches_a_run_with_them() -> None:
    config = DecodingConfig(keep_candidates=True, mode="always")
    other = config.model_copy(update={"weights": Weights(sequence=0.0, relevance=3.0, support=0.1, utility=0.0)})
    before, run = annotated(config, rows=30), annotated(other, rows=30)
    found = [rechosen(row, other) for row in before]
    assert [row["answer"] for row in found] == [row["answer"] for row in run]
    assert [row["answer"] for row in found] != [row["answer"] for row in before]
    for one, two in zip(found, run, strict=True):
        assert [c["score"] for c in one["candidates"]] == pytest.approx([c["score"] for c in two["candidates"]])


def test_rows_without_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="keep_candidates=true"):
        to_recorded({"candidates": None, "retrieve_probability": 0.5})


def test_candidates_of_earlier_versions_are_read() -> None:
    (row,) = annotated(DecodingConfig(keep_candidates=True, mode="always", segments=2), rows=1)
    old = [{key: c[key] for key in c if key not in ("beside", "rerank_score")} for c in row["candidates"]]
    assert to_recorded({**row, "candidates": old}).candidates == to_recorded(row).candidates
