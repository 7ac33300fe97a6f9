"""From files and datasets to a query set that can be annotated, through the command."""

import json
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.import_queries import import_queries
from pipeline.config.sections import Columns, StorageConfig
from pipeline.queries.converters import load_known_datasets
from pipeline.queries.query_set import inspect_queries
from pipeline.storage.location import locate
from tests.pipeline.queries.test_sources import lines
from tests.support.s3 import S3Server

APP = typer.Typer()
APP.command()(import_queries)


def run(source: object, output: object, *options: str) -> Result:
    return CliRunner().invoke(APP, ["--source", str(source), "--output", str(output), *options])


def read(folder: Path) -> list[dict[str, Any]]:
    return list(pa.concat_tables(map(pq.read_table, sorted(folder.iterdir()))).to_pylist())


MAPPED = ["--column", "query=question", "--column", "answers=answer.aliases"]


CSV = """q,gold,year
Who?,"['Paris', 'Lutetia']",1
When?,"[1969, 1970]",nan
Where?,None,2
NaN,x,3
"""
LINES = """{"q": "Who?", "gold": ["Paris", "Lutetia", NaN], "year": 1}
{"q": "When?", "gold": "[1969, 1970]", "year": NaN}
{"q": "Where?", "gold": NaN, "year": 2}
{"q": NaN, "gold": "x", "year": 3}
"""


