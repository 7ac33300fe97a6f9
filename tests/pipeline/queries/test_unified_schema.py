"""Files of one query set whose schemas differ: rows come out as they went in, or the set is refused before a run."""

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import Columns, StorageConfig
from pipeline.queries.query_set import QuerySet, inspect_queries
from pipeline.queries.schema import to_query
from pipeline.queries.units import read_unit
from pipeline.storage.location import locate

HERE = StorageConfig()
TEXT, VIEW, LARGE = pa.string(), pa.string_view(), pa.large_string()
NOW = datetime.datetime(2024, 1, 31, 12)


def write(file: Path, values: pa.Array, key: str) -> None:
    ids = [f"{key}{n}" for n in range(len(values))]
    pq.write_table(pa.table({"id": ids, "query": ids, "x": values}), file)


def inspect(folder: Path) -> QuerySet:
    return inspect_queries(locate(str(folder), HERE), Columns(), 4)


def read(found: QuerySet) -> pa.Table:
    table = pa.concat_tables([read_unit(unit, found.schema, HERE) for unit in found.units])
    table.validate(full=True)
    assert table.schema == found.schema
    return table


# Type and value of a column in two files, and its type in the query set.
UNIFIED: dict[str, tuple[pa.DataType, Any, pa.DataType, Any, pa.DataType]] = {
    "null and string": (pa.null(), None, TEXT, "é", TEXT),
    "null and view": (pa.null(), None, VIEW, "é", LARGE),
    "null and list": (pa.null(), None, pa.list_(TEXT), ["é"], pa.list_(TEXT)),
    "null and struct": (pa.null(), None, pa.struct([("a", TEXT)]), {"a": "é"}, pa.struct([("a", TEXT)])),
    "string and large_string": (TEXT, "a", LARGE, "é", LARGE),
    "string and view": (TEXT, "a", VIEW, "é", LARGE),
    "string and dictionary": (TEXT, "a", pa.dictionary(pa.int8(), TEXT), "é", TEXT),
    "large_string and dictionary": (LARGE, "a", pa.dictionary(pa.int32(), TEXT), "é", LARGE),
    "binary and large_binary": (pa.binary(), b"\xff", pa.large_binary(), b"\x00", pa.large_binary()),
    "list of nulls and of strings": (pa.list_(pa.null()), [None], pa.list_(TEXT), ["é"], pa.list_(TEXT)),
    "list and large_list": (pa.list_(TEXT), ["a"], pa.large_list(TEXT), ["é"], pa.large_list(TEXT)),
    "list of strings and of views": (pa.list_(TEXT), ["a"], pa.list_(VIEW), ["é"], pa.list_(LARGE)),
    "fixed_size_list and list": (pa.list_(TEXT, 1), ["a"], pa.list_(TEXT), ["é", "b"], pa.list_(TEXT)),
    "bool and null": (pa.bool_(), True, pa.null(), None, pa.bool_()),
    "int32 and int64": (pa.int32(), 1, pa.int64(), 2**40, pa.int64()),
    "int8 and uint8": (pa.int8(), -1, pa.uint8(), 255, pa.int16()),
    "int64 and double": (pa.int64(), 2**40, pa.float64(), 0.1, pa.float64()),
    "float and double": (pa.float32(), 0.5, pa.float64(), 0.1, pa.float64()),
    "decimals": (pa.decimal128(5, 2), Decimal("1.50"), pa.decimal128(7, 3), Decimal("2.125"), pa.decimal128(7, 3)),
    "us and ns": (pa.timestamp("us"), NOW, pa.timestamp("ns"), pd.Timestamp(NOW), pa.timestamp("ns")),
    "structs": (
        pa.list_(pa.struct([("id", TEXT), ("text", TEXT)])),
        [{"id": "1", "text": "a", "title": None}],
        pa.list_(pa.struct([("title", TEXT), ("text", TEXT), ("id", TEXT)])),
        [{"id": "2", "text": "b", "title": "é"}],
        pa.list_(pa.struct([("id", TEXT), ("text", TEXT), ("title", TEXT)])),
    ),
}


@pytest.mark.parametrize("name", UNIFIED)
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_types_are_unified_without_loss(name: str, order: str, tmp_path: Path) -> None:
    one, first, other, second, unified = UNIFIED[name]
    values = [pa.array([first, None], one), pa.array([second, None], other)]
    for key, array in zip(order, values, strict=True):
        write(tmp_path / f"{key}.parquet", array, key)
    found = inspect(tmp_path)
    rows = read(found).sort_by("id")["x"].to_pylist()
    assert rows == ([first, None, second, None] if order == "ab" else [second, None, first, None])
    if "struct" not in name:
        assert found.schema.field("x").type == unified


TEXTS, PASSAGE = pa.list_(TEXT), pa.struct([("id", TEXT), ("title", TEXT), ("text", TEXT)])
UNTITLED = pa.struct([("id", TEXT), ("title", pa.null()), ("text", TEXT)])
# Columns of a query set whose writer knew nothing of their inner types: column, type and value, in two files.
INNER_NULLS: list[tuple[str, pa.DataType, Any, pa.DataType, Any]] = [
    ("answers", pa.list_(pa.null()), [], TEXTS, ["x"]),
    ("answers", pa.null(), None, TEXTS, ["x"]),
    ("answers", pa.list_(TEXT, 1), ["y"], TEXTS, ["x", "z"]),
    ("choices", pa.list_(pa.null()), [], TEXTS, ["x", "y"]),
    ("choices", pa.large_list(pa.null()), [], TEXTS, ["x", "y"]),
    ("short_answers", pa.list_(pa.null()), [], pa.list_(TEXTS), [["x"]]),
    ("short_answers", pa.list_(pa.list_(pa.null())), [[]], pa.list_(TEXTS), [["x"]]),
    ("passages", pa.list_(pa.null()), [], pa.list_(PASSAGE), [{"id": "1", "title": "t", "text": "x"}]),
    ("passages", pa.list_(UNTITLED), [{"id": "1", "title": None, "text": "x"}], pa.list_(UNTITLED), []),
    ("input", pa.null(), None, TEXT, "x"),
    ("task", pa.null(), None, TEXT, "popqa"),
    ("gold_passage_id", pa.null(), None, LARGE, "x"),
]


