"""Find, check, sample and read passages in Parquet files, and divide them into shards."""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pandas.util import hash_array

from pipeline.indexing.form import PassageForm
from pipeline.indexing.parts import split_passages
from pipeline.retrieval.passage_columns import MetadataType
from pipeline.storage.location import Location
from pipeline.storage.parquet import RowRange, list_parquet, map_in_threads, read_footer, read_range

log = logging.getLogger(__name__)

# The columns id, title and text, without vectors, whole.
PLAIN = PassageForm()


@dataclass(frozen=True)
class PassageBatch:
    """Passages of a file, or parts of them, in the order of its rows.

    Attributes:
        file: file of the passages.
        rows: row numbers in the file, from 0; equal for the parts of a passage: int64 [rows].
        passages: passages in ``PASSAGE_SCHEMA``, with further columns if any are kept.
        embeddings: vectors as stored in the file, a list array; None if no column was requested.
    """

    file: Location
    rows: npt.NDArray[np.int64]
    passages: pa.RecordBatch
    embeddings: pa.Array | None

    def take(self, rows: npt.NDArray[np.int64]) -> "PassageBatch":
        """Return a batch of some of the passages, given by their positions in this batch."""
        places = pa.array(rows)
        embeddings = None if self.embeddings is None else self.embeddings.take(places)
        return PassageBatch(self.file, self.rows[rows], self.passages.take(places), embeddings)

    def split(self, most: int | None) -> "PassageBatch":
        """Return a batch of parts of at most ``most`` words; None keeps the passages whole."""
        if most is None:
            return self
        parts, positions = split_passages(self.passages, most)
        return PassageBatch(self.file, self.rows[positions], parts, None)

    def thin(self, most: int) -> "PassageBatch":
        """Return a batch with at most ``most`` evenly spaced parts of each passage."""
        _, first, counts = np.unique(self.rows, return_index=True, return_counts=True)
        places = np.arange(len(self.rows)) - np.repeat(first, counts)
        # Begins at another part in each row: first parts alone would be a biased sample.
        kept = (places + self.rows) * most % np.repeat(counts, counts) < most
        return self.take(np.flatnonzero(kept))

    def count_rows(self) -> int:
        """Return the number of rows that the passages, or their parts, are from."""
        return len(np.unique(self.rows))


@dataclass(frozen=True)
class ShardPlan:
    """The passages of a shard: consecutive rows, possibly of several files."""

    number: int
    ranges: tuple[RowRange, ...]

    @property
    def rows(self) -> int:
        """Number of passages, before they are split."""
        return sum(part.rows for part in self.ranges)


def find_passages(source: Location, form: PassageForm = PLAIN) -> list[RowRange]:
    """List the non-empty Parquet files of a source, in the order of names, as ranges of all rows; reads only footers.

    Args:
        source: file or folder of passages.
        form: columns of the passages.

    Raises:
        ValueError: there are no files or no passages, a file is not Parquet, a column is missing or of another type, or
            the column that ``form`` names for titles is in no file.
        StorageError: the storage cannot be read.
    """
    try:
        files = list_parquet(source)
    except ValueError as error:
        raise ValueError(f"passages {error}") from None
    checked = map_in_threads(lambda file: _check_footer(file, form), files)
    found = [RowRange(file, 0, rows) for file, (rows, _) in zip(files, checked, strict=True)]
    if not any(part.rows for part in found):
        raise ValueError(f"passages {source.uri}: no rows")
    if not any(has_title for _, has_title in checked):
        _report_missing_titles(source, form)
    return [part for part in found if part.rows]


def _check_footer(file: Location, form: PassageForm) -> tuple[int, bool]:
    """Check the columns of a file; return its number of rows, and whether it has titles."""
    footer = read_footer(file)
    schema = footer.schema.to_arrow_schema()
    if footer.num_rows:  # pandas writes an empty table without the types of its columns
        form.check_schema(file, schema)
    return int(footer.num_rows), form.has_title(schema)


def _report_missing_titles(source: Location, form: PassageForm) -> None:
    if "title" in form.columns:
        raise ValueError(f"passages {source.uri}: no file has the column {form.columns['title']} of --column title")
    log.warning("%s: no file has titles; if another column holds them, pass --column title=COLUMN", source.uri)


