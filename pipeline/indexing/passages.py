"""Passages in Parquet: found, checked, cut into shards, read."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.indexing.embeddings import check_embeddings
from pipeline.retrieval.shard_files import PASSAGE_SCHEMA
from pipeline.storage.location import Location, one_line

# Rows read, encoded and added to an index at a time: a few megabytes.
BATCH_ROWS = 1024
# Footers read at once.
READERS = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


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
class PassageBatch:
    """Consecutive passages of a file, or some of them.

    Attributes:
        rows: their numbers in the file, from 0: int64 [rows].
        passages: in ``PASSAGE_SCHEMA``.
        embeddings: their vectors as the file has them, a list array; None where they were not asked for.
    """

    file: Location
    rows: npt.NDArray[np.int64]
    passages: pa.RecordBatch
    embeddings: pa.Array | None

    def take(self, rows: npt.NDArray[np.int64]) -> "PassageBatch":
        """Some of them, counted from the first."""
        places = pa.array(rows)
        embeddings = None if self.embeddings is None else self.embeddings.take(places)
        return PassageBatch(self.file, self.rows[rows], self.passages.take(places), embeddings)


@dataclass(frozen=True)
class ShardPlan:
    """The passages of a shard: consecutive ones, possibly from several files."""

    number: int
    ranges: tuple[PassageRange, ...]

    @property
    def rows(self) -> int:
        """How many."""
        return sum(part.rows for part in self.ranges)


def find_passages(source: Location, embeddings: str | None = None) -> list[PassageRange]:
    """Every Parquet file of a source, whole, in the order of names; only footers are read.

    Args:
        embeddings: column that must hold vectors.

    Raises:
        ValueError: nothing there, not Parquet, no passages, or a column is missing or of another type.
        StorageError: storage does not answer.
    """
    kind = source.kind()
    if kind == fs.FileType.NotFound:
        raise ValueError(f"passages {source.uri}: no such file or folder")
    files = [source] if kind == fs.FileType.File else source.files(".parquet")
    if not files:
        raise ValueError(f"passages {source.uri}: no Parquet files (*.parquet) in this folder")
    rows = in_threads(lambda file: _checked_rows(file, embeddings), files)
    found = [PassageRange(file, 0, count) for file, count in zip(files, rows, strict=True)]
    if not any(part.rows for part in found):
        raise ValueError(f"passages {source.uri}: no rows")
    return [part for part in found if part.rows]


def _checked_rows(file: Location, embeddings: str | None) -> int:
    footer = read_footer(file)
    schema = footer.schema.to_arrow_schema()
    for name in PASSAGE_SCHEMA.names:
        if name not in schema.names:
            raise ValueError(f"{file.uri}: column {name} is missing; passages have the columns id, title and text")
        kind = schema.field(name).type
        values = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values)):
            raise ValueError(f"{file.uri}: column {name} is {kind}; make it string")
    if embeddings:
        check_embeddings(file, schema, embeddings)
    return int(footer.num_rows)


def read_footer(file: Location) -> pq.FileMetaData:
    """The footer of a Parquet file.

    Raises:
        ValueError: it is none.
        StorageError: it cannot be read.
    """

    def work() -> pq.FileMetaData:
        with file.filesystem.open_input_file(file.path) as stream:
            return pq.read_metadata(stream)

    with _readable(file):
        return file.attempt(work)


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


def read_passages(parts: Iterable[PassageRange], embeddings: str | None = None) -> Iterator[PassageBatch]:
    """The passages of ranges, at most ``BATCH_ROWS`` at a time; a null title is empty.

    Args:
        embeddings: column with their vectors, where it is wanted.

    Raises:
        ValueError: a file cannot be read; names it.
    """
    columns = [*PASSAGE_SCHEMA.names, *([embeddings] if embeddings else [])]
    for part in parts:
        for row, batch in read_columns(part, columns):
            strings = [batch[name].cast(pa.string()) for name in PASSAGE_SCHEMA.names]
            strings[1] = pc.fill_null(strings[1], "")
            passages = pa.record_batch(strings, schema=PASSAGE_SCHEMA)
            yield PassageBatch(
                part.file, np.arange(row, row + len(batch)), passages, batch[embeddings] if embeddings else None
            )


def read_columns(
    part: PassageRange, columns: list[str], batch_rows: int = BATCH_ROWS
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The rows of a range with the number of the first, reading only the row groups that it touches.

    Where an object store fails for a while, reading goes on at the row that was reached.

    Raises:
        ValueError: the file is not Parquet; names it.
        StorageError: it cannot be read.
    """
    left, batches = part, _read_columns(part, columns, batch_rows)

    def following() -> tuple[int, pa.RecordBatch]:
        nonlocal batches
        try:
            return next(batches)
        except OSError:
            batches = _read_columns(left, columns, batch_rows)  # a generator that has raised is over
            raise

    while left.rows:
        with _readable(part.file):
            row, batch = part.file.attempt(following)
        left = PassageRange(part.file, row + batch.num_rows, part.stop)
        yield row, batch


