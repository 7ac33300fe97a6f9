import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.evaluate import evaluate
from pipeline.config.sections import StorageConfig
from pipeline.evaluation.evaluate import (
    Evaluation,
    answer_from_first_passage,
    answer_without_retrieval,
    evaluate_set,
    keep_row,
)
from pipeline.output.folder import FORMAT_VERSION
from pipeline.output.schema import CANDIDATE_FIELDS
from pipeline.storage.location import locate
from tests.jobs.test_rescore import annotated_set

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("answer", pa.string()),
        ("retrieved", pa.bool_()),
        ("answers", pa.list_(pa.string())),
        ("gold_passage_id", pa.string()),
        *CANDIDATE_FIELDS,
    ]
)


def candidates(*pairs: tuple[str, float | None]) -> list[dict[str, Any]]:
    return [{"text": "", "passage_id": p, "is_rel": is_rel, "rank": n} for n, (p, is_rel) in enumerate(pairs, 1)]


def judged(folder: Path, **options: Any) -> Evaluation:
    return evaluate_set(locate(str(folder), StorageConfig()), **options)


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
SECOND_FILE: list[dict[str, Any]] = [
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


@pytest.mark.parametrize(("options", "match", "exact"), [((), 0.0, 0.0), (("--squad",), 1.0, 1.0)])
def test_numbers_differ_by_their_signs_unless_squad_is_asked_for(
    tmp_path: Path, options: tuple[str, ...], match: float, exact: float
) -> None:
    rows = [{"id": "1", "task": "qa", "answer": "3.5", "retrieved": False, "answers": ["35"]}]
    write_rows(tmp_path / "data" / "part-a.parquet", rows)
    metrics = json.loads(run("--annotations", str(tmp_path), "--json", "-", *options).stdout)["overall"]["metrics"]
    assert (metrics["match"]["mean"], metrics["exact_match"]["mean"]) == (match, exact)


def test_figures_are_computed_by_task_and_overall(annotated: Path) -> None:
    evaluation = judged(annotated)
    assert list(evaluation.by_group) == ["(none)", "instruction", "qa"]
    qa = evaluation.by_group["qa"]
    assert (qa.rows, qa.errors, qa.retrieval_rate) == (2, 1, 1.0)
    assert (qa.metrics["match"].mean, qa.metrics["exact_match"].mean, qa.metrics["match"].rows) == (0.5, 0.5, 2)
    # "in 911" shares "in" with "in year 912": 2 * 1 / (2 + 3)
    assert qa.metrics["f1"].mean == pytest.approx((1 + 0.4) / 2)
    assert qa.isrel is not None
    assert qa.isrel.auc == 0.75  # 0.9 and 0.3 against 0.4 and 0.2
    assert qa.isrel.judged == 4  # one wrote no IsRel
    assert evaluation.by_group["instruction"].metrics == {}
    overall = evaluation.overall
    assert (overall.rows, overall.errors, overall.retrieval_rate) == (4, 1, 0.5)
    assert overall.metrics["match"].mean == pytest.approx(1 / 3)


def test_recall_is_computed_for_the_first_search(annotated: Path) -> None:
    metrics = judged(annotated, task="qa").overall.metrics
    assert {name: m.mean for name, m in metrics.items() if "recall" in name} == {"recall@1": 1.0, "recall@k": 1.0}


def test_figures_can_be_grouped_by_any_column(annotated: Path) -> None:
    evaluation = judged(annotated, by="gold_passage_id")
    assert {name: figures.rows for name, figures in evaluation.by_group.items()} == {"(none)": 2, "p1": 1, "p2": 1}


def test_missing_answer_counts_as_wrong(annotated: Path) -> None:
    figures = judged(annotated).by_group["(none)"]
    assert (figures.metrics["match"].mean, figures.metrics["match"].rows, figures.isrel) == (0.0, 1, None)


def test_one_task_can_be_selected(annotated: Path) -> None:
    evaluation = judged(annotated, task="qa")
    assert list(evaluation.by_group) == ["qa"]
    assert evaluation.overall == evaluation.by_group["qa"]


def test_relevance_figure_requires_candidates(tmp_path: Path) -> None:
    plain = pa.schema([SCHEMA.field(name) for name in ("id", "answer", "retrieved", "answers")])
    write_rows(tmp_path / "data" / "part.parquet", [{k: FIRST_FILE[0][k] for k in plain.names}], plain)
    assert judged(tmp_path).overall.isrel is None


def test_closed_set_is_graded_by_label(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "answer": "A", "retrieved": False, "answers": ["A"], "choices": ["A", "B"]},
        {"id": "2", "answer": "A", "retrieved": False, "answers": ["B"], "choices": ["A", "B"]},
    ]
    schema = pa.schema([SCHEMA.field(name) for name in ("id", "answer", "retrieved", "answers")])
    schema = schema.append(pa.field("choices", pa.list_(pa.string())))
    write_rows(tmp_path / "data" / "part.parquet", rows, schema)
    assert {n: m.mean for n, m in judged(tmp_path).overall.metrics.items()} == {"accuracy": 0.5}


