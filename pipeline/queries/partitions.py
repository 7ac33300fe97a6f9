"""Read the partition columns of Hive-partitioned folders from the paths of their files.

Hive, Spark and DuckDB write the columns ``task`` and ``dt`` of ``task=popqa/dt=2024-01-01/part-0.parquet`` into the
path only (https://duckdb.org/docs/stable/data/partitioning/hive_partitioning). Folders above the query set itself are
not read, as in Spark and pyarrow.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from datetime import date
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.queries.values import is_missing
from pipeline.storage.location import Location

log = logging.getLogger(__name__)

# The value that Hive and Spark write for null.
NULL = "__HIVE_DEFAULT_PARTITION__"
INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")
DATE = re.compile(r"\d{4}-\d\d-\d\d")

Partition = Mapping[str, str | None]


def find_partition(file: Location, root: Location) -> str:
    """Return the folders between a root and a file that name partitions, such as ``task=popqa/dt=2024-01-01``."""
    base = root.path.rstrip("/")
    folders = file.path[len(base) + 1 :].split("/")[:-1] if file.path.startswith(f"{base}/") else []
    return "/".join(folder for folder in folders if _is_partition(folder))


def warn_of_columns_above(root: Location, known: Iterable[str]) -> None:
    """Log the partition columns that the path of a root itself names, which are not read, if they are not known."""
    named = [unquote(folder.partition("=")[0]) for folder in root.path.split("/") if _is_partition(folder)]
    missing = [name for name in named if name not in known]
    if missing:
        log.warning(
            "%s: columns that only its own path names are not read (%s); give the folder above it, or set the task",
            root.uri,
            ", ".join(missing),
        )


def _is_partition(folder: str) -> bool:
    name, sign, _ = folder.partition("=")
    return bool(name and sign)


def parse_partition(folders: str) -> dict[str, str | None]:
    """Parse the folders that :func:`find_partition` returns to values by column; decodes percent signs.

    Raises:
        ValueError: two folders name one column, or a decoded name or value is not UTF-8.
    """
    values: dict[str, str | None] = {}
    for folder in filter(None, folders.split("/")):
        name, _, value = folder.partition("=")
        try:
            name, text = unquote(name, errors="strict"), unquote(value, errors="strict")
        except UnicodeDecodeError:
            raise ValueError(f"the folder {folder} is not UTF-8 behind its percent signs; rename it") from None
        if find_name(name, values) is not None:
            raise ValueError(f"two of the folders {folders} name the column {name!r}; rename one")
        values[name] = None if value == NULL else text
    return values


def find_name(name: str, names: Iterable[str]) -> str | None:
    """Return the name that is equal but for case, as in Hive and Spark; None if there is none."""
    return next((other for other in names if other.casefold() == name.casefold()), None)


def infer_types(
    partitions: Iterable[Partition], texts: Iterable[str], own: Mapping[str, pa.DataType]
) -> dict[str, pa.DataType]:
    """Infer the type of each partition column: that of the files that have it too; int64; date32; or string.

    Args:
        partitions: values by column, of every file.
        texts: columns that are strings whatever their values.
        own: types of the columns within the files.
    """
    values: dict[str, set[str]] = {}
    for partition in partitions:
        for name, value in partition.items():
            values.setdefault(name, set()).update([] if value is None else [value])
    return {name: pa.string() if name in texts else _infer_type(found, own.get(name)) for name, found in values.items()}


def _infer_type(values: set[str], own: pa.DataType | None) -> pa.DataType:
    if own is not None and all(parse_value(value, own) is not None for value in values):
        return own
    if values and all(map(INTEGER.fullmatch, values)):
        return pa.int64()
    if values and all(map(_is_date, values)):
        return pa.date32()
    return pa.string()


def _is_date(value: str) -> bool:
    try:
        return bool(DATE.fullmatch(value) and date.fromisoformat(value))
    except ValueError:
        return False


def parse_value(text: str | None, kind: pa.DataType) -> pa.Scalar | None:
    """Parse the text of a partition as a value of a type; None if it is not one."""
    try:
        return pa.scalar(text, pa.string()).cast(kind)
    except pa.ArrowException:
        return None


def append_fields(schema: pa.Schema, partition: Partition, types: Mapping[str, pa.DataType]) -> pa.Schema:
    """Append the partition columns that a schema does not have itself; one of Arrow's null type counts as missing.

    Args:
        schema: schema of a file, without views.
        partition: values by column.
        types: types of partition columns; others are strings.
    """
    own = [field for field in schema if not (pa.types.is_null(field.type) and find_name(field.name, partition))]
    names = [field.name for field in own]
    missing = [name for name in partition if find_name(name, names) is None]
    return pa.schema([*own, *(pa.field(name, types.get(name, pa.string())) for name in missing)])


def append_partition(table: pa.Table, partition: Partition, place: str) -> pa.Table:
    """Append partition columns as strings to a table, and fill the nulls of those that it has itself.

    Args:
        table: rows of a file, without views.
        partition: values by column.
        place: URI of the file, for messages.

    Raises:
        ValueError: a column of the file contradicts its partition.
    """
    for name, value in partition.items():
        own = find_name(name, table.column_names)
        if own is not None and pa.types.is_null(table.schema.field(own).type):
            table, own = table.drop_columns(own), None
        if own is None:
            table = table.append_column(name, pa.repeat(pa.scalar(value, pa.string()), len(table)))
        else:
            filled = _fill_nulls(table[own], value)
            if filled is None:
                raise ValueError(f"{place}: {_describe_conflict(own, name, value)}")
            table = table.set_column(table.column_names.index(own), own, filled)
    return table


def _fill_nulls(column: pa.ChunkedArray, value: str | None) -> pa.ChunkedArray | None:
    """Fill the nulls of a column with the value of its partition; None if another value differs from it."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    expected = parse_value(value, kind)
    if expected is None or (value is None and column.null_count < len(column)):
        return None
    if value is None:
        return column
    filled = pc.fill_null(column.cast(kind), expected)
    return filled if pc.all(pc.equal(filled, expected)).as_py() is not False else None


def add_partition_values(
    values: Mapping[str, Any], partition: Partition, types: Mapping[str, pa.DataType]
) -> dict[str, Any]:
    """Add the partition columns to a row of a text file, where it has no values of its own.

    Args:
        values: values of the row by column.
        partition: values by partition column.
        types: types of the partition columns.

    Raises:
        ValueError: a value of the row contradicts the partition.
    """
    added = dict(values)
    for name, value in partition.items():
        own = find_name(name, values) or name
        if is_missing(values.get(own)):
            added[own] = pa.scalar(value, pa.string()).cast(types[name]).as_py()
        elif not _equals(values[own], value):
            raise ValueError(_describe_conflict(own, name, value))
    return added


def _equals(own: Any, value: str | None) -> bool:
    if value is None or isinstance(own, str):
        return bool(own == value)
    try:
        scalar = pa.scalar(own)
    except (pa.ArrowException, OverflowError):
        return False
    return bool(parse_value(value, scalar.type) == scalar)


def _describe_conflict(column: str, name: str, value: str | None) -> str:
    folder = f"{name}={NULL if value is None else value}"
    return f"column {column!r} differs from the partition {folder} in the path; correct the folder's name or the column"
