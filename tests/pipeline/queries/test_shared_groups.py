"""Units that share a row group are read in order with one reader."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.queries.shared_groups import SharedGroups
from pipeline.storage.parquet import GroupReader

ROWS, UNIT = 60, 6


class Opening:
    """Opens readers of one row group, whose batches hold a few rows, and counts them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.opened = 0

    def __call__(self) -> GroupReader:
        self.opened += 1
        return GroupReader(pa.OSFile(str(self.file)), 0)


@pytest.fixture
def opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opening:
    monkeypatch.setattr("pipeline.storage.parquet.BATCH_BYTES", 40)
    pq.write_table(pa.table({"n": range(ROWS)}), tmp_path / "a.parquet")
    return Opening(tmp_path / "a.parquet")


ORDERS = {
    "in order": (range(10), 1),
    "every third, as of three actors": ([0, 3, 6, 9], 1),
    "the last one first": ([9, *range(9)], 2),
    "neighbors swapped": ([1, 0, 3, 2, 5, 4, 7, 6, 9, 8], 2),
    "four at once": ([1, 3, 2, 0, 5, 7, 6, 4], 4),
    "one of them again at once": ([0, 1, 1, 2], 2),
    "backwards": (range(9, -1, -1), 10),
    "the first one again at the end": ([*range(10), 0], 2),
    "only the last one": ([9], 1),
    "twice": ([*range(10), *range(10)], 2),
}


@pytest.mark.parametrize(("order", "opened"), ORDERS.values(), ids=ORDERS.keys())
def test_units_are_read_in_any_order(opening: Opening, order: list[int], opened: int) -> None:
    groups = SharedGroups()
    for number in order:
        rows = groups.read("a", opening, number * UNIT, UNIT)["n"].to_pylist()
        assert rows == list(range(number * UNIT, (number + 1) * UNIT))
    assert opening.opened <= opened


def test_row_groups_are_told_apart(opening: Opening) -> None:
    groups = SharedGroups()
    for key in ("a", "b", "a", "b"):
        groups.read(key, opening, 0 if opening.opened < 2 else UNIT, UNIT)
    assert opening.opened == 2
    groups.read("c", opening, 0, UNIT)
    assert opening.opened == 3


def test_a_reader_that_failed_is_not_used_again(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, unbroken = SharedGroups(), GroupReader.read
    groups.read("a", opening, 0, UNIT)

    def fail(*_: object) -> pa.Table:
        raise OSError("connection lost")

    monkeypatch.setattr(GroupReader, "read", fail)
    with pytest.raises(OSError, match="connection lost"):
        groups.read("a", opening, UNIT, UNIT)
    monkeypatch.setattr(GroupReader, "read", unbroken)
    assert groups.read("a", opening, UNIT, UNIT)["n"].to_pylist() == list(range(UNIT, 2 * UNIT))
    assert opening.opened == 2


def test_random_ranges_are_read(opening: Opening) -> None:
    groups, draw = SharedGroups(), random.Random(0)
    for _ in range(100):
        start = draw.randrange(ROWS)
        rows = draw.randint(1, ROWS - start)
        assert groups.read("a", opening, start, rows)["n"].to_pylist() == list(range(start, start + rows))
