"""A row that kills its process is found and set aside; its neighbours are not blamed for it.

Ray restarts a dead actor and gives it the same units again. A unit is tried twice beside others, then alone, then row
by row: when the process dies while a row is alone in it, that row is to blame.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

# Attempts of a unit beside others; the next one is alone in its process, and from then on its rows are one by one.
BESIDE_OTHERS = 2
# A row whose process died this often while it was alone is not tried again.
ROW_DEATHS = 2


class ProcessDiedError(RuntimeError):
    """Every process that decoded the row died of it."""


class Attempts:
    """A Ray actor that outlives those that die, and counts what was begun."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, what: str) -> int:
        """Count an attempt; how many before it did not end."""
        self._begun[what] += 1
        return self._begun[what] - 1

    def end(self, what: str) -> None:
        """Forget what has ended, however it ended."""
        del self._begun[what]


class Turnstile:
    """Units pass beside one another, or one alone: who wants to be alone waits for those inside, and others for him."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._inside = 0
        self._alone_wanted = 0

    @asynccontextmanager
    async def beside_others(self) -> AsyncIterator[None]:
        """Enter as soon as nobody is alone or waits to be."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._alone_wanted)
            self._inside += 1
        try:
            yield
        finally:
            await self._leave()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Enter as soon as nobody is inside."""
        async with self._changed:
            self._alone_wanted += 1
            try:
                await self._changed.wait_for(lambda: not self._inside)
            except BaseException:
                self._alone_wanted -= 1
                raise
            self._inside += 1
        try:
            yield
        finally:
            self._alone_wanted -= 1
            await self._leave()

    async def _leave(self) -> None:
        async with self._changed:
            self._inside -= 1
            self._changed.notify_all()
