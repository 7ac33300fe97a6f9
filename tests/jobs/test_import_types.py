"""Values that Python cannot hold, or holds only in part, pass an import and an evaluation unchanged."""

import json
import uuid
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import Columns, StorageConfig
from pipeline.evaluation.evaluate import evaluate_set
from pipeline.queries.query_set import inspect_queries
from pipeline.storage.location import locate
from tests.jobs.test_import_queries import run

INFINITY = 2**31 - 1
# Stored number and type of a value.
UNUSUAL: dict[str, tuple[Any, pa.DataType]] = {
    "nanoseconds of a day": (1, pa.time64("ns")),
    "nanoseconds of a date": (1_700_000_000_123_456_789, pa.timestamp("ns")),
    "infinite date of DuckDB": (INFINITY, pa.date32()),
    "negative infinite date": (-INFINITY, pa.date32()),
    "infinite timestamp of DuckDB": (2**63 - 1, pa.timestamp("us")),
    "year 10000": (253_402_300_800, pa.timestamp("s")),
    "year 0": (-62_167_219_200_000, pa.timestamp("ms")),
    "unknown time zone": (0, pa.timestamp("us", "Mars/Olympus")),
    "offset as time zone": (0, pa.timestamp("us", "+05:30")),
    "long duration": (2**62, pa.duration("s")),
    "nanoseconds of a duration": (1, pa.duration("ns")),
    "large unsigned integer": (2**64 - 1, pa.uint64()),
}


@pytest.fixture(autouse=True)
def no_wait_for_other_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.lease.SETTLE_S", 0)


@pytest.mark.parametrize("name", UNUSUAL)
def test_values_that_python_cannot_hold_are_imported(name: str, tmp_path: Path) -> None:
    number, kind = UNUSUAL[name]
    storage = pa.uint64() if kind == pa.uint64() else pa.int32() if kind == pa.date32() else pa.int64()
    values = pa.array([number, None], storage).cast(kind)
    nested = pa.StructArray.from_arrays([values], ["at"])
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": ["1", "2"], "query": ["a", "b"], "x": values, "n": nested}), file)
    stored = pq.read_table(file)  # Parquet has no seconds
    result = run(file, tmp_path / "set")
    assert result.exit_code == 0, result.output
    found = pq.read_table(tmp_path / "set")
    assert found["x"].combine_chunks().equals(stored["x"].combine_chunks())
    assert found["n"].combine_chunks().equals(stored["n"].combine_chunks())
    inspect_queries(locate(str(tmp_path / "set"), StorageConfig()), Columns(), 256)


@pytest.mark.parametrize("name", UNUSUAL)
def test_values_that_python_cannot_hold_are_groups_of_an_evaluation(name: str, tmp_path: Path) -> None:
    number, kind = UNUSUAL[name]
    storage = pa.uint64() if kind == pa.uint64() else pa.int32() if kind == pa.date32() else pa.int64()
    answers = {"id": ["1", "2"], "answer": ["a", "b"], "retrieved": [True, True], "answers": [["a"], ["a"]]}
    (tmp_path / "data").mkdir()
    values = pa.array([number, None], storage).cast(kind)
    pq.write_table(pa.table({**answers, "x": values}), tmp_path / "data" / "part-0.parquet")
    groups = evaluate_set(locate(str(tmp_path), StorageConfig()), by="x").by_group
    assert sorted(group.rows for group in groups.values()) == [1, 1]
    assert "(none)" in groups


@pytest.mark.parametrize("unreadable", ["infinite date of DuckDB", "unknown time zone"])
def test_read_column_with_a_value_that_python_cannot_hold_is_named(unreadable: str, tmp_path: Path) -> None:
    number, kind = UNUSUAL[unreadable]
    storage = pa.int32() if kind == pa.date32() else pa.int64()
    gold = pa.array([None, number], storage).cast(kind)
    pq.write_table(pa.table({"id": ["1", "2"], "query": ["a", "b"], "gold": gold}), tmp_path / "a.parquet")
    result = run(tmp_path / "a.parquet", tmp_path / "set", "--column", "answers=gold")
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "a.parquet row 1: column 'gold' has a value that cannot be read: " in line
    assert run(tmp_path / "a.parquet", tmp_path / "set", "--drop", "gold").exit_code == 0


