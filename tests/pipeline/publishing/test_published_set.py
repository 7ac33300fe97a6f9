"""What every table format can hold, and how a table differs from a set."""

import pyarrow as pa
import pytest

from pipeline.output.schema import build_data_schema
from pipeline.publishing.published_set import check_table_columns, describe_error, find_difference

PLAIN = pa.schema([("id", pa.string()), ("n", pa.int32()), ("words", pa.list_(pa.string()))])


def test_all_columns_of_a_run_fit_every_format():
    check_table_columns(
        build_data_schema(pa.schema([("id", pa.string()), ("query", pa.string())]), keep_candidates=True)
    )


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.timestamp("us", "UTC"),
        pa.decimal128(10, 2),
        pa.map_(pa.string(), pa.int64()),
        pa.large_list(pa.struct([("x", pa.float32())])),
    ],
)
def test_types_that_all_formats_have_are_accepted(kind: pa.DataType):
    check_table_columns(pa.schema([("x", kind)]))


@pytest.mark.parametrize(
    "kind",
    [
        pa.uint64(),
        pa.int16(),
        pa.decimal256(40, 2),
        pa.float16(),
        pa.null(),
        pa.struct([]),
        pa.timestamp("ns"),
        pa.time64("us"),
        pa.duration("s"),
        pa.list_(pa.uint8()),
        pa.struct([("inner", pa.struct([]))]),
        pa.map_(pa.string(), pa.null()),
    ],
)
def test_types_that_a_format_lacks_are_named(kind: pa.DataType):
    with pytest.raises(ValueError, match="a table cannot hold the column 'x' of type"):
        check_table_columns(pa.schema([("id", pa.string()), ("x", kind)]))


@pytest.mark.parametrize("name", ["", "a b", "usage.seconds", "a=b", "a;b"])
def test_names_that_a_format_refuses_are_named(name: str):
    with pytest.raises(ValueError, match="a table cannot hold a column named"):
        check_table_columns(pa.schema([(name, pa.string())]))


def test_names_that_differ_in_case_alone_are_named():
    with pytest.raises(ValueError, match="a table cannot hold both columns 'Task' and 'task'"):
        check_table_columns(pa.schema([("Task", pa.string()), ("task", pa.string())]))


def test_errors_are_one_plain_line():
    assert describe_error(OSError("Generic error\n \x1b[31m↳\x1b[0m gone")) == "Generic error ↳ gone"
    assert describe_error(KeyError()) == "KeyError"


def test_layouts_of_arrow_are_no_difference():
    same = [("id", pa.large_string()), ("n", pa.int32()), ("words", pa.large_list(pa.string_view()))]
    assert find_difference(PLAIN, pa.schema(same)) is None
    assert find_difference(PLAIN, pa.schema(list(reversed(same)))) is None


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"n": pa.int64()}, "column 'n' is int32 in the set and int64 in the table"),
        ({"more": pa.string()}, "column 'more' is missing in the set and string in the table"),
        ({"words": None}, "column 'words' is list<item: string> in the set and missing in the table"),
    ],
)
def test_the_first_difference_is_named(changed: dict[str, pa.DataType | None], difference: str):
    columns = {field.name: field.type for field in PLAIN} | changed
    theirs = pa.schema([(name, kind) for name, kind in columns.items() if kind is not None])
    assert find_difference(PLAIN, theirs) == difference
