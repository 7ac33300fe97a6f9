"""The actor of a trial: it ends the trial where a run's actor would try again."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pipeline.engine.vllm import EngineDeadError
from pipeline.output.unit_files import Work
from pipeline.queries.units import Unit
from pipeline.run.actor import SelfRagActor
from pipeline.run.finished_rows import FinishedRows

PLAINLY_SLOWER = "plainly slower"


class TrialEndedError(RuntimeError):
    """A trial is not worth going on, or cannot."""


def make_trial_actor(limit_s: float | None) -> type[SelfRagActor]:
    """Return the class of a trial's actor.

    Args:
        limit_s: seconds that a unit may take; None without a limit.
    """

    class TrialActor(SelfRagActor):
        async def _annotate(self, unit: Unit, way: Any, finished: FinishedRows) -> tuple[Any, Work]:
            try:
                await asyncio.shield(self._warm)  # the engine's start does not count
                async with limiting(unit.rows, limit_s):
                    return await super()._annotate(unit, way, finished)
            except EngineDeadError as error:
                raise TrialEndedError(f"the engine died: {error}") from None

    return TrialActor


@asynccontextmanager
async def limiting(rows: int, limit_s: float | None) -> AsyncIterator[None]:
    """Limit the seconds of the body, which annotates a unit of so many rows.

    Raises:
        TrialEndedError: it takes longer.
    """
    clock = asyncio.timeout(limit_s)
    try:
        async with clock:
            yield
    except TimeoutError:
        if not clock.expired():
            raise
        raise TrialEndedError(f"{PLAINLY_SLOWER}: {rows} rows were not done after {limit_s:.0f} s") from None
