"""Carries answers over from an earlier annotated set if their searches would still find the same passages.

An answer depends on the index by what its searches have found alone. So each search of a row is repeated, without the
engine, and the row is answered again if any of them finds other passages, another order, or other texts.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from pipeline.config.run import RunConfig
from pipeline.decoding.beam import gather_all
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.protocols import Retriever
from pipeline.decoding.searches import digest_passages
from pipeline.decoding.types import Usage
from pipeline.output.partial import Outcome
from pipeline.queries.schema import Row, read_rows, to_query
from pipeline.retrieval.shard_servers import IndexLostError
from pipeline.run.annotation import ROWS_AT_ONCE
from pipeline.run.earlier_set import EarlierSet
from pipeline.run.finished_rows import FinishedRows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CarryingOver:
    """Carries answers over.

    Attributes:
        earlier: the earlier set.
        retriever: the index, which has been updated since.
        config: configuration of the run.
    """

    earlier: EarlierSet
    retriever: Retriever
    config: RunConfig

    @cached_property
    def tasks(self) -> Tasks:
        """The decoding settings by task."""
        return Tasks(self.config.decoding, self.config.profiles, self.config.task)

    async def carry_over(self, unit: str, rows: pa.Table, finished: FinishedRows) -> None:
        """Add those rows of a unit to the finished ones whose searches still find the same.

        Args:
            unit: id of the unit.
            rows: its rows.
            finished: receives them; rows that it has already are left as they are.

        Raises:
            IndexLostError: a shard server is lost.
            StorageError: the earlier set cannot be read.
        """
        columns = self.config.columns
        outcomes = await asyncio.to_thread(self.earlier.read_outcomes, unit, rows[columns.id].to_pylist())
        read = [name for name in vars(columns).values() if name in rows.schema.names]
        places = asyncio.Semaphore(ROWS_AT_ONCE)

        async def carry(number: int, row: Row, before: Outcome) -> None:
            async with places:
                usage = await self._search_again(row, before["searches"])
            if usage is not None:
                run = before["carried_from"] or self.earlier.run
                await finished.add(number, {**before, "usage": vars(usage), "carried_from": run}, keep=False)

        left = outcomes.keys() - finished.outcomes.keys()
        asked = enumerate(read_rows(rows.select(read)))
        await gather_all(*(carry(number, row, outcomes[number]) for number, row in asked if number in left))

    async def _search_again(self, row: Row, searches: Sequence[Outcome]) -> Usage | None:
        """Repeat the searches of a row; return what that took, or None if one finds other passages."""
        if isinstance(row, ValueError):
            return None
        began, reranking, empty = time.monotonic(), 0.0, 0
        try:
            query, decoding = self.tasks.apply(to_query(row, self.config.columns))
            async with asyncio.timeout(self.config.execution.row_timeout_s):
                for search in searches:
                    found = await self.retriever.retrieve(search["text"], decoding.passages, query.filter)
                    if digest_passages(found.passages) != search["digest"]:
                        return None
                    reranking += found.rerank_seconds
                    empty += not found.passages
        except IndexLostError:
            raise
        except Exception as error:  # noqa: BLE001  the row is answered again, and has the error if it persists
            name = row.get(self.config.columns.id)
            log.warning("row %r is answered again: %s: %s", name, type(error).__name__, error)
            return None
        seconds = time.monotonic() - began
        counts = {"retrievals": len(searches), "empty_searches": empty}
        return Usage(**counts, seconds=seconds, retrieve_seconds=seconds - reranking, rerank_seconds=reranking)