def find_metadata_types(files: list[RowRange], form: PassageForm) -> dict[str, MetadataType]:
    """Return the types in which the further columns are kept.

    Raises:
        ValueError: a column has different types in two files; names both.
        StorageError: a footer cannot be read.
    """
    if not form.metadata:
        return {}
    schemas = map_in_threads(lambda part: read_footer(part.file).schema.to_arrow_schema(), files)
    found = [form.find_metadata_types(part.file, schema) for part, schema in zip(files, schemas, strict=True)]
    for part, kinds in zip(files, found, strict=True):
        if differing := [name for name in form.metadata if kinds[name] != found[0][name]]:
            name = differing[0]
            raise ValueError(
                f"{part.file.uri}: column {name} holds {kinds[name]}, but {found[0][name]} in {files[0].file.uri}; "
                "convert one of them"
            )
    return found[0]


def plan_shards(files: list[RowRange], shards: int) -> tuple[ShardPlan, ...]:
    """Divide the passages, in their order, into shards whose sizes differ by at most one.

    Raises:
        ValueError: there are fewer passages than shards.
    """
    total = sum(part.rows for part in files)
    if total < shards:
        raise ValueError(f"--shards {shards}: there are only {total} passages; use fewer shards")
    borders = [number * total // shards for number in range(shards + 1)]
    ranges = [_cut(files, start, stop) for start, stop in pairwise(borders)]
    return tuple(ShardPlan(number, parts) for number, parts in enumerate(ranges))


def _cut(files: list[RowRange], start: int, stop: int) -> tuple[RowRange, ...]:
    parts, before = [], 0
    for part in files:
        first, last = max(start - before, 0), min(stop - before, part.rows)
        if first < last:
            parts.append(RowRange(part.file, part.start + first, part.start + last))
        before += part.rows
    return tuple(parts)


def read_passages(parts: Iterable[RowRange], form: PassageForm = PLAIN) -> Iterator[PassageBatch]:
    """Read the passages of ranges, those of ``BATCH_ROWS`` rows at a time, and split long ones if ``form`` says so.

    Args:
        parts: ranges to read.
        form: columns of the passages and their vectors, and the length of parts.

    Raises:
        ValueError: a file is not Parquet, or damaged; names it.
        StorageError: a file cannot be read.
    """
    for batch in _read_whole(parts, form):
        yield batch.split(form.max_words)


def _read_whole(parts: Iterable[RowRange], form: PassageForm) -> Iterator[PassageBatch]:
    columns = form.list_columns()
    if form.embeddings:
        columns.append(form.embeddings)
    for part in parts:
        for row, batch in read_range(part, columns):
            vectors = batch[form.embeddings] if form.embeddings else None
            yield PassageBatch(part.file, np.arange(row, row + len(batch)), form.convert(batch), vectors)


@dataclass(frozen=True)
class Sample:
    """A sample of the rows of a range.

    Attributes:
        part: range that is sampled.
        rows: sampled rows, counted from the start of the range: int64 [rows].
        parts: number of parts of each passage that suffice for the size of the whole sample.
    """

    part: RowRange
    rows: npt.NDArray[np.int64]
    parts: int = 1

    def read(self, form: PassageForm = PLAIN) -> Iterator[PassageBatch]:
        """Read the sampled passages, with all their parts, like :func:`read_passages`."""
        for batch in _read_whole([self.part], form):
            start = batch.rows[0] - self.part.start
            taken = self.rows[(self.rows >= start) & (self.rows < start + batch.passages.num_rows)] - start
            if len(taken):
                yield batch.take(taken).split(form.max_words)


def spread_samples(files: list[RowRange], size: int) -> list[Sample]:
    """Sample ``size`` evenly spaced passages, or all if there are fewer.

    In a corpus more than eight times larger than the sample, evenly spaced runs of consecutive passages are sampled, so
    that only some row groups are read: about eight rows for each sampled one. There are at least 64 runs,
    unless the sample itself is smaller.
    """
    parts = list(chain.from_iterable(map_in_threads(_list_row_groups, files)))
    ends = np.cumsum([part.rows for part in parts])
    chosen = _spread(int(ends[-1]), size, len(parts))
    split = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    samples = []
    for part, rows, end in zip(parts, split, ends, strict=True):
        if len(rows):
            samples.append(Sample(part, rows - (end - part.rows), -(-size // int(ends[-1]))))
    return samples


def _spread(total: int, size: int, groups: int) -> npt.NDArray[np.int64]:
    """Return the sorted numbers of the sampled rows."""
    size = min(size, total)
    runs = size if total <= 8 * size else min(size, max(64, 8 * size * groups // total))
    places = np.arange(size)
    run = places * runs // size
    first = -(-run * size // runs)  # the first position in the same run
    rows: npt.NDArray[np.int64] = run * total // runs + places - first
    return rows


def _list_row_groups(part: RowRange) -> list[RowRange]:
    footer = read_footer(part.file)
    sizes = [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
    ends = [0, *np.cumsum(sizes).tolist()]
    return [RowRange(part.file, start, stop) for start, stop in pairwise(ends) if start < stop]


# Rows that are checked at a time.
CHECKED_ROWS = 1 << 13


# Repeated hashes to look up at most. One repeated id suffices, but different ids can have equal hashes.
MOST_REPEATED = 1000


# Ids compared at a time: 8 bytes each, and as much again for sorting.
COMPARED_IDS = 1 << 23


def check_passages(files: list[RowRange], form: PassageForm = PLAIN, compared: int = COMPARED_IDS) -> None:
    """Check that every passage has an id and a text in UTF-8, and that no two passages, or parts of them, share an id.

    Memory does not grow with the corpus: 64-bit hashes of the ids are partitioned by value into temporary files of
    about ``compared`` hashes each, so that equal hashes are in the same file. Ids with equal hashes are then compared
    in full.

    Raises:
        ValueError: an id is null or not unique, a text is null or blank, or a value is not UTF-8; names file, column
            and row (from 0).
    """
    parts = 1 + sum(part.rows for part in files) // compared
    with tempfile.TemporaryDirectory(prefix="selfrag-ids-") as folder:
        names = [Path(folder) / str(number) for number in range(parts)]
        for part in files:
            for batch in _read_checked(part, form):
                _scatter(_hash_ids(batch.passages["id"]), names)
        for name in names:
            if len(repeated := _find_repeated(name)):
                _refuse_equal_ids(files, form, repeated)


def _read_checked(part: RowRange, form: PassageForm) -> Iterator[PassageBatch]:
    """Read and check passages, and split their texts, since parts have ids of their own."""
    for row, read in read_range(part, form.list_columns(), CHECKED_ROWS):
        try:
            passages = form.convert(read)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{part.file.uri}: rows {row} to {row + len(read) - 1}: {error}") from None
        for name, column in {**form.sources, **dict.fromkeys(form.metadata)}.items():
            _refuse_other_encodings(passages[name], part.file, row, column or name)
        _refuse(pc.is_null(passages["id"]), part.file, row, f"column {form.sources['id']} is null")
        blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(passages["text"])), 0)
        _refuse(pc.fill_null(blank, True), part.file, row, f"column {form.sources['text']} is empty")
        yield PassageBatch(part.file, np.arange(row, row + len(read)), passages, None).split(form.max_words)


def _refuse_other_encodings(strings: pa.Array, file: Location, first_row: int, column: str) -> None:
    if not _is_utf8(strings):
        place = next(n for n in range(len(strings)) if not _is_utf8(strings.slice(n, 1)))
        raise ValueError(f"{file.uri}: row {first_row + place}: column {column} is not UTF-8; convert it to UTF-8")


def _is_utf8(strings: pa.Array) -> bool:
    try:
        strings.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _refuse(wrong: pa.Array, file: Location, first_row: int, problem: str) -> None:
    place = pc.index(wrong, True).as_py()
    if place >= 0:
        raise ValueError(f"{file.uri}: row {first_row + place}: {problem}; give every passage an id and a text")


def _hash_ids(ids: pa.Array) -> npt.NDArray[np.uint64]:
    hashes: npt.NDArray[np.uint64] = hash_array(ids.to_numpy(zero_copy_only=False), categorize=False)
    return hashes


def _scatter(hashes: npt.NDArray[np.uint64], files: list[Path]) -> None:
    home = hashes % np.uint64(len(files))
    for number in np.unique(home):
        with files[int(number)].open("ab") as file:
            hashes[home == number].tofile(file)


def _find_repeated(file: Path) -> npt.NDArray[np.uint64]:
    if not file.exists():
        return np.empty(0, np.uint64)
    hashes = np.fromfile(file, np.uint64)
    hashes.sort()
    repeated = hashes[1:] == hashes[:-1]
    return np.unique(hashes[1:][repeated])[:MOST_REPEATED]


def _refuse_equal_ids(files: list[RowRange], form: PassageForm, hashes: npt.NDArray[np.uint64]) -> None:
    places: dict[str, str] = {}
    for batch in chain.from_iterable(_read_checked(part, form) for part in files):
        ids = batch.passages["id"]
        for n in np.flatnonzero(np.isin(_hash_ids(ids), hashes)).tolist():
            place, name = f"{batch.file.uri}: row {batch.rows[n]}", ids[n].as_py()
            if name in places:
                parts = ", and so must those of parts (#1, #2, …)" if form.max_words else ""
                column = form.sources["id"]
                raise ValueError(
                    f"{place}: column {column}: {name!r} is also in {places[name]}; ids must be unique{parts}"
                )
            places[name] = place
