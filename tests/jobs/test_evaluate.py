import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.evaluate import evaluate, evaluate_set, first_passage

CANDIDATE = pa.struct([("text", pa.string()), ("passage_id", pa.string()), ("is_rel", pa.float64())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("answer", pa.string()),
        ("retrieved", pa.bool_()),
        ("answers", pa.list_(pa.string())),
        ("gold_passage_id", pa.string()),
        ("candidates", pa.list_(CANDIDATE)),
    ]
)


def candidates(*pairs: tuple[str, float | None]) -> list[dict[str, Any]]:
    return [{"text": "", "passage_id": passage, "is_rel": is_rel} for passage, is_rel in pairs]


FIRST_FILE = [
    {
        "id": "1",
        "task": "qa",
        "answer": "the Normans",
        "retrieved": True,
        "answers": ["Normans"],
        "gold_passage_id": "p1",
        "candidates": candidates(("p1", 0.9), ("p2", 0.4), ("p3", None)),
    },
    {
        "id": "2",
        "task": "qa",
        "answer": "in 911",
        "retrieved": True,
        "answers": ["912", "in the year 912"],
        "gold_passage_id": "p2",
        "candidates": candidates(("p2", 0.3), ("p1", 0.2)),
    },
]
SECOND_FILE = [
    {"id": "3", "task": "instruction", "answer": "Hello!", "retrieved": False},
    {"id": "4", "task": None, "answer": None, "retrieved": False, "answers": ["x"], "gold_passage_id": None},
]


def write_rows(file: Path, rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    folder = tmp_path / "annotated"
    write_rows(folder / "data" / "part-a.parquet", FIRST_FILE)
    write_rows(folder / "data" / "part-b.parquet", SECOND_FILE)
    errors = pa.schema([("id", pa.string()), ("task", pa.string()), ("error_type", pa.string())])
    write_rows(folder / "errors" / "part-a.parquet", [{"id": "5", "task": "qa", "error_type": "ValueError"}], errors)
    (folder / "_SUCCESS").touch()
    return folder


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(evaluate)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})


def test_figures_by_task_and_overall(annotated: Path) -> None:
    evaluation = evaluate_set(str(annotated))
    assert list(evaluation.tasks) == ["(none)", "instruction", "qa"]
    qa = evaluation.tasks["qa"]
    assert (qa.rows, qa.errors, qa.graded, qa.retrieval_rate) == (2, 1, 2, 1.0)
    assert (qa.match, qa.exact_match) == (0.5, 0.5)
    assert qa.f1 == pytest.approx((1 + 0.4) / 2)  # "in 911" shares "in" with "in year 912": 2 * 1 / (2 + 3)
    assert qa.isrel_auc == 0.75  # 0.9 and 0.3 against 0.4 and 0.2
    assert evaluation.tasks["instruction"].match is None
    overall = evaluation.overall
    assert (overall.rows, overall.errors, overall.graded, overall.retrieval_rate) == (4, 1, 3, 0.5)
    assert overall.match == pytest.approx(1 / 3)


def test_a_missing_answer_counts_as_wrong_and_not_as_absent(annotated: Path) -> None:
    scores = evaluate_set(str(annotated)).tasks["(none)"]
    assert (scores.graded, scores.match, scores.isrel_auc) == (1, 0.0, None)


def test_one_task_only(annotated: Path) -> None:
    evaluation = evaluate_set(str(annotated), task="qa")
    assert list(evaluation.tasks) == ["qa"]
    assert evaluation.overall == evaluation.tasks["qa"]


def test_without_candidates_there_is_no_relevance_figure(tmp_path: Path) -> None:
    plain = pa.schema([SCHEMA.field(name) for name in ("id", "answer", "retrieved", "answers")])
    write_rows(tmp_path / "data" / "part.parquet", [{k: FIRST_FILE[0][k] for k in plain.names}], plain)
    assert evaluate_set(str(tmp_path)).overall.isrel_auc is None


def test_command_shows_a_table_with_baselines_and_writes_json(annotated: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    result = run("--annotations", str(annotated), "--baseline", f"first={annotated}", "--json", str(file))
    assert result.exit_code == 0
    assert "first" in result.stdout
    assert "33.3 %" in result.stdout
    figures = json.loads(file.read_text())
    assert figures["tasks"]["qa"]["isrel_auc"] == 0.75
    assert figures["overall"]["errors"] == 1
    assert figures["baselines"]["first"]["overall"] == figures["overall"]


def test_json_on_stdout_is_all_that_is_on_stdout(annotated: Path) -> None:
    result = run("--annotations", str(annotated), "--json", "-")
    assert json.loads(result.stdout)["overall"]["rows"] == 4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--annotations", "nowhere"], "no Parquet files"),
        (["--annotations", "SET", "--task", "bio"], "no rows of task 'bio'"),
        (["--annotations", "SET", "--baseline", "SET"], "expected NAME=URI"),
    ],
)
def test_bad_input_is_one_line_and_status_2(annotated: Path, arguments: list[str], complaint: str) -> None:
    result = run(*[word.replace("SET", str(annotated)) for word in arguments])
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_set_without_gold_answers_is_refused_by_name(tmp_path: Path) -> None:
    plain = pa.schema([SCHEMA.field(name) for name in ("id", "answer", "retrieved")])
    write_rows(tmp_path / "data" / "part.parquet", [{"id": "1", "answer": "x", "retrieved": True}], plain)
    result = run("--annotations", str(tmp_path))
    assert result.exit_code == 2
    assert "no column 'answers'; it has id, answer, retrieved" in result.stderr


def test_an_unfinished_set_is_evaluated_with_a_warning(annotated: Path, caplog: pytest.LogCaptureFixture) -> None:
    (annotated / "_SUCCESS").unlink()
    assert evaluate_set(str(annotated)).overall.rows == 4
    assert "_SUCCESS" in caplog.text


def test_first_passage_view_answers_from_rank_one() -> None:
    candidates = [{"rank": 2, "text": "Paris"}, {"rank": 1, "text": "Rome"}]
    assert first_passage({"answer": "Paris", "candidates": candidates})["answer"] == "Rome"
    assert first_passage({"answer": "Hello", "candidates": [{"rank": None, "text": "Hello"}]})["answer"] == "Hello"
    assert first_passage({"answer": "Hello"})["answer"] == "Hello"
