import asyncio

import pytest

from pipeline.retrieval.batching import Batcher


class LostError(Exception):
    pass


async def test_answers_go_to_those_who_asked() -> None:
    batches: list[list[int]] = []

    def double(asked: list[int]) -> list[int]:
        batches.append(asked)
        return [2 * one for one in asked]

    batcher = Batcher("double", double, size=3, wait_s=0.02)
    assert await asyncio.gather(*map(batcher.ask, range(7))) == [0, 2, 4, 6, 8, 10, 12]
    assert batches == [[0, 1, 2], [3, 4, 5], [6]]
    batcher.close()


async def test_faulty_request_fails_alone_and_a_shared_fault_fails_all() -> None:
    tried: list[list[str]] = []

    def read(asked: list[str]) -> list[int]:
        tried.append(asked)
        if "lost" in asked:
            raise LostError
        return [int(one) for one in asked]

    batcher = Batcher("read", read, size=8, wait_s=0.02, shared=(LostError,))
    ended = await asyncio.gather(*map(batcher.ask, ["1", "x", "3"]), return_exceptions=True)
    assert (ended[0], ended[2]) == (1, 3)
    assert isinstance(ended[1], ValueError)
    assert tried == [["1", "x", "3"], ["1"], ["x"], ["3"]]
    ended = await asyncio.gather(*map(batcher.ask, ["1", "lost"]), return_exceptions=True)
    assert [type(one) for one in ended] == [LostError, LostError]
    with pytest.raises(LostError):
        await batcher.ask("lost")
