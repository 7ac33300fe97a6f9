"""Measure how a run scales with its rows and its actors, with an engine that only waits.

``python -m jobs.benchmark.scaling [--rows 1000 --rows 10000 …] [--actors 1 --actors 8 …] [--json FILE]``

Everything but the engine is real: Ray Data, actors, tokenizer, decoding, Parquet. Without waiting, the time of a row is
the overhead of our own code. With a fixed wait and more and more actors, the throughput shows whether the actors slow
one another down.
"""

import asyncio
import dataclasses
import json
import math
import os
import resource
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from jobs.benchmark.scripted_model import WRITTEN, Prompter, Script
from jobs.common import start_logging
from jobs.shell import run
from pipeline.config.run import RunConfig
from pipeline.config.sections import DecodingConfig, ExecutionConfig, ModelConfig
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.decoding.self_rag import SelfRag
from pipeline.decoding.types import Generation
from pipeline.engine.models import load_tokenizer
from pipeline.output.unit_log import read_units
from pipeline.retrieval.retriever import SearchDigests
from pipeline.run.actor import SelfRagActor
from pipeline.run.driver import allot_resources, run_plan
from pipeline.run.plan import check_run

# Environment variable of the actors: seconds that the waiting engine takes for a request.
LATENCY = "SELFRAG_BENCHMARK_LATENCY"
PASSAGES = [{"id": f"p{n}", "title": "A title", "text": f"A passage of some words, number {n}."} for n in range(3)]
# When numbers of actors are compared: rows for each actor, and rows of a unit.
ROWS_PER_ACTOR, UNIT_ROWS = 240, 8
FIVE_TOKENS = Script(tokens=5)


@dataclass(frozen=True)
class WaitingEngine:
    """An engine that retrieves for every query and generates five tokens for each passage, each after a fixed time."""

    prompter: Prompter
    seconds: float
    max_model_len: int = 2048

    async def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        stops: Sequence[int],  # noqa: ARG002  the script sets the length
    ) -> Generation:
        """See :meth:`pipeline.decoding.protocols.Generator.generate`."""
        await asyncio.sleep(self.seconds)
        length = self.prompter.script.get_length(max_tokens)
        blank = Generation((self.prompter.digits[0],) * length, np.full(length, WRITTEN), np.empty(0), len(prompt))
        return self.prompter.apply_script(blank, prompt)

    async def warm(self) -> None:
        """Do nothing: there is nothing to compile."""

    def shutdown(self) -> None:
        """Do nothing: there is no engine to shut down."""

    def abandon(self) -> None:
        """Do nothing: there is no engine to abandon."""


class WaitingActor(SelfRagActor):
    """An actor with a waiting engine, and without an index."""

    def _open(self, servers: Sequence[Any], digests: SearchDigests) -> None:  # noqa: ARG002  there is no index
        config = self.config
        tokenizer = PromptTokenizer.of(load_tokenizer(config.model), config.model.name)
        self.retriever = None
        engine = WaitingEngine(Prompter(tokenizer, FIVE_TOKENS), float(os.environ.get(LATENCY, "0")))
        self.generator: Any = engine
        self.system = SelfRag(engine, ReflectionCritic(tokenizer), Tasks(config.decoding), None)


@dataclass(frozen=True)
class Run:
    """The figures of one run.

    Attributes:
        seconds: seconds from the start of the first unit to the end of the last one.
        call_seconds: seconds of the whole call.
        driver_mb: peak memory of this process so far, in MB.
        steady: rows/s while all actors are busy: from the time at which all have their first units to the start of the
            last unit.
    """

    rows: int
    actors: int
    seconds: float
    call_seconds: float
    driver_mb: float
    steady: float

    @property
    def rate(self) -> float:
        """Throughput of the whole run, in rows/s."""
        return self.rows / self.seconds


def write_queries(file: Path, rows: int) -> None:
    """Write questions with three given passages each."""
    given = pa.list_(pa.struct([("id", pa.string()), ("title", pa.string()), ("text", pa.string())]))
    names = [f"q{n}" for n in range(rows)]
    texts = [f"What is the answer to question number {n}?" for n in range(rows)]
    table = pa.table({"id": names, "query": texts, "passages": pa.array([PASSAGES] * rows, given)})
    pq.write_table(table, file, row_group_size=10_000)


