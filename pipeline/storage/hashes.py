"""Hashes of texts, compared in bounded memory however many there are: sorted runs on disk, read range by range."""

import tempfile
import threading
from collections.abc import Iterator
from itertools import chain, pairwise
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from pipeline.storage.location import StorageError, join_lines

Hashes = npt.NDArray[np.uint64]

# Rows of a sorted run, and about those of a range: 32 MB for each column.
RUN_ROWS = 1 << 22
# Repeated hashes that are looked up at a time.
MOST_REPEATED = 1_000
# Key for a second hash, which is independent of the first.
SECOND_KEY = "selfrag-batch-16"


def hash_texts(texts: pa.ChunkedArray) -> Hashes:
    """Hash texts: uint64 [N], equal for equal texts; null counts as empty.

    Among N different texts, the probability that any two have the same hash is about N² / 2⁶⁵: below one in a million
    for four million, and 3 % for a billion.
    """
    return _hash(texts, {})


def hash_twice(texts: pa.ChunkedArray) -> Hashes:
    """Hash texts to 128 bits: uint64 [2, N]. For a billion texts, the probability of a collision is 10⁻²¹."""
    return np.stack([_hash(texts, {}), _hash(texts, {"hash_key": SECOND_KEY})])


def _hash(texts: pa.ChunkedArray, key: dict[str, str]) -> Hashes:
    values = texts.cast(pa.large_string()).fill_null("").to_numpy(zero_copy_only=False)
    return np.asarray(pd.util.hash_array(np.asarray(values, object), categorize=False, **key), np.uint64)


class HashRuns:
    """Rows of numbers whose first column is a hash, sorted by it in runs on the disk of this machine; thread-safe.

    Memory: a run while rows are added, and a range while they are read. Disk: 8 bytes for each number, in ``TMPDIR``,
    freed also if the process is killed; nothing for less than a run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Hashes] = []
        self._waiting_rows = 0
        self._runs: list[tuple[IO[bytes], tuple[int, int]]] = []
        self.rows = 0

    def __enter__(self) -> "HashRuns":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file, _ in self._runs:
            file.close()

    def add(self, rows: Hashes) -> None:
        """Add rows: uint64 [columns, N].

        Raises:
            StorageError: the disk is full.
        """
        with self._lock:
            self.rows += rows.shape[1]
            for start in range(0, rows.shape[1], RUN_ROWS):
                self._add_block(rows[:, start : start + RUN_ROWS])

    def _add_block(self, block: Hashes) -> None:
        self._waiting.append(block)
        self._waiting_rows += block.shape[1]
        if self._waiting_rows >= RUN_ROWS:
            rows = _sort_rows(self._waiting)
            self._runs.append((_write_run(rows), rows.shape))
            self._waiting, self._waiting_rows = [], 0

    def read_ranges(self, count: int | None = None) -> Iterator[Hashes]:
        """Yield the rows, sorted by their hashes, in ranges of the hashes: uint64 [columns, N] each.

        Args:
            count: number of ranges, all equally wide; by default so many that each has about ``RUN_ROWS`` rows.
        """
        if not self.rows:
            return
        count = count or self.count_ranges()
        rest = [_sort_rows(self._waiting)] if self._waiting else []
        bounds = [2**64 * number // count for number in range(1, count)]
        for first, last in pairwise([None, *bounds, None]):
            # Mapped anew for each range: pages that stay mapped count as memory of this process.
            runs = (np.memmap(file, np.uint64, "r", shape=shape) for file, shape in self._runs)
            yield _sort_rows([_cut_range(run, first, last) for run in chain(runs, rest)])

    def count_ranges(self) -> int:
        """Return the number of ranges that have about ``RUN_ROWS`` rows each."""
        return max(1, -(-self.rows // RUN_ROWS))

    def find_repeated(self) -> Iterator[Hashes]:
        """Yield the hashes that are there more than once, in ascending order, ``MOST_REPEATED`` at a time."""
        for (hashes,) in self.read_ranges():
            repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
            for start in range(0, len(repeated), MOST_REPEATED):
                yield repeated[start : start + MOST_REPEATED]


def _write_run(rows: Hashes) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115  closed with the runs
    try:
        rows.tofile(file)
    except OSError as error:
        raise StorageError(
            f"{tempfile.gettempdir()}: the hashes of the ids do not fit ({join_lines(error)}); set TMPDIR to a folder "
            "with 8 bytes for each query, or 24 for each query and each earlier row with skip_annotated"
        ) from error
    return file


def _cut_range(run: Hashes, first: int | None, last: int | None) -> Hashes:
    """Copy the rows of a sorted run from the hash ``first`` up to but not including ``last``."""
    start = 0 if first is None else int(np.searchsorted(run[0], np.uint64(first)))
    end = run.shape[1] if last is None else int(np.searchsorted(run[0], np.uint64(last)))
    return np.array(run[:, start:end])


def _sort_rows(blocks: list[Hashes]) -> Hashes:
    rows = np.concatenate(blocks, axis=1)
    if len(rows) == 1:  # several times faster than by positions
        return np.sort(rows, axis=1)
    return rows[:, np.argsort(rows[0], kind="stable")]
