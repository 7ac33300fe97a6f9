"""A row that kills its process is found and set aside; its neighbours are not blamed for it.

Ray restarts a dead actor and gives it the same units again. A unit is tried twice beside others, then alone, then row
by row: when the process dies while a row is alone in it, that row is to blame.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pipeline.engine.postmortem import Death
from pipeline.run.telemetry import DeathTelemetry

# Attempts of a unit beside others; the next one is alone in its process, and from then on its rows are one by one.
BESIDE_OTHERS = 2
# A row whose process died this often while it was alone is not tried again.
ROW_DEATHS = 2
# Attempts in vain, one after another, that each unit in flight may have a part in; those of a poison row are five.
PATIENCE = 10
# A unit whose process died this often while its files were written ends the run: no row of it is to blame.
WRITING_DEATHS = 3
# What an actor's start is counted as.
START = "an actor's start"


class ProcessDiedError(RuntimeError):
    """Every process that decoded the row died of it."""


class OutOfMemoryError(RuntimeError):
    """Every engine that decoded the row ran out of memory over it."""


class HopelessError(RuntimeError):
    """Processes die one after another, and nothing gets done in between."""


class Attempts:
    """A Ray actor that outlives those that die, and counts what was begun and has not ended.

    Names of a unit's rows begin with the unit's own and a colon: their counts last until the unit ends, since a unit
    that is begun again begins with its first row.

    Args:
        patience: so many attempts that ended with their process, with nothing done in between, end the run.
        run: the output's URI, for telemetry.
    """

    def __init__(self, patience: int, run: str) -> None:
        self._patience = patience
        self._telemetry = DeathTelemetry(run)
        self._begun: Counter[str] = Counter()
        self._engines: dict[str, list[Death]] = {}
        self._last: Death | None = None
        self._in_vain = 0

    def deaths(self, what: str) -> int:
        """Attempts that were begun and did not end."""
        return self._begun[what]

    def begin(self, what: str) -> None:
        """Count an attempt.

        Raises:
            HopelessError: too many, of whatever, died one after another.
        """
        if what == START:
            self._telemetry.started()
        if self._begun[what]:
            self._in_vain += 1
        self._begun[what] += 1
        if self._in_vain > self._patience:
            last = f"; the last engine's end: {self._last.reason}" if self._last else ""
            raise HopelessError(f"{self._in_vain} attempts ended with their process, with nothing done{last}")

    def writing(self, unit: str) -> None:
        """Count an attempt to write a unit's files; what outlives its run does not write, since this actor is gone.

        Raises:
            HopelessError: too many processes died of it.
        """
        name = f"{unit}:files"
        if self._begun[name] >= WRITING_DEATHS:
            raise HopelessError(f"{WRITING_DEATHS} processes died while they wrote the files of unit {unit}")
        self._begun[name] += 1

    def died(self, what: str, death: Death) -> None:
        """Record how the engine ended that this was decoded on."""
        self._engines.setdefault(what, []).append(death)
        self._last = death
        self._telemetry.died(death.out_of_memory)

    def engines(self, what: str) -> list[Death]:
        """How engines ended under it, as far as known: nothing is, where a whole process was killed."""
        return self._engines.get(what, [])

    def end(self, what: str) -> None:
        """Forget what was done, and with a unit its rows and files; a start alone gets nothing done."""
        for name in [name for name in self._begun if name == what or name.startswith(f"{what}:")]:
            del self._begun[name]
            self._engines.pop(name, None)
        if what != START:
            self._in_vain = 0


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