def _read_columns(part: PassageRange, columns: list[str], batch_rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    with pq.ParquetFile(part.file.path, filesystem=part.file.filesystem) as parquet:
        sizes = [parquet.metadata.row_group(n).num_rows for n in range(parquet.metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        groups = [n for n, end in enumerate(ends) if end > part.start and end - sizes[n] < part.stop]
        row = int(ends[groups[0]]) - sizes[groups[0]]
        for batch in parquet.iter_batches(batch_rows, row_groups=groups, columns=columns):
            first, last = max(part.start - row, 0), min(part.stop - row, batch.num_rows)
            if first < last:
                yield row + first, batch.slice(first, last - first)
            row += batch.num_rows


@contextmanager
def _readable(file: Location) -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as error:
        raise ValueError(f"{file.uri}: cannot be read as Parquet ({one_line(error)})") from None


@dataclass(frozen=True)
class Sample:
    """Some rows of a range, counted from its start: int64 [rows]."""

    part: PassageRange
    rows: npt.NDArray[np.int64]

    def read(self, embeddings: str | None = None) -> Iterator[PassageBatch]:
        """Its passages, as :func:`read_passages`."""
        for batch in read_passages([self.part], embeddings):
            start = batch.rows[0] - self.part.start
            taken = self.rows[(self.rows >= start) & (self.rows < start + batch.passages.num_rows)] - start
            if len(taken):
                yield batch.take(taken)


def spread_samples(files: list[PassageRange], size: int) -> list[Sample]:
    """Evenly spaced passages, ``size`` of them or all.

    Of a corpus much larger than the sample they are taken in runs of neighbours, so that only some row groups are
    read: about eight rows for each one taken, but 64 runs at least.
    """
    groups = in_threads(_row_groups, files)
    parts = [group for several in groups for group in several]
    ends = np.cumsum([part.rows for part in parts])
    chosen = _spread(int(ends[-1]), size, len(parts))
    split = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    return [Sample(p, rows - (end - p.rows)) for p, rows, end in zip(parts, split, ends, strict=True) if len(rows)]


def _spread(total: int, size: int, groups: int) -> npt.NDArray[np.int64]:
    """Numbers of evenly spaced rows, in runs where they are few among many."""
    size = min(size, total)
    runs = size if total <= 8 * size else min(size, max(64, 8 * size * groups // total))
    places = np.arange(size)
    run = places * runs // size
    first = -(-run * size // runs)  # the first place of the same run
    rows: npt.NDArray[np.int64] = run * total // runs + places - first
    return rows


def _row_groups(part: PassageRange) -> list[PassageRange]:
    footer = read_footer(part.file)
    sizes = [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
    ends = [0, *np.cumsum(sizes).tolist()]
    return [PassageRange(part.file, start, stop) for start, stop in pairwise(ends) if start < stop]


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What a function makes of each item, in order; many at once, since object stores answer slowly."""
    with ThreadPoolExecutor(READERS) as threads:
        return list(threads.map(work, items))
