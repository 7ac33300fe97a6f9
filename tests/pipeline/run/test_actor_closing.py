"""Units that do not begin, or are given back, since the run or the node ends."""

import asyncio
from pathlib import Path

import pytest

from pipeline.output.partial import list_partial_units
from pipeline.run.actor import SelfRagActor
from pipeline.run.attempts import MAX_CONSECUTIVE_CRASHES, Attempts
from pipeline.run.closing import Closing
from tests.support.actors import Folder, LocalHandle, actor, table


def count(closing: Closing | None = None) -> Attempts:
    return Attempts(MAX_CONSECUTIVE_CRASHES, "run", closing=closing)


def wait_for_slow(made: SelfRagActor, name: str = "slow") -> asyncio.Event:
    """The query of this name waits for the event."""
    answer, done = made.system.answer, asyncio.Event()

    async def wait(query):
        if query.query == name:
            await done.wait()
        return await answer(query)

    object.__setattr__(made.system, "answer", wait)
    return done


async def test_unit_that_would_end_too_late_does_not_begin(tmp_path: Path) -> None:
    attempts, folder, seen = count(Closing(until=0)), Folder(tmp_path, table("one")), list[str]()
    assert await folder.annotate(actor(LocalHandle(attempts), seen)) is None
    assert (seen, attempts._units, attempts.may_continue(1), attempts.recall(1)) == ([], {}, False, 0)
    assert not (tmp_path / "out").exists()


async def test_durations_of_units_are_noted(tmp_path: Path) -> None:
    closing = Closing()
    attempts, folder = count(closing), Folder(tmp_path, table("one", "two"))
    made = actor(LocalHandle(attempts), [])
    made.generator.seconds = 0.2  # the warm-up
    assert await folder.annotate(made) is not None
    (pace,) = closing._paces
    assert 0.1 <= pace < 2
    assert attempts.may_continue(1)


@pytest.mark.parametrize("same_run", [True, False])
async def test_unit_is_given_back_and_its_finished_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_run: bool
) -> None:
    monkeypatch.setattr("pipeline.run.actor.WATCH_S", 0.05)
    attempts, folder = count(), Folder(tmp_path, table("one", "slow", None, "two"))
    made, seen = actor(LocalHandle(attempts), []), list[str]()
    wait_for_slow(made)
    unit = asyncio.create_task(folder.annotate(made))
    await asyncio.sleep(0.2)
    assert not unit.done()
    assert attempts.recall(0.1) == 1
    assert await asyncio.wait_for(unit, 5) is None
    assert (attempts.count_deaths(folder.unit.id), attempts.has_partial(folder.unit.id)) == (0, True)
    assert (attempts.recall(0), attempts.may_continue(1)) == (0, False)
    assert [attempts.take_given_back() for _ in range(2)] == [1, 0]
    assert list_partial_units(folder.output.location) == {folder.unit.id}
    attempts = count() if not same_run else attempts
    attempts._closing = Closing()
    summary = await folder.annotate(actor(LocalHandle(attempts), seen))
    assert summary is not None
    assert sorted(seen) == ["", "slow"]  # rows that failed are tried again
    assert (summary.rows, summary.errors, summary.actor) == (4, {"ValueError": 1}, "")
    assert folder.answers() == ["one", "slow", "two"]
    assert attempts._units == {}


async def test_unit_that_ends_in_time_is_not_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.run.actor.WATCH_S", 0.05)
    attempts, folder = count(), Folder(tmp_path, table("one", "slow"))
    made = actor(LocalHandle(attempts), [])
    done = wait_for_slow(made)
    unit = asyncio.create_task(folder.annotate(made))
    await asyncio.sleep(0.2)
    attempts.recall(60)
    await asyncio.sleep(0.2)
    done.set()
    summary = await asyncio.wait_for(unit, 5)
    assert summary is not None
    assert folder.answers() == ["one", "slow"]


async def test_row_that_is_given_back_is_not_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.run.actor.WATCH_S", 0.05)
    attempts, folder = count(), Folder(tmp_path, table("one", "slow"))
    for _ in range(3):
        attempts.begin(folder.unit.id)  # processes that died: rows are done one by one
    made = actor(LocalHandle(attempts), [])
    wait_for_slow(made)
    unit = asyncio.create_task(folder.annotate(made))
    await asyncio.sleep(0.2)
    assert attempts.count_deaths(folder.unit.id, 1) == 1  # the attempt in progress
    attempts.recall(0)
    assert await asyncio.wait_for(unit, 5) is None
    assert [attempts.count_deaths(folder.unit.id, row) for row in (None, 1)] == [3, 0]
    assert list_partial_units(folder.output.location) == {folder.unit.id}
