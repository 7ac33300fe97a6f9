"""Measure what the driver of a run needs as its query set grows.

``python -m jobs.benchmark.growth --rows 1000000 [--hollow-answers [--hollow-queries]] [--json FILE]``

Everything but decoding is real: the query set, its inspection, Ray Data, the unit files, the count at the end, the
report. The actors give every row the same answer. For sets that would take too long or do not fit on the disk, unit
files are written with a few rows each, and query files too; the driver, which reads neither, takes their summaries and
their inspection at their word.
"""

import dataclasses
import json
import os
import resource
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from jobs.common import fail, start_logging
from jobs.shell import run
from pipeline.config.run import RunConfig
from pipeline.config.sections import Columns, DecodingConfig, ExecutionConfig, ModelConfig
from pipeline.output.folder import OutputFolder
from pipeline.output.unit_files import UnitSummary, Work, split_failed, summarize_unit
from pipeline.queries.kept_inspection import keep_inspection
from pipeline.queries.query_set import inspect_queries
from pipeline.queries.units import Unit, read_unit
from pipeline.report.write import write_report
from pipeline.retrieval.retriever import SearchDigests
from pipeline.run.actor import SelfRagActor
from pipeline.run.annotation import build_annotated_schema
from pipeline.run.driver import allot_resources, run_plan
from pipeline.run.plan import check_run
from pipeline.storage.location import Location, locate
from pipeline.storage.parquet import encode_parquet

# Environment variable of the actors: set if they read no queries and write a few rows of each unit.
HOLLOW = "SELFRAG_BENCHMARK_HOLLOW"
# Rows of a hollow file.
FEW_ROWS = 10
# pyarrow's default: the largest row groups that are common.
FILE_ROWS = 1 << 20
# One unit in so many is deleted and annotated again.
LOST = 10
ANSWER = {
    "answer": "Paris",
    "raw_output": "[No Retrieval]Paris[Utility:5]",
    "retrieved": False,
    "retrieve_probability": 0.1,
    "finish_reason": "stop",
    "segments": [{"text": "Paris", "score": 1.0, "is_use": 1.0}],
    "passages": [],
    "usage": {"prompt_tokens": 40, "generated_tokens": 4, "engine_requests": 1, "seconds": 0.5},
}


class RepeatingActor(SelfRagActor):
    """An actor that gives every row the same answer, without an engine."""

    def _open(self, servers: Sequence[Any], digests: SearchDigests) -> None:
        pass

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """See :meth:`pipeline.run.actor.SelfRagActor.__call__`."""
        (planned,) = batch.to_pylist()
        unit = Unit.from_record(planned)
        summary = write_few_rows(self, unit) if os.environ.get(HOLLOW) else write_all_rows(self, unit)
        return pa.table({"summary": [json.dumps(dataclasses.asdict(summary))]})


def write_all_rows(actor: RepeatingActor, unit: Unit) -> UnitSummary:
    """Read the rows of a unit, answer them and write its file."""
    rows = read_unit(unit, actor.schema, actor.config.storage)
    now = time.time()
    return actor.output.write_unit(unit.id, *answer_rows(rows), actor.run, Work(now, now))


def write_few_rows(actor: RepeatingActor, unit: Unit) -> UnitSummary:
    """Write a file of a few rows, whose summary counts those of the unit."""
    answers, errors = answer_rows(make_rows(0, FEW_ROWS))
    found, now = summarize_unit(unit.id, answers, errors), time.time()
    written = dataclasses.replace(found, began=now, ended=now, run=actor.run, attempt=uuid.uuid4().hex)
    summary = dataclasses.replace(written, rows=unit.rows)
    content = encode_parquet(answers.replace_schema_metadata(summary.to_metadata()))
    actor.output.locate_unit_file("data", unit.id).write(content)
    return dataclasses.replace(summary, data_bytes=len(content))


