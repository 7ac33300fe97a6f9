"""The Ray Data actor: opens the engine and the index once, then annotates units, with one coroutine per row."""

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
from pipeline.engine.arguments import get_gpu_share
from pipeline.engine.models import load_critic
from pipeline.engine.postmortem import Death
from pipeline.engine.vllm import EngineDeadError, VllmGenerator, prepare_environment
from pipeline.gpus import lock_gpus
from pipeline.nodes.access import Access
from pipeline.output.folder import OutputFolder
from pipeline.output.schema import ANSWER_FIELDS, CANDIDATE_FIELDS, ERROR_FIELDS, rename_reserved_columns, to_answer_row
from pipeline.queries.schema import Row, read_rows, to_query
from pipeline.queries.units import Unit, read_unit
from pipeline.retrieval.retriever import IndexRetriever
from pipeline.retrieval.shard_servers import IndexLostError
from pipeline.run.attempts import (
    BESIDE_OTHERS,
    ROW_DEATHS,
    OutOfMemoryError,
    ProcessDiedError,
    SharedExclusiveLock,
)
from pipeline.run.telemetry import ActorTelemetry
from pipeline.storage.location import locate

log = logging.getLogger(__name__)


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
class OneByOne:
    """Annotates the rows of a unit one at a time, to find a row that kills its process.

    Args:
        attempts: Ray handle of ``Attempts``.
        unit: id of the unit, under which attempts at its rows are counted.
    """

    attempts: Any
    unit: str

    async def annotate(self, system: Answering, row: Row, config: RunConfig, number: int) -> dict[str, Any]:
        """Annotate one row; after ``ROW_DEATHS`` crashes of its process, return its error columns instead."""
        attempts, unit = self.attempts, self.unit
        deaths = await attempts.count_deaths.remote(unit, number)
        if deaths >= ROW_DEATHS:
            return build_error_columns(
                explain_deaths(deaths, await attempts.list_engine_deaths.remote(unit, number)), deaths
            )
        await attempts.begin.remote(unit, number)
        try:
            outcome = await annotate_row(system, row, config)
        except EngineDeadError as error:
            await attempts.record_death.remote(error.death, unit, number)
            raise
        await attempts.end.remote(unit, number)
        return outcome


async def annotate_table(
    system: Answering, inputs: pa.Table, config: RunConfig, one_by_one: OneByOne | None = None
) -> pa.Table:
    """Annotate the rows of a unit; returns one row for each input row, in the same order.

    Args:
        one_by_one: annotates the rows one at a time; without it they run concurrently.
    """
    read = [name for name in vars(config.columns).values() if name in inputs.schema.names]
    rows = read_rows(inputs.select(read))
    if one_by_one is None:
        outcomes = await asyncio.gather(*(annotate_row(system, row, config) for row in rows))
    else:
        outcomes = [await one_by_one.annotate(system, row, config, n) for n, row in enumerate(rows)]
    schema = build_annotated_schema(inputs.schema, config.decoding.keep_candidates)
    passed = inputs.rename_columns(rename_reserved_columns(inputs.schema).names)
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