def test_tasks_and_column_names_come_from_the_manifest(tmp_path: Path) -> None:
    row = {"qid": "1", "kind": "essay", "answer": "The Normans came. [1]", "retrieved": True}
    row["answers"] = ["Normans came"]
    names = {"id": "qid", "task": "kind"}
    fields = [SCHEMA.field(name) for name in ("id", "task", "answer", "retrieved", "answers")]
    schema = pa.schema([field.with_name(names.get(field.name, field.name)) for field in fields])
    write_rows(tmp_path / "data" / "part.parquet", [row], schema)
    manifest = {
        "format_version": FORMAT_VERSION,
        "configuration": {"columns": names},
        "tasks": {"essay": {"metric": "rouge_l", "choices": [], "decoding": {"citations": False}}},
    }
    (tmp_path / "_manifest.json").write_text(json.dumps(manifest))
    assert judged(tmp_path).by_group["essay"].metrics["rouge_l"].mean == pytest.approx(0.8)


def test_sets_are_compared_row_by_row(annotated: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_rows(other / "data" / "part.parquet", [{**FIRST_FILE[0], "answer": "Danes"}, FIRST_FILE[1]])
    found = judged(annotated).compare_with(judged(other))["match"]
    assert (found.rows, found.mean) == (2, 0.5)  # rows 3 and 4 are not in both
    assert found.p_value == 1.0  # one unequal row proves nothing


def test_command_prints_a_table_with_baselines_and_writes_json(annotated: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    result = run("--annotations", str(annotated), "--baseline", f"first={annotated}", "--json", str(file))
    assert result.exit_code == 0
    assert "first" in result.stdout
    assert "33.3 ±" in result.stdout
    assert "Difference from each baseline" in result.stdout
    figures = json.loads(file.read_text())
    assert figures["groups"]["qa"]["isrel"]["auc"] == 0.75
    assert figures["baselines"]["first"]["difference"]["match"]["mean"] == 0.0
    assert figures["overall"]["errors"] == 1
    assert figures["baselines"]["first"]["overall"] == figures["overall"]


def test_reliability_is_printed_on_request(annotated: Path) -> None:
    assert "Reliability" not in run("--annotations", str(annotated)).stdout
    shown = run("--annotations", str(annotated), "--reliability").stdout
    assert "Reliability of IsRel" in shown


def test_stdout_holds_only_the_requested_json(annotated: Path) -> None:
    result = run("--annotations", str(annotated), "--json", "-")
    assert json.loads(result.stdout)["overall"]["rows"] == 4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--annotations", "nowhere"], "no Parquet files"),
        (["--annotations", "SET", "--task", "bio"], "no rows of task 'bio'"),
        (["--annotations", "SET", "--baseline", "SET"], "expected NAME=URI"),
        (["--annotations", "SET", "--by", "taks"], "no column 'taks'"),
    ],
)
def test_bad_input_gives_one_line_and_status_2(annotated: Path, arguments: list[str], complaint: str) -> None:
    result = run(*[word.replace("SET", str(annotated)) for word in arguments])
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_set_without_gold_is_evaluated_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = pa.schema([SCHEMA.field(name) for name in ("id", "answer", "retrieved")])
    write_rows(tmp_path / "data" / "part.parquet", [{"id": "1", "answer": "x", "retrieved": True}], plain)
    assert judged(tmp_path).overall.metrics == {}
    assert "has no gold answers or passages (columns answers, short_answers, gold_passage_id)" in caplog.text


