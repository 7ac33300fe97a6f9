"""Check a query set and divide it into units."""

import hashlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.sections import Columns, StorageConfig
from pipeline.queries.schema import check_query_schema, replace_views
from pipeline.storage.location import Location, join_lines, locate
from pipeline.storage.parquet import list_parquet, read_footer, read_parquet

READ_BYTES = 8 * 2**20
# The units of an actor start at the same time, and a row group may be large: only one of them reads it.
READING = threading.Lock()


@dataclass(frozen=True)
class Unit:
    """A range of rows of one row group: one actor call, one output file.

    Attributes:
        id: hexadecimal digest of the file's content and the range; the same in every run on the same files.
        uri: URI of the Parquet file.
        row_group: number of the row group in the file, from 0.
        offset: first row within the row group.
        rows: number of rows.
        size: size of the file in bytes.
        digest: hexadecimal digest of the file's content.
    """

    id: str
    uri: str
    row_group: int
    offset: int
    rows: int
    size: int
    digest: str


@dataclass(frozen=True)
class QuerySet:
    """A checked query set.

    Attributes:
        schema: schema of every file.
        units: all units, in the order of files and rows.
        files: number of files.
        rows: number of rows.
        digest: digest of all unit ids: the identity of the query set and of its division into units.
        given: whether there is a column of given passages.
        tasks: number of rows by task; rows without a task are not counted.
    """

    schema: pa.Schema
    units: tuple[Unit, ...]
    files: int
    rows: int
    digest: str
    given: bool
    tasks: Mapping[str, int]


def inspect_queries(location: Location, columns: Columns, unit_rows: int) -> QuerySet:
    """Check a query set and divide it into units.

    Every file is read in full, since its content is its identity: a resumed run must not mix the answers of two sets.
    Driver memory: all ids of the set at once while they are compared.

    Raises:
        ValueError: there are no Parquet files, a file is unreadable or has another schema, a column is missing or of
            the wrong type, an id is null or not unique, or there are no rows.
        StorageError: the storage cannot be read.
    """
    files = list_parquet(location)
    footers = [(file, read_footer(file)) for file in files]
    schema = _read_schema(footers[0][1])
    for file, footer in footers:
        check_query_schema(_read_schema(footer), columns, file.uri)
        if (other := _read_schema(footer)) != schema:
            raise ValueError(
                f"{file.uri}: its schema differs from that of {files[0].uri}: {_describe_difference(schema, other)}"
            )
    rows = sum(footer.num_rows for _, footer in footers)
    if rows == 0:
        raise ValueError(f"{location.uri}: the query set has no rows")
    _check_ids(files, columns.id)
    units = tuple(chain.from_iterable(_divide_file(file, footer, unit_rows) for file, footer in footers))
    digest = hashlib.sha256("".join(unit.id for unit in units).encode()).hexdigest()
    given, tasks = _has_passages(schema, columns), _count_tasks(files, schema, columns)
    return QuerySet(schema, units, len(files), rows, digest, given, tasks)


def _read_schema(footer: pq.FileMetaData) -> pa.Schema:
    return replace_views(footer.schema.to_arrow_schema())


def read_query_ids(queries: QuerySet, column: str, storage: StorageConfig) -> pa.ChunkedArray:
    """Read all ids, in the order of the units: large_string.

    Raises:
        StorageError: the storage cannot be read.
    """
    uris = dict.fromkeys(unit.uri for unit in queries.units)
    return _concatenate_ids([_read_column(locate(uri, storage), column, pa.large_string()) for uri in uris])


