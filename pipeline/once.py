"""Queries that are asked again get the answer that they got before."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Protocol

from pipeline.types import Answer, Query, Usage

# Answers that are kept; with passages and candidates one takes some ten kilobytes.
MOST = 4096


class Answering(Protocol):
    """Answers queries."""

    async def answer(self, query: Query) -> Answer:
        """See :meth:`pipeline.self_rag.SelfRag.answer`."""
        ...


@dataclass
class _Known:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    answer: Answer | None = None


@dataclass
class AnsweredOnce:
    """Finds an answer once for all queries that differ in nothing but their ids.

    Decoding is greedy, so a query has one answer; what a batch's numerics would change between two times is the same
    for both rows this way. Equal queries that are under way together wait for the first of them; if that one fails,
    the next is asked for itself.

    Attributes:
        most: answers that are kept, the latest used.
    """

    system: Answering
    most: int = MOST
    known: OrderedDict[Query, _Known] = field(default_factory=OrderedDict)

    async def answer(self, query: Query) -> Answer:
        """See :meth:`Answering.answer`; the usage of a repeated answer is 0."""
        known = self._known(replace(query, id=""))
        async with known.lock:
            if known.answer is None:
                known.answer = await self.system.answer(query)
                return known.answer
        return replace(known.answer, usage=Usage())

    def _known(self, key: Query) -> _Known:
        known = self.known.setdefault(key, _Known())
        self.known.move_to_end(key)
        if len(self.known) > self.most:
            self.known.popitem(last=False)
        return known
