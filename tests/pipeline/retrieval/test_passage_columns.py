import datetime as dt

import pyarrow as pa
import pytest

from pipeline.retrieval.passage_columns import (
    METADATA_TYPES,
    PASSAGE_SCHEMA,
    convert_metadata,
    extend_schema,
    find_metadata_type,
    format_metadata,
)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (pa.string(), "string"),
        (pa.large_string(), "string"),
        (pa.dictionary(pa.int8(), pa.string()), "string"),
        (pa.uint8(), "integer"),
        (pa.int64(), "integer"),
        (pa.float32(), "number"),
        (pa.decimal128(10, 2), "number"),
        (pa.bool_(), "bool"),
        (pa.date64(), "date"),
        (pa.large_list(pa.string()), "strings"),
        (pa.list_(pa.string(), 3), "strings"),
        (pa.list_(pa.int64()), None),
        (pa.timestamp("us"), None),
        (pa.struct([("a", pa.string())]), None),
        (pa.null(), None),
        (pa.binary(), None),
    ],
)
def test_types_that_are_kept(kind: pa.DataType, name: str | None) -> None:
    assert find_metadata_type(kind) == name


def test_kept_types_are_found_again() -> None:
    assert {name: find_metadata_type(kind) for name, kind in METADATA_TYPES.items()} == {n: n for n in METADATA_TYPES}


def test_schema_has_further_columns_in_their_order() -> None:
    schema = extend_schema({"year": "integer", "tags": "strings"})
    assert schema.names == ["id", "title", "text", "year", "tags"]
    assert schema.field("tags").type == pa.list_(pa.string())
    assert extend_schema({}) == PASSAGE_SCHEMA


def test_metadata_are_a_json_object() -> None:
    values = {"day": dt.date(2024, 2, 29), "year": 2020, "tags": ["é", None], "open": False, "none": None, "w": 0.5}
    text = format_metadata(values)
    assert text == '{"day": "2024-02-29", "year": 2020, "tags": ["é", null], "open": false, "none": null, "w": 0.5}'


def test_numbers_that_json_lacks_become_null() -> None:
    odd = pa.array([0.5, float("nan"), float("inf"), -float("inf"), None], pa.float32())
    assert convert_metadata(odd, "number").to_pylist() == [0.5, None, None, None, None]
    assert convert_metadata(pa.array([1, None], pa.int8()), "integer").type == pa.int64()
