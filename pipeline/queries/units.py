"""Divide a query set into units, and read the rows of a unit."""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.sections import StorageConfig
from pipeline.queries.partitions import append_partition, parse_partition
from pipeline.queries.unified_schema import cast_table, replace_views
from pipeline.storage.location import locate
from pipeline.storage.parquet import map_in_threads, read_parquet

# The units of an actor start at the same time, and a row group may be large: only one of them reads it.
READING = threading.Lock()


@dataclass(frozen=True)
class Part:
    """A range of rows of one row group.

    Attributes:
        uri: URI of the Parquet file.
        size: size of the file in bytes.
        digest: hexadecimal digest of the file's content.
        partition: folders that name the partition columns of the file, as ``task=popqa/dt=2024-01-01``.
        row_group: number of the row group in the file, from 0.
        group_rows: number of rows of the row group.
        offset: first row within the row group.
        rows: number of rows.
    """

    uri: str
    size: int
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
        parts: one range of rows, or several small ones.
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


def join_parts(parts: Iterable[Part], unit_rows: int) -> Iterator[Unit]:
    """Join consecutive parts, of at most ``unit_rows`` rows each, into units of at most ``unit_rows`` rows."""
    waiting: list[Part] = []
    for part in parts:
        if waiting and sum(other.rows for other in waiting) + part.rows > unit_rows:
            yield Unit.join(waiting)
            waiting = []
        waiting.append(part)
    if waiting:
        yield Unit.join(waiting)


def read_unit(unit: Unit, schema: pa.Schema, storage: StorageConfig) -> pa.Table:
    """Read the rows of a unit; thread-safe.

    Whole row groups are read in parallel. Of those that several units share, the last one stays in memory, since the
    other units tend to follow.

    Args:
        unit: unit to read.
        schema: schema of the query set, to which every file is cast.
        storage: access to object storage.

    Raises:
        ValueError: the size of a file has changed since the run was planned. A change that keeps the size is not
            detected: every process would have to compute the digest of the whole file.
        StorageError: the storage cannot be read.
    """
    return pa.concat_tables(map_in_threads(lambda part: _read_part(part, schema, storage), unit.parts))


def _read_part(part: Part, schema: pa.Schema, storage: StorageConfig) -> pa.Table:
    place = part.uri, part.size, part.digest, part.row_group
    if part.rows == part.group_rows:
        group = _read_group(*place, storage)
    else:
        with READING:
            group = _read_last_group(*place, storage)
    rows = group.slice(part.offset, part.rows)
    assert rows.num_rows == part.rows, f"{part.uri} has {rows.num_rows} of the {part.rows} rows that were planned"
    return cast_table(append_partition(rows, parse_partition(part.partition), part.uri), schema, part.uri)


def _read_group(
    uri: str,
    size: int,
    digest: str,  # noqa: ARG001  part of the cache key: a process may outlive a run, and the file may change
    group: int,
    storage: StorageConfig,
) -> pa.Table:
    def read_group(stream: Any) -> pa.Table:
        if stream.size() != size:
            raise ValueError(
                f"{uri}: has changed since the run began, from {size} to {stream.size()} bytes; choose another "
                "output, or pass --overwrite"
            )
        rows = pq.ParquetFile(stream).read_row_group(group)
        return rows.cast(replace_views(rows.schema))

    return read_parquet(locate(uri, storage), read_group)


_read_last_group = lru_cache(maxsize=1)(_read_group)
