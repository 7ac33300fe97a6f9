"""Units of a query set, and their rows."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config.sections import StorageConfig
from pipeline.queries.changes import check_version, reading_version
from pipeline.queries.partitions import append_partition, parse_partition
from pipeline.queries.shared_groups import SharedGroups
from pipeline.queries.unified_schema import cast_table, replace_views
from pipeline.storage.location import Location, locate
from pipeline.storage.parquet import GroupReader, map_in_threads, open_versioned, retry_reading

SHARED = SharedGroups()


@dataclass(frozen=True)
class Part:
    """A range of rows of one row group.

    Attributes:
        uri: URI of the Parquet file.
        version: size of the file and its ETag or modification time, when it was inspected.
        digest: hexadecimal digest of the file's content.
        partition: folders that name the partition columns of the file, as ``task=popqa/dt=2024-01-01``.
        row_group: number of the row group in the file, from 0.
        group_rows: number of rows of the row group.
        offset: first row within the row group.
        rows: number of rows.
    """

    uri: str
    version: str
    digest: str
    partition: str
    row_group: int
    group_rows: int
    offset: int
    rows: int

    def compute_key(self) -> str:
        """Return a digest of the content, the same wherever the file lies: 20 hexadecimal digits."""
        partition = self.partition and f":{self.partition}"
        return _hash(f"{self.digest}:{self.row_group}:{self.offset}:{self.rows}{partition}")


@dataclass(frozen=True)
class Unit:
    """Rows that one actor call annotates and one output file holds.

    Attributes:
        id: hexadecimal digest of the content of its parts; the same in every run on the same files.
        parts: ranges of rows that follow each other, of one file or of several small ones.
    """

    id: str
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(part.rows for part in self.parts)

    @classmethod
    def join(cls, parts: Iterable[Part]) -> "Unit":
        """Return the unit of the parts."""
        parts = tuple(parts)
        keys = [part.compute_key() for part in parts]
        return cls(keys[0] if len(keys) == 1 else _hash("".join(keys)), parts)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Unit":
        """Return the unit that ``dataclasses.asdict`` has turned into a record."""
        return cls(record["id"], tuple(Part(**part) for part in record["parts"]))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def read_unit(unit: Unit, schema: pa.Schema, storage: StorageConfig) -> pa.Table:
    """Read the rows of a unit, its parts in parallel; thread-safe.

    Memory: the rows, and a few megabytes for each column. The reader of a row group that several units share stays open
    and continues where the last unit has ended, since the other units tend to follow.

    Args:
        unit: unit to read.
        schema: schema of the query set, to which every file is cast.
        storage: access to object storage.

    Raises:
        ValueError: a file has changed since the run was planned.
        StorageError: the storage cannot be read.
    """
    return pa.concat_tables(map_in_threads(lambda part: _read_part(part, schema, storage), unit.parts))


def read_unit_ids(unit: Unit, column: str, storage: StorageConfig) -> pa.ChunkedArray:
    """Read the ids of a unit as :func:`read_unit` reads its rows: large_string."""

    def read(part: Part) -> pa.Table:
        return _read_checked(part, locate(part.uri, storage), [column]).cast(pa.schema([(column, pa.large_string())]))

    return pa.concat_tables(map_in_threads(read, unit.parts))[column]


def _read_part(part: Part, schema: pa.Schema, storage: StorageConfig) -> pa.Table:
    rows = _read_checked(part, locate(part.uri, storage))
    rows = rows.cast(replace_views(rows.schema))
    return cast_table(append_partition(rows, parse_partition(part.partition), part.uri), schema, part.uri)


def _read_checked(part: Part, file: Location, columns: list[str] | None = None) -> pa.Table:
    with reading_version(file, part.version):
        rows = retry_reading(file, lambda: _read_rows(part, file, columns))
    assert rows.num_rows == part.rows, f"{part.uri} has {rows.num_rows} of the {part.rows} rows that were planned"
    return rows


def _read_rows(part: Part, file: Location, columns: list[str] | None) -> pa.Table:
    def open_group() -> GroupReader:
        return GroupReader(_open_planned(part, file), part.row_group, columns)

    if part.rows == part.group_rows:
        return open_group().read(0, part.rows)
    # The digest, since a process may outlive a run, and a file may be replaced by one of the same size and time.
    key = part.uri, part.version, part.digest, part.row_group, columns and tuple(columns)
    return SHARED.read(key, open_group, part.offset, part.rows)


def _open_planned(part: Part, file: Location) -> Any:
    stream, version = open_versioned(file)
    check_version(part.uri, part.version, version)
    return stream
