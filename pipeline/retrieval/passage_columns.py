"""The columns of passages: id, title and text, and further ones with their types and their values as JSON."""

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

PASSAGE_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "title", "text")])

MetadataType = Literal["string", "integer", "number", "bool", "date", "strings"]
METADATA_TYPES: Mapping[MetadataType, pa.DataType] = MappingProxyType(
    {
        "string": pa.string(),
        "integer": pa.int64(),
        "number": pa.float64(),
        "bool": pa.bool_(),
        "date": pa.date32(),
        "strings": pa.list_(pa.string()),
    }
)
_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_fixed_size_list)
_TESTS: Mapping[MetadataType, tuple[Callable[[pa.DataType], bool], ...]] = {
    "string": _STRINGS,
    "integer": (pa.types.is_integer,),
    "number": (pa.types.is_floating, pa.types.is_decimal),
    "bool": (pa.types.is_boolean,),
    "date": (pa.types.is_date,),
}


def extend_schema(metadata: Mapping[str, MetadataType]) -> pa.Schema:
    """Return the schema of passages with further columns, given by their types."""
    return pa.schema([*PASSAGE_SCHEMA, *((name, METADATA_TYPES[kind]) for name, kind in metadata.items())])


def find_metadata_type(kind: pa.DataType) -> MetadataType | None:
    """Return the type in which values of an Arrow type are kept; None if they cannot be kept."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if any(test(kind) for test in _LISTS):
        return "strings" if find_metadata_type(kind.value_type) == "string" else None
    return next((name for name, tests in _TESTS.items() if any(test(kind) for test in tests)), None)


def convert_metadata(values: pa.Array, kind: MetadataType) -> pa.Array:
    """Convert the values of a column to the type in which they are kept; numbers that JSON lacks become null.

    Raises:
        pyarrow.ArrowInvalid: an integer does not fit.
    """
    kept = values.cast(METADATA_TYPES[kind])
    return pc.if_else(pc.is_finite(kept), kept, None) if kind == "number" else kept


def format_metadata(values: Mapping[str, Any]) -> str:
    """Format the values of a passage as a JSON object, dates in ISO format."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False, default=str)
