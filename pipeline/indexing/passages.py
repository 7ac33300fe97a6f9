"""Passages in Parquet: found, checked, cut into shards, read."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.indexing.embeddings import check_embeddings
from pipeline.retrieval.shard_files import PASSAGE_SCHEMA
from pipeline.storage.location import Location
from pipeline.storage.parquet import RowRange, list_parquet, map_in_threads, read_footer, read_range


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
    ranges: tuple[RowRange, ...]

    @property
    def rows(self) -> int:
        """How many."""
        return sum(part.rows for part in self.ranges)


def find_passages(source: Location, embeddings: str | None = None) -> list[RowRange]:
    """Every Parquet file of a source, whole, in the order of names; only footers are read.

    Args:
        embeddings: column that must hold vectors.

    Raises:
        ValueError: nothing there, not Parquet, no passages, or a column is missing or of another type.
        StorageError: storage does not answer.
    """
    files = list_parquet(source)
    rows = map_in_threads(lambda file: _checked_rows(file, embeddings), files)
    found = [RowRange(file, 0, count) for file, count in zip(files, rows, strict=True)]
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


def plan_shards(files: list[RowRange], shards: int) -> tuple[ShardPlan, ...]:
    """Cut the passages, in their order, into shards whose sizes differ by one at most.

    Raises:
        ValueError: fewer passages than shards.
    """
    total = sum(part.rows for part in files)
    if total < shards:
        raise ValueError(f"--shards {shards}: there are only {total} passages; ask for fewer shards")
    borders = [number * total // shards for number in range(shards + 1)]
    return tuple(ShardPlan(number, _cut(files, start, stop)) for number, (start, stop) in enumerate(pairwise(borders)))


def _cut(files: list[RowRange], start: int, stop: int) -> tuple[RowRange, ...]:
    parts, before = [], 0
    for part in files:
        first, last = max(start - before, 0), min(stop - before, part.rows)
        if first < last:
            parts.append(RowRange(part.file, part.start + first, part.start + last))
        before += part.rows
    return tuple(parts)


def read_passages(parts: Iterable[RowRange], embeddings: str | None = None) -> Iterator[PassageBatch]:
    """The passages of ranges, at most ``BATCH_ROWS`` at a time; a null title is empty.

    Args:
        embeddings: column with their vectors, where it is wanted.

    Raises:
        ValueError: a file cannot be read; names it.
    """
    columns = [*PASSAGE_SCHEMA.names, *([embeddings] if embeddings else [])]
    for part in parts:
        for row, batch in read_range(part, columns):
            strings = [batch[name].cast(pa.string()) for name in PASSAGE_SCHEMA.names]
            strings[1] = pc.fill_null(strings[1], "")
            passages = pa.record_batch(strings, schema=PASSAGE_SCHEMA)
            yield PassageBatch(
                part.file, np.arange(row, row + len(batch)), passages, batch[embeddings] if embeddings else None
            )


@dataclass(frozen=True)
class Sample:
    """Some rows of a range, counted from its start: int64 [rows]."""

    part: RowRange
    rows: npt.NDArray[np.int64]

    def read(self, embeddings: str | None = None) -> Iterator[PassageBatch]:
        """Its passages, as :func:`read_passages`."""
        for batch in read_passages([self.part], embeddings):
            start = batch.rows[0] - self.part.start
            taken = self.rows[(self.rows >= start) & (self.rows < start + batch.passages.num_rows)] - start
            if len(taken):
                yield batch.take(taken)


def spread_samples(files: list[RowRange], size: int) -> list[Sample]:
    """Evenly spaced passages, ``size`` of them or all.

    Of a corpus much larger than the sample they are taken in runs of neighbours, so that only some row groups are
    read: about eight rows for each one taken, but 64 runs at least.
    """
    groups = map_in_threads(_row_groups, files)
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


def _row_groups(part: RowRange) -> list[RowRange]:
    footer = read_footer(part.file)
    sizes = [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
    ends = [0, *np.cumsum(sizes).tolist()]
    return [RowRange(part.file, start, stop) for start, stop in pairwise(ends) if start < stop]
