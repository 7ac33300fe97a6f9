"""Passages in Parquet: found, checked, cut into shards, read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.shards import PASSAGE_SCHEMA
from pipeline.storage import Location

# Rows read, encoded and added to an index at a time: a few megabytes.
BATCH_ROWS = 1024


@dataclass(frozen=True)
class PassageRange:
    """The rows from ``start`` to before ``stop`` of a file."""

    file: Location
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


@dataclass(frozen=True)
class ShardPlan:
    """The passages of a shard: consecutive ones, possibly from several files."""

    number: int
    ranges: tuple[PassageRange, ...]

    @property
    def rows(self) -> int:
        """How many."""
        return sum(part.rows for part in self.ranges)


def find_passages(source: Location) -> list[PassageRange]:
    """Every Parquet file of a source, whole, in the order of names; only footers are read.

    Raises:
        ValueError: nothing there, not Parquet, no passages, or a column is missing or no string.
        StorageError: storage does not answer.
    """
    kind = source.kind()
    if kind == fs.FileType.NotFound:
        raise ValueError(f"passages {source.uri}: no such file or folder")
    files = [source] if kind == fs.FileType.File else source.files(".parquet")
    if not files:
        raise ValueError(f"passages {source.uri}: no Parquet files (*.parquet) in this folder")
    found = [PassageRange(file, 0, _checked_rows(file)) for file in files]
    if not any(part.rows for part in found):
        raise ValueError(f"passages {source.uri}: no rows")
    return [part for part in found if part.rows]


def _checked_rows(file: Location) -> int:
    with _readable(file), pq.ParquetFile(file.path, filesystem=file.filesystem) as parquet:
        schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
    for name in PASSAGE_SCHEMA.names:
        if name not in schema.names:
            raise ValueError(f"{file.uri}: column {name} is missing; passages have the columns id, title and text")
        kind = schema.field(name).type
        values = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values)):
            raise ValueError(f"{file.uri}: column {name} is {kind}; make it string")
    return int(rows)


def check_passages(files: list[PassageRange]) -> None:
    """Read ids and texts once: an id must be there and unique, a text must not be empty.

    The ids are held in memory, some tens of bytes each; the texts are not.

    Raises:
        ValueError: names file, column and row (from 0).
    """
    ids = []
    for part in files:
        row = part.start
        for batch in _batches(part, ("id", "text")):
            _refuse(pc.is_null(batch["id"]), part.file, row, "column id is null")
            blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(batch["text"])), 0)
            _refuse(pc.fill_null(blank, True), part.file, row, "column text is empty")
            ids.append(batch["id"])
            row += batch.num_rows
    _refuse_duplicate(files, pa.chunked_array(ids))


def _refuse(wrong: pa.Array, file: Location, first_row: int, problem: str) -> None:
    place = pc.index(wrong, True).as_py()
    if place >= 0:
        raise ValueError(f"{file.uri}: row {first_row + place}: {problem}; give every passage an id and a text")


def _refuse_duplicate(files: list[PassageRange], ids: pa.ChunkedArray) -> None:
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    value = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), True).as_py()]
    first, second = (_place(files, int(row)) for row in np.flatnonzero(pc.equal(ids, value).to_numpy())[:2])
    raise ValueError(f"{second}: column id: {value.as_py()!r} is also in {first}; ids must be unique")


def _place(files: list[PassageRange], row: int) -> str:
    for part in files:
        if row < part.rows:
            return f"{part.file.uri}: row {row}"
        row -= part.rows
    raise AssertionError("a row beyond the last file")


def plan_shards(files: list[PassageRange], shards: int) -> tuple[ShardPlan, ...]:
    """Cut the passages, in their order, into shards whose sizes differ by one at most.

    Raises:
        ValueError: fewer passages than shards.
    """
    total = sum(part.rows for part in files)
    if total < shards:
        raise ValueError(f"--shards {shards}: there are only {total} passages; ask for fewer shards")
    borders = [number * total // shards for number in range(shards + 1)]
    return tuple(ShardPlan(number, _cut(files, start, stop)) for number, (start, stop) in enumerate(pairwise(borders)))


def _cut(files: list[PassageRange], start: int, stop: int) -> tuple[PassageRange, ...]:
    parts, before = [], 0
    for part in files:
        first, last = max(start - before, 0), min(stop - before, part.rows)
        if first < last:
            parts.append(PassageRange(part.file, part.start + first, part.start + last))
        before += part.rows
    return tuple(parts)


def read_passages(parts: tuple[PassageRange, ...]) -> Iterator[pa.RecordBatch]:
    """The passages of ranges, in ``PASSAGE_SCHEMA``, at most ``BATCH_ROWS`` at a time; a null title is empty.

    Raises:
        ValueError: a file cannot be read; names it.
    """
    for part in parts:
        for batch in _batches(part, tuple(PASSAGE_SCHEMA.names)):
            titles = pc.fill_null(batch["title"], "")
            yield pa.record_batch([batch["id"], titles, batch["text"]], schema=PASSAGE_SCHEMA)


def sample_passages(files: list[PassageRange], size: int) -> pa.Table:
    """Evenly spaced passages, ``size`` of them or all."""
    total = sum(part.rows for part in files)
    chosen = np.unique(np.linspace(0, total - 1, min(size, total)).astype(np.int64))
    taken, row = [], 0
    for batch in read_passages(tuple(files)):
        here = chosen[(chosen >= row) & (chosen < row + batch.num_rows)]
        taken.append(batch.take(pa.array(here - row)))
        row += batch.num_rows
    return pa.Table.from_batches(taken, PASSAGE_SCHEMA)


def _batches(part: PassageRange, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    """The rows of a range with their columns as strings, reading only the row groups that it touches."""
    with _readable(part.file), pq.ParquetFile(part.file.path, filesystem=part.file.filesystem) as parquet:
        sizes = [parquet.metadata.row_group(n).num_rows for n in range(parquet.metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        groups = [n for n, end in enumerate(ends) if end > part.start and end - sizes[n] < part.stop]
        row = int(ends[groups[0]]) - sizes[groups[0]]
        for batch in parquet.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(columns)):
            first, last = max(part.start - row, 0), min(part.stop - row, batch.num_rows)
            row += batch.num_rows
            if first < last:
                strings = [batch.column(name)[first:last].cast(pa.string()) for name in columns]
                yield pa.record_batch(strings, names=list(columns))


@contextmanager
def _readable(file: Location) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.uri}: cannot be read as Parquet ({' '.join(str(error).split())})") from None
