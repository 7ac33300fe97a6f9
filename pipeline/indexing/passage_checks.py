"""Whether passages can be indexed: every one has an id of its own and a text."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pandas.util import hash_array

from pipeline.storage.location import Location
from pipeline.storage.parquet import RowRange, read_range

# Rows checked at a time.
CHECKED_ROWS = 1 << 13
# One repeated id is enough to refuse; several may turn out to be different ids with equal hashes.
MOST_REPEATED = 1000
# Ids compared at a time: 8 bytes each, and as much again to sort them.
COMPARED_IDS = 1 << 23


def check_passages(files: list[RowRange], compared: int = COMPARED_IDS) -> None:
    """Read ids and texts once: an id must be there and unique, a text must not be empty.

    Memory stays the same whatever the corpus: the ids' 64-bit hashes go to temporary files of about ``compared``
    each, by their value, so that equal ones meet in one file. Ids with equal hashes are compared themselves.

    Raises:
        ValueError: names file, column and row (from 0).
    """
    parts = 1 + sum(part.rows for part in files) // compared
    with tempfile.TemporaryDirectory(prefix="selfrag-ids-") as folder:
        names = [Path(folder) / str(number) for number in range(parts)]
        for part in files:
            for row, batch in read_range(part, ["id", "text"], CHECKED_ROWS):
                _refuse(pc.is_null(batch["id"]), part.file, row, "column id is null")
                blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(_strings(batch["text"]))), 0)
                _refuse(pc.fill_null(blank, True), part.file, row, "column text is empty")
                _scatter(_hashes(batch["id"]), names)
        for name in names:
            if len(repeated := _repeated(name)):
                _refuse_equal_ids(files, repeated)


def _refuse(wrong: pa.Array, file: Location, first_row: int, problem: str) -> None:
    place = pc.index(wrong, True).as_py()
    if place >= 0:
        raise ValueError(f"{file.uri}: row {first_row + place}: {problem}; give every passage an id and a text")


def _strings(column: Any) -> pa.Array:
    return column.cast(pa.string())


def _hashes(ids: pa.Array) -> npt.NDArray[np.uint64]:
    hashes: npt.NDArray[np.uint64] = hash_array(_strings(ids).to_numpy(zero_copy_only=False), categorize=False)
    return hashes


def _scatter(hashes: npt.NDArray[np.uint64], files: list[Path]) -> None:
    home = hashes % np.uint64(len(files))
    for number in np.unique(home):
        with files[int(number)].open("ab") as file:
            hashes[home == number].tofile(file)


def _repeated(file: Path) -> npt.NDArray[np.uint64]:
    if not file.exists():
        return np.empty(0, np.uint64)
    hashes = np.fromfile(file, np.uint64)
    hashes.sort()
    return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])[:MOST_REPEATED]


def _refuse_equal_ids(files: list[RowRange], hashes: npt.NDArray[np.uint64]) -> None:
    places: dict[str, str] = {}
    for part in files:
        for row, batch in read_range(part, ["id"], CHECKED_ROWS):
            for n in np.flatnonzero(np.isin(_hashes(batch["id"]), hashes)).tolist():
                place, name = f"{part.file.uri}: row {row + n}", batch["id"][n].as_py()
                if name in places:
                    raise ValueError(f"{place}: column id: {name!r} is also in {places[name]}; ids must be unique")
                places[name] = place
