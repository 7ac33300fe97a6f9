"""Parquet files at any URI: listed, opened and read in one way, with errors that name the file."""

import io
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.storage.location import Location, MissingFileError, StorageError, join_lines

log = logging.getLogger(__name__)

# Names of Parquet files end in these, in any case. Trino and Athena write names without a suffix: those count if they
# begin with the magic bytes (https://parquet.apache.org/docs/file-format/).
SUFFIXES = (".parquet", ".pq", ".parq")
MAGIC = b"PAR1"
# Files named at most where some are not read.
NAMED_FILES = 5
# Rows read at a time by default: a few megabytes.
BATCH_ROWS = 1024
MAX_BATCH_ROWS = 1 << 16
# Files read at once: an object store takes many requests and answers each of them slowly.
THREADS = 16
# Files up to this size are read whole, in one request to the store.
SMALL_BYTES = 4 << 20
# Rows are read in batches of about this size before decoding, whatever the size of their row group.
BATCH_BYTES = 4 << 20
# Bytes of each column that are read ahead.
AHEAD_BYTES = 4 << 20
# How files are written: with checksums, so that a damaged page is noticed when it is read.
WRITING = {"compression": "zstd", "write_page_checksum": True}
# Arrow reports damaged metadata and damaged pages as I/O errors with these words.
DAMAGED = re.compile("thrift|[Cc]orrupt|decompress|page integrity|end of stream")

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class RowRange:
    """The rows of a file from ``start`` up to but not including ``stop``."""

    file: Location
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


def list_parquet(location: Location) -> list[Location]:
    """List the Parquet files of a URI: the file itself, or all files below the folder, by name.

    Files that are not Parquet are left out with a warning; hidden ones without.

    Raises:
        ValueError: there are none.
        StorageError: the storage cannot be read.
    """
    info = location.get_info()
    if info.type == fs.FileType.File:
        return [location.with_stamp(info)]
    listed = location.list_files()
    taken = map_in_threads(is_parquet, listed)
    files = [file for file, is_taken in zip(listed, taken, strict=True) if is_taken]
    if not files:
        raise ValueError(f"{location.uri}: {_explain_absence(location, info.type)}")
    warn_of_other_files(location, listed, files)
    return files


def is_parquet(file: Location) -> bool:
    """Whether a file is Parquet: by its suffix, in any case, or, without a suffix, by its first bytes.

    Copies such as ``a.parquet.bak`` are not.
    """
    if "." in file.name:
        return file.name.lower().endswith(SUFFIXES)

    def read_start() -> bytes:
        with file.filesystem.open_input_stream(file.path) as stream:
            return bytes(stream.read(len(MAGIC)))

    return file.retrying(read_start) == MAGIC


def warn_of_other_files(folder: Location, listed: list[Location], taken: list[Location]) -> None:
    """Log the files of a folder that are not read."""
    read = {file.path for file in taken}
    others = [file.name for file in listed if file.path not in read]
    if others:
        more = ", …" if len(others) > NAMED_FILES else ""
        names = ", ".join(others[:NAMED_FILES])
        log.warning("%s: %d files are not read (%s%s)", folder.uri, len(others), names, more)


def _explain_absence(location: Location, kind: fs.FileType) -> str:
    if kind != fs.FileType.NotFound:
        return "no Parquet files in it"
    bucket = location.path.partition("/")[0]
    if not location.local and not replace(location, path=bucket).exists():
        return f"not found; its store has no bucket {bucket}"
    return "not found"


def read_parquet(file: Location, work: Callable[[Any], Result]) -> Result:
    """Call ``work`` with the file opened for random access; retries transient errors.

    Raises:
        ValueError: the file is not Parquet, or damaged.
        StorageError: the file cannot be read.
    """
    return read_versioned(file, lambda stream, _: work(stream))


def read_versioned(file: Location, work: Callable[[Any, str], Result]) -> Result:
    """Call ``work`` as :func:`read_parquet` does, also with the version of the opened file."""

    def open_and_work() -> Result:
        stream, version = open_versioned(file)
        with stream:
            return work(stream, version)

    return retry_reading(file, open_and_work)


def open_versioned(file: Location) -> tuple[Any, str]:
    """Open a file for random access, a small one of an object store in memory; returns the stream and its version."""
    stream = file.filesystem.open_input_file(file.path)
    version = file.read_version(stream)
    if file.local or stream.size() > SMALL_BYTES:
        return stream, version
    with stream:
        return pa.BufferReader(stream.read_buffer(stream.size())), version


def retry_reading(file: Location, work: Callable[[], Result]) -> Result:
    """Call a function that reads a Parquet file; retries transient errors.

    Raises:
        ValueError: the file is not Parquet, or damaged.
        StorageError: the file cannot be read.
    """
    with _naming_file(file):
        return file.retrying(work)


@contextmanager
def _naming_file(file: Location) -> Iterator[None]:
    """Turn what Arrow raises for damaged Parquet into one line that names the file."""
    try:
        yield
    except MemoryError:  # also an ArrowException
        raise
    except pa.ArrowException as error:
        raise ValueError(f"{file.uri}: not a readable Parquet file: {join_lines(error)}") from None
    except StorageError as error:
        if DAMAGED.search(str(error)):
            raise ValueError(f"{file.uri}: not a readable Parquet file: {join_lines(error.__cause__)}") from None
        raise


def read_footer(file: Location) -> pq.FileMetaData:
    """Read the footer of a Parquet file.

    Raises:
        ValueError: the file is not Parquet.
        StorageError: the file cannot be read.
    """
    return read_parquet(file, pq.read_metadata)