@pytest.mark.parametrize(("name", "content"), [("a.csv", CSV), ("a.jsonl", LINES)])
def test_markers_of_missing_values_and_written_lists_are_understood(
    name: str, content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_text(content)
    result = run(tmp_path / name, tmp_path / "set", "--column", "query=q", "--column", "answers=gold", "--skip-bad")
    assert result.exit_code == 3, result.stderr
    assert "row 3: the query is empty" in caplog.text
    found = pq.read_table(tmp_path / "set").to_pylist()
    assert [(row["query"], row["answers"]) for row in found] == [
        ("Who?", ["Paris", "Lutetia"]),
        ("When?", ["1969", "1970"]),
        ("Where?", None),
    ]


def test_float_columns_of_pandas_lose_their_nan(tmp_path: Path) -> None:
    columns = {"id": [1.0, 2.0], "query": ["Who?", "When?"], "answers": [1969.0, float("nan")]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert run(tmp_path / "a.parquet", tmp_path / "set").exit_code == 0
    found = pq.read_table(tmp_path / "set").to_pylist()
    assert [(row["id"], row["answers"]) for row in found] == [("1.0", ["1969.0"]), ("2.0", None)]


def test_passages_of_released_files_need_no_ids(tmp_path: Path) -> None:
    contexts = [{"title": "a", "text": "one"}, {"title": "b", "text": "two"}, {"title": "a", "text": "one"}]
    lines(tmp_path / "a.jsonl", {"question": "Who?", "ctxs": contexts})
    mapped = ["--column", "query=question", "--column", "passages=ctxs"]
    assert run(tmp_path / "a.jsonl", tmp_path / "set", *mapped).exit_code == 0
    (row,) = pq.read_table(tmp_path / "set").to_pylist()
    ids = [passage["id"] for passage in row["passages"]]
    assert [passage["text"] for passage in row["passages"]] == ["one", "two", "one"]
    assert ids[2] == f"{ids[0]}-2"
    assert len(set(ids)) == 3


def test_json_lines_become_a_valid_query_set(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": {"aliases": ["a", str(n)]}, "year": n} for n in range(3)]
    file = lines(tmp_path / "in.jsonl", *rows)
    result = run(file, tmp_path / "set", *MAPPED, "--task", "triviaqa", "--limit", "2", "--drop", "answer")
    assert result.exit_code == 0, result.output
    assert f"query set: {tmp_path}/set, 2 rows in 1 files" in result.stderr
    found = read(tmp_path / "set")
    ids = [row.pop("id") for row in found]
    assert found == [{"query": f"q{n}", "task": "triviaqa", "answers": ["a", str(n)], "year": n} for n in range(2)]
    checked = inspect_queries(locate(str(tmp_path / "set"), StorageConfig()), Columns(), 256)
    assert (checked.rows, checked.tasks, checked.given) == (2, {"triviaqa": 2}, False)
    assert run(file, tmp_path / "again", *MAPPED).exit_code == 0
    assert [row["id"] for row in read(tmp_path / "again")][:2] == ids


def test_imported_set_loads_with_datasets(tmp_path: Path) -> None:
    run(lines(tmp_path / "in.jsonl", {"query": "q", "choices": ["a", "b"]}), tmp_path / "set")
    (row,) = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    assert (row["query"], row["choices"]) == ("q", ["a", "b"])


# As the hub has them: the dataset's name here, its configuration and split, a row, and what the row becomes.
HUB_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "popqa": (
        {"id": 4222362, "question": "What?", "possible_answers": '["politician", "leader"]', "s_pop": 142},
        {"id": "4222362", "query": "What?", "answers": ["politician", "leader"], "s_pop": 142},
    ),
    "triviaqa": (
        {"question_id": "tc_2", "question": "Who?", "answer": {"aliases": ["A", "B"], "value": "A"}},
        {"id": "tc_2", "query": "Who?", "answers": ["A", "B"], "answer": {"aliases": ["A", "B"], "value": "A"}},
    ),
    "nq": (
        {"question": "when", "answer": ["1870", "1871"]},
        {"query": "when", "answers": ["1870", "1871"]},
    ),
    "arc_challenge": (
        {"id": "M_7", "question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        {"id": "M_7", "query": "Why?\nA: x\nB: y", "choices": ["A", "B"], "answers": ["B"]},
    ),
    "fever": (
        {"id": "9", "input": "A claim.", "output": [{"answer": "REFUTES"}]},
        {"id": "9", "query": "A claim.", "answers": ["REFUTES"], "output": [{"answer": "REFUTES"}]},
    ),
    "asqa": (
        {
            "sample_id": -5,
            "ambiguous_question": "Who won?",
            "qa_pairs": [{"short_answers": ["a", "b"]}, {"short_answers": ["c"]}],
            "annotations": [{"long_answer": "A long one."}],
        },
        {
            "id": "-5",
            "query": "Who won?",
            "answers": ["A long one."],
            "short_answers": [["a", "b"], ["c"]],
            "qa_pairs": [{"short_answers": ["a", "b"]}, {"short_answers": ["c"]}],
            "annotations": [{"long_answer": "A long one."}],
        },
    ),
    "eli5": (
        {"id": "x", "input": "why?", "output": [{"answer": "Because."}, {"answer": ""}]},
        {"id": "x", "query": "why?", "answers": ["Because."], "output": [{"answer": "Because."}, {"answer": ""}]},
    ),
}


@pytest.mark.parametrize("name", load_known_datasets())
def test_known_dataset_needs_only_its_name(name: str, tmp_path: Path) -> None:
    """The hub cannot be asked in a test: a folder of the same form stands in its place."""
    known, (row, expected) = load_known_datasets()[name], HUB_ROWS[name]
    lines(tmp_path / "hub" / "file.jsonl", row)
    files = {"config_name": known.name or "default", "data_files": [{"split": known.split, "path": "file.jsonl"}]}
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n- {json.dumps(files)}\n---\n")
    result = run(f"hf:{tmp_path / 'hub'}", tmp_path / "set", "--dataset", name)
    assert result.exit_code == 0, result.output
    (found,) = read(tmp_path / "set")
    assert {"id": found["id"], "task": name, **expected} == found


def test_import_reads_from_and_writes_to_object_storage(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    file = lines(tmp_path / "in.jsonl", {"query": "q", "id": 1})
    with s3.filesystem().open_output_stream(f"{s3.bucket}/import/in.jsonl") as stream:
        stream.write(file.read_bytes())
    source, output = f"s3://{s3.bucket}/import/in.jsonl", f"s3://{s3.bucket}/import/set"
    for _ in range(2):
        result = run(source, output, "--overwrite")
        assert result.exit_code == 0, result.output
        time.sleep(1.5)  # the server's listings are a second old
    table = pq.read_table(f"{s3.bucket}/import/set/queries-00000.parquet", filesystem=s3.filesystem())
    assert table.to_pylist() == [{"id": "1", "query": "q"}]
    missing = run(file, "s3://no-such-bucket/set")
    assert (missing.exit_code, "no bucket 'no-such-bucket'" in missing.stderr) == (2, True)


BAD = [{"id": "1", "query": "q"}, {"id": "2", "query": " "}, {"id": "1", "query": "r"}, {"id": "3", "query": "s"}]


def test_first_bad_row_ends_an_import_before_anything_is_written(tmp_path: Path) -> None:
    file = lines(tmp_path / "in.jsonl", *BAD)
    result = run(file, tmp_path / "set")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {file} row 1: the query is empty (columns: id, query; map them with --column); ")
    assert not (tmp_path / "set").exists()


def test_bad_rows_are_logged_and_skipped_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = lines(tmp_path / "in.jsonl", *BAD)
    file.write_text(f"{file.read_text()}{{broken\n")
    result = run(file, tmp_path / "set", "--skip-bad")
    assert result.exit_code == 3, result.output
    assert [row["id"] for row in read(tmp_path / "set")] == ["1", "3"]
    assert f"skipped: {file} row 1: the query is empty" in caplog.text
    assert f"skipped: {file} row 2: id '1' is not unique" in caplog.text
    assert f"skipped: {file} row 4: not JSON" in caplog.text
    assert "2 rows in 1 files, 3 bad rows skipped" in result.stderr


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--source", "nowhere.jsonl"], "nowhere.jsonl: not found"),
        (["--source", "IN", "--split", "test"], "--split is for Hugging Face datasets"),
        (["--source", "IN", "--dataset", "popqua"], "--dataset popqua: expected one of popqa, triviaqa"),
        ([], "--source or --dataset is required"),
        (["--source", "IN", "--column", "query"], "--column query: expected NAME=COLUMN"),
        (["--source", "IN", "--column", "question=query"], "a query set has the columns id, query"),
        (["--source", "IN", "--column", "answers=gold"], "--column answers=gold: empty in every row"),
        (
            ["--source", "IN", "--column", "query=question"],
            "row 0: the query is empty (no column 'question'; columns: query, n; map them with --column)",
        ),
        (["--source", "EMPTY"], "no rows to import (0 bad rows skipped)"),
        (["--source", "FOLDER"], "one contains the other"),
        (["--source", "IN", "--set", "model.name=x"], "only storage.* can be set here"),
    ],
)
def test_bad_usage_gives_one_line_and_status_2(options: list[str], problem: str, tmp_path: Path) -> None:
    places = {"IN": str(lines(tmp_path / "in.jsonl", {"query": "q", "n": 1})), "FOLDER": str(tmp_path)}
    places["EMPTY"] = str(lines(tmp_path / "empty.jsonl"))
    words = [places.get(word, word) for word in options]
    result = CliRunner().invoke(APP, ["--output", str(tmp_path / "set"), *words])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert problem in line
    assert not (tmp_path / "set").exists()


def test_existing_set_is_replaced_only_on_request(tmp_path: Path) -> None:
    file = lines(tmp_path / "in.jsonl", {"query": "q"})
    assert run(file, tmp_path / "set").exit_code == 0
    lines(file, {"query": "new"})
    refused = run(file, tmp_path / "set")
    assert (refused.exit_code, "holds a query set" in refused.stderr) == (2, True)
    assert run(file, tmp_path / "set", "--overwrite").exit_code == 0
    assert [row["query"] for row in read(tmp_path / "set")] == ["new"]
