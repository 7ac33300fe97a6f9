"""The Ray Data actor: engine and index once, then units from file to file, one coroutine for each row."""

import asyncio
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import ray

from pipeline.config.run import RunConfig
from pipeline.decoding.answer_cache import AnsweredOnce, Answering
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.protocols import Critic
from pipeline.decoding.self_rag import SelfRag
from pipeline.engine.arguments import gpu_share
from pipeline.engine.models import critic_of
from pipeline.engine.postmortem import Death
from pipeline.engine.vllm import EngineDeadError, VllmGenerator, prepare_environment
from pipeline.gpus import exclusive_start
from pipeline.output.folder import OutputFolder
from pipeline.output.schema import ANSWER_FIELDS, CANDIDATE_FIELDS, ERROR_FIELDS, answer_row, passed_through
from pipeline.queries.query_set import Unit, read_unit
from pipeline.queries.schema import Row, query_of, read_rows
from pipeline.retrieval.retriever import IndexRetriever
from pipeline.retrieval.shard_servers import IndexLostError
from pipeline.run.attempts import (
    BESIDE_OTHERS,
    ROW_DEATHS,
    START,
    OutOfMemoryError,
    ProcessDiedError,
    SharedExclusiveLock,
)
from pipeline.run.telemetry import ActorTelemetry
from pipeline.storage.location import locate

log = logging.getLogger(__name__)


def annotated_schema(inputs: pa.Schema, keep_candidates: bool) -> pa.Schema:
    """What an annotated unit has before its rows part: input, answer and error columns."""
    extra = CANDIDATE_FIELDS if keep_candidates else []
    return pa.schema([*passed_through(inputs), *ANSWER_FIELDS, *extra, *ERROR_FIELDS])


async def annotate_row(system: Answering, row: Row, config: RunConfig) -> dict[str, Any]:
    """Answer one row; whatever goes wrong with it alone becomes its error columns.

    Raises:
        EngineDeadError, IndexLostError: the row is not to blame.
    """
    if isinstance(row, UnicodeDecodeError):
        return failed(ValueError(f"its text is not UTF-8: {row}"))
    limit = config.execution.row_timeout_s
    clock = asyncio.timeout(limit)
    try:
        async with clock:
            return answer_row(await system.answer(query_of(row, config.columns)))
    except (EngineDeadError, IndexLostError):
        raise
    except Exception as error:  # noqa: BLE001  a bad row must not sink its neighbours, whatever is wrong with it
        if clock.expired():
            return failed(TimeoutError(f"no answer within execution.row_timeout_s = {limit:g} s"))
        log.warning("row %r failed: %s: %s", row.get(config.columns.id), type(error).__name__, error)
        return failed(error)


def failed(error: Exception, attempts: int = 1) -> dict[str, Any]:
    """The error columns of a row."""
    return {"error_type": type(error).__name__, "error_message": str(error), "attempts": attempts}


@dataclass(frozen=True)
class OneByOne:
    """Annotates a unit's rows with nothing beside them, so that one that kills its process is found.

    Args:
        attempts: Ray handle of ``Attempts``.
        unit: its id, under which attempts at its rows are counted.
    """

    attempts: Any
    unit: str

    async def annotate(self, system: Answering, row: Row, config: RunConfig, number: int) -> dict[str, Any]:
        """Annotate one row, unless processes have died of it before."""
        name, attempts = f"{self.unit}:{number}", self.attempts
        deaths = await attempts.deaths.remote(name)
        if deaths >= ROW_DEATHS:
            return failed(cause(deaths, await attempts.engines.remote(name)), deaths)
        await attempts.begin.remote(name)
        try:
            outcome = await annotate_row(system, row, config)
        except EngineDeadError as error:
            await attempts.died.remote(name, error.death)
            raise
        await attempts.end.remote(name)
        return outcome


