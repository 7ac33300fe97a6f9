"""Inspect the files of a query set: every page is read once, for a digest, the ids and the tasks."""

import contextlib
import hashlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.sections import Columns
from pipeline.queries.partitions import append_fields, append_partition, find_name, find_partition, parse_partition
from pipeline.queries.schema import check_query_schema
from pipeline.queries.unified_schema import replace_views
from pipeline.queries.units import Part
from pipeline.storage.hashes import hash_texts
from pipeline.storage.location import Location, join_lines
from pipeline.storage.parquet import SMALL_BYTES, open_pages, read_batches, read_versioned

READ_BYTES = 8 * 2**20
# Files are read in parallel, but a process reads only so many large ones at a time: their pages may be large.
READING_LARGE = threading.BoundedSemaphore(4)


@dataclass(frozen=True)
class QueryFile:
    """A file of a query set, as its inspection has found it.

    Attributes:
        uri: URI of the file.
        version: its size and its ETag or modification time.
        digest: hexadecimal digest of its content.
        partition: folders that name its partition columns.
        schema: schema of its columns, without views.
        groups: number of rows of each row group.
        tasks: number of rows by task.
    """

    uri: str
    version: str
    digest: str
    partition: str
    schema: pa.Schema
    groups: tuple[int, ...]
    tasks: Mapping[str, int]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(self.groups)

    def complete_schema(self, types: Mapping[str, pa.DataType]) -> pa.Schema:
        """Return the schema with the partition columns; their types are strings unless ``types`` has others."""
        return append_fields(self.schema, parse_partition(self.partition), types)

    def divide(self, unit_rows: int) -> Iterator[list[Part]]:
        """Divide the rows into ranges of ``unit_rows`` rows, the last one smaller; yields the parts of each range."""
        taken: list[Part] = []
        room = unit_rows
        for group, rows in enumerate(self.groups):
            offset = 0
            while offset < rows:
                count = min(room, rows - offset)
                taken.append(Part(self.uri, self.version, self.digest, self.partition, group, rows, offset, count))
                offset, room = offset + count, room - count
                if not room:
                    yield taken
                    taken, room = [], unit_rows
        if taken:
            yield taken


class Inspected(NamedTuple):
    """A file that has been inspected, and the hashes of its ids: uint64 [rows], in the order of the rows."""

    file: QueryFile
    hashes: npt.NDArray[np.uint64]


def inspect_file(file: Location, source: Location, columns: Columns) -> Inspected:
    """Read a file of a query set in full: its content is its identity, and a damaged page is found before the run.

    Memory: 8 bytes for each row, and a batch.

    Args:
        file: the file.
        source: file or folder of the query set.
        columns: names of its columns.

    Raises:
        ValueError: the file is unreadable, its folder names the column of ids, a column is missing or of the wrong
            type, or an id is null or not UTF-8.
        StorageError: the storage cannot be read.
    """
    partition = find_partition(file, source)
    if find_name(columns.id, parse_partition(partition)):
        raise ValueError(
            f"{file.uri}: its folder names the column {columns.id!r} (columns.id), but every query needs an id of its "
            "own; rename the folder, or set columns.id to a column of the file"
        )

    def inspect(stream: Any, version: str) -> Inspected:
        with READING_LARGE if stream.size() > SMALL_BYTES else contextlib.nullcontext():
            return _inspect_stream(stream, version, file, partition, columns)

    return read_versioned(file, inspect)


def _inspect_stream(stream: Any, version: str, file: Location, partition: str, columns: Columns) -> Inspected:
    digest = _hash_stream(stream)
    parquet = open_pages(stream)
    metadata = parquet.metadata
    groups = tuple(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))
    schema = replace_views(metadata.schema.to_arrow_schema())
    if any(groups):  # pandas writes an empty table without the types of its columns
        check_query_schema(append_fields(schema, parse_partition(partition), {}), columns, file.uri)
    hashes, tasks, row = np.empty(sum(groups), np.uint64), Counter[str](), 0
    for table in read_tables(parquet, file, partition):
        ids = table[columns.id].cast(pa.large_string())
        _check_ids(ids, columns.id, file, row)
        hashes[row : row + len(ids)] = hash_texts(ids)
        row += len(ids)
        if columns.task in table.schema.names:
            tasks.update(_count_tasks(table[columns.task], columns.task, file))
    return Inspected(QueryFile(file.uri, version, digest, partition, schema, groups, dict(tasks)), hashes)


def _hash_stream(stream: Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(READ_BYTES):
        digest.update(block)
    return digest.hexdigest()


def read_tables(parquet: pq.ParquetFile, file: Location, partition: str) -> Iterator[pa.Table]:
    """Read every page, batch by batch; the columns of the partition are appended."""
    for batch in read_batches(parquet):
        rows = pa.Table.from_batches([batch])
        yield append_partition(rows.cast(replace_views(rows.schema)), parse_partition(partition), file.uri)


def _check_ids(ids: pa.ChunkedArray, column: str, file: Location, first: int) -> None:
    if ids.null_count:
        row = first + pc.index(ids.is_null(), True).as_py()
        raise ValueError(f"{file.uri}: column {column!r} is null in row {row}; every query needs an id")
    try:
        ids.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file.uri}: column {column!r} is not UTF-8: {join_lines(error)}") from None


def _count_tasks(values: pa.ChunkedArray, column: str, file: Location) -> dict[str, int]:
    try:
        counts = pc.value_counts(values.cast(pa.string()).drop_null()).to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.uri}: column {column!r} is not UTF-8: {error}") from None
    return {entry["values"]: entry["counts"] for entry in counts}
