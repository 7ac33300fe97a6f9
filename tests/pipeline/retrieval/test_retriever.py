import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from pipeline.config.sections import RetrievalConfig
from pipeline.decoding.self_rag import take_given_passages
from pipeline.decoding.types import Passage, Query, RetrievedPassage
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.fusion import QueryBatch
from pipeline.retrieval.hits import Hit
from pipeline.retrieval.passage_columns import MetadataType
from pipeline.retrieval.retriever import IndexRetriever
from pipeline.retrieval.shard_servers import IndexLostError

DIGEST = "d" * 64


class LengthEncoder:
    """Encodes a query as its length; counts batches; breaks on the word ``boom``."""

    name, digest, dimension = "length", DIGEST, 1

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self.busy, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def encode_queries(self, texts: list[str]) -> Vectors:
        self.batches.append(texts)
        self.threads.add(threading.get_ident())
        self.busy.set()
        self.gate.wait(5)
        if "boom" in texts:
            raise RuntimeError("no vectors today")
        return np.array([[len(text)] for text in texts], np.float32)


class CountingIndex:
    """Finds passages numbered from the query's vector upwards."""

    class manifest:  # noqa: N801
        dimension = 1
        encoder = type("entry", (), {"name": "length", "digest": DIGEST})
        lexical = None
        metadata: Mapping[str, MetadataType] = {"year": "integer"}

    def __init__(self) -> None:
        self.asked: list[int] = []

    def rank(self, batch: QueryBatch, depths: Sequence[int]) -> list[list[list[Hit]]]:
        k = max(depths)
        self.asked.append(k)
        assert batch.vectors is not None
        return [[[Hit(1.0 / rank, int(query[0]), rank) for rank in range(1, k + 1)] for query in batch.vectors]]

    def read(self, hits: Sequence[Sequence[Hit]]) -> list[list[Passage]]:
        return [[found(hit.shard, hit.row).passage for hit in of_query] for of_query in hits]


def found(length: int, rank: int) -> RetrievedPassage:
    return RetrievedPassage(Passage(f"{length}-{rank}", "", "text"), 1.0 / rank, rank)


async def find(retriever: IndexRetriever, query: str, k: int) -> list[RetrievedPassage]:
    return (await retriever.retrieve(query, k)).passages


def make(batch_size: int = 64, wait_ms: float = 20.0) -> tuple[IndexRetriever, LengthEncoder, CountingIndex]:
    encoder, index = LengthEncoder(), CountingIndex()
    made: Any = IndexRetriever
    return made(encoder, index, RetrievalConfig(batch_size=batch_size, wait_ms=wait_ms)), encoder, index


async def test_concurrent_requests_share_one_encode_and_one_search() -> None:
    retriever, encoder, index = make()
    answers = await asyncio.gather(*(find(retriever, "x" * n, 1 + n % 3) for n in range(10)))
    assert answers == [[found(n, rank) for rank in range(1, 2 + n % 3)] for n in range(10)]
    assert [len(batch) for batch in encoder.batches] == [10]
    assert index.asked == [3]
    retriever.close()


async def test_full_batch_does_not_wait() -> None:
    retriever, encoder, _ = make(batch_size=4, wait_ms=60_000)
    await asyncio.wait_for(asyncio.gather(*(find(retriever, "x", 1) for _ in range(8))), 5)
    assert [len(batch) for batch in encoder.batches] == [4, 4]


async def test_requests_during_a_search_form_the_next_batch() -> None:
    retriever, encoder, _ = make(wait_ms=0)
    encoder.gate.clear()
    first = asyncio.create_task(find(retriever, "first", 1))
    await asyncio.to_thread(encoder.busy.wait, 5)
    later = [asyncio.create_task(find(retriever, f"later {n}", 1)) for n in range(5)]
    await asyncio.sleep(0.02)
    encoder.gate.set()
    await asyncio.gather(first, *later)
    assert encoder.batches == [["first"], [f"later {n}" for n in range(5)]]