def test_ids_of_duckdb_become_text(tmp_path: Path) -> None:
    ids = [uuid.uuid4(), uuid.uuid4()]
    columns = {"id": pa.array([one.bytes for one in ids], pa.uuid()), "query": ["a", "b"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert run(tmp_path / "a.parquet", tmp_path / "set").exit_code == 0
    assert pq.read_table(tmp_path / "set")["id"].to_pylist() == [str(one) for one in ids]


def test_dropped_column_that_cannot_be_read_is_no_hindrance(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    bad = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(
        pa.table({"id": ["1"], "query": ["a"], "bad": bad, "x": pa.array([["v"]], pa.list_(pa.string()))}), file
    )
    refused = run(file, tmp_path / "set")
    assert refused.exit_code == 2
    assert "a.parquet row 0: column 'bad' is not valid: Invalid UTF8" in refused.stderr
    assert run(file, tmp_path / "set", "--drop", "bad").exit_code == 0
    assert pq.read_table(tmp_path / "set").to_pylist() == [{"id": "1", "query": "a", "x": ["v"]}]


@pytest.mark.parametrize("name", ["part-0.parquet", "part-0.jsonl", "part-0.csv"])
def test_partition_columns_are_imported(name: str, tmp_path: Path) -> None:
    for number, (task, day) in enumerate([("popqa", "2024-01-01"), ("zo%C3%AB", "2024-01-02")]):
        folder = tmp_path / "in" / f"task={task}" / f"day={day}" / f"n={number}"
        folder.mkdir(parents=True)
        if name.endswith("parquet"):
            pq.write_table(pa.table({"query": [f"q{number}"]}), folder / name)
        else:
            (folder / name).write_text(f"query\nq{number}\n" if "csv" in name else f'{{"query": "q{number}"}}')
    result = run(tmp_path / "in", tmp_path / "set")
    assert result.exit_code == 0, result.output
    found = pq.read_table(tmp_path / "set").drop_columns("id")
    assert [json.dumps(row, default=str, ensure_ascii=False) for row in found.to_pylist()] == [
        '{"query": "q0", "task": "popqa", "day": "2024-01-01", "n": 0}',
        '{"query": "q1", "task": "zoë", "day": "2024-01-02", "n": 1}',
    ]
    assert found.schema.field("day").type == pa.date32()


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", '{"query": "q", "task": "pubhealth"}'), ("a.csv", "query,task\nq,pubhealth\n")]
)
def test_row_that_contradicts_its_partition_is_bad(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "task=popqa").mkdir()
    (tmp_path / "task=popqa" / name).write_text(content)
    refused = run(tmp_path, tmp_path.parent / "set")
    assert refused.exit_code == 2
    assert f"{name} row 0: column 'task' differs from the partition task=popqa in the path" in refused.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id,query,task\n1,q,\n2,q,popqa\n"),
        ("a.jsonl", '{"id": "1", "query": "q", "task": null}\n{"id": "2", "query": "q", "task": "popqa"}\n'),
        ("a.jsonl", '{"id": "1", "query": "q", "task": " "}\n'),
        ("a.jsonl", '{"id": "1", "query": "q", "task": NaN}\n'),
        ("a.jsonl", '{"id": "1", "query": "q"}\n{"id": "2", "query": "q", "Task": "popqa"}\n'),
    ],
)
def test_missing_value_is_that_of_the_partition(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "in" / "task=popqa").mkdir(parents=True)
    (tmp_path / "in" / "task=popqa" / name).write_text(content)
    assert run(tmp_path / "in", tmp_path / "set").exit_code == 0
    assert pq.read_table(tmp_path / "set")["task"].to_pylist()[0] == "popqa"


@pytest.mark.parametrize(
    ("content", "folder", "exit_code"),
    [
        ('{"query": "q", "x": true}', "x=true", 0),
        ('{"query": "q", "x": 1}', "x=1", 0),
        ('{"query": "q", "x": 1.0}', "x=1", 0),
        ('{"query": "q", "x": 1}', "x=01", 0),
        ('{"query": "q", "x": "2024-01-01"}', "x=2024-01-01", 0),
        ('{"query": "q", "x": 2}', "x=1", 2),
        ('{"query": "q", "x": [1]}', "x=1", 2),
        ('{"query": "q", "x": {"a": 1}}', "x=1", 2),
        ('{"query": "q", "x": false}', "x=true", 2),
        ('{"query": "q", "x": "a"}', "x=__HIVE_DEFAULT_PARTITION__", 2),
    ],
)
def test_values_are_compared_with_the_partition(content: str, folder: str, exit_code: int, tmp_path: Path) -> None:
    (tmp_path / "in" / folder).mkdir(parents=True)
    (tmp_path / "in" / folder / "a.jsonl").write_text(content)
    result = run(tmp_path / "in", tmp_path / "set")
    assert result.exit_code == exit_code, result.output
    assert ("differs from the partition" in result.stderr) == bool(exit_code)


