from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import Columns, StorageConfig
from pipeline.queries import writer as query_writer
from pipeline.queries.converters import ColumnMapping
from pipeline.queries.query_set import QuerySet, inspect_queries
from pipeline.queries.schema import QUERY_FIELDS
from pipeline.queries.source_rows import PythonBatch, SourceRow
from pipeline.queries.writer import UNFINISHED, Spool, check_free, publish_query_set, write_query_set
from pipeline.storage.location import Location, StorageError, locate


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_writer, "FILE_ROWS", 3)
    monkeypatch.setattr(query_writer, "GROUP_ROWS", 2)


@pytest.fixture
def output(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "out"), StorageConfig())


def write(tmp_path: Path, rows: list[dict[str, Any]], output: Location, batch_rows: int = 3) -> QuerySet:
    """A set of rows that have an id and a query beside what is given."""
    for name in ("spool", "set"):
        (tmp_path / name).mkdir(exist_ok=True)
    spool, mapping = Spool(tmp_path / "spool"), ColumnMapping()
    for start in range(0, len(rows), batch_rows):
        numbered = list(enumerate(rows))[start : start + batch_rows]
        batch = PythonBatch([SourceRow(f"f row {n}", {"id": str(n), "query": f"q{n}", **row}) for n, row in numbered])
        queries = [{name: row.values.get(name) for name in QUERY_FIELDS.names} for row in batch.rows]
        spool.write(batch.place, queries, batch.pass_columns(mapping, range(len(numbered))))
    return write_query_set(spool, tmp_path / "set", output)


def written(tmp_path: Path) -> pa.Table:
    return pa.concat_tables(map(pq.read_table, sorted((tmp_path / "set").iterdir())))


@pytest.mark.parametrize("batch_rows", [1, 2, 3, 5, 7])
def test_files_and_row_groups_are_bounded(tmp_path: Path, output: Location, batch_rows: int) -> None:
    found = write(tmp_path, [{}] * 7, output, batch_rows)
    assert (found.files, found.rows) == (3, 7)
    files = sorted((tmp_path / "set").iterdir())
    groups = [pq.read_metadata(file) for file in files]
    sizes = [[meta.row_group(n).num_rows for n in range(meta.num_row_groups)] for meta in groups]
    assert sizes == [[2, 1], [2, 1], [1]]
    assert written(tmp_path)["id"].to_pylist() == [str(n) for n in range(7)]


def test_empty_columns_are_not_written(tmp_path: Path, output: Location) -> None:
    write(tmp_path, [{"answers": ["a"]}, {}, {}, {"choices": ["x", "y"]}], output)
    assert written(tmp_path).schema.names == ["id", "query", "choices", "answers"]
    assert written(tmp_path)["answers"].to_pylist() == [["a"], None, None, None]


def test_column_types_are_unified_across_files(tmp_path: Path, output: Location) -> None:
    """Three rows are a batch."""
    rows: list[dict[str, Any]] = [{"n": None, "o": {"a": 1}, "l": []}] * 3 + [{"n": 1, "o": {"b": "x"}, "l": ["y"]}] * 3
    write(tmp_path, [*rows, {"n": 1.5, "late": True}], output)
    table = written(tmp_path)
    assert table.schema.field("n").type == pa.float64()
    assert table["n"].to_pylist() == [None] * 3 + [1.0] * 3 + [1.5]
    assert table["o"].to_pylist() == [{"a": 1, "b": None}] * 3 + [{"a": None, "b": "x"}] * 3 + [None]
    assert table["l"].to_pylist() == [[]] * 3 + [["y"]] * 3 + [None]
    assert table["late"].to_pylist() == [None] * 6 + [True]


def test_value_that_does_not_fit_its_column_is_named(tmp_path: Path, output: Location) -> None:
    with pytest.raises(
        ValueError, match="f row 2: column 'n' fits no type, or not that of the rows before it .* --drop n"
    ):
        write(tmp_path, [{"n": 1}, {"n": 2}, {"n": "x"}], output)


def test_incompatible_column_types_are_refused(tmp_path: Path, output: Location) -> None:
    with pytest.raises(ValueError, match="f row 3: column 'n' is string, not int64 as in f row 0; .* --drop n"):
        write(tmp_path, [{"n": 1}] * 3 + [{"n": "x"}], output)


def test_values_that_parquet_cannot_store_are_refused(tmp_path: Path, output: Location) -> None:
    with pytest.raises(ValueError, match="Parquet cannot store a column .*'meta'.* leave it out with --drop"):
        write(tmp_path, [{"meta": {}}], output)


def test_written_set_passes_the_checks_of_annotate(tmp_path: Path, output: Location) -> None:
    with pytest.raises(ValueError, match="columns 'answer' and 'input_answer' would both be written"):
        write(tmp_path, [{"answer": "a", "input_answer": "b"}], output)


def test_published_set_replaces_the_previous_one(tmp_path: Path, output: Location) -> None:
    write(tmp_path, [{}] * 7, output)
    publish_query_set(tmp_path / "set", output)
    check_free(output, overwrite=True)
    for file in (tmp_path / "set").iterdir():
        file.unlink()
    found = write(tmp_path, [{"id": "new"}], output)
    publish_query_set(tmp_path / "set", output)
    assert [file.path for file in output.list_files()] == [f"{output.path}/queries-00000.parquet"]
    again = inspect_queries(output, Columns(), 256)
    assert (again.digest, again.rows, again.schema) == (found.digest, found.rows, found.schema)


def test_partially_published_set_is_not_readable(
    tmp_path: Path, output: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [{}] * 7, output)
    put = Location.write

    def failing(file: Location, content: bytes) -> None:
        if "00001" in file.path:
            raise StorageError(file.uri)
        put(file, content)

    monkeypatch.setattr(Location, "write", failing)
    with pytest.raises(StorageError):
        publish_query_set(tmp_path / "set", output)
    with pytest.raises(ValueError, match=f"{UNFINISHED}: not a readable Parquet file"):
        inspect_queries(output, Columns(), 256)
    with pytest.raises(ValueError, match="replace it with --overwrite"):
        check_free(output, overwrite=False)
    monkeypatch.undo()
    publish_query_set(tmp_path / "set", output)
    assert inspect_queries(output, Columns(), 256).rows == 7


@pytest.mark.parametrize("name", ["thesis.txt", "old/queries-00000.parquet", "queries.parquet"])
def test_foreign_files_are_kept(tmp_path: Path, output: Location, name: str) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("years of work")
    with pytest.raises(ValueError, match=f"contains files that are not part of a query set .{name}.; choose another"):
        check_free(output, overwrite=True)


def test_output_that_is_a_file_is_refused(tmp_path: Path, output: Location) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out is a file; name a folder"):
        check_free(output, overwrite=True)
