"""Hashes of texts, compared in bounded memory however many there are: sorted runs on disk, read range by range."""

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

Hashes = npt.NDArray[np.uint64]

# Rows of a sorted run, and about those of a range: 32 MB for each column.
RUN_ROWS = 1 << 22
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

    Memory: a run while rows are added, and a range while they are read. Disk: 8 bytes for each number, in ``TMPDIR``;
    nothing for less than a run.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="selfrag-")
        self._lock = threading.Lock()
        self._waiting: list[Hashes] = []
        self._waiting_rows = 0
        self._files: list[Path] = []
        self.rows = 0

    def __enter__(self) -> "HashRuns":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def add(self, rows: Hashes) -> None:
        """Add rows: uint64 [columns, N]."""
        with self._lock:
            self.rows += rows.shape[1]
            for start in range(0, rows.shape[1], RUN_ROWS):
                self._add_block(rows[:, start : start + RUN_ROWS])

    def _add_block(self, block: Hashes) -> None:
        self._waiting.append(block)
        self._waiting_rows += block.shape[1]
        if self._waiting_rows >= RUN_ROWS:
            file = Path(self._folder.name) / f"{len(self._files)}.npy"
            np.save(file, _sort(self._waiting))
            self._files.append(file)
            self._waiting, self._waiting_rows = [], 0

    def read_ranges(self, count: int | None = None) -> Iterator[Hashes]:
        """Yield the rows, sorted by their hashes, in ranges of the hashes: uint64 [columns, N] each.

        Args:
            count: number of ranges, all equally wide; by default so many that each has about ``RUN_ROWS`` rows.
        """
        if not self.rows:
            return
        runs = [np.load(file, mmap_mode="r") for file in self._files]
        runs += [_sort(self._waiting)] if self._waiting else []
        count = count or self.count_ranges()
        bounds = [2**64 * number // count for number in range(count)]
        edges = [[*np.searchsorted(run[0], np.array(bounds, np.uint64)), run.shape[1]] for run in runs]
        for number in range(count):
            yield _sort([run[:, edge[number] : edge[number + 1]] for run, edge in zip(runs, edges, strict=True)])

    def count_ranges(self) -> int:
        """Return the number of ranges that have about ``RUN_ROWS`` rows each."""
        return max(1, -(-self.rows // RUN_ROWS))

    def find_repeated(self) -> Iterator[Hashes]:
        """Yield the hashes that are there more than once, range by range; nothing if there are none."""
        for (hashes,) in self.read_ranges():
            repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
            if len(repeated):
                yield repeated


def _sort(blocks: list[Hashes]) -> Hashes:
    rows = np.concatenate(blocks, axis=1)
    return np.sort(rows, axis=1) if len(rows) == 1 else rows[:, np.argsort(rows[0], kind="stable")]
