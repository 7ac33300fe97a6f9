"""Isolates rows that kill their process, so that the other rows of their unit are answered.

Ray restarts a dead actor and gives it the same units again. A unit is tried twice beside others, then alone, then row
by row: a row that is alone in a process that dies is the cause.

Processes that end with their node, such as a spot machine that is reclaimed, count for nothing. Ray may notice the loss
of a node after that of its processes, so nodes are looked up whenever attempts are counted, not when they end.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from pipeline.engine.postmortem import Death
from pipeline.nodes.loss import get_node, list_draining_nodes, list_lost_nodes
from pipeline.run.closing import Closing
from pipeline.run.telemetry import DeathTelemetry
from pipeline.storage.lease import PERMIT_S, read_clock

# Attempts of a unit beside others; the next one has the process to itself, and those after it run row by row.
BESIDE_OTHERS = 2
# Crashes of a row that was alone in its process after which it is not tried again.
ROW_DEATHS = 2
# Consecutive crashes, without any finished unit or row, that are allowed for each unit in flight; a single poison row
# causes five.
MAX_CONSECUTIVE_CRASHES = 10
# Seconds between two requests of an actor for the permit to write.
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
class Attempt:
    """An attempt that was begun and has not ended.

    Attributes:
        node: id of the Ray node of its process; empty if unknown.
        death: cause of death of its engine; None while it lives, or if the whole process was killed.
        began: time when it was begun, on a clock of its own.
    """

    node: str = ""
    death: Death | None = None
    began: float = field(default_factory=read_clock)


@dataclass
class UnitRecord:
    """Attempts at a unit and at its rows that have not ended.

    Attributes:
        begun: attempts by row number; None stands for the unit as a whole.
        writing: attempts that have begun to write the unit's files.
        partial: whether finished rows of the unit have been written to sub-files.
        rows: number of rows of the unit; 0 if unknown.
    """

    begun: defaultdict[int | None, list[Attempt]] = field(default_factory=lambda: defaultdict(list))
    writing: list[Attempt] = field(default_factory=list)
    partial: bool = False
    rows: int = 0


class Attempts:
    """Counts attempts that were begun and have not ended; a Ray actor that survives crashes of the others.

    Counts of rows are kept until their unit ends, since a unit that is retried starts with its first row.

    Args:
        max_crashes: consecutive crashes, with nothing finished in between, after which the run ends.
        run: URI of the output, for telemetry.
        list_lost: returns the ids of the nodes that are lost.
        closing: when the run ends early; by default it does not.
    """

    def __init__(
        self,
        max_crashes: int,
        run: str,
        list_lost: Callable[[], frozenset[str]] = list_lost_nodes,
        closing: Closing | None = None,
    ) -> None:
        self._max_crashes = max_crashes
        self._telemetry = DeathTelemetry(run)
        self._list_lost = list_lost
        self._closing = closing or Closing()
        self._units: defaultdict[str, UnitRecord] = defaultdict(UnitRecord)
        self._last: Death | None = None
        self._starting: list[Attempt] = []
        self._crashed: list[Attempt] = []
        self._in_flight: set[str] = set()
        self._given_back = 0
        self._renewed = read_clock()

    def renew_permit(self) -> None:
        """Note a heartbeat of the run's lease."""
        self._renewed = read_clock()

    def begin_start(self, node: str = "") -> None:
        """Count an actor that starts; a start counts as a crash if another one has not ended.

        Raises:
            CrashLoopError: too many attempts crashed one after another.
        """
        self._telemetry.count_start()
        self._count_crash(self._starting)
        self._starting.append(Attempt(node))

    def end_start(self) -> None:
        """Clear the count of starts; a start is no progress."""
        self._starting.clear()

    def count_deaths(self, unit: str, row: int | None = None) -> int:
        """Return the number of attempts that were begun and did not end, without those whose node is lost."""
        return len(self._select_counting(self._get_begun(unit, row)))

    def is_settled(self, unit: str, row: int | None = None) -> bool:
        """Whether the count of deaths is final: all were on this node, which the run would not outlive."""
        return all(attempt.node in ("", get_node()) for attempt in self._get_begun(unit, row))

    def may_begin(self, unit: str, rows: int) -> bool:
        """Whether a unit may begin; not if the run ends early and the unit would not end in time."""
        if not self._closing.may_begin(rows):
            self._in_flight.discard(unit)
            return False
        self._units[unit].rows = rows
        self._in_flight.add(unit)
        return True

    def may_continue(self, rows: int) -> bool:
        """Whether a unit of so many rows may begin in a further job."""
        return self._closing.may_begin(rows)

    def recall(self, seconds: float) -> int:
        """Refuse further units, and have those in flight given back after some seconds; return their number."""
        self._closing.recall(seconds)
        return len(self._in_flight)

    def take_given_back(self) -> int:
        """Return the number of units that were given back since the last call."""
        count, self._given_back = self._given_back, 0
        return count

    def get_respite(self, node: str) -> float | None:
        """Return the seconds until the units in flight on a node are given back; None if they are not."""
        return self._closing.compute_respite(node, list_draining_nodes() if node else {})

    def begin(self, unit: str, row: int | None = None, node: str = "") -> None:
        """Count an attempt at a unit or at one of its rows.

        Raises:
            CrashLoopError: too many attempts crashed one after another.
        """
        begun = self._units[unit].begun[row]
        self._count_crash(begun)
        begun.append(Attempt(node))

    def _get_begun(self, unit: str, row: int | None) -> list[Attempt]:
        return self._units[unit].begun[row] if unit in self._units else []

    def _select_counting(self, attempts: Sequence[Attempt]) -> list[Attempt]:
        lost = self._list_lost() if any(attempt.node for attempt in attempts) else frozenset()
        return [attempt for attempt in attempts if attempt.node not in lost]

    def _count_crash(self, earlier: Sequence[Attempt]) -> None:
        self._crashed += earlier[-1:]
        crashes = len(self._select_counting(self._crashed))
        if crashes > self._max_crashes:
            last = f"; last engine failure: {self._last.reason}" if self._last else ""
            raise CrashLoopError(f"{crashes} consecutive attempts crashed without progress{last}")

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
        if len(self._select_counting(record.writing)) >= WRITING_DEATHS:
            raise CrashLoopError(f"{WRITING_DEATHS} processes died while writing the files of unit {unit}")
        record.writing.append((record.begun[None] or [Attempt()])[-1])
        return True

    def begin_partial(self, unit: str) -> None:
        """Permit the unit's actor to write finished rows to a sub-file; they are progress."""
        self._units[unit].partial = True
        self._crashed.clear()

    def has_partial(self, unit: str) -> bool:
        """Whether finished rows of the unit have been written to sub-files in this run."""
        return unit in self._units and self._units[unit].partial

    def record_death(self, death: Death, unit: str, row: int | None = None) -> None:
        """Record the death of the engine that decoded this unit or row."""
        self._in_flight.discard(unit)
        for attempt in self._get_begun(unit, row)[-1:]:
            attempt.death = death
        self._last = death
        self._telemetry.count_death(death.out_of_memory)

    def list_engine_deaths(self, unit: str, row: int | None = None) -> list[Death]:
        """Return the known causes of death of its engines; empty if whole processes were killed."""
        counting = self._select_counting(self._get_begun(unit, row))
        return [attempt.death for attempt in counting if attempt.death is not None]

    def withdraw(self, unit: str, row: int | None = None) -> None:
        """Forget the last attempt at a unit, or at one of its rows, which was given back."""
        del self._get_begun(unit, row)[-1:]
        if row is None:
            self._in_flight.discard(unit)
            self._given_back += 1

    def end(self, unit: str, row: int | None = None) -> None:
        """Clear the counts of a finished unit, rows included, or of a finished row."""
        self._crashed.clear()
        if row is None:
            self._in_flight.discard(unit)
            record = self._units.pop(unit, UnitRecord())
            if record.rows and record.begun[None]:
                self._closing.add(record.rows, read_clock() - record.begun[None][-1].began)
        elif unit in self._units:
            self._units[unit].begun.pop(row, None)


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
