"""Collects the finished rows of a unit in progress, and keeps them in sub-files if the unit takes long."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from pipeline.output.partial import Outcome, PartialUnit
from pipeline.storage.location import StorageError

log = logging.getLogger(__name__)

# Seconds between the sub-files of a unit: the work that its loss may cost, beside the rows in flight. A unit that takes
# less time has none.
KEEP_S = 60.0


class FinishedRows:
    """Collects the outcomes of a unit's rows.

    Args:
        sub_files: keeps finished rows for later attempts at the unit; by default they are only in memory.
        permit: asks whether a sub-file may be written; fails if the run is over.
        every_s: seconds between sub-files; 0 writes one for each row.

    Attributes:
        outcomes: values of the columns that a run adds, by number of the row within the unit.
    """

    def __init__(
        self,
        sub_files: PartialUnit | None = None,
        permit: Callable[[], Awaitable[None]] | None = None,
        every_s: float = KEEP_S,
    ) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self._sub_files = sub_files
        self._permit = permit
        self._every_s = every_s
        self._unwritten: dict[int, Outcome] = {}
        self._wrote = time.monotonic()
        self._writing: set[asyncio.Task[None]] = set()
        self._left = False

    async def load(self, rows: int) -> None:
        """Take over the rows that earlier attempts at the unit have finished.

        Args:
            rows: number of rows of the unit.
        """
        if self._sub_files is not None:
            self._left = True
            self.outcomes |= await asyncio.to_thread(self._sub_files.read, rows)
            log.info("unit %s: %d of %d rows are finished", self._sub_files.unit, len(self.outcomes), rows)

    async def add(self, number: int, outcome: Outcome, keep: bool = True) -> None:
        """Add a finished row.

        Args:
            number: number of the row within the unit, from 0.
            outcome: values of the columns that a run adds.
            keep: whether the outcome is final, so that the row need not be annotated again if the unit is.
        """
        self.outcomes[number] = outcome
        if keep and self._sub_files is not None:
            self._unwritten[number] = outcome
            if time.monotonic() - self._wrote >= self._every_s:
                await self._write(self._sub_files)

    async def keep(self) -> None:
        """Write the finished rows that no sub-file has yet, and await those that are being written."""
        if self._unwritten and self._sub_files is not None:
            await self._write(self._sub_files)
        await asyncio.gather(*self._writing)

    async def _write(self, sub_files: PartialUnit) -> None:
        """Write the rows, even if the caller is canceled meanwhile."""
        rows, self._unwritten, self._wrote = self._unwritten, {}, time.monotonic()
        task = asyncio.create_task(self._write_rows(sub_files, rows))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        await asyncio.shield(task)

    async def _write_rows(self, sub_files: PartialUnit, rows: Mapping[int, Outcome]) -> None:
        if self._permit is not None:
            await self._permit()
        self._left = True
        try:
            await asyncio.to_thread(sub_files.write, rows)
        except StorageError as error:
            log.warning("%d finished rows are not kept in case the unit is repeated: %s", len(rows), error)

    async def discard(self) -> None:
        """Delete the sub-files of the unit, if there may be any, once its own files are written."""
        if self._left and self._sub_files is not None:
            try:
                await asyncio.to_thread(self._sub_files.delete)
            except StorageError as error:
                log.warning("sub-files are left until the end of the run: %s", error)
