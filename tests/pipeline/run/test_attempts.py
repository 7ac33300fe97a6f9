import asyncio
import random

import pytest

from pipeline.engine.postmortem import Death
from pipeline.run.attempts import MAX_CONSECUTIVE_CRASHES, Attempts, CrashLoopError, SharedExclusiveLock
from pipeline.storage.lease import EXPIRY_S, HEARTBEAT_S


def test_deaths_are_counted_until_the_unit_ends() -> None:
    attempts = Attempts(MAX_CONSECUTIVE_CRASHES, "run")
    for what in ("a", "a", "b"):
        attempts.begin(what)
    assert (attempts.count_deaths("a"), attempts.count_deaths("b"), attempts.count_deaths("c")) == (2, 1, 0)
    attempts.end("a")
    assert (attempts.count_deaths("a"), attempts.count_deaths("b")) == (0, 1)


def test_nothing_is_written_while_the_lease_has_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("pipeline.run.attempts.read_clock", lambda: clock[0])
    attempts = Attempts(MAX_CONSECUTIVE_CRASHES, "run")
    assert attempts.begin_writing("u")
    clock[0] = EXPIRY_S - HEARTBEAT_S / 2
    assert [attempts.begin_writing("u") for _ in range(9)] == [False] * 9
    attempts.renew_permit()
    assert attempts.begin_writing("u")


def test_row_counts_are_reset_when_their_unit_ends() -> None:
    attempts = Attempts(MAX_CONSECUTIVE_CRASHES, "run")
    attempts.begin("u")
    attempts.begin("u", 1)
    attempts.begin("u", 10)
    attempts.begin("v", 1)
    attempts.end("u", 1)
    assert [attempts.count_deaths("u", row) for row in (None, 1, 10)] == [1, 0, 1]
    attempts.end("u")
    assert [attempts.count_deaths("u", row) for row in (None, 10)] == [0, 0]
    assert [attempts.count_deaths("v", row) for row in (None, 1)] == [0, 1]


def test_consecutive_deaths_without_progress_end_the_run() -> None:
    attempts = Attempts(max_crashes=3, run="run")
    for _ in range(4):
        attempts.begin("a")
    attempts.begin("b")
    attempts.end("b")
    for _ in range(3):
        attempts.begin("a")
    attempts.record_death(Death("CUDA error: device lost", out_of_memory=False), "a")
    with pytest.raises(
        CrashLoopError,
        match=r"^4 consecutive attempts crashed without progress; last engine failure: CUDA error: device lost$",
    ):
        attempts.begin("a")


def test_start_does_not_count_as_progress() -> None:
    attempts = Attempts(max_crashes=3, run="run")
    attempts.begin("a")
    for _ in range(3):
        attempts.begin_start()
        attempts.end_start()
        attempts.begin("a")
    with pytest.raises(CrashLoopError, match=r"^4 consecutive attempts"):
        attempts.begin("a")


def test_deaths_while_writing_are_counted_until_the_unit_ends() -> None:
    attempts = Attempts(MAX_CONSECUTIVE_CRASHES, "run")
    for _ in range(2):
        for _ in range(3):
            attempts.begin_writing("u")
        attempts.end("u")
    for _ in range(3):
        attempts.begin_writing("u")
        attempts.end("u", 1)
    with pytest.raises(CrashLoopError, match=r"^3 processes died while writing the files of unit u$"):
        attempts.begin_writing("u")


def test_engine_deaths_are_kept_until_their_row_ends() -> None:
    attempts, death = Attempts(MAX_CONSECUTIVE_CRASHES, "run"), Death("killed", out_of_memory=True)
    attempts.begin("a")
    attempts.record_death(death, "a")
    assert (attempts.list_engine_deaths("a"), attempts.list_engine_deaths("b")) == ([death], [])
    attempts.end("a")
    assert attempts.list_engine_deaths("a") == []


def test_unfinished_start_counts_as_a_crash() -> None:
    attempts = Attempts(max_crashes=2, run="run")
    for _ in range(3):
        attempts.begin_start()
    with pytest.raises(CrashLoopError, match=r"^3 consecutive attempts"):
        attempts.begin_start()


@pytest.mark.parametrize("seed", range(20))
async def test_exclusive_holders_are_alone_and_all_are_admitted(seed: int) -> None:
    rng, lock = random.Random(seed), SharedExclusiveLock()
    inside: list[str] = []
    passed = 0

    async def visit(name: str, alone: bool) -> None:
        nonlocal passed
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        async with lock.hold_exclusive() if alone else lock.hold_shared():
            inside.append(name)
            for _ in range(rng.randrange(6)):
                assert "alone" not in inside or inside == ["alone"]
                await asyncio.sleep(0)
            inside.remove(name)
        passed += 1

    visits = [visit("alone" if n % 3 == 0 else f"v{n}", n % 3 == 0) for n in range(30)]
    await asyncio.wait_for(asyncio.gather(*visits), 5)
    assert passed == 30


async def test_shared_holders_run_concurrently() -> None:
    lock, inside, most = SharedExclusiveLock(), 0, 0

    async def visit() -> None:
        nonlocal inside, most
        async with lock.hold_shared():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.01)
            inside -= 1

    await asyncio.gather(*(visit() for _ in range(5)))
    assert most == 5


async def test_canceled_exclusive_wait_admits_shared_holders() -> None:
    lock = SharedExclusiveLock()
    async with lock.hold_shared():
        waiting = asyncio.create_task(lock.hold_exclusive().__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        async with asyncio.timeout(1), lock.hold_shared():
            pass