async def test_searches_run_in_one_thread_outside_the_event_loop() -> None:
    retriever, encoder, _ = make(batch_size=1)
    await asyncio.gather(*(find(retriever, "x", 1) for _ in range(5)))
    assert len(encoder.threads) == 1
    assert threading.get_ident() not in encoder.threads


async def test_query_that_cannot_be_encoded_fails_alone() -> None:
    retriever, encoder, _ = make()
    ended = await asyncio.gather(*(find(retriever, q, 1) for q in ("a", "boom", "abc")), return_exceptions=True)
    assert (ended[0], str(ended[1]), ended[2]) == ([found(1, 1)], "no vectors today", [found(3, 1)])
    assert encoder.batches == [["a", "boom", "abc"], ["a"], ["boom"], ["abc"]]
    assert await find(retriever, "ab", 1) == [found(2, 1)]


async def test_lost_index_fails_the_whole_batch() -> None:
    retriever, encoder, index = make()

    def lost(_batch: QueryBatch, _k: int) -> None:
        raise IndexLostError("a shard server was lost")

    index.rank = lost  # type: ignore[assignment,method-assign]
    ended = await asyncio.gather(*(find(retriever, q, 1) for q in ("a", "b")), return_exceptions=True)
    assert [type(error) for error in ended] == [IndexLostError] * 2
    assert len(encoder.batches) == 1


async def test_canceled_request_is_not_searched_and_does_not_affect_others() -> None:
    retriever, encoder, _ = make()
    gone, stays = (asyncio.create_task(find(retriever, query, 1)) for query in ("gone", "stays"))
    await asyncio.sleep(0)
    gone.cancel()
    assert await stays == [found(5, 1)]
    assert encoder.batches == [["stays"]]


async def test_cancellation_during_a_search_does_not_affect_others() -> None:
    retriever, encoder, _ = make(wait_ms=0)
    encoder.gate.clear()
    gone, stays = (asyncio.create_task(find(retriever, query, 1)) for query in ("gone", "stays"))
    await asyncio.to_thread(encoder.busy.wait, 5)
    gone.cancel()
    encoder.gate.set()
    assert await stays == [found(5, 1)]
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert await find(retriever, "ab", 1) == [found(2, 1)]


async def test_encoder_that_does_not_fit_the_index_is_refused() -> None:
    encoder, made = LengthEncoder(), IndexRetriever
    encoder.digest = "e" * 64
    build: Any = made
    with pytest.raises(ValueError, match="not the one that the index was built with"):
        build(encoder, CountingIndex(), RetrievalConfig())


def test_given_passages_keep_their_order_and_have_no_score() -> None:
    brought = tuple(Passage(name, name, name) for name in "abc")
    assert take_given_passages(Query("1", "q", passages=brought), 2) == [
        RetrievedPassage(brought[0], None, 1),
        RetrievedPassage(brought[1], None, 2),
    ]
    assert take_given_passages(Query("1", "q"), 2) == []


class ReversingReranker:
    """Puts the last passages first."""

    candidates, queries_per_call = 6, 2

    def __init__(self) -> None:
        self.batches: list[int] = []

    def rerank(self, searches: list[tuple[str, list[RetrievedPassage]]]) -> list[list[RetrievedPassage]]:
        self.batches.append(len(searches))
        return [list(reversed(passages)) for _, passages in searches]


async def test_reranker_orders_more_passages_than_are_returned() -> None:
    encoder, index, reranker = LengthEncoder(), CountingIndex(), ReversingReranker()
    made: Any = IndexRetriever
    retriever = made(encoder, index, RetrievalConfig(wait_ms=20), reranker)
    answers = await asyncio.gather(*(retriever.retrieve("x" * n, 2) for n in range(4)))
    assert [answer.passages for answer in answers] == [[found(n, 6), found(n, 5)] for n in range(4)]
    assert all(answer.rerank_seconds > 0 for answer in answers)
    assert (index.asked, reranker.batches) == ([6], [2, 2])
    assert len((await retriever.retrieve("x", 8)).passages) == 8
    retriever.close()


async def test_search_without_a_reranker_has_no_rerank_seconds() -> None:
    retriever, *_ = make()
    assert (await retriever.retrieve("x", 1)).rerank_seconds == 0.0
