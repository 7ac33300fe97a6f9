"""Annotates the rows of a unit: concurrently, or one at a time to find the row that kills its process."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config.run import RunConfig
from pipeline.decoding.answer_cache import Answering
from pipeline.engine.postmortem import Death
from pipeline.engine.vllm import EngineDeadError
from pipeline.nodes.loss import NODE_LOSS_S, get_node
from pipeline.output.partial import Outcome
from pipeline.output.schema import ANSWER_FIELDS, CANDIDATE_FIELDS, ERROR_FIELDS, rename_reserved_columns, to_answer_row
from pipeline.queries.schema import Row, read_rows, to_query
from pipeline.retrieval.shard_servers import IndexLostError
from pipeline.run.attempts import ROW_DEATHS, OutOfMemoryError, ProcessDiedError
from pipeline.run.finished_rows import FinishedRows

log = logging.getLogger(__name__)

AskEngine = Callable[[], Awaitable[None]]
TIMED_OUT = TimeoutError.__name__
# Rows of a unit that are decoded at once. With more, none would finish for long, since the engine serves the first
# request of each before the second request of any, and the loss of a large unit would cost all that work.
ROWS_AT_ONCE = 1024


async def assume_alive() -> None:
    """Ask nothing, for systems without an engine that could hang."""


def build_annotated_schema(inputs: pa.Schema, keep_candidates: bool) -> pa.Schema:
    """Return the schema of an annotated unit, whose answers and errors are not separated yet: columns of both."""
    extra = CANDIDATE_FIELDS if keep_candidates else []
    return pa.schema([*rename_reserved_columns(inputs), *ANSWER_FIELDS, *extra, *ERROR_FIELDS])


async def annotate_row(system: Answering, row: Row, config: RunConfig) -> dict[str, Any]:
    """Answer one row; an error that concerns this row alone becomes its error columns.

    Raises:
        EngineDeadError, IndexLostError: the row did not cause the error.
    """
    if isinstance(row, ValueError):
        return build_error_columns(row)
    limit = config.execution.row_timeout_s
    clock = asyncio.timeout(limit)
    try:
        async with clock:
            return to_answer_row(await system.answer(to_query(row, config.columns)))
    except (EngineDeadError, IndexLostError):
        raise
    except Exception as error:  # noqa: BLE001  no error of one row may fail the other rows
        if clock.expired():
            return build_error_columns(TimeoutError(f"no answer within execution.row_timeout_s = {limit:g} s"))
        log.warning("row %r failed: %s: %s", row.get(config.columns.id), type(error).__name__, error)
        return build_error_columns(error)


def build_error_columns(error: Exception, attempts: int = 1) -> dict[str, Any]:
    """Return the error columns of a row."""
    return {"error_type": type(error).__name__, "error_message": str(error), "attempts": attempts}


@dataclass(frozen=True)
class Together:
    """Annotates the rows of a unit concurrently.

    Rows that failed are annotated again if the unit is, since the engine may be the cause.

    Attributes:
        ask_engine: asks the engine for one token; raises ``EngineDeadError`` if it does not answer.
    """

    ask_engine: AskEngine = assume_alive

    async def annotate(
        self, system: Answering, rows: Mapping[int, Row], config: RunConfig, finished: FinishedRows
    ) -> None:
        """Annotate rows.

        Args:
            rows: rows to annotate, by number within the unit.
            finished: collects the outcomes.

        Raises:
            EngineDeadError: rows timed out because of the engine: of several rows none was answered, or the engine
                does not even answer a request for one token.
        """
        places = asyncio.Semaphore(ROWS_AT_ONCE)

        async def annotate(number: int, row: Row) -> None:
            async with places:
                outcome = await annotate_row(system, row, config)
            await finished.add(number, outcome, keep="error_type" not in outcome)

        await asyncio.gather(*(annotate(number, row) for number, row in rows.items()))
        kinds = Counter(finished.outcomes[number].get("error_type") for number in rows)
        if kinds[TIMED_OUT] > 1 and kinds.keys() <= {TIMED_OUT, "ValueError"}:
            limit = config.execution.row_timeout_s
            reason = f"none of the {kinds[TIMED_OUT]} rows of a unit was answered within {limit:g} s"
            raise EngineDeadError(Death(reason, out_of_memory=False))
        if kinds[TIMED_OUT]:
            await self.ask_engine()


@dataclass(frozen=True)
class OneByOne:
    """Annotates the rows of a unit one at a time, to find a row that kills its process.

    Attributes:
        attempts: Ray handle of ``Attempts``.
        unit: id of the unit, under which attempts at its rows are counted.
        ask_engine: asks the engine for one token; raises ``EngineDeadError`` if it does not answer.
    """

    attempts: Any
    unit: str
    ask_engine: AskEngine = assume_alive

    async def annotate(
        self, system: Answering, rows: Mapping[int, Row], config: RunConfig, finished: FinishedRows
    ) -> None:
        """Annotate rows one at a time; after ``ROW_DEATHS`` crashes of its process, a row has their cause as error.

        Args:
            rows: rows to annotate, by number within the unit.
            finished: collects the outcomes.
        """
        for number, row in rows.items():
            deaths = await self._count_deaths(number)
            if deaths >= ROW_DEATHS:
                engines = await self.attempts.list_engine_deaths.remote(self.unit, number)
                # Not kept: in another run, once the cause is fixed, the row may be answered.
                await finished.add(number, build_error_columns(explain_deaths(deaths, engines), deaths), keep=False)
            else:
                await finished.add(number, await self._annotate_row(system, row, config, number))

    async def _count_deaths(self, number: int) -> int:
        """Return the deaths of a row; before the row is blamed, wait for Ray to notice that their nodes are lost."""
        attempts, unit = self.attempts, self.unit
        deaths = int(await attempts.count_deaths.remote(unit, number))
        if deaths < ROW_DEATHS or await attempts.is_settled.remote(unit, number):
            return deaths
        await asyncio.sleep(NODE_LOSS_S)
        return int(await attempts.count_deaths.remote(unit, number))

    async def _annotate_row(self, system: Answering, row: Row, config: RunConfig, number: int) -> Outcome:
        attempts, unit = self.attempts, self.unit
        try:
            await attempts.begin.remote(unit, number, get_node())
            outcome = await annotate_row(system, row, config)
            if outcome.get("error_type") == TIMED_OUT:
                await self.ask_engine()
        except EngineDeadError as error:
            await attempts.record_death.remote(error.death, unit, number)
            raise
        except asyncio.CancelledError:
            await attempts.withdraw.remote(unit, number)
            raise
        await attempts.end.remote(unit, number)
        return outcome


async def annotate_table(
    system: Answering,
    inputs: pa.Table,
    config: RunConfig,
    way: Together | OneByOne = Together(),
    finished: FinishedRows | None = None,
) -> pa.Table:
    """Annotate the rows of a unit; returns one row for each input row, in the same order.

    Args:
        way: annotates the rows concurrently, or one at a time.
        finished: rows that need not be annotated again; receives the others.
    """
    read = [name for name in vars(config.columns).values() if name in inputs.schema.names]
    finished = finished or FinishedRows()
    rows = enumerate(read_rows(inputs.select(read)))
    missing = {number: row for number, row in rows if number not in finished.outcomes}
    await way.annotate(system, missing, config, finished)
    schema = build_annotated_schema(inputs.schema, config.decoding.keep_candidates)
    passed = inputs.rename_columns(rename_reserved_columns(inputs.schema).names)
    outcomes = [finished.outcomes[number] for number in range(inputs.num_rows)]
    columns = []
    for field in schema:
        if field.name in passed.schema.names:
            columns.append(passed[field.name])
        else:
            values = [outcome.get(field.name) for outcome in outcomes]
            columns.append(pa.array(values, field.type))
    return pa.table(columns, schema=schema)


def explain_deaths(deaths: int, engines: Sequence[Death]) -> Exception:
    """Return the error of a row that is not tried again, since its processes crashed.

    Args:
        deaths: number of processes that crashed while they decoded only this row.
        engines: known causes of death of their engines.
    """
    if not engines:
        return ProcessDiedError(f"{deaths} processes died while decoding only this row")
    last = engines[-1].reason
    if len(engines) == deaths and all(death.out_of_memory for death in engines):
        return OutOfMemoryError(
            f"the engine ran out of memory {deaths} times while decoding only this row ({last}); "
            "lower model.engine.gpu_memory_utilization, decoding.passages or model.engine.max_model_len"
        )
    return ProcessDiedError(f"{deaths} processes died while decoding only this row; last engine failure: {last}")
