"""What an inspection has found is kept, and used only for the same files and columns."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import Columns, StorageConfig
from pipeline.output.folder import INSPECTION
from pipeline.queries.inspection import Inspected, inspect_file
from pipeline.queries.kept_inspection import keep_inspection, read_inspection
from pipeline.queries.query_set import QuerySet, inspect_queries
from pipeline.storage.location import Location, locate

COLUMNS = Columns()
HERE = StorageConfig()


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    """Two files of different schemas in folders that name a column, and one without rows."""
    folder = tmp_path / "queries"
    for number, kind in enumerate([pa.int32(), pa.int64()]):
        place = folder / f"day={number + 1}"
        place.mkdir(parents=True)
        ids = [f"{number}-{row}" for row in range(5)]
        columns = {"id": ids, "query": ["?"] * 5, "task": ["a", "b", None, "b", "é"], "n": pa.array(range(5), kind)}
        pq.write_table(pa.table(columns), place / "part.parquet", row_group_size=3)
    pq.write_table(pa.table({"id": [], "query": []}), folder / "day=1" / "empty.parquet")
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "out"), HERE)


def inspect(queries: Path, output: Location, columns: Columns = COLUMNS) -> QuerySet:
    """Inspect the set, with what is kept in the output."""
    return inspect_queries(locate(str(queries), HERE), columns, 2, read_inspection(output, columns))


def count_readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URIs of the files that are read in full from now on."""
    read: list[str] = []

    def note(file: Location, **arguments: Any) -> Inspected:
        read.append(file.uri)
        return inspect_file(file, **arguments)

    monkeypatch.setattr("pipeline.queries.query_set.inspect_file", note)
    return read


def test_unchanged_files_are_not_read_again(queries: Path, output: Location, monkeypatch: pytest.MonkeyPatch):
    first = inspect(queries, output)
    keep_inspection(output, COLUMNS, first.inspected)
    read = count_readings(monkeypatch)
    monkeypatch.setattr("pipeline.queries.query_set.check_unique", None)
    monkeypatch.setattr("pipeline.queries.query_set.cast_table", None)
    assert inspect(queries, output) == first
    assert read == []


def test_a_set_whose_folder_is_given_in_another_way_is_read_again(queries: Path, output: Location):
    keep_inspection(output, COLUMNS, inspect(queries / "day=1", output).inspected)
    shutil.rmtree(queries / "day=2")
    assert inspect(queries / "day=1", output).partitions == ()
    assert inspect(queries, output).partitions == ("day",)


def test_an_output_that_cannot_be_written_is_a_warning(queries: Path, output: Location, tmp_path: Path, caplog):
    (tmp_path / "out").write_text("a file where the folder should be")
    keep_inspection(output, COLUMNS, inspect(queries, output).inspected)
    assert "a run that resumes will read all queries again: " in caplog.text


def rewrite(queries: Path) -> None:
    file = queries / "day=1" / "part.parquet"
    file.write_bytes(file.read_bytes())


def add(queries: Path) -> None:
    table = pq.read_table(queries / "day=2" / "part.parquet", partitioning=None)
    ids = pa.array([f"new {row}" for row in range(table.num_rows)])
    pq.write_table(table.set_column(0, "id", ids), queries / "day=2" / "new.parquet")


def delete(queries: Path) -> None:
    (queries / "day=1" / "part.parquet").unlink()


@pytest.mark.parametrize("change", [rewrite, add, delete])
def test_all_files_are_read_again_after_a_change(queries: Path, output: Location, monkeypatch, change):
    keep_inspection(output, COLUMNS, inspect(queries, output).inspected)
    change(queries)
    read = count_readings(monkeypatch)
    found = inspect(queries, output)
    assert sorted(read) == sorted(map(str, queries.rglob("*.parquet")))
    assert found == inspect_queries(locate(str(queries), HERE), COLUMNS, 2)


def test_other_columns_are_inspected_anew(queries: Path, output: Location):
    keep_inspection(output, COLUMNS, inspect(queries, output).inspected)
    others = Columns(task="n")
    assert read_inspection(output, COLUMNS)
    assert read_inspection(output, others) == {}


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def write_another_table(file: Path) -> None:
    pq.write_table(pa.table({"uri": ["x"]}), file)


def write_nulls(file: Path) -> None:
    table = pq.read_table(file)
    pq.write_table(table.set_column(2, "digest", pa.nulls(len(table), pa.string())), file)


def put_a_folder_there(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [empty, cut, write_another_table, write_nulls, put_a_folder_there])
def test_a_damaged_file_is_ignored_with_a_warning(queries: Path, output: Location, caplog, damage):
    keep_inspection(output, COLUMNS, inspect(queries, output).inspected)
    damage(Path(output.path) / INSPECTION)
    assert read_inspection(output, COLUMNS) == {}
    assert f"{output.uri}/{INSPECTION} is ignored, and the queries are read again" in caplog.text


def test_nothing_is_kept_of_a_set_whose_version_differs(queries: Path, output: Location, monkeypatch):
    found = inspect(queries, output)
    keep_inspection(output, COLUMNS, [replace(file, version="older") for file in found.inspected])
    read = count_readings(monkeypatch)
    assert inspect(queries, output) == found
    assert len(read) == 3
