"""Notices an engine that hangs: requests are in flight, and it makes no step.

Such an engine neither answers nor dies: its process was stopped, or waits forever for a driver or for another GPU.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

# Checks without a step after which an engine counts as hung.
CHECKS = 20


class EngineStalledError(RuntimeError):
    """The engine has requests and makes no step."""


@dataclass
class Heartbeat:
    """Watches the steps of an engine while requests are in flight.

    Silence is measured in checks that were made, not by the clock: a process that was stopped itself, or whose event
    loop was busy, does not take its own silence for that of the engine.

    Attributes:
        stall_s: seconds without a step after which the engine counts as hung.
        count_steps: returns the number of steps so far.
    """

    stall_s: float
    count_steps: Callable[[], int]
    _clocks: set[asyncio.Timeout] = field(default_factory=set)
    _watch: asyncio.Task[None] | None = None
    _reason: str = ""

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Watch the engine while the body, a request, is in flight.

        Raises:
            EngineStalledError: the engine made no step for ``stall_s`` seconds.
        """
        clock = asyncio.timeout(None)
        try:
            async with clock:
                self._add(clock)
                yield
        except TimeoutError:
            if not clock.expired():
                raise
            raise EngineStalledError(self._reason) from None
        finally:
            self._remove(clock)

    def _add(self, clock: asyncio.Timeout) -> None:
        self._clocks.add(clock)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_steps())

    def _remove(self, clock: asyncio.Timeout) -> None:
        self._clocks.discard(clock)
        if not self._clocks and self._watch is not None:
            self._watch.cancel()
            self._watch = None

    async def _watch_steps(self) -> None:
        seen, silent = self.count_steps(), 0
        while silent < CHECKS:
            await asyncio.sleep(self.stall_s / CHECKS)
            steps = self.count_steps()
            silent = silent + 1 if steps == seen else 0
            seen = steps
        self._reason = f"no step for {self.stall_s:g} s with {len(self._clocks)} request(s) in flight"
        now = asyncio.get_running_loop().time()
        for clock in self._clocks:
            clock.reschedule(now)
