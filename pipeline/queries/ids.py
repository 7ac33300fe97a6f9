"""The ids of a query set, compared and read in bounded memory."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.queries.changes import reading_version
from pipeline.storage.hashes import Hashes, HashRuns, hash_texts, hash_twice
from pipeline.storage.location import Location
from pipeline.storage.parquet import map_in_threads, open_pages, read_batches, read_parquet

# Places of an id that a message names.
NAMED_PLACES = 3


def check_unique(hashes: HashRuns, files: Sequence[Location], column: str) -> None:
    """Check that the ids of all files differ.

    Args:
        hashes: hashes of all ids. If two are equal, the ids themselves are compared.
        files: files of the query set.
        column: column of the ids.

    Raises:
        ValueError: an id is there twice; names it and its places.
        StorageError: the storage cannot be read.
    """
    for repeated in hashes.find_repeated():
        found = map_in_threads(lambda file: _find_rows(file, column, repeated), files)  # noqa: B023  used at once
        places: dict[str, list[str]] = {}
        for file, rows in zip(files, found, strict=True):
            for row, value in rows:
                places.setdefault(value, []).append(f"{file.uri} row {row}")
        for value, named in places.items():
            if len(named) > 1:
                raise ValueError(f"id {value!r} is not unique: {', '.join(named[:NAMED_PLACES])}")


def _find_rows(file: Location, column: str, hashes: Hashes) -> list[tuple[int, str]]:
    """Return the number and the id of each row whose id has one of the hashes."""
    return read_parquet(
        file,
        lambda stream: [
            (first + int(row), ids[int(row)].as_py())
            for first, ids in _read_batches(stream, column)
            for row in np.flatnonzero(np.isin(hash_texts(ids), hashes))
        ],
    )


def read_file_ids(file: Location, version: str, column: str) -> pa.ChunkedArray:
    """Read the ids of a file: large_string.

    Raises:
        ValueError: the file has not the version of its inspection.
        StorageError: the storage cannot be read.
    """

    def read(stream: Any) -> pa.ChunkedArray:
        return pa.chunked_array([ids for _, ids in _read_batches(stream, column)], pa.large_string())

    with reading_version(file, version):
        return read_parquet(file, read)


def hash_ids(file: Location, version: str, column: str) -> Hashes:
    """Hash the ids of a file to 128 bits: uint64 [2, rows].

    Raises:
        ValueError: the file has not the version of its inspection.
        StorageError: the storage cannot be read.
    """

    def read(stream: Any) -> Hashes:
        nothing = np.empty((2, 0), np.uint64)
        return np.concatenate([nothing, *(hash_twice(ids) for _, ids in _read_batches(stream, column))], axis=1)

    with reading_version(file, version):
        return read_parquet(file, read)


def _read_batches(stream: Any, column: str) -> Iterator[tuple[int, pa.Array]]:
    """Yield the ids batch by batch: large_string, with the number of the first row."""
    first = 0
    for batch in read_batches(open_pages(stream), columns=[column]):
        yield first, batch[column].cast(pa.large_string())
        first += batch.num_rows