class SelfRagActor:
    """Holds a vLLM replica, and an open index or the handles of its shard servers.

    When the engine dies, the actor ends its own process: Ray then starts a new actor and runs the unit again, which it
    would not do after an exception.

    Args:
        config: configuration of the run.
        schema: schema of the query set.
        attempts: Ray handle of ``Attempts``.
        servers: handles of the shard servers of a partitioned index.
        index_digest: digest that the index must have.
        access: environment of the driver, and what this machine must read and write; None if nothing is checked.
    """

    def __init__(
        self,
        config: RunConfig,
        schema: pa.Schema,
        attempts: Any,
        servers: Sequence[Any] = (),
        index_digest: str | None = None,
        access: Access | None = None,
    ) -> None:
        if access is not None:
            access.prepare()
        self.config = config
        self.schema = schema
        self.output = OutputFolder(locate(config.output, config.storage))
        self.attempts = attempts
        self.lock = SharedExclusiveLock()
        self.telemetry = ActorTelemetry(config.output)
        # Ray restarts an actor that is killed during its start, and sets no limit; Attempts does.
        ray.get(attempts.begin_start.remote())
        self._open(servers, index_digest)
        ray.get(attempts.end_start.remote())

    def _open(self, servers: Sequence[Any], index_digest: str | None) -> None:
        prepare_environment()
        config = self.config
        critic = self._load_critic()
        self.retriever: IndexRetriever | None = None
        if config.index is not None and config.decoding.mode != "never":
            folder, share = locate(config.index, config.storage), get_gpu_share(config.model)
            self.retriever = IndexRetriever.open(folder, config.retrieval, share, servers, index_digest)
            self.retriever.on_search = self.telemetry.record_search
        with lock_gpus():
            self.generator = self._start_engine(critic)
        tasks = Tasks(config.decoding, config.profiles, config.task)
        self.system: Answering = AnsweredOnce(SelfRag(self.generator, critic, tasks, self.retriever))

    def _load_critic(self) -> Critic:
        return load_critic(self.config)

    def _start_engine(self, critic: Critic) -> Any:
        generator = VllmGenerator.start(self.config.model, critic.watched)
        generator.load.on_step = self.telemetry.record_step
        return generator

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Read, annotate and write one unit; reading and writing overlap with the decoding of other units.

        Args:
            batch: a table with a single row, the record of a ``Unit``.

        Returns:
            The ``UnitSummary`` of the unit as JSON, in the column ``summary``.
        """
        (planned,) = batch.to_pylist()
        unit, config = Unit.from_record(planned), self.config
        async with self._attempting(unit.id) as one_by_one:
            await asyncio.shield(self._warm)
            began = time.time()
            rows = await asyncio.to_thread(read_unit, unit, self.schema, config.storage)
            with self.telemetry.counting_rows(unit.rows):
                annotated = await annotate_table(self.system, rows, config, one_by_one)
            times, keep_candidates = (began, time.time()), config.decoding.keep_candidates
            await self.attempts.begin_writing.remote(unit.id)
            summary = await asyncio.to_thread(
                self.output.write_unit, unit.id, annotated, rows.schema, keep_candidates, times
            )
        self.telemetry.count_unit(annotated)
        return pa.table({"summary": [json.dumps(dataclasses.asdict(summary))]})

    @cached_property
    def _warm(self) -> asyncio.Task[None]:
        """The engine's warm-up request, which all units await, for at most ``execution.row_timeout_s``."""

        async def warm() -> None:
            try:
                await asyncio.wait_for(self.generator.warm(), self.config.execution.row_timeout_s)
            except EngineDeadError:
                raise
            except Exception as error:  # noqa: BLE001  rows with the same error go to errors/
                log.warning("the engine's first request failed: %s: %s", type(error).__name__, error)

        return asyncio.create_task(warm())

    @asynccontextmanager
    async def _attempting(self, unit: str) -> AsyncIterator[OneByOne | None]:
        """Run the body as an attempt at a unit: concurrently with others, or alone after ``BESIDE_OTHERS`` crashes.

        If the engine dies, record its death and end this process.

        Yields:
            After more crashes, an object that annotates the rows one at a time; None if they may run concurrently.
        """
        deaths = await self.attempts.count_deaths.remote(unit)
        place = self.lock.hold_shared() if deaths < BESIDE_OTHERS else self.lock.hold_exclusive()
        try:
            async with place:
                await self.attempts.begin.remote(unit)
                yield OneByOne(self.attempts, unit) if deaths > BESIDE_OTHERS else None
        except EngineDeadError as error:
            memory = " (out of memory)" if error.death.out_of_memory else ""
            log.critical("the engine died%s: %s; this actor exits and Ray restarts it", memory, error)
            await self.attempts.record_death.remote(error.death, unit)
            os._exit(1)
        await self.attempts.end.remote(unit)

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """Shut down the engine and close the index: Ray Data deletes the object on shutdown and calls no other hook."""
        # Engine first: its processes end with this one, and would then log irrelevant errors.
        if (generator := getattr(self, "generator", None)) is not None:
            if finalizing():  # vLLM's modules have been unloaded
                generator.abandon()
                return
            generator.shutdown()
        if (retriever := getattr(self, "retriever", None)) is not None:
            retriever.close()
