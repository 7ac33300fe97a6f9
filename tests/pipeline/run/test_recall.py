import asyncio

import pytest

from pipeline.run.recall import Recall, RecalledError


async def test_units_in_flight_and_later_ones_are_given_back() -> None:
    recall, ended = Recall(), []

    async def work(name: str, seconds: float) -> None:
        async with recall.limiting():
            await asyncio.sleep(seconds)
            ended.append(name)

    short, long = (asyncio.create_task(work(name, seconds)) for name, seconds in (("short", 0.01), ("long", 60)))
    await asyncio.sleep(0)
    recall.set(0.2)
    recall.set(60)  # the earliest time holds
    await short
    with pytest.raises(RecalledError):
        await long
    with pytest.raises(RecalledError):
        await work("later", 60)
    assert ended == ["short"]


async def test_time_can_be_moved_forward() -> None:
    recall = Recall()

    async def work() -> None:
        async with recall.limiting():
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    recall.set(30)
    recall.set(0.01)
    with pytest.raises(RecalledError):
        await task


async def test_other_errors_pass() -> None:
    recall = Recall()
    recall.set(60)
    with pytest.raises(TimeoutError, match="of the body"):
        async with recall.limiting():
            raise TimeoutError("of the body")
    with pytest.raises(KeyError):
        async with recall.limiting():
            raise KeyError
