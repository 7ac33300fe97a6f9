"""Queries that are asked again get the answer that they got before."""

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Protocol

from pipeline.decoding.types import Answer, Query, Usage

# Queries that are remembered. An answer takes some ten kilobytes, with all candidates of a long one half a megabyte.
MOST = 1024


class Answering(Protocol):
    """Answers queries."""

    async def answer(self, query: Query) -> Answer:
        """See :meth:`pipeline.decoding.self_rag.SelfRag.answer`."""
        ...


@dataclass
class AnsweredOnce:
    """Finds an answer once for queries that differ in nothing but their ids.

    Decoding is greedy, so a query has one answer; what a batch's numerics would change between two times is the same
    for both rows this way. Equal queries that are under way together wait for the first of them; if that one fails,
    each is asked for itself.

    Attributes:
        most: queries that are remembered, the latest used.
        known: their answers, or None for one that failed.
    """

    system: Answering
    most: int = MOST
    known: OrderedDict[Query, asyncio.Future[Answer | None]] = field(default_factory=OrderedDict)

    async def answer(self, query: Query) -> Answer:
        """See :meth:`Answering.answer`; a repeated answer has cost nothing but its wait."""
        started, key = time.monotonic(), replace(query, id="")
        if (first := self.known.get(key)) is None:
            return await self._first(query, key)
        self.known.move_to_end(key)
        # Who stops waiting must not take the answer from the others.
        if (answer := await asyncio.shield(first)) is None:
            return await self.system.answer(query)
        return replace(answer, usage=Usage(seconds=time.monotonic() - started))

    async def _first(self, query: Query, key: Query) -> Answer:
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
