"""Actors without engines: processes that die of some queries, and the folders that they write to."""

import asyncio
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.run import RunConfig
from pipeline.config.sections import ExecutionConfig, StorageConfig
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.decoding.self_rag import SelfRag
from pipeline.engine.postmortem import Death
from pipeline.output.folder import OutputFolder
from pipeline.output.unit_files import UnitSummary
from pipeline.queries.query_set import inspect_queries
from pipeline.run.actor import SelfRagActor
from pipeline.run.attempts import SharedExclusiveLock
from pipeline.run.telemetry import ActorTelemetry
from pipeline.storage.location import locate
from tests.support.fakes import ScriptedGenerator, generation, word_tokenizer

CONFIG = RunConfig.model_validate(
    {"queries": "q", "output": "o", "model": {"name": "m"}, "decoding": {"mode": "never"}}
)


DEATH = Death("exited with status 1", out_of_memory=False)


def system(failure: Callable[[str], Exception] = KeyError) -> SelfRag:
    """Repeats the question; a question about poison raises."""
    tokenizer = word_tokenizer()

    def script(prompt: str):
        if "poison" in prompt:
            raise failure("script")
        return generation(tokenizer, [prompt.split()[2], "</s>"])

    return SelfRag(ScriptedGenerator(tokenizer, script), ReflectionCritic(tokenizer), Tasks(CONFIG.decoding))


def table(*queries: str | None) -> pa.Table:
    ids = [str(n) for n in range(len(queries))]
    return pa.table({"id": ids, "query": pa.array(queries, pa.string()), "answer": ids})


class LocalHandle:
    """Calls methods of an object as a Ray handle does."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str):
        async def call(*arguments):
            return getattr(self.inner, name)(*arguments)

        return SimpleNamespace(remote=call)


HERE = StorageConfig()


class Folder:
    """A query set of one unit, and the output of its run.

    Args:
        name: of the query set's file; sets of one folder have one output.
    """

    def __init__(self, folder: Path, queries: pa.Table, name: str = "queries") -> None:
        folder.mkdir(exist_ok=True)
        file = folder / f"{name}.parquet"
        pq.write_table(queries, file)
        self.output = OutputFolder(locate(str(folder / "out"), HERE))
        found = inspect_queries(locate(str(file), HERE), CONFIG.columns, ExecutionConfig().unit_rows)
        (self.unit,), self.schema = found.units, found.schema

    async def annotate(self, actor: SelfRagActor) -> UnitSummary | None:
        """What the unit comes to; None where the actor's process died of it, did not begin it or gave it back."""
        actor.output, actor.schema = self.output, self.schema
        try:
            found = await actor(pa.Table.from_pylist([dataclasses.asdict(self.unit)]))
        except Died:
            return None
        (summary,) = map(json.loads, found["summary"].to_pylist())
        return None if summary is None else UnitSummary(**summary)

    async def annotate_at_last(self, *arguments: Any) -> tuple[UnitSummary, int]:
        """What the unit comes to in the last of several processes, and how many died of it before."""
        deaths = 0
        while (found := await self.annotate(actor(*arguments))) is None:
            deaths += 1
        return found, deaths

    def answers(self) -> list[str]:
        return pq.read_table(Path(self.output.location.path) / "data")["answer"].to_pylist()

    def errors(self) -> list[dict[str, Any]]:
        return pq.read_table(Path(self.output.location.path) / "errors").to_pylist()


class Died(BaseException):
    """The process is gone, with everything in it."""


def dies(*_: Any) -> None:
    """Die, in the place of a function."""
    raise Died


@dataclass
class Engine:
    """Counts how often it was warmed, which takes some seconds and may fail."""

    seconds: float = 0.02
    error: Exception | None = None
    begun: int = 0
    warmed: int = 0

    async def warm(self) -> None:
        self.begun += 1
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        self.warmed += 1

    def shutdown(self) -> None: ...

    def abandon(self) -> None: ...


def actor(attempts: LocalHandle, seen: list[str], deadly: str = "poison") -> SelfRagActor:
    """A new process: its engine dies of some query, and so does the process."""
    made = SelfRagActor.__new__(SelfRagActor)
    made.config, made.attempts, made.lock, made.run = CONFIG, attempts, SharedExclusiveLock(), "same"
    made.telemetry, made.carrying = ActorTelemetry("run"), None
    made.system, made.generator = system(), Engine()
    answer = made.system.answer

    async def mortal(query):
        assert made.generator.warmed or made.generator.error or made.generator.seconds > 1
        seen.append(query.query)
        if deadly in query.query:
            raise Died
        return await answer(query)

    object.__setattr__(made.system, "answer", mortal)
    return made
