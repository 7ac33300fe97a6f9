"""Isolates rows that kill their process, so that the other rows of their unit are answered.

Ray restarts a dead actor and gives it the same units again. A unit is tried twice beside others, then alone, then row
by row: a row that is alone in a process that dies is the cause.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pipeline.engine.postmortem import Death
from pipeline.run.telemetry import DeathTelemetry

# Attempts of a unit beside others; the next attempt has the process to itself and runs its rows one by one.
BESIDE_OTHERS = 2
# Crashes of a row that was alone in its process after which it is not tried again.
ROW_DEATHS = 2
# Consecutive crashes, without any finished unit or row, that are allowed for each unit in flight; a single poison row
# causes five.
MAX_CONSECUTIVE_CRASHES = 10
# Crashes while the files of one unit are written after which the run ends: no row is the cause.
WRITING_DEATHS = 3
# Name under which starts of actors are counted.
START = "an actor's start"


class ProcessDiedError(RuntimeError):
    """Every process that decoded the row crashed."""


class OutOfMemoryError(RuntimeError):
    """Every engine that decoded the row ran out of memory."""


class CrashLoopError(RuntimeError):
    """Processes crash one after another, and nothing is finished in between."""


class Attempts:
    """Counts attempts that were begun and have not ended; a Ray actor that survives crashes of the others.

    Names of a unit's rows begin with the unit's name and a colon. Their counts are kept until the unit ends, since a
    unit that is retried starts with its first row.

    Args:
        max_crashes: consecutive crashes, with nothing finished in between, after which the run ends.
        run: URI of the output, for telemetry.
    """

    def __init__(self, max_crashes: int, run: str) -> None:
        self._patience = max_crashes
        self._telemetry = DeathTelemetry(run)
        self._begun: Counter[str] = Counter()
        self._engines: dict[str, list[Death]] = {}
        self._last: Death | None = None
        self._crashes = 0

    def deaths(self, what: str) -> int:
        """Number of attempts that were begun and did not end."""
        return self._begun[what]

    def begin(self, what: str) -> None:
        """Count an attempt.

        Raises:
            CrashLoopError: too many attempts crashed one after another.
        """
        if what == START:
            self._telemetry.started()
        if self._begun[what]:
            self._crashes += 1
        self._begun[what] += 1
        if self._crashes > self._patience:
            last = f"; the last engine's end: {self._last.reason}" if self._last else ""
            raise CrashLoopError(f"{self._crashes} attempts ended with their process, with nothing done{last}")

    def writing(self, unit: str) -> None:
        """Count an attempt to write a unit's files; actors that outlive their run cannot write, since this one is gone.

        Raises:
            CrashLoopError: too many processes crashed while writing them.
        """
        name = f"{unit}:files"
        if self._begun[name] >= WRITING_DEATHS:
            raise CrashLoopError(f"{WRITING_DEATHS} processes died while they wrote the files of unit {unit}")
        self._begun[name] += 1

    def died(self, what: str, death: Death) -> None:
        """Record the death of the engine that decoded this unit or row."""
        self._engines.setdefault(what, []).append(death)
        self._last = death
        self._telemetry.died(death.out_of_memory)

    def engines(self, what: str) -> list[Death]:
        """Known causes of death of the engines that decoded it; empty if the whole process was killed."""
        return self._engines.get(what, [])

    def end(self, what: str) -> None:
        """Clear the counts of a finished unit or row; a start does not count as progress."""
        for name in [name for name in self._begun if name == what or name.startswith(f"{what}:")]:
            del self._begun[name]
            self._engines.pop(name, None)
        if what != START:
            self._crashes = 0


class SharedExclusiveLock:
    """A shared/exclusive lock that prefers exclusive requests: while one waits, no new shared holder enters."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._holders = 0
        self._exclusive_wanted = 0

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Hold the lock together with other shared holders."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._exclusive_wanted)
            self._holders += 1
        try:
            yield
        finally:
            await self._leave()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Hold the lock alone."""
        async with self._changed:
            self._exclusive_wanted += 1
            try:
                await self._changed.wait_for(lambda: not self._holders)
            except BaseException:
                self._exclusive_wanted -= 1
                raise
            self._holders += 1
        try:
            yield
        finally:
            self._exclusive_wanted -= 1
            await self._leave()

    async def _leave(self) -> None:
        async with self._changed:
            self._holders -= 1
            self._changed.notify_all()
