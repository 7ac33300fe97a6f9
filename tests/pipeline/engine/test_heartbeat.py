import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from pipeline.engine.heartbeat import EngineStalledError, Heartbeat

STALL_S = 0.2


class Steps:
    """An engine that makes a step with every count while it runs."""

    def __init__(self) -> None:
        self.running = True
        self.made = 0

    def count(self) -> int:
        self.made += self.running
        return self.made


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
async def heartbeat(steps: Steps) -> AsyncIterator[Heartbeat]:
    watch = Heartbeat(STALL_S, steps.count)
    yield watch
    assert watch._watch is None
    assert watch._clocks == set()


async def ask(heartbeat: Heartbeat, seconds: float) -> str:
    async with heartbeat.watching():
        await asyncio.sleep(seconds)
    return "answered"


async def test_request_to_an_engine_that_steps_may_take_any_time(heartbeat: Heartbeat) -> None:
    assert await ask(heartbeat, 5 * STALL_S) == "answered"


@pytest.mark.parametrize("requests", [1, 2, 12])
async def test_engine_without_steps_fails_all_requests_in_flight(
    heartbeat: Heartbeat, steps: Steps, requests: int
) -> None:
    steps.running = False
    found = await asyncio.gather(*(ask(heartbeat, 60) for _ in range(requests)), return_exceptions=True)
    assert [type(error) for error in found] == [EngineStalledError] * requests
    assert {str(error) for error in found} == {f"no step for 0.2 s with {requests} request(s) in flight"}


async def test_engine_that_stops_stepping_in_mid_request_is_noticed(heartbeat: Heartbeat, steps: Steps) -> None:
    asking = asyncio.create_task(ask(heartbeat, 60))
    await asyncio.sleep(2 * STALL_S)
    steps.running = False
    with pytest.raises(EngineStalledError):
        await asyncio.wait_for(asking, 20 * STALL_S)


async def test_engine_that_resumes_in_time_is_not_blamed(heartbeat: Heartbeat, steps: Steps) -> None:
    asking = asyncio.create_task(ask(heartbeat, 5 * STALL_S))
    for _ in range(4):
        steps.running = False
        await asyncio.sleep(STALL_S / 2)
        steps.running = True
        await asyncio.sleep(STALL_S / 4)
    assert await asking == "answered"


async def test_idle_engine_is_not_blamed(heartbeat: Heartbeat, steps: Steps) -> None:
    steps.running = False
    assert await ask(heartbeat, 0) == "answered"
    await asyncio.sleep(3 * STALL_S)
    assert await ask(heartbeat, STALL_S / 4) == "answered"


async def test_own_pause_is_not_taken_for_the_silence_of_the_engine(heartbeat: Heartbeat, steps: Steps) -> None:
    steps.running = False
    asking = asyncio.create_task(ask(heartbeat, 6 * STALL_S))
    await asyncio.sleep(0)
    time.sleep(5 * STALL_S)  # noqa: ASYNC251  the process stops, and with it the event loop
    steps.running = True
    assert await asking == "answered"


async def test_later_request_to_a_hung_engine_fails_too(heartbeat: Heartbeat, steps: Steps) -> None:
    steps.running = False
    for _ in range(2):
        with pytest.raises(EngineStalledError, match=r"^no step for 0.2 s with 1 request\(s\) in flight$"):
            await ask(heartbeat, 60)


@pytest.mark.parametrize("error", [TimeoutError("of its own"), KeyError("no"), asyncio.CancelledError()])
async def test_errors_of_a_request_pass_unchanged(heartbeat: Heartbeat, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        async with heartbeat.watching():
            raise error
    assert caught.value is error


async def test_limit_of_a_row_is_not_taken_for_a_stall(heartbeat: Heartbeat) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(STALL_S / 4):
            await ask(heartbeat, 60)
