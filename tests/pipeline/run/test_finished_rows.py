import asyncio
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.sections import StorageConfig
from pipeline.output.partial import FOLDER, Outcome, PartialUnit
from pipeline.run.finished_rows import KEEP_S, FinishedRows
from pipeline.storage.location import StorageError, locate

ANSWER: Outcome = {"answer": "one", "retrieved": False}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The time in seconds, which tests set."""
    now = {"s": 1000.0}
    monkeypatch.setattr("pipeline.run.finished_rows.time", SimpleNamespace(monotonic=lambda: now["s"]))
    return now


@pytest.fixture
def sub_files(tmp_path: Path) -> PartialUnit:
    return PartialUnit(locate(str(tmp_path), StorageConfig()), "0" * 20, "same", keep_candidates=False)


def count_files(folder: Path) -> int:
    return len(list((folder / FOLDER).glob("*.parquet")))


@pytest.mark.parametrize(
    ("every_s", "seconds", "files"),
    [
        (KEEP_S, [], 0),
        (KEEP_S, [0, 1, 2], 0),
        (KEEP_S, [59], 0),
        (KEEP_S, [60], 1),
        (KEEP_S, [1, 2, 61], 1),
        (KEEP_S, [1, 61, 62, 120], 1),
        (KEEP_S, [1, 61, 62, 121], 2),
        (KEEP_S, [60, 120, 180], 3),
        (KEEP_S, [600], 1),
        (0, [0], 1),
        (0, [0, 0, 1], 3),
    ],
)
async def test_only_units_that_take_long_have_sub_files(
    tmp_path: Path, sub_files: PartialUnit, clock: dict[str, float], every_s: float, seconds: list[float], files: int
) -> None:
    finished = FinishedRows(sub_files, every_s=every_s)
    for number, second in enumerate(seconds):
        clock["s"] = 1000.0 + second
        await finished.add(number, ANSWER)
    assert count_files(tmp_path) == files
    assert sorted(finished.outcomes) == list(range(len(seconds)))


async def test_later_attempt_takes_over_the_rows_in_sub_files(
    tmp_path: Path, sub_files: PartialUnit, clock: dict[str, float]
) -> None:
    first = FinishedRows(sub_files)
    await first.add(0, ANSWER)
    await first.add(1, ANSWER, keep=False)
    clock["s"] += KEEP_S
    await first.add(2, ANSWER)
    await first.add(3, ANSWER)  # not due yet: the row is annotated again
    second = FinishedRows(PartialUnit(sub_files.output, sub_files.unit, "same", keep_candidates=False))
    await second.load(4)
    assert sorted(second.outcomes) == [0, 2]
    await second.discard()
    assert count_files(tmp_path) == 0


async def test_rows_that_are_not_final_never_cause_a_sub_file(tmp_path: Path, sub_files: PartialUnit) -> None:
    finished = FinishedRows(sub_files, every_s=0)
    await finished.add(0, ANSWER, keep=False)
    assert finished.outcomes == {0: ANSWER}
    assert count_files(tmp_path) == 0


async def test_unit_without_sub_files_makes_no_request(sub_files: PartialUnit, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError

    for name in ("read", "write", "delete"):
        monkeypatch.setattr(PartialUnit, name, refuse)
    finished = FinishedRows(sub_files)
    await finished.add(0, ANSWER)
    await finished.discard()


async def test_sub_file_is_written_only_with_permission(tmp_path: Path, sub_files: PartialUnit) -> None:
    async def refuse() -> None:
        raise ConnectionError("the run is over")

    finished = FinishedRows(sub_files, refuse, every_s=0)
    with pytest.raises(ConnectionError):
        await finished.add(0, ANSWER)
    assert count_files(tmp_path) == 0


@pytest.mark.parametrize(
    ("name", "said"), [("write", "1 finished rows are not kept"), ("delete", "sub-files are left")]
)
async def test_trouble_with_sub_files_fails_no_row(
    sub_files: PartialUnit, name: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise StorageError("s3://out: no space left")

    monkeypatch.setattr(PartialUnit, name, fail)
    finished = FinishedRows(sub_files, every_s=0)
    with caplog.at_level(logging.WARNING):
        await finished.add(0, ANSWER)
        await finished.discard()
    assert finished.outcomes == {0: ANSWER}
    assert said in caplog.text


async def test_attempts_with_the_same_unit_at_once_do_not_disturb_each_other(
    tmp_path: Path, sub_files: PartialUnit
) -> None:
    both = [FinishedRows(PartialUnit(sub_files.output, sub_files.unit, "same", False), every_s=0) for _ in range(2)]
    await asyncio.gather(*(finished.add(n, ANSWER) for n in range(20) for finished in both))
    assert count_files(tmp_path) == 40
    await both[0].discard()
    await both[1].add(20, ANSWER)
    third = FinishedRows(sub_files)
    await third.load(30)
    assert sorted(third.outcomes) == [20]
    assert sorted(both[1].outcomes) == list(range(21))


@pytest.mark.parametrize("moment", ["permit", "write"])
async def test_rows_are_written_even_if_their_unit_is_given_back_meanwhile(sub_files, monkeypatch, moment):
    writing, allowed, write = threading.Event(), asyncio.Event(), sub_files.write

    async def permit():
        if moment == "permit":
            await allowed.wait()

    def write_late(rows):
        writing.wait(10)
        write(rows)

    monkeypatch.setattr(sub_files, "write", write_late if moment == "write" else write)
    finished = FinishedRows(sub_files, permit, every_s=0)
    adding = asyncio.create_task(finished.add(3, ANSWER))
    await asyncio.sleep(0.1)
    adding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await adding
    keeping = asyncio.create_task(finished.keep())
    await asyncio.sleep(0.1)
    assert not keeping.done()
    allowed.set()
    writing.set()
    await keeping
    assert {number: row["answer"] for number, row in sub_files.read(9).items()} == {3: "one"}


async def test_rows_that_are_not_due_are_kept_on_request(sub_files):
    finished = FinishedRows(sub_files, every_s=60)
    await finished.add(1, ANSWER)
    await finished.add(2, {"error_type": "KeyError"}, keep=False)
    assert sub_files.read(9) == {}
    await finished.keep()
    await finished.keep()
    assert list(sub_files.read(9)) == [1]
    assert sub_files.written == 1