@pytest.mark.parametrize(("column", "one", "first", "other", "second"), INNER_NULLS)
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_columns_that_a_run_reads_may_be_null_within(
    column: str, one: pa.DataType, first: Any, other: pa.DataType, second: Any, order: str, tmp_path: Path
) -> None:
    values = [pa.array([first], one), pa.array([second], other)]
    for key, array in zip(order, values, strict=True):
        pq.write_table(pa.table({"id": [key], "query": [key], column: array}), tmp_path / f"{key}.parquet")
    rows = read(inspect(tmp_path)).to_pylist()
    assert [row[column] for row in rows] == ([first, second] if order == "ab" else [second, first])
    assert [to_query(row, Columns()).id for row in rows] == ["a", "b"]


REFUSED: dict[str, tuple[pa.Array, pa.Array, str]] = {
    "string and int64": (
        pa.array(["a"]),
        pa.array([1]),
        "b.parquet: column 'x' is int64, not string as in .*a.parquet",
    ),
    "string and list": (pa.array(["a"]), pa.array([["a"]]), r"column 'x' is list<\w+: string>, not string"),
    "bool and int64": (pa.array([True]), pa.array([1]), "column 'x' is int64, not bool"),
    "decimal and double": (
        pa.array([Decimal("0.10")]),
        pa.array([0.5]),
        r"column 'x' is double, not decimal128\(2, 2\)",
    ),
    "list of decimals and of doubles": (pa.array([[Decimal("0.10")]]), pa.array([[0.5]]), "column 'x' is list"),
    "map of decimals and of doubles": (
        pa.array([[("k", Decimal("0.12345678901234567890"))]], pa.map_(TEXT, pa.decimal128(30, 20))),
        pa.array([[("k", 0.5)]], pa.map_(TEXT, pa.float64())),
        "column 'x' is map",
    ),
    "zones": (pa.array([NOW], pa.timestamp("us", "UTC")), pa.array([NOW]), r"column 'x' is timestamp\[us\]"),
    "date and time": (pa.array([NOW.date()]), pa.array([NOW]), r"column 'x' is timestamp\[us\], not date32"),
    "large integer and double": (
        pa.array([2**53 + 1]),
        pa.array([0.5]),
        "a.parquet: a value of column 'x' does not fit",
    ),
    "uint64 and int64": (pa.array([2**63], pa.uint64()), pa.array([-1]), "a value of column 'x' does not fit int64"),
    "year 9999 and ns": (
        pa.array([datetime.datetime(9999, 1, 1)], pa.timestamp("us")),
        pa.array([NOW], pa.timestamp("ns")),
        r"a value of column 'x' does not fit timestamp\[ns\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_types_that_would_change_values_are_refused(name: str, tmp_path: Path) -> None:
    one, other, message = REFUSED[name]
    write(tmp_path / "a.parquet", one, "a")
    write(tmp_path / "b.parquet", other, "b")
    with pytest.raises(ValueError, match=f"{message}.*jobs.import_queries"):
        inspect(tmp_path)


def test_columns_in_another_order_are_one_set(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "query": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"query": ["y"], "id": ["b"]}), tmp_path / "b.parquet")
    assert read(inspect(tmp_path)).to_pylist() == [{"id": "a", "query": "x"}, {"id": "b", "query": "y"}]


def test_differing_nullability_is_one_set(tmp_path: Path) -> None:
    for name, nullable in (("a", False), ("b", True)):
        schema = pa.schema([pa.field("id", TEXT, nullable), pa.field("query", TEXT, nullable)])
        pq.write_table(pa.table({"id": [name], "query": [name]}, schema), tmp_path / f"{name}.parquet")
    found = inspect(tmp_path)
    assert found.schema.field("query").nullable
    assert read(found)["id"].to_pylist() == ["a", "b"]


@pytest.mark.parametrize("empty", [pd.DataFrame({"id": [], "query": []}), pd.DataFrame(), pd.DataFrame({"y": [1]})[:0]])
def test_file_without_rows_may_have_any_columns(tmp_path: Path, empty: pd.DataFrame) -> None:
    write(tmp_path / "b.parquet", pa.array(["x"]), "b")
    expected = inspect(tmp_path)
    empty.to_parquet(tmp_path / "a.parquet")
    found = inspect(tmp_path)
    assert (found.schema, found.digest, found.files) == (expected.schema, expected.digest, 2)


def test_set_without_rows_is_refused(tmp_path: Path) -> None:
    pd.DataFrame().to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="the query set has no rows"):
        inspect(tmp_path)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_column_that_only_some_files_have_is_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    pq.write_table(pa.table({"id": ["1"], "query": ["x"]}), tmp_path / f"{names[0]}.parquet")
    pq.write_table(pa.table({"id": ["2"], "query": ["y"], "task": ["t"]}), tmp_path / f"{names[1]}.parquet")
    with pytest.raises(
        ValueError, match=rf"{names[0]}.parquet: no column 'task', which .*{names[1]}.parquet has; .*import"
    ):
        inspect(tmp_path)
