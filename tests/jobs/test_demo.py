import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.demo import (
    PASSAGES,
    QUERIES,
    DemoSet,
    demo,
    describe_answers,
    evaluate_demo,
    summarize_demo,
    write_first_rows,
)
from jobs.shell import Interrupted
from pipeline.decoding.prompts import format_passage
from pipeline.evaluation.evaluate import Evaluation, Tally
from pipeline.evaluation.judging import Judged
from pipeline.output.schema import build_data_schema
from pipeline.retrieval.encoder import Encoder

QUERY_SCHEMA = pq.read_schema(QUERIES)
FULL = QUERIES.with_name("queries_full.parquet")


def evaluation(*right: bool) -> Evaluation:
    tally = Tally()
    for n, is_right in enumerate(right):
        tally.add(str(n), Judged(True, {"match": float(is_right)}))
    return Evaluation("somewhere", {"qa": tally})


def test_demo_data_is_consistent() -> None:
    passages = {row["id"]: row for row in pq.read_table(PASSAGES).to_pylist()}
    full = {row["id"]: row for row in pq.read_table(FULL).to_pylist()}
    rows = pq.read_table(QUERIES).to_pylist()
    assert (len(passages), len(full), len(rows)) == (1271, 1190 + 236 + 2, 60 + 10 + 2)
    assert all(full[row["id"]] == row for row in rows)
    for row in full.values():
        gold = passages.get(row["gold_passage_id"])
        assert (gold is None) == (row["task"] != "qa") == (row["answers"] is None)
        assert (row["short_answers"] is None) == (row["task"] != "two_questions")
        assert gold is None or any(answer in gold["text"] for answer in row["answers"])
    assert sum(row["task"] == "qa" for row in rows) == 60


def test_demo_passage_vectors_match_the_encoder() -> None:
    rows = pq.read_table(PASSAGES).slice(600, 5).to_pylist()
    vectors = Encoder.load("demo", "cpu").encode([format_passage(row["title"], row["text"]) for row in rows])
    cosines = np.sum(vectors * np.array([row["vector"] for row in rows], np.float32), axis=1)
    np.testing.assert_allclose(cosines, 1, atol=1e-3)


def test_first_rows_of_a_query_set_are_written(tmp_path: Path) -> None:
    few = pq.read_table(write_first_rows(QUERIES, 7, tmp_path / "deep" / "few.parquet"))
    assert few.equals(pq.read_table(QUERIES).slice(0, 7))


def test_summary_compares_with_the_baselines(tmp_path: Path) -> None:
    grades = {"adaptive": (True, True, True, False), "first passage": (True, True, False, False), "never": (False,) * 4}
    evaluated = {name: evaluation(*right) for name, right in grades.items()}
    counts = {"rows": 4, "annotated": 4, "retrieved": 3, "seconds": 8.0}
    first, second, folder, page = summarize_demo(DemoSet(tmp_path, 0, counts), evaluated)
    assert first == "Answers that contain a gold answer: 75.0 % adaptive; 50.0 % first passage, 0.0 % never."
    assert second.startswith("3 of 4 rows used a passage. 4 rows in 8 s, 0.50 rows/s")
    assert folder == f"annotated set: {tmp_path}"
    assert page == f"report: {tmp_path}/report.html"


def test_answers_are_shown_with_and_without_evidence(tmp_path: Path) -> None:
    passage = {"id": "p", "title": "Normans", "text": "Rollo led them.", "retrieval_score": 0.7, "rank": 1}
    segment = {"text": "Rollo", "passage_id": "p", "is_rel": 0.91, "is_sup": 0.82, "is_use": 0.73, "score": 2.64}
    read = {"id": "1", "query": "Who led the Norse?", "answers": ["Rollo"], "answer": "Rollo", "retrieved": True}
    read |= {"retrieve_probability": 0.99, "segments": [segment], "passages": [passage]}
    unread = {"id": "2", "query": "Say hello", "answer": "Hello", "retrieved": False, "retrieve_probability": 0.01}
    unread |= {"segments": [], "passages": []}
    both = [{**segment, "text": "Rollo"}, {**segment, "text": "in 911", "score": 1.0}]
    long = {
        **read,
        "id": "3",
        "query": "Who? When?",
        "answers": None,
        "answer": "Rollo [1] in 911 [1]",
        "segments": both,
    }
    file = tmp_path / "data" / "part.parquet"
    file.parent.mkdir()
    pq.write_table(
        pa.Table.from_pylist([read, unread, long], build_data_schema(QUERY_SCHEMA, keep_candidates=True)), file
    )
    assert describe_answers(tmp_path) == [
        "Who? When?",
        "  – Rollo [1] in 911 [1] (from Normans)",
        "    p(retrieve) 0.99, IsRel 0.91, IsSup 0.82, IsUse 0.73, score 1.82",
        "Who led the Norse?",
        "  ✓ Rollo (from Normans)",
        "    p(retrieve) 0.99, IsRel 0.91, IsSup 0.82, IsUse 0.73, score 2.64",
        "Say hello",
        "  – Hello",
        "    p(retrieve) 0.01",
    ]


@pytest.mark.parametrize("step", ["build_demo_model", "get_demo_index", "annotate_demo"])
def test_interrupted_demo_can_be_continued(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted(signal.SIGTERM)

    for name in ("build_demo_model", "get_demo_index"):
        monkeypatch.setattr(f"jobs.demo.{name}", lambda: Path("index"))
    monkeypatch.setattr(f"jobs.demo.{step}", interrupt)
    with pytest.raises(Interrupted) as caught:
        demo()
    assert caught.value.resumable


@pytest.mark.slow
def test_demo_runs_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.demo", "--rows", "6", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=550, check=True)
    assert "Answers that contain a gold answer" in result.stdout
    evaluated = evaluate_demo(tmp_path / "adaptive")
    assert [(e.overall.rows, e.overall.errors) for e in evaluated.values()] == [(6, 0)] * 3
    assert evaluated["never"].overall.retrieval_rate == 0.0
    assert evaluated["first passage"].overall.retrieval_rate == 1.0