def read_range(
    part: RowRange, columns: list[str], batch_rows: int = BATCH_ROWS
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Read a range in batches, each with the number of its first row; only row groups that it touches are read.

    After a transient error, reading continues at the row that was reached.

    Raises:
        ValueError: the file is not Parquet, or damaged.
        StorageError: the file cannot be read.
    """
    left, batches = part, _open_range(part, columns, batch_rows)

    def read_next() -> tuple[int, pa.RecordBatch]:
        nonlocal batches
        try:
            return next(batches)
        except OSError:
            batches = _open_range(left, columns, batch_rows)  # a generator that has raised is exhausted
            raise

    while left.rows:
        with _naming_file(part.file):
            row, batch = part.file.retrying(read_next)
        left = RowRange(part.file, row + batch.num_rows, part.stop)
        yield row, batch


def _open_range(part: RowRange, columns: list[str], batch_rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    with part.file.filesystem.open_input_file(part.file.path) as stream:
        parquet = open_pages(stream)
        groups, row = _find_groups(parquet.metadata, part)
        for batch in parquet.iter_batches(batch_rows, row_groups=groups, columns=columns):
            first, last = max(part.start - row, 0), min(part.stop - row, batch.num_rows)
            if first < last:
                yield row + first, batch.slice(first, last - first)
            row += batch.num_rows


def _find_groups(footer: pq.FileMetaData, part: RowRange) -> tuple[list[int], int]:
    """Return the row groups that a range touches, and the number of their first row in the file."""
    sizes = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    ends = np.cumsum(sizes)
    groups = [number for number, end in enumerate(ends) if end > part.start and end - sizes[number] < part.stop]
    return groups, int(ends[groups[0]]) - sizes[groups[0]] if groups else part.start


def read_row_range(part: RowRange, of: int, names: list[str] | None = None) -> pa.Table:
    """Read a range as a table, all columns by default; missing columns are left out.

    Args:
        of: number of rows that the file must have.

    Raises:
        ValueError: the file is not Parquet, is damaged, or has another number of rows.
        StorageError: the file cannot be read.
    """

    def read(stream: Any) -> pa.Table:
        parquet = pq.ParquetFile(stream, pre_buffer=True, page_checksum_verification=True)
        if parquet.metadata.num_rows != of:
            raise ValueError(f"{part.file.uri}: holds {parquet.metadata.num_rows} rows instead of {of}")
        groups, first = _find_groups(parquet.metadata, part)
        return parquet.read_row_groups(groups, columns=names).slice(part.start - first, part.rows)

    return read_parquet(part.file, read)


def read_columns(file: Location, names: list[str]) -> pa.Table:
    """Read columns of a file that a run has written, with the file's metadata; missing columns are left out.

    Args:
        names: columns, or fields of nested ones by their path in Parquet, such as ``usage.seconds`` or
            ``segments.list.element.score``.

    Raises:
        StorageError: the file cannot be read, or is damaged.
    """
    try:
        return read_checked(file, names)
    except (ValueError, MissingFileError) as error:
        raise StorageError(f"{join_lines(error)}; delete it and run again") from error


def read_checked(file: Location, names: list[str] | None = None) -> pa.Table:
    """Read columns of a file, all by default, with its metadata; pages are compared with their checksums.

    Raises:
        ValueError: the file is not Parquet, or damaged.
        StorageError: the file cannot be read.
    """

    def read(stream: Any) -> pa.Table:
        return pq.ParquetFile(stream, pre_buffer=True, page_checksum_verification=True).read(columns=names)

    return read_parquet(file, read)


def open_pages(stream: Any) -> pq.ParquetFile:
    """Open a file to read page after page, compared with their checksums where it has any.

    Arrow would otherwise read the columns of whole row groups ahead.
    """
    return pq.ParquetFile(stream, buffer_size=AHEAD_BYTES, pre_buffer=False, page_checksum_verification=True)


def read_batches(
    parquet: pq.ParquetFile, groups: Sequence[int] | None = None, columns: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Read row groups, all by default, in batches of about ``BATCH_BYTES``, so that none is in memory as a whole.

    Memory: a batch and, of each column, a page and ``AHEAD_BYTES``.
    """
    numbers = range(parquet.metadata.num_row_groups) if groups is None else groups
    infos = [parquet.metadata.row_group(number) for number in numbers]
    filled = [info for info in infos if info.num_rows]
    rows = min((BATCH_BYTES * info.num_rows // max(info.total_byte_size, 1) for info in filled), default=1)
    yield from parquet.iter_batches(min(max(rows, 1), MAX_BATCH_ROWS), row_groups=list(numbers), columns=columns)


class GroupReader:
    """Reads ranges of a row group, each of which begins where the last one ended, or after it.

    Attributes:
        start: first row that can still be read.
    """

    def __init__(self, stream: Any, group: int, columns: list[str] | None = None) -> None:
        self._batches = read_batches(open_pages(stream), [group], columns)
        self._held = next(self._batches)
        self.start = 0

    def read(self, offset: int, rows: int) -> pa.Table:
        """Read rows; ``offset`` is the first one, not below ``start``."""
        stop, taken = offset + rows, []
        while True:
            end = self.start + self._held.num_rows
            if end > offset:
                first = max(offset, self.start)
                taken.append(self._held.slice(first - self.start, stop - first))
            if end >= stop:
                return pa.Table.from_batches(taken)
            self.start, self._held = end, next(self._batches)


def encode_parquet(table: pa.Table, row_group_size: int | None = None) -> bytes:
    """Encode a table as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=row_group_size, **WRITING)
    return buffer.getvalue()


def map_in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Map a function over items in ``THREADS`` threads; results in the order of the items."""
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(work, items))