def test_gold_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    schema = pa.schema([SCHEMA.field(name) for name in ("id", "answer", "retrieved")])
    schema = schema.append(pa.field("short_answers", pa.list_(pa.string())))
    row = {"id": "1", "answer": "x", "retrieved": True, "short_answers": ["x"]}
    write_rows(tmp_path / "data" / "part.parquet", [row], schema)
    assert "column 'short_answers' is list<" in run("--annotations", str(tmp_path)).stderr


def test_null_gold_answers_are_ignored(tmp_path: Path) -> None:
    row = {"id": "1", "answer": "x", "retrieved": False, "answers": [None, "x"]}
    write_rows(tmp_path / "data" / "part.parquet", [row, {**row, "id": "2", "answers": [None]}])
    assert judged(tmp_path).overall.metrics["match"].rows == 1


def test_rows_are_exported_for_alce_and_factscore(tmp_path: Path) -> None:
    run_folder = annotated_set(tmp_path / "run", keep_candidates=True)
    alce, lines = tmp_path / "alce.json", tmp_path / "factscore.jsonl"
    flags = ["--alce", str(alce), "--factscore", str(lines), "--task", "label"]
    assert run("--annotations", str(run_folder), *flags).exit_code == 0
    assert len(json.loads(alce.read_text())["data"]) == len(lines.read_text().splitlines()) == 20


def test_unfinished_set_is_evaluated_with_a_warning(annotated: Path, caplog: pytest.LogCaptureFixture) -> None:
    (annotated / "_SUCCESS").unlink()
    assert judged(annotated).overall.rows == 4
    assert "_SUCCESS" in caplog.text


def test_views_replace_the_answer_with_another_candidate() -> None:
    read = {"rank": 2, "text": "Paris", "parent": None, "opening": "[Retrieval]"}
    first = {**read, "rank": 1, "text": "Rome"}
    alone = {"rank": None, "text": "Hello", "parent": None, "opening": "[No Retrieval]"}
    row = {"answer": "Paris", "candidates": [read, first, alone]}
    assert answer_from_first_passage(row) == {**row, "answer": "Rome", "retrieved": True}
    assert answer_without_retrieval(row) == {**row, "answer": "Hello", "retrieved": False, "candidates": []}
    assert keep_row(row) == row


def test_views_keep_or_drop_rows_without_the_needed_candidate() -> None:
    alone = {"rank": None, "text": "Hello", "parent": None, "opening": "[No Retrieval]"}
    row = {"answer": "Hello", "candidates": [alone]}
    assert answer_from_first_passage(row) == row
    assert answer_from_first_passage({"answer": "Hello"}) == {"answer": "Hello"}
    assert answer_from_first_passage({"answer": "a b", "candidates": [alone, {**alone, "parent": 0}]}) is None
    assert answer_from_first_passage({"answer": "a", "candidates": [{**alone, "rank": 1, "beside": [alone]}]}) is None


def test_views_of_a_closed_set_give_a_choice() -> None:
    first = {"rank": 1, "text": "B: because", "parent": None, "opening": "[Retrieval]"}
    seen = answer_from_first_passage({"answer": "A", "candidates": [first], "choices": ["A", "B"]})
    assert seen is not None
    assert seen["answer"] == "B"