def compute_steady_rate(begins: Sequence[float], slots: int) -> float:
    """Return the rate at which units start, in units/s, once all slots are in use.

    Args:
        begins: start times of all units, in seconds.
        slots: maximum number of units in progress at once; the result is NaN if there are no more units than this.
    """
    ordered = sorted(begins)
    first, last = ordered[min(slots, len(ordered)) - 1], ordered[-1]
    return sum(first < begin <= last for begin in ordered) / (last - first) if last > first else math.nan


def time_run(rows: int, execution: ExecutionConfig, folder: Path) -> Run:
    """Annotate a query set of so many rows and return the figures of the run."""
    write_queries(folder / "queries.parquet", rows)
    config = RunConfig(
        queries=str(folder / "queries.parquet"),
        output=str(folder / "out"),
        model=ModelConfig(name="demo"),
        decoding=DecodingConfig(passages=len(PASSAGES)),
        execution=execution,
    )
    plan = check_run(config, overwrite=True)
    summary = run_plan(plan, allot_resources(plan), WaitingActor)
    units = read_units(plan.output.location).values()
    begins = [unit.began or 0.0 for unit in units]
    seconds = max(unit.ended or 0.0 for unit in units) - min(begins)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    steady = compute_steady_rate(begins, execution.actors * execution.units_in_flight)
    return Run(rows, execution.actors, seconds, summary.seconds, memory, steady * max(unit.rows for unit in units))


def build_scaling_tables(sizes: Sequence[Run], pools: Sequence[Run], latency: float) -> list[Table]:
    """Return a table of the runs by rows, and one of the runs by actors."""
    by_rows = Table(title="One actor, engine without latency")
    for heading in ("rows", "ms/row", "rows/s", "whole call, s", "driver, MB"):
        by_rows.add_column(heading, justify="right")
    for one in sizes:
        cells = [f"{1000 / one.rate:.2f}", f"{one.rate:.0f}", f"{one.call_seconds:.1f}", f"{one.driver_mb:.0f}"]
        by_rows.add_row(f"{one.rows:,}", *cells)
    by_actors = Table(title=f"Engine latency of {latency:g} s per request, {ROWS_PER_ACTOR} rows per actor")
    for heading in ("actors", "rows/s", "efficiency"):
        by_actors.add_column(heading, justify="right")
    for one in pools:
        share = one.steady / one.actors / (pools[0].steady / pools[0].actors)
        by_actors.add_row(str(one.actors), f"{one.steady:.2f}", f"{share:.3f}")
    return [by_rows, by_actors]


def benchmark_scaling(
    rows: Annotated[list[int] | None, typer.Option(help="Rows of a run with one actor; repeatable.")] = None,
    actors: Annotated[list[int] | None, typer.Option(help="Number of actors of a run; repeatable.")] = None,
    latency: Annotated[
        float, typer.Option(help="Seconds per engine request when numbers of actors are compared.")
    ] = 2.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this JSON file.")] = None,
) -> None:
    """Measure how a run scales with its rows and its actors."""
    start_logging()
    import ray

    pools_wanted = actors or [1, 2, 4, 8]
    pools = []
    with tempfile.TemporaryDirectory() as name:
        sizes = [time_run(size, ExecutionConfig(), Path(name)) for size in rows or [1_000, 10_000, 100_000]]
        ray.shutdown()
        os.environ[LATENCY] = str(latency)
        for pool in pools_wanted:
            share = (os.cpu_count() or 1) / max(pools_wanted)
            execution = ExecutionConfig(
                actors=pool, cpus_per_actor=share, gpus_per_actor=0, unit_rows=UNIT_ROWS, units_in_flight=2
            )
            pools.append(time_run(ROWS_PER_ACTOR * pool, execution, Path(name)))
    for table in build_scaling_tables(sizes, pools, latency):
        Console().print(table)
    if json_file:
        json_file.write_text(json.dumps([dataclasses.asdict(one) for one in [*sizes, *pools]], indent=2))


if __name__ == "__main__":
    run(benchmark_scaling)