def _read_column(file: Location, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    return read_parquet(file, lambda stream: pq.read_table(stream, columns=[name])[name].cast(kind))


def _concatenate_ids(columns: Sequence[pa.ChunkedArray]) -> pa.ChunkedArray:
    chunks = chain.from_iterable(column.chunks for column in columns)
    return pa.chunked_array(list(chunks), pa.large_string())


def _describe_difference(one: pa.Schema, other: pa.Schema) -> str:
    for name in [*one.names, *other.names]:
        expected, found = _describe_type(one, name), _describe_type(other, name)
        if found != expected:
            return f"column {name!r} is {found}, not {expected}"
    return "the columns are in another order, or differ in nullability"


def _describe_type(schema: pa.Schema, column: str) -> str:
    return str(schema.field(column).type) if column in schema.names else "missing"


def _check_ids(files: list[Location], column: str) -> None:
    ids: list[pa.ChunkedArray] = []
    for file in files:
        values = _read_column(file, column, pa.large_string())
        if values.null_count:
            row = pc.index(values.is_null(), True).as_py()
            raise ValueError(f"{file.uri}: column {column!r} is null in row {row}; every query needs an id")
        try:
            values.validate(full=True)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file.uri}: column {column!r} is not UTF-8: {join_lines(error)}") from None
        ids.append(values)
    merged = _concatenate_ids(ids)
    if pc.count_distinct(merged).as_py() != len(merged):
        counts = pc.value_counts(merged)
        double = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        found = (_find_places(file, values, double) for file, values in zip(files, ids, strict=True))
        places = list(chain.from_iterable(found))
        raise ValueError(f"id {double!r} is not unique: {', '.join(places[:3])}")


def _find_places(file: Location, values: pa.ChunkedArray, value: str) -> list[str]:
    mask = pc.equal(values, value).combine_chunks()
    return [f"{file.uri} row {row}" for row in pc.indices_nonzero(mask).to_pylist()]


def _has_passages(schema: pa.Schema, columns: Columns) -> bool:
    return columns.passages in schema.names and not pa.types.is_null(schema.field(columns.passages).type)


def _count_tasks(files: list[Location], schema: pa.Schema, columns: Columns) -> dict[str, int]:
    if columns.task not in schema.names:
        return {}
    tasks: Counter[str] = Counter()
    for file in files:
        values = _read_column(file, columns.task, pa.string())
        try:
            counts = pc.value_counts(values.drop_null()).to_pylist()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.uri}: column {columns.task!r} is not UTF-8: {error}") from None
        tasks.update({entry["values"]: entry["counts"] for entry in counts})
    return dict(sorted(tasks.items()))


def _hash_file(file: Location) -> tuple[int, str]:
    def hash_blocks() -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        with file.filesystem.open_input_stream(file.path) as stream:
            while block := stream.read(READ_BYTES):
                digest.update(block)
                size += len(block)
        return size, digest.hexdigest()

    return file.retrying(hash_blocks)


def _decode(stream: Any) -> None:
    """Read every page, so that a damaged one is found before the run starts."""
    for _ in pq.ParquetFile(stream).iter_batches():
        pass


def _divide_file(file: Location, footer: pq.FileMetaData, unit_rows: int) -> Iterator[Unit]:
    size, digest = _hash_file(file)
    read_parquet(file, _decode)
    for group in range(footer.num_row_groups):
        total = footer.row_group(group).num_rows
        for offset in range(0, total, unit_rows):
            rows = min(unit_rows, total - offset)
            key = hashlib.sha256(f"{digest}:{group}:{offset}:{rows}".encode()).hexdigest()[:20]
            yield Unit(key, file.uri, group, offset, rows, size, digest)


@lru_cache(maxsize=1)
def _read_row_group(
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


def read_unit(unit: Unit, storage: StorageConfig) -> pa.Table:
    """Read the rows of a unit; thread-safe.

    The last row group stays in memory, since the other units of it tend to follow.

    Raises:
        ValueError: the size of the file has changed since the run was planned. A change that keeps the size is not
            detected: every process would have to compute the digest of the whole file.
        StorageError: the storage cannot be read.
    """
    with READING:
        group = _read_row_group(unit.uri, unit.size, unit.digest, unit.row_group, storage)
    rows = group.slice(unit.offset, unit.rows)
    assert rows.num_rows == unit.rows, f"unit {unit.id} has {unit.rows} rows, but {rows.num_rows} were read"
    return rows
