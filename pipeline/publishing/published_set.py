"""The files of a finished annotated set, as a table format registers them: without reading or copying a row."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa

from pipeline.output.folder import OutputFolder, hash_identity
from pipeline.output.unit_log import read_units
from pipeline.storage.location import Location, join_lines
from pipeline.storage.parquet import read_footer

# Characters that Spark refuses in the names of columns, and the dot, which names nested ones.
_REFUSED = re.compile(r"[ ,;{}()\n\t=.]|^$")
# Colors in the messages of delta-rs.
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


class State(StrEnum):
    """The state of a set in a table once it was published."""

    NEW = "new"
    LISTED = "listed"
    ELSEWHERE = "elsewhere"


@dataclass(frozen=True)
class DataFile:
    """A data file of a set: its location, with size and modification time, and the number of its rows."""

    location: Location
    rows: int


@dataclass(frozen=True)
class FinishedFiles:
    """The data files of a finished set.

    Attributes:
        folder: folder of the set.
        run: digest of the run's identity, which a table keeps of what it was given.
        files: data files with rows, in the order of the queries.
        schema: schema of the rows, without what Arrow alone distinguishes; nulls are allowed everywhere.
    """

    folder: Location
    run: str
    files: tuple[DataFile, ...]
    schema: pa.Schema

    @property
    def rows(self) -> int:
        """Number of answered rows."""
        return sum(file.rows for file in self.files)

    @classmethod
    def of(cls, output: OutputFolder) -> "FinishedFiles":
        """Read the manifest, the list of the units and the schema of a set.

        Raises:
            ValueError: the set is not finished, is a sample, has too many errors, or its data files are not those that
                it lists.
            StorageError: the storage cannot be read.
        """
        place, manifest = output.location, output.read_manifest()
        if manifest is None or not output.is_finished():
            raise ValueError(f"{place.uri}: not a finished annotated set; run jobs.annotate to completion")
        if manifest.get("population") is not None:
            raise ValueError(f"{place.uri}: a sample is not published; annotate all queries")
        counts, execution = manifest.get("counts", {}), manifest.get("configuration", {}).get("execution", {})
        if counts.get("errors", 0) > execution.get("max_error_rate", 1) * counts.get("rows", 0):
            raise ValueError(f"{place.uri}: more rows failed than execution.max_error_rate allows; it is not published")
        listed, found = read_units(place), output.list_unit_files("data")
        if listed.keys() != found.keys() or not listed:
            raise ValueError(f"{place.uri}: its data files are not those that it lists; see selfrag verify")
        files = [DataFile(found[unit.unit], unit.rows - unit.failed) for unit in listed.values()]
        schema = pa.schema(_simplify_columns(read_footer(files[0].location).schema.to_arrow_schema()))
        return cls(place, hash_identity(manifest), tuple(file for file in files if file.rows), schema)


# Types that Delta Lake, Iceberg and Spark all have, apart from nested ones and those of ``_simplify``.
_COMMON = (
    pa.types.is_boolean,
    pa.types.is_int32,
    pa.types.is_int64,
    pa.types.is_float32,
    pa.types.is_float64,
    pa.types.is_decimal128,
    pa.types.is_date32,
    pa.types.is_string,
    pa.types.is_binary,
)


def check_table_columns(schema: pa.Schema) -> None:
    """Check that tables of all formats can hold the columns of a set.

    Raises:
        ValueError: they cannot; names the column and its type.
    """
    known: dict[str, str] = {}
    for field in schema:
        if _REFUSED.search(field.name):
            raise ValueError(f"a table cannot hold a column named {field.name!r}; rename it in the query set")
        if (other := known.setdefault(field.name.casefold(), field.name)) != field.name:
            raise ValueError(f"a table cannot hold both columns {other!r} and {field.name!r}; rename one")
        if not _is_common(_simplify(field.type)):
            raise ValueError(
                f"a table cannot hold the column {field.name!r} of type {field.type}; cast it in the query set, or "
                "leave it out"
            )


def _is_common(kind: Any) -> bool:
    """Whether a simplified type is common to all formats; structures need a field, times microseconds."""
    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(_is_common(field.type) for field in kind)
    if pa.types.is_map(kind):
        return _is_common(kind.key_type) and _is_common(kind.item_type)
    if pa.types.is_list(kind):
        return _is_common(kind.value_type)
    if pa.types.is_timestamp(kind):
        return bool(kind.unit == "us" and kind.tz in (None, "UTC"))
    return any(is_kind(kind) for is_kind in _COMMON)


def describe_error(error: BaseException) -> str:
    """Return the message of an error in one plain line."""
    return _COLORS.sub("", join_lines(error)) or type(error).__name__


def find_difference(ours: pa.Schema, theirs: pa.Schema) -> str | None:
    """Describe the first column in which two schemas differ, apart from how Arrow lays out values; None if none does.

    Args:
        ours: schema of a set.
        theirs: schema of a table.
    """
    own, other = (_simplify_columns(schema) for schema in (ours, theirs))
    for name in [*own, *other]:
        if own.get(name) != other.get(name):
            sides = (f"{side.get(name, 'missing')} in the {where}" for side, where in ((own, "set"), (other, "table")))
            return f"column {name!r} is {' and '.join(sides)}"
    return None


def _simplify_columns(schema: pa.Schema) -> Mapping[str, pa.DataType]:
    return {field.name: _simplify(field.type) for field in schema}


def _simplify(kind: Any) -> pa.DataType:
    """Return a type without what only Arrow distinguishes: 64-bit offsets, views, dictionaries, names of elements."""
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _simplify(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_simplify(kind.key_type), _simplify(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(_simplify(kind.value_type))
    if pa.types.is_dictionary(kind):
        return _simplify(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind
