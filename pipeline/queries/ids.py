"""The ids of a query set, compared and read in bounded memory."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config.sections import StorageConfig
from pipeline.queries.changes import reading_version
from pipeline.queries.inspection import QueryFile
from pipeline.storage.hashes import Hashes, HashRuns, hash_texts, hash_twice
from pipeline.storage.location import Location, locate
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
    """Return the numbers and the ids of rows whose id has one of the hashes: of each id the first ``NAMED_PLACES``."""

    def find(stream: Any) -> list[tuple[int, str]]:
        found, counts = [], Counter[str]()
        for first, ids in _read_batches(stream, column):
            for row in np.flatnonzero(np.isin(hash_texts(ids), hashes)).tolist():
                value = ids[row].as_py()
                counts[value] += 1
                if counts[value] <= NAMED_PLACES:
                    found.append((first + row, value))
        return found

    return read_parquet(file, find)


def number_ids(file: QueryFile, start: int, column: str, storage: StorageConfig, add: Callable[[Hashes], None]) -> None:
    """Hash the ids of a file to 128 bits, batch by batch.

    Args:
        file: file of a query set.
        start: number of its first row in the set.
        column: column of the ids.
        storage: access to object storage.
        add: takes uint64 [3, N]: both hashes, and the numbers of the rows. After a transient error it gets some rows
            once more.

    Raises:
        ValueError: the file has changed since its inspection.
        StorageError: the storage cannot be read.
    """

    def read(stream: Any) -> None:
        for first, ids in _read_batches(stream, column):
            numbers = np.arange(start + first, start + first + len(ids), dtype=np.uint64)
            add(np.vstack([hash_twice(ids), numbers]))

    place = locate(file.uri, storage)
    with reading_version(place, file.version):
        read_parquet(place, read)


def _read_batches(stream: Any, column: str) -> Iterator[tuple[int, pa.ChunkedArray]]:
    """Yield the ids batch by batch: large_string, with the number of the first row."""
    first = 0
    for batch in read_batches(open_pages(stream), columns=[column]):
        yield first, pa.chunked_array([batch[column].cast(pa.large_string())])
        first += batch.num_rows
