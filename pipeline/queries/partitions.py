"""Read the partition columns of Hive-partitioned folders from the paths of their files.

Hive, Spark and DuckDB write the columns ``task`` and ``dt`` of ``task=popqa/dt=2024-01-01/part-0.parquet`` into the
path only (https://duckdb.org/docs/stable/data/partitioning/hive_partitioning). Folders above the query set itself are
not read, as in Spark and pyarrow.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from datetime import date
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

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
    """Parse the folders that :func:`find_partition` returns to values by column; decodes percent signs."""
    pairs = [folder.partition("=") for folder in folders.split("/") if folder]
    return {unquote(name): None if value == NULL else unquote(value) for name, _, value in pairs}


def infer_types(partitions: Iterable[Partition], texts: Iterable[str]) -> dict[str, pa.DataType]:
    """Infer the type of each partition column: int64, date32, or string where some value is neither.

    Args:
        partitions: values by column, of every file.
        texts: columns that are strings whatever their values.
    """
    values: dict[str, set[str]] = {}
    for partition in partitions:
        for name, value in partition.items():
            values.setdefault(name, set()).update([] if value is None else [value])
    return {name: pa.string() if name in texts else _infer_type(found) for name, found in values.items()}


def _infer_type(values: set[str]) -> pa.DataType:
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


def append_partition(table: pa.Table, partition: Partition, place: str) -> pa.Table:
    """Append partition columns as strings to a table; columns that it already has must have the same values.

    Args:
        table: rows of a file.
        partition: values by column.
        place: URI of the file, for messages.

    Raises:
        ValueError: a column of the file contradicts its partition.
    """
    for name, value in partition.items():
        if name not in table.schema.names:
            table = table.append_column(name, pa.repeat(pa.scalar(value, pa.string()), len(table)))
        elif not _equals(table[name], value):
            raise ValueError(
                f"{place}: column {name!r} differs from the partition {name}={NULL if value is None else value} in its "
                "path; correct the folder's name or the column"
            )
    return table


def _equals(column: pa.ChunkedArray, value: str | None) -> bool:
    if value is None:
        return bool(column.null_count == len(column))
    try:
        texts = column.cast(pa.string())
    except pa.ArrowException:
        return False
    return bool(pc.all(pc.fill_null(pc.equal(texts, value), False)).as_py() in (True, None))
