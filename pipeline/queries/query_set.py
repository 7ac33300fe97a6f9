"""Check a query set and divide it into units."""

import contextlib
import hashlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.sections import Columns, StorageConfig
from pipeline.queries.changes import Listing, reading_version
from pipeline.queries.partitions import append_fields, append_partition, find_partition, infer_types, parse_partition
from pipeline.queries.schema import GOLD_TYPES, check_query_schema
from pipeline.queries.unified_schema import cast_table, replace_views, unify_schemas
from pipeline.queries.units import Part, Unit, join_parts
from pipeline.storage.location import Location, join_lines, locate
from pipeline.storage.parquet import (
    SMALL_BYTES,
    list_parquet,
    map_in_threads,
    open_pages,
    read_batches,
    read_parquet,
    read_versioned,
)

READ_BYTES = 8 * 2**20
# Files are read in parallel, but only so many large ones at a time: their pages may be large.
READING_LARGE = threading.BoundedSemaphore(4)


@dataclass(frozen=True)
class QuerySet:
    """A checked query set.

    Attributes:
        schema: schema to which every file is cast.
        units: all units, in the order of files and rows.
        files: number of files.
        rows: number of rows.
        digest: digest of all unit ids: the identity of the query set and of its division into units.
        given: whether there is a column of given passages.
        tasks: number of rows by task; rows without a task are not counted.
        listing: the files with their sizes and modification times.
        partitions: columns that are read from the paths of the files.
    """

    schema: pa.Schema
    units: tuple[Unit, ...]
    files: int
    rows: int
    digest: str
    given: bool
    tasks: Mapping[str, int]
    listing: Listing
    partitions: tuple[str, ...] = ()


@dataclass(frozen=True)
class QueryFile:
    """A file of a query set, as its inspection has found it.

    Attributes:
        file: the file.
        schema: schema of its columns, without views.
        partition: folders that name its partition columns.
        groups: number of rows of each row group.
        version: its size and its ETag or modification time.
        digest: hexadecimal digest of its content.
        ids: ids of its rows: large_string.
        tasks: number of rows by task.
    """

    file: Location
    schema: pa.Schema
    partition: str
    groups: tuple[int, ...]
    version: str
    digest: str
    ids: pa.ChunkedArray
    tasks: Mapping[str, int]

    def complete_schema(self, types: Mapping[str, pa.DataType]) -> pa.Schema:
        """Return the schema with the partition columns; their types are strings unless ``types`` has others."""
        return append_fields(self.schema, parse_partition(self.partition), types)

    def divide(self, unit_rows: int) -> Iterator[Part]:
        """Divide the rows into parts of at most ``unit_rows`` rows."""
        for group, rows in enumerate(self.groups):
            for offset in range(0, rows, unit_rows):
                taken = min(unit_rows, rows - offset)
                yield Part(self.file.uri, self.version, self.digest, self.partition, group, rows, offset, taken)


def inspect_queries(location: Location, columns: Columns, unit_rows: int) -> QuerySet:
    """Check a query set and divide it into units.

    Every file is read in full, since its content is its identity: a resumed run must not mix the answers of two sets.
    Driver memory: all ids of the set at once while they are compared.

    Raises:
        ValueError: there are no Parquet files, a file is unreadable, its schema cannot be unified with the others, a
            column is missing or of the wrong type, or contradicts the partition in the path, an id is null or not
            unique, or there are no rows.
        StorageError: the storage cannot be read.
    """
    files = list_parquet(location)
    found = map_in_threads(lambda file: _inspect_file(file, find_partition(file, location), columns), files)
    filled = [file for file in found if any(file.groups)]
    if not filled:
        raise ValueError(f"{location.uri}: the query set has no rows")
    partitions = _infer_partition_types(filled, columns)
    schema = _unify_files(filled, partitions)
    _check_unique(filled)
    units = tuple(join_parts(chain.from_iterable(file.divide(unit_rows) for file in filled), unit_rows))
    digest = hashlib.sha256("".join(unit.id for unit in units).encode()).hexdigest()
    tasks: Counter[str] = sum((Counter(file.tasks) for file in filled), Counter())
    return QuerySet(
        schema=schema,
        units=units,
        files=len(files),
        rows=sum(unit.rows for unit in units),
        digest=digest,
        given=_has_passages(schema, columns),
        tasks=dict(sorted(tasks.items())),
        listing=Listing.of(location, files),
        partitions=tuple(partitions),
    )


def _inspect_file(file: Location, partition: str, columns: Columns) -> QueryFile:
    def inspect(stream: Any, version: str) -> QueryFile:
        with READING_LARGE if stream.size() > SMALL_BYTES else contextlib.nullcontext():
            return _inspect_stream(stream, version, file, partition, columns)

    return read_versioned(file, inspect)


