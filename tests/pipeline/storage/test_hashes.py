"""Hashes are compared in bounded memory, with the same result as all at once."""

import resource
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage import hashes
from pipeline.storage.hashes import HashRuns, hash_texts, hash_twice
from pipeline.storage.location import StorageError

RUN = 8


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "RUN_ROWS", RUN)


def texts(*values: str | None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, pa.string())])


def block(*columns: list[int]) -> hashes.Hashes:
    return np.array(columns, np.uint64)


def test_equal_texts_have_equal_hashes():
    found = hash_texts(texts("a", "b", "a", "", None, "é🙂"))
    assert found.dtype == np.uint64
    assert found[0] == found[2]
    assert found[3] == found[4]
    assert len(set(found.tolist())) == 4
    assert (hash_texts(texts("a", "b").cast(pa.large_string())) == found[:2]).all()


def test_the_second_hash_is_another():
    first, second = hash_twice(texts("a", "b", "a"))
    assert (first == hash_texts(texts("a", "b", "a"))).all()
    assert second[0] == second[2]
    assert len({*first.tolist(), *second.tolist()}) == 4


@given(st.lists(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=30), max_size=5))
@settings(max_examples=50)
def test_ranges_hold_every_row_in_the_order_of_the_hashes(blocks: list[list[int]]):
    with HashRuns() as runs:
        for number, values in enumerate(blocks):
            runs.add(block(values, [number] * len(values)))
        found = list(runs.read_ranges())
        assert runs.rows == sum(map(len, blocks))
    rows = [tuple(row) for part in found for row in part.T.tolist()]
    assert sorted(rows) == sorted((value, number) for number, values in enumerate(blocks) for value in values)
    assert [value for value, _ in rows] == sorted(value for values in blocks for value in values)


def test_equal_hashes_are_in_one_range():
    with HashRuns() as runs:
        for _ in range(3 * RUN):
            runs.add(block([7, 2**63, 2**64 - 1]))
        ranges = [set(found[0].tolist()) for found in runs.read_ranges()]
    assert len(ranges) == 9
    assert [found for found in ranges if found] == [{7}, {2**63}, {2**64 - 1}]


def test_repeated_hashes_are_found_across_runs():
    with HashRuns() as runs:
        runs.add(block([*range(0, 90, 3), 2**63]))
        runs.add(block([30, 31, 2**63, 32, 30]))
        assert [found.tolist() for found in runs.find_repeated()] == [[30], [2**63]]


def test_different_hashes_are_not_repeated():
    with HashRuns() as runs:
        runs.add(block(list(range(5 * RUN))))
        assert list(runs.find_repeated()) == []


def test_no_rows_have_no_ranges():
    with HashRuns() as runs:
        runs.add(block([]))
        assert list(runs.read_ranges()) == []


def test_runs_leave_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with HashRuns() as runs:
        runs.add(block(list(range(3 * RUN))))
        assert list(tmp_path.iterdir()) == []  # so that nothing is left if the process is killed
        assert [found.tolist() for found in runs.read_ranges()] == [[list(range(3 * RUN))], [[]], [[]]]


def test_a_full_disk_is_named_with_the_setting(monkeypatch: pytest.MonkeyPatch):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(hashes, "RUN_ROWS", 100_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with HashRuns() as runs, pytest.raises(StorageError, match=r"^/.*: the hashes of the ids do not fit .*TMPDIR"):
            runs.add(np.zeros((1, 100_000), np.uint64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)


def test_many_repeated_hashes_come_in_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hashes, "MOST_REPEATED", 2)
    with HashRuns() as runs:
        runs.add(block([1, 2, 3, 1, 2, 3]))
        assert [found.tolist() for found in runs.find_repeated()] == [[1, 2], [3]]
