"""A cache that reuses the answer of a repeated query."""

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Protocol

from pipeline.decoding.types import Answer, Query, Usage

# Maximum number of cached answers. One takes about 10 kB, or 0.5 MB if it is long-form and keeps all candidates.
MOST = 1024


class Answering(Protocol):
    """A system that answers queries."""

    async def answer(self, query: Query) -> Answer:
        """See :meth:`pipeline.decoding.self_rag.SelfRag.answer`."""
        ...


@dataclass
class AnsweredOnce:
    """A cache in front of a system: queries that differ only in their ids are answered once.

    Decoding is greedy, so a query has one answer, up to rounding that depends on the batch; the cache gives equal
    queries the same one. A query that equals one in progress waits for it; if that one fails, each waiting query is
    answered separately.

    Attributes:
        system: system that answers queries that are not in the cache.
        most: maximum number of cached answers; the least recently used one is evicted.
        known: futures of the cached answers by query without its id, least recently used first. The result of a
            failed query is None.
    """

    system: Answering
    most: int = MOST
    known: OrderedDict[Query, asyncio.Future[Answer | None]] = field(default_factory=OrderedDict)

    async def answer(self, query: Query) -> Answer:
        """See :meth:`Answering.answer`; the usage of a cached answer is only the seconds spent waiting for it."""
        started, key = time.monotonic(), replace(query, id="")
        if (first := self.known.get(key)) is None:
            return await self._answer_first(query, key)
        self.known.move_to_end(key)
        # Shielded: canceling one waiting query must not cancel the future that others wait for.
        if (answer := await asyncio.shield(first)) is None:
            return await self.system.answer(query)
        return replace(answer, usage=Usage(seconds=time.monotonic() - started))

    async def _answer_first(self, query: Query, key: Query) -> Answer:
        future = self.known[key] = asyncio.get_running_loop().create_future()
        if len(self.known) > self.most:
            self.known.popitem(last=False)
        answer: Answer | None = None
        try:
            answer = await self.system.answer(query)
        finally:
            future.set_result(answer)
            if answer is None and self.known.get(key) is future:
                del self.known[key]
        return answer
