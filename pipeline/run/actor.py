"""The Ray Data actor: opens the engine and the index once, then annotates units, with one coroutine per row."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
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
from pipeline.nodes.loss import get_node
from pipeline.output.folder import OutputFolder
from pipeline.output.partial import PartialUnit, list_partial_units
from pipeline.output.unit_files import UnitSummary, Work, split_failed
from pipeline.queries.units import Unit, read_unit
from pipeline.retrieval.retriever import ANY_DIGESTS, IndexRetriever, SearchDigests
from pipeline.run.annotation import OneByOne, Together, annotate_table
from pipeline.run.attempts import BESIDE_OTHERS, PERMIT_WAIT_S, SharedExclusiveLock
from pipeline.run.carrying import CarryingOver
from pipeline.run.earlier_set import EarlierSet
from pipeline.run.finished_rows import KEEP_S, FinishedRows
from pipeline.run.recall import Recall, RecalledError
from pipeline.run.telemetry import ActorTelemetry
from pipeline.storage.location import join_lines, locate

log = logging.getLogger(__name__)

# Seconds between two questions whether the units in flight are to be given back.
WATCH_S = 3.0


class SelfRagActor:
    """Holds a vLLM replica, and an open index or the handles of its shard servers.

    When the engine dies, the actor ends its own process: Ray then starts a new actor and runs the unit again, which it
    would not do after an exception.

    Args:
        config: configuration of the run.
        schema: schema of the query set.
        attempts: Ray handle of ``Attempts``.
        servers: handles of the shard servers of a partitioned index.
        digests: digests that index and reranker must have.
        run: digest of the run's identity.
        access: environment of the driver, and what this machine must read and write; None if nothing is checked.
        stale: digest of the run that answers are carried over from; None if none are.

    Attributes:
        id: random id of this process's actor; a new one after a restart.
        full_at: last time when a request waited for the engine; None if none has.
    """

    id = ""
    full_at: float | None = None

    def __init__(
        self,
        config: RunConfig,
        schema: pa.Schema,
        attempts: Any,
        servers: Sequence[Any] = (),
        digests: SearchDigests = ANY_DIGESTS,
        run: str = "",
        access: Access | None = None,
        stale: str | None = None,
    ) -> None:
        if access is not None:
            access.prepare()
        self.config = config
        self.run, self.stale = run, stale
        self.id = uuid.uuid4().hex
        self.carrying: CarryingOver | None = None
        self.schema = schema
        self.output = OutputFolder(locate(config.output, config.storage))
        self.attempts = attempts
        self.lock = SharedExclusiveLock()
        self.telemetry = ActorTelemetry(config.output)
        # Ray restarts an actor that is killed during its start, and sets no limit; Attempts does.
        ray.get(attempts.begin_start.remote(get_node()))
        self._open(servers, digests)
        ray.get(attempts.end_start.remote())

    def _open(self, servers: Sequence[Any], digests: SearchDigests) -> None:
        prepare_environment()
        config = self.config
        critic = self._load_critic()
        self.retriever: IndexRetriever | None = None
        if config.index is not None and config.decoding.mode != "never":
            folder, share = locate(config.index, config.storage), get_gpu_share(config.model)
            self.retriever = IndexRetriever.open(folder, config.retrieval, share, servers, digests)
            self.retriever.on_search = self.telemetry.record_search
        with lock_gpus():
            self.generator = self._start_engine(critic)
        tasks = Tasks(config.decoding, config.profiles, config.task)
        self.carrying = self._open_earlier()
        self.system: Answering = AnsweredOnce(SelfRag(self.generator, critic, tasks, self.retriever))

    def _open_earlier(self) -> CarryingOver | None:
        config = self.config
        if config.stale is None or self.stale is None or self.retriever is None:
            return None
        output = OutputFolder(locate(config.stale, config.storage))
        return CarryingOver(EarlierSet(output, self.stale, config.columns.id), self.retriever, config)

    def _load_critic(self) -> Critic:
        return load_critic(self.config)

    def _start_engine(self, critic: Critic) -> Any:
        generator = VllmGenerator.start(self.config.model, critic.watched, self.config.execution.engine_stall_s)
        generator.load.on_step = self.record_step
        return generator

    def record_step(self, running: int, waiting: int, ended: int) -> None:
        """Record a step of the engine; see ``EngineLoad.on_step``."""
        self.telemetry.record_step(running, waiting, ended)
        if waiting:
            self.full_at = time.time()

    def _read_full(self, began: float) -> float | None:
        """Return the last time when a request waited for the engine; None if none has since ``began``."""
        return self.full_at if self.full_at is not None and self.full_at > began else None

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Read, annotate and write one unit; reading and writing overlap with the decoding of other units.

        Args:
            batch: a table with a single row, the record of a ``Unit``.

        Returns:
            The ``UnitSummary`` of the unit as JSON, in the column ``summary``; ``null`` if the unit was not begun, or
            was given back.
        """
        (planned,) = batch.to_pylist()
        unit, summary = Unit.from_record(planned), None
        if await self.attempts.may_begin.remote(unit.id, unit.rows):
            self._watch  # noqa: B018  begins with the first unit
            with contextlib.suppress(RecalledError):
                summary = await self._do(unit)
        return pa.table({"summary": [json.dumps(summary and dataclasses.asdict(summary))]})

    async def _do(self, unit: Unit) -> UnitSummary:
        """Annotate a unit and write its files.

        Raises:
            RecalledError: the unit is given back.
        """
        async with self._attempting(unit.id) as way:
            finished = self._collect_rows(unit, way)
            try:
                async with self.recall.limiting():
                    annotated, work = await self._annotate(unit, way, finished)
            except RecalledError:
                await finished.keep()
                raise
            files = split_failed(annotated, self.schema, self.config.decoding.keep_candidates)
            while not await self.attempts.begin_writing.remote(unit.id):  # noqa: ASYNC110  another process decides
                await asyncio.sleep(PERMIT_WAIT_S)
            summary = await asyncio.to_thread(self.output.write_unit, unit.id, *files, self.run, work)
            await finished.discard()
            self.telemetry.count_unit(annotated)
        return summary

    async def _annotate(self, unit: Unit, way: Together | OneByOne, finished: FinishedRows) -> tuple[pa.Table, Work]:
        """Read a unit and annotate the rows that no earlier attempt, of this call or an earlier one, has finished."""
        await asyncio.shield(self._warm)
        began = time.time()
        rows = await asyncio.to_thread(read_unit, unit, self.schema, self.config.storage)
        if await self.attempts.has_partial.remote(unit.id) or unit.id in await asyncio.shield(self._left):
            await finished.load(unit.rows)
        repeated = bool(finished.outcomes)
        with self.telemetry.counting_rows(unit.rows):
            if self.carrying is not None and isinstance(way, Together):  # a search may be what kills the process
                await self.carrying.carry_over(unit.id, rows, finished)
            annotated = await annotate_table(self.system, rows, self.config, way, finished)
        return annotated, Work(began, time.time(), self._read_full(began), "" if repeated else self.id)

    def _collect_rows(self, unit: Unit, way: Together | OneByOne) -> FinishedRows:
        sub_files = PartialUnit(self.output.location, unit.id, self.run, self.config.decoding.keep_candidates)
        every_s = 0 if isinstance(way, OneByOne) else KEEP_S
        return FinishedRows(sub_files, lambda: self.attempts.begin_partial.remote(unit.id), every_s)

    @cached_property
    def recall(self) -> Recall:
        """When the units in flight are given back."""
        return Recall()

    @cached_property
    def _watch(self) -> asyncio.Task[None]:
        """A task that learns when the units in flight are to be given back, since the run or this node ends."""

        async def watch() -> None:
            while True:
                await asyncio.sleep(WATCH_S)
                try:
                    respite = await self.attempts.get_respite.remote(get_node())
                except ray.exceptions.RayActorError:
                    return  # the run is over
                except ray.exceptions.RayError as error:
                    log.warning("whether this node is being drained is not known: %s", join_lines(error))
                    continue
                if respite is not None:
                    self.recall.set(respite)

        return asyncio.create_task(watch())

    @cached_property
    def _left(self) -> asyncio.Task[frozenset[str]]:
        """The units with sub-files when this actor began: those of earlier runs; this run's are known to Attempts."""
        return asyncio.create_task(asyncio.to_thread(list_partial_units, self.output.location))

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

    async def _ask_engine(self) -> None:
        """Ask the engine for one token; an error is an answer, too.

        Raises:
            EngineDeadError: it does not answer within ``execution.row_timeout_s``.
        """
        limit = self.config.execution.row_timeout_s
        try:
            await asyncio.wait_for(self.generator.warm(), limit)
        except EngineDeadError:
            raise
        except TimeoutError:
            reason = f"not even a request for one token was answered within {limit:g} s"
            raise EngineDeadError(Death(reason, out_of_memory=False)) from None
        except Exception as error:  # noqa: BLE001  the rows that timed out are errors already
            log.warning("a request for one token failed: %s: %s", type(error).__name__, error)

    @contextlib.asynccontextmanager
    async def _attempting(self, unit: str) -> AsyncIterator[Together | OneByOne]:
        """Run the body as an attempt at a unit: concurrently with others, or alone after ``BESIDE_OTHERS`` crashes.

        If the engine dies, record its death and end this process. If the unit is given back, the attempt counts for
        nothing.

        Yields:
            The way to annotate its rows: concurrently or, after more crashes, one at a time.
        """
        deaths = await self.attempts.count_deaths.remote(unit)
        place = self.lock.hold_shared() if deaths < BESIDE_OTHERS else self.lock.hold_exclusive()
        try:
            async with place:
                await self.attempts.begin.remote(unit, None, get_node())
                yield self._choose_way(unit, deaths)
        except EngineDeadError as error:
            memory = " (out of memory)" if error.death.out_of_memory else ""
            log.critical("the engine died%s: %s; this actor exits and Ray restarts it", memory, error)
            await self.attempts.record_death.remote(error.death, unit)
            os._exit(1)
        except RecalledError:
            log.info("unit %s is given back", unit)
            await self.attempts.withdraw.remote(unit)
            raise
        await self.attempts.end.remote(unit)

    def _choose_way(self, unit: str, deaths: int) -> Together | OneByOne:
        if deaths > BESIDE_OTHERS:
            return OneByOne(self.attempts, unit, self._ask_engine)
        return Together(self._ask_engine)

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
