"""Isolates rows that kill their process, so that the other rows of their unit are answered.

Ray restarts a dead actor and gives it the same units again. A unit is tried twice beside others, then alone, then row
by row: a row that is alone in a process that dies is the cause.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from pipeline.engine.postmortem import Death
from pipeline.run.telemetry import DeathTelemetry
from pipeline.storage.lease import EXPIRY_S, read_clock

# Attempts of a unit beside others; the next one has the process to itself, and those after it run row by row.
BESIDE_OTHERS = 2
# Crashes of a row that was alone in its process after which it is not tried again.
ROW_DEATHS = 2
# Consecutive crashes, without any finished unit or row, that are allowed for each unit in flight; a single poison row
# causes five.
MAX_CONSECUTIVE_CRASHES = 10
# Seconds after a heartbeat of the run's lease for which its actors may begin to write: another run can take over after
# EXPIRY_S.
PERMIT_S = 0.8 * EXPIRY_S
# Seconds between two requests of an actor for that permit.
PERMIT_WAIT_S = 1.0
# Crashes while the files of one unit are written after which the run ends: no row is the cause.
WRITING_DEATHS = 3


class ProcessDiedError(RuntimeError):
    """Every process that decoded the row crashed."""


class OutOfMemoryError(RuntimeError):
    """Every engine that decoded the row ran out of memory."""


class CrashLoopError(RuntimeError):
    """Processes crash one after another, and nothing is finished in between."""


@dataclass
class UnitRecord:
    """Attempts at a unit and at its rows that have not ended.

    Attributes:
        begun: attempts by row number; None stands for the unit as a whole.
        writing: attempts to write the unit's files.
        engines: causes of death of the engines that decoded it, by row number.
    """

    begun: Counter[int | None] = field(default_factory=Counter)
    writing: int = 0
    engines: defaultdict[int | None, list[Death]] = field(default_factory=lambda: defaultdict(list))


class Attempts:
    """Counts attempts that were begun and have not ended; a Ray actor that survives crashes of the others.

    Counts of rows are kept until their unit ends, since a unit that is retried starts with its first row.

    Args:
        max_crashes: consecutive crashes, with nothing finished in between, after which the run ends.
        run: URI of the output, for telemetry.
    """

    def __init__(self, max_crashes: int, run: str) -> None:
        self._max_crashes = max_crashes
        self._telemetry = DeathTelemetry(run)
        self._units: defaultdict[str, UnitRecord] = defaultdict(UnitRecord)
        self._last: Death | None = None
        self._starting = 0
        self._crashes = 0
        self._renewed = read_clock()

    def renew_permit(self) -> None:
        """Note a heartbeat of the run's lease."""
        self._renewed = read_clock()

    def begin_start(self) -> None:
        """Count an actor that starts; a start counts as a crash if another one has not ended.

        Raises:
            CrashLoopError: too many attempts crashed one after another.
        """
        self._telemetry.count_start()
        self._starting += 1
        self._count_crash(self._starting > 1)

    def end_start(self) -> None:
        """Clear the count of starts; a start is no progress."""
        self._starting = 0

    def count_deaths(self, unit: str, row: int | None = None) -> int:
        """Return the number of attempts that were begun and did not end."""
        return self._units[unit].begun[row] if unit in self._units else 0

    def begin(self, unit: str, row: int | None = None) -> None:
        """Count an attempt at a unit or at one of its rows.

        Raises:
            CrashLoopError: too many attempts crashed one after another.
        """
        begun = self._units[unit].begun
        begun[row] += 1
        self._count_crash(begun[row] > 1)

    def _count_crash(self, crashed: bool) -> None:
        self._crashes += crashed
        if self._crashes > self._max_crashes:
            last = f"; last engine failure: {self._last.reason}" if self._last else ""
            raise CrashLoopError(f"{self._crashes} consecutive attempts crashed without progress{last}")

    def begin_writing(self, unit: str) -> bool:
        """Count an attempt to write a unit's files; actors that outlive their run cannot write, since this one is gone.

        Returns:
            Whether they may be written now; not while the run's lease has no heartbeat, since another run may take it.

        Raises:
            CrashLoopError: too many processes crashed while writing them.
        """
        if read_clock() - self._renewed > PERMIT_S:
            return False
        record = self._units[unit]
        if record.writing >= WRITING_DEATHS:
            raise CrashLoopError(f"{WRITING_DEATHS} processes died while writing the files of unit {unit}")
        record.writing += 1
        return True

    def record_death(self, death: Death, unit: str, row: int | None = None) -> None:
        """Record the death of the engine that decoded this unit or row."""
        self._units[unit].engines[row].append(death)
        self._last = death
        self._telemetry.count_death(death.out_of_memory)

    def list_engine_deaths(self, unit: str, row: int | None = None) -> list[Death]:
        """Return the known causes of death of its engines; empty if whole processes were killed."""
        return list(self._units[unit].engines[row]) if unit in self._units else []

    def end(self, unit: str, row: int | None = None) -> None:
        """Clear the counts of a finished unit, rows included, or of a finished row."""
        self._crashes = 0
        if row is None:
            self._units.pop(unit, None)
        elif unit in self._units:
            self._units[unit].begun.pop(row, None)
            self._units[unit].engines.pop(row, None)


class SharedExclusiveLock:
    """A shared/exclusive lock that prefers exclusive requests: while one waits, no new shared holder enters."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._holders = 0
        self._exclusive_wanted = 0

    @asynccontextmanager
    async def hold_shared(self) -> AsyncIterator[None]:
        """Hold the lock together with other shared holders."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._exclusive_wanted)
            self._holders += 1
        try:
            yield
        finally:
            await self._leave()

    @asynccontextmanager
    async def hold_exclusive(self) -> AsyncIterator[None]:
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