def answer_rows(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Give every row the same answer; returns the rows of the data file, and those of the errors file."""
    schema = build_annotated_schema(rows.schema, keep_candidates=False)
    answers = pa.Table.from_pylist([ANSWER], schema).take(np.zeros(rows.num_rows, np.int32))
    for number, name in enumerate(rows.column_names):
        answers = answers.set_column(number, schema.field(name), rows[name])
    return split_failed(answers, rows.schema, keep_candidates=False)


@dataclass(frozen=True)
class Phase:
    """The duration of a phase in seconds, and the driver's peak memory up to its end, in MB."""

    name: str
    seconds: float
    driver_mb: float


@dataclass(frozen=True)
class Growth:
    """The figures of one query set."""

    rows: int
    units: int
    output_files: int
    phases: tuple[Phase, ...]


def make_rows(first: int, rows: int) -> pa.Table:
    """Make short questions with different ids."""
    numbers = pa.array(np.arange(first, first + rows)).cast(pa.string())
    texts = pc.binary_join_element_wise("What is the answer to question ", numbers, "?", "")
    return pa.table({"id": pc.binary_join_element_wise("question-", numbers, ""), "query": texts})


def write_questions(folder: Path, rows: int, file_rows: int) -> None:
    """Write a query set with ``file_rows`` rows for each ``FILE_ROWS`` of its rows."""
    folder.mkdir()
    for number, first in enumerate(range(0, rows, FILE_ROWS)):
        pq.write_table(make_rows(first, min(file_rows, rows - first)), folder / f"part-{number:05d}.parquet")


def pretend_inspection(queries: Location, output: Location, rows: int) -> None:
    """Keep an inspection that gives every file of a query set ``FILE_ROWS`` rows."""
    found = inspect_queries(queries, Columns(), None).inspected
    left = [min(FILE_ROWS, rows - first) for first in range(0, rows, FILE_ROWS)]
    keep_inspection(
        output,
        Columns(),
        [dataclasses.replace(file, groups=(count,)) for file, count in zip(found, left, strict=True)],
    )


class Clock:
    """Collects phases."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time the body."""
        began = time.monotonic()
        yield
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        self.phases.append(Phase(name, time.monotonic() - began, memory))


def measure_growth(rows: int, folder: Path, hollow_answers: bool = False, hollow_queries: bool = False) -> Growth:
    """Plan, run, resume and repeat a run over so many rows, and write its report."""
    write_questions(folder / "queries", rows, FEW_ROWS if hollow_queries else FILE_ROWS)
    config = RunConfig(
        queries=str(folder / "queries"),
        output=str(folder / "out"),
        model=ModelConfig(name="demo"),
        decoding=DecodingConfig(mode="never"),
        execution=ExecutionConfig(actors=os.cpu_count() or 1, cpus_per_actor=1, gpus_per_actor=0),
    )
    output = OutputFolder(locate(config.output, config.storage))
    os.environ[HOLLOW] = "1" if hollow_answers else ""
    if hollow_queries:
        pretend_inspection(locate(config.queries, config.storage), output.location, rows)
    clock = Clock()
    with clock.time("plan"):
        plan = check_run(config)
    resources = allot_resources(plan)
    with clock.time("run, count, report"):
        run_plan(plan, resources, RepeatingActor)
    (folder / "out" / "_SUCCESS").unlink()
    for unit in plan.queries.units[::LOST]:
        output.withdraw(unit.id)
    with clock.time("plan again"):
        plan = check_run(config)
    with clock.time("resume, a tenth left"):
        run_plan(plan, resources, RepeatingActor)
    with clock.time("repeat when finished"):
        assert check_run(config).finished
    with clock.time("report"):
        write_report(output.location)
    files = sum(file.is_file() for file in (folder / "out").rglob("*"))
    return Growth(rows, len(plan.queries.units), files, tuple(clock.phases))


def benchmark_growth(
    rows: Annotated[int, typer.Option(help="Rows of the query set.", min=1)] = 1_000_000,
    hollow_answers: Annotated[bool, typer.Option(help="Write unit files with a few rows each.")] = False,
    hollow_queries: Annotated[
        bool, typer.Option(help="Write query files with a few rows each; needs --hollow-answers.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this JSON file.")] = None,
) -> None:
    """Measure what the driver needs to plan, run, resume and report a query set of so many rows."""
    start_logging()
    if hollow_queries and not hollow_answers:
        fail("--hollow-queries needs --hollow-answers: actors cannot read rows that are not there", 2)
    folder = Path(tempfile.mkdtemp(prefix="growth-"))
    try:
        growth = measure_growth(rows, folder, hollow_answers, hollow_queries)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = Table(title=f"{growth.rows:,} rows\n{growth.units:,} units, {growth.output_files:,} files in the output")
    for heading in ("phase", "seconds", "driver, MB"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for phase in growth.phases:
        table.add_row(phase.name, f"{phase.seconds:.1f}", f"{phase.driver_mb:.0f}")
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps(dataclasses.asdict(growth), indent=2))


if __name__ == "__main__":
    run(benchmark_growth)