def _inspect_stream(stream: Any, version: str, file: Location, partition: str, columns: Columns) -> QueryFile:
    digest = _hash_stream(stream)
    parquet = open_pages(stream)
    metadata = parquet.metadata
    groups = tuple(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))
    schema = replace_views(metadata.schema.to_arrow_schema())
    ids, tasks = [pa.chunked_array([], pa.large_string())], Counter[str]()
    if any(groups):  # pandas writes an empty table without the types of its columns
        check_query_schema(append_fields(schema, parse_partition(partition), {}), columns, file.uri)
    for table in _read_tables(parquet, file, partition):
        ids.append(table[columns.id].cast(pa.large_string()))
        if columns.task in table.schema.names:
            tasks.update(_count_tasks(table[columns.task], columns.task, file))
    found = _concatenate(ids)
    _check_ids_of_file(found, columns.id, file)
    return QueryFile(file, schema, partition, groups, version, digest, found, tasks)


def _hash_stream(stream: Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(READ_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _read_tables(parquet: pq.ParquetFile, file: Location, partition: str) -> Iterator[pa.Table]:
    """Read every page, so that a damaged one is found before the run starts."""
    for batch in read_batches(parquet):
        rows = pa.Table.from_batches([batch])
        yield append_partition(rows.cast(replace_views(rows.schema)), parse_partition(partition), file.uri)


def _count_tasks(values: pa.ChunkedArray, column: str, file: Location) -> dict[str, int]:
    try:
        counts = pc.value_counts(values.cast(pa.string()).drop_null()).to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.uri}: column {column!r} is not UTF-8: {error}") from None
    return {entry["values"]: entry["counts"] for entry in counts}


def _check_ids_of_file(ids: pa.ChunkedArray, column: str, file: Location) -> None:
    if ids.null_count:
        row = pc.index(ids.is_null(), True).as_py()
        raise ValueError(f"{file.uri}: column {column!r} is null in row {row}; every query needs an id")
    try:
        ids.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file.uri}: column {column!r} is not UTF-8: {join_lines(error)}") from None


def _infer_partition_types(files: Sequence[QueryFile], columns: Columns) -> dict[str, pa.DataType]:
    texts = [*vars(columns).values(), *GOLD_TYPES]
    own = {field.name: field.type for file in files for field in file.schema if not pa.types.is_null(field.type)}
    return infer_types((parse_partition(file.partition) for file in files), texts, own)


def _unify_files(files: Sequence[QueryFile], partitions: Mapping[str, pa.DataType]) -> pa.Schema:
    """Unify the schemas of the files, and check that every value fits."""
    schemas = {file.file.uri: file.complete_schema(partitions) for file in files}
    unified = unify_schemas(schemas)
    differing = [file for file in files if _differs(schemas[file.file.uri], unified)]
    map_in_threads(lambda file: _check_cast(file, unified), differing)
    return unified


def _differs(schema: pa.Schema, unified: pa.Schema) -> bool:
    return any(field.type != unified.field(field.name).type for field in schema)


def _check_cast(file: QueryFile, schema: pa.Schema) -> None:
    def cast(stream: Any) -> None:
        for table in _read_tables(open_pages(stream), file.file, file.partition):
            cast_table(table, schema, file.file.uri)

    read_parquet(file.file, cast)


def _check_unique(files: Sequence[QueryFile]) -> None:
    merged = _concatenate([file.ids for file in files])
    if pc.count_distinct(merged).as_py() == len(merged):
        return
    counts = pc.value_counts(merged)
    double = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
    places = list(chain.from_iterable(_find_places(file, double) for file in files))
    raise ValueError(f"id {double!r} is not unique: {', '.join(places[:3])}")


def _find_places(file: QueryFile, value: str) -> list[str]:
    mask = pc.equal(file.ids, value).combine_chunks()
    return [f"{file.file.uri} row {row}" for row in pc.indices_nonzero(mask).to_pylist()]


def _has_passages(schema: pa.Schema, columns: Columns) -> bool:
    return columns.passages in schema.names and not pa.types.is_null(schema.field(columns.passages).type)


def read_query_ids(queries: QuerySet, column: str, storage: StorageConfig) -> pa.ChunkedArray:
    """Read all ids, in the order of the units: large_string.

    Raises:
        ValueError: a file has changed since it was inspected.
        StorageError: the storage cannot be read.
    """
    versions = {part.uri: part.version for unit in queries.units for part in unit.parts}
    return _concatenate(map_in_threads(lambda uri: _read_ids(locate(uri, storage), versions[uri], column), versions))


def _read_ids(file: Location, version: str, column: str) -> pa.ChunkedArray:
    with reading_version(file, version):
        return read_parquet(
            file, lambda stream: pq.read_table(stream, columns=[column])[column].cast(pa.large_string())
        )


def _concatenate(columns: Iterable[pa.ChunkedArray]) -> pa.ChunkedArray:
    chunks = chain.from_iterable(column.chunks for column in columns)
    return pa.chunked_array(list(chunks), pa.large_string())