def test_column_that_occurs_twice_is_named(tmp_path: Path) -> None:
    columns = [["1"], ["q"], ["x"], ["y"]]
    pq.write_table(pa.table(columns, names=["id", "query", "x", "x"]), tmp_path / "a.parquet")
    result = run(tmp_path / "a.parquet", tmp_path / "set")
    assert (result.exit_code, "a.parquet: 2 columns are named 'x'; rename all but one" in result.stderr) == (2, True)
    assert run(tmp_path / "a.parquet", tmp_path / "set", "--drop", "x").exit_code == 0


def test_type_that_cannot_be_read_is_named_before_the_import(tmp_path: Path) -> None:
    views = pa.array([["a"]], pa.large_list_view(pa.string()))
    pq.write_table(pa.table({"id": ["1"], "query": ["q"], "x": views}), tmp_path / "a.parquet")
    result = run(tmp_path / "a.parquet", tmp_path / "set")
    assert result.exit_code == 2
    assert f"{tmp_path}/a.parquet: column 'x' is large_list_view" in result.stderr
    assert run(tmp_path / "a.parquet", tmp_path / "set", "--drop", "x").exit_code == 0


@pytest.mark.parametrize("wrap", ["struct", "list"])
def test_only_the_mapped_field_of_a_nested_column_is_read(wrap: str, tmp_path: Path) -> None:
    times = pa.array([2**40], pa.int64()).cast(pa.timestamp("s"))
    nested = pa.StructArray.from_arrays([pa.array(["Paris"]), times], ["a", "t"])
    if wrap == "list":
        nested = pa.ListArray.from_arrays([0, 1], nested)
    pq.write_table(pa.table({"id": ["1"], "query": ["q"], "m": nested}), tmp_path / "a.parquet")
    assert run(tmp_path / "a.parquet", tmp_path / "set", "--column", "answers=m.a").exit_code == 0
    found = pq.read_table(tmp_path / "set")
    assert found["answers"].to_pylist() == [["Paris"]]
    assert found.schema.names == ["id", "query", "answers", "m"]


@pytest.mark.parametrize("empty", [pd.DataFrame({"id": [], "query": [], "x": []}), pd.DataFrame()])
def test_file_without_rows_does_not_matter(empty: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    empty.to_parquet(tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"id": ["1"], "query": ["q"], "x": [[1]]}), tmp_path / "in" / "b.parquet")
    assert run(tmp_path / "in", tmp_path / "set").exit_code == 0
    assert pq.read_table(tmp_path / "set").to_pylist() == [{"id": "1", "query": "q", "x": [1]}]


TIMES = pa.array([2**40], pa.int64()).cast(pa.timestamp("s"))


@pytest.mark.parametrize(
    "nested", [pa.StructArray.from_arrays([TIMES], ["t"]), pa.ListArray.from_arrays([0, 1], TIMES)]
)
def test_group_that_cannot_be_read_is_named(nested: pa.Array, tmp_path: Path) -> None:
    answers = {"id": ["1"], "answer": ["a"], "retrieved": [True], "answers": [["a"]], "x": nested}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(answers), tmp_path / "data" / "part-0.parquet")
    with pytest.raises(ValueError, match=f"^{tmp_path}/data: column 'x' has a value that cannot be read: "):
        evaluate_set(locate(str(tmp_path), StorageConfig()), by="x")


def test_schema_drift_is_unified_by_an_import(tmp_path: Path) -> None:
    """What a run refuses: a column of other types in some files, or missing there."""
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": [1], "query": ["a"], "n": [1], "m": ["x"]}), tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"id": ["2"], "query": ["b"], "n": [0.5]}), tmp_path / "in" / "b.parquet")
    assert run(tmp_path / "in", tmp_path / "set").exit_code == 0
    assert pq.read_table(tmp_path / "set").to_pylist() == [
        {"id": "1", "query": "a", "n": 1.0, "m": "x"},
        {"id": "2", "query": "b", "n": 0.5, "m": None},
    ]


def test_mapped_column_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,question\n1,Who?\n")
    result = run(tmp_path / "a.csv", tmp_path / "set", "--column", "query=quiz")
    assert result.exit_code == 2
    assert "the query is empty (no column 'quiz'; columns: id, question; map them with --column)" in result.stderr
