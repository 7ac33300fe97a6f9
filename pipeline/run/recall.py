"""Gives back units in flight: ends their decoding at a time that may become known while they are decoded."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class RecalledError(Exception):
    """The unit is given back before it has ended, so that it can be done elsewhere or later."""


class Recall:
    """The time at which the units of an actor are given back, if any."""

    def __init__(self) -> None:
        self._when: float | None = None
        self._limits: set[asyncio.Timeout] = set()

    def set(self, seconds: float) -> None:
        """Give back the units that are in flight after some seconds, unless they are given back earlier anyway."""
        when = asyncio.get_running_loop().time() + seconds
        if self._when is not None and self._when <= when:
            return
        self._when = when
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(when)

    @asynccontextmanager
    async def limiting(self) -> AsyncIterator[None]:
        """Cancel the body when its unit is given back.

        Raises:
            RecalledError: it was.
        """
        limit = asyncio.timeout_at(self._when)
        self._limits.add(limit)
        try:
            async with limit:
                yield
        except TimeoutError:
            if limit.expired():
                raise RecalledError from None
            raise
        finally:
            self._limits.discard(limit)