async def annotate_table(
    system: Answering, inputs: pa.Table, config: RunConfig, one_by_one: OneByOne | None = None
) -> pa.Table:
    """Annotate a unit's rows; rows stay in order, one out for each one in.

    Args:
        one_by_one: where they shall not be concurrent.
    """
    read = [name for name in vars(config.columns).values() if name in inputs.schema.names]
    rows = read_rows(inputs.select(read))
    if one_by_one is None:
        outcomes = await asyncio.gather(*(annotate_row(system, row, config) for row in rows))
    else:
        outcomes = [await one_by_one.annotate(system, row, config, n) for n, row in enumerate(rows)]
    schema = annotated_schema(inputs.schema, config.decoding.keep_candidates)
    passed = inputs.rename_columns(passed_through(inputs.schema).names)
    columns = [
        passed[field.name]
        if field.name in passed.schema.names
        else pa.array([outcome.get(field.name) for outcome in outcomes], field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def cause(deaths: int, engines: Sequence[Death]) -> Exception:
    """Why a row is given up that so many processes have died of.

    Args:
        engines: how those ended of which it is known.
    """
    if not engines:
        return ProcessDiedError(f"{deaths} processes died while this row alone was decoded")
    last = engines[-1].reason
    if len(engines) == deaths and all(death.out_of_memory for death in engines):
        return OutOfMemoryError(
            f"the engine ran out of memory {deaths} times while this row alone was decoded ({last}); "
            "lower model.engine.gpu_memory_utilization, decoding.passages or the lengths"
        )
    return ProcessDiedError(f"{deaths} processes died while this row alone was decoded; the last engine: {last}")


class SelfRagActor:
    """Holds a vLLM replica, and an opened index or the handles of its shard servers.

    When the engine dies the process ends with it: Ray starts a new actor and runs the unit again, which an
    exception would not bring about.

    Args:
        attempts: Ray handle of ``Attempts``.
        servers: handles of the shard servers, if there are any.
        index_digest: that the index must have.
    """

    def __init__(
        self, config: RunConfig, attempts: Any, servers: Sequence[Any] = (), index_digest: str | None = None
    ) -> None:
        self.config = config
        self.output = OutputFolder(locate(config.output, config.storage))
        self.attempts = attempts
        self.lock = SharedExclusiveLock()
        self.telemetry = ActorTelemetry(config.output)
        # Ray restarts a process that is killed while it starts without limit.
        ray.get(attempts.begin.remote(START))
        self._open(servers, index_digest)
        ray.get(attempts.end.remote(START))

    def _open(self, servers: Sequence[Any], index_digest: str | None) -> None:
        prepare_environment()
        config = self.config
        critic = self._critic()
        self.retriever: IndexRetriever | None = None
        if config.index is not None and config.decoding.mode != "never":
            folder, share = locate(config.index, config.storage), gpu_share(config.model)
            self.retriever = IndexRetriever.open(folder, config.retrieval, share, servers, index_digest)
            self.retriever.on_search = self.telemetry.search
        with exclusive_start():
            self.generator = self._start_engine(critic)
        tasks = Tasks(config.decoding, config.profiles, config.task)
        self.system: Answering = AnsweredOnce(SelfRag(self.generator, critic, tasks, self.retriever))

    def _critic(self) -> Critic:
        return critic_of(self.config)

    def _start_engine(self, critic: Critic) -> Any:
        generator = VllmGenerator.start(self.config.model, critic.watched)
        generator.load.on_step = self.telemetry.step
        return generator

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Take one unit from its file to its files; reading and writing happen beside the decoding of others.

        Args:
            batch: the fields of a ``Unit``, in its only row.

        Returns:
            Its ``UnitSummary`` as JSON, in the column ``summary``.
        """
        (planned,) = batch.to_pylist()
        unit, config = Unit(**planned), self.config
        async with self._attempt(unit.id) as one_by_one:
            await asyncio.shield(self._warm)
            began = time.time()
            rows = await asyncio.to_thread(read_unit, unit, config.storage)
            with self.telemetry.flying(unit.rows):
                annotated = await annotate_table(self.system, rows, config, one_by_one)
            times, keep_candidates = (began, time.time()), config.decoding.keep_candidates
            await self.attempts.writing.remote(unit.id)
            summary = await asyncio.to_thread(
                self.output.write_unit, unit.id, annotated, rows.schema, keep_candidates, times
            )
        self.telemetry.unit(annotated)
        return pa.table({"summary": [json.dumps(dataclasses.asdict(summary))]})

    @cached_property
    def _warm(self) -> asyncio.Task[None]:
        """The engine's first request, which all units wait for, no longer than a row may take."""

        async def warm() -> None:
            try:
                await asyncio.wait_for(self.generator.warm(), self.config.execution.row_timeout_s)
            except EngineDeadError:
                raise
            except Exception as error:  # noqa: BLE001  rows that meet it say so themselves
                log.warning("the engine's first request failed: %s: %s", type(error).__name__, error)

        return asyncio.create_task(warm())

    @asynccontextmanager
    async def _attempt(self, unit: str) -> AsyncIterator[OneByOne | None]:
        """An attempt at a unit: beside others, or alone where processes have died under it.

        Yields:
            How its rows are to be annotated, where they must not be concurrent.
        """
        deaths = await self.attempts.deaths.remote(unit)
        place = self.lock.shared() if deaths < BESIDE_OTHERS else self.lock.exclusive()
        try:
            async with place:
                await self.attempts.begin.remote(unit)
                yield OneByOne(self.attempts, unit) if deaths > BESIDE_OTHERS else None
        except EngineDeadError as error:
            memory = " (out of memory)" if error.death.out_of_memory else ""
            log.critical("the engine is dead%s: %s; this actor ends and is started again", memory, error)
            await self.attempts.died.remote(unit, error.death)
            os._exit(1)
        await self.attempts.end.remote(unit)

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """End engine and index; Ray Data deletes the object when the pool shuts down, and calls nothing else."""
        # The engine first: its processes end with this one, and what they say then is noise.
        if (generator := getattr(self, "generator", None)) is not None:
            if finalizing():  # vLLM's modules are gone
                generator.abandon()
                return
            generator.shutdown()
        if (retriever := getattr(self, "retriever", None)) is not None:
            retriever.close()
