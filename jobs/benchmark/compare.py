"""Compare the cost of a row in our job, in other implementations and on the bare engine, side by side in one run.

``python -m jobs.benchmark [--quick] [--json FILE] [--plot FILE]``

The variant *ours* is ``jobs.annotate`` itself, Parquet to Parquet (``jobs.benchmark.job_run``), on its own engine,
which other queries have warmed up. All other variants (``jobs.benchmark.baselines``) share an engine that has answered
the same queries before, and other implementations receive their passages without a search. If the output is scripted,
``jobs.benchmark.scripted_model`` runs in place of ``jobs.annotate``. Compare ratios of the same run only; absolute
rates depend on the machine.

An engine is slow to start, and one GPU does not hold two. The shared engine therefore starts once for all workloads and
repeats, and ends before the engine of *ours* starts, once for each workload. The price: *ours* does not alternate with
the other variants, and its repeats follow one another, so that the ratios include any drift of the machine's speed.
Every repeat has its own queries, the same for all variants; medians are over different queries.
"""

import asyncio
import dataclasses
import os
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jobs.benchmark.baselines import OPTIONAL, Bench, Trial, measure_agreement
from jobs.benchmark.job_run import Job
from jobs.benchmark.results import Measured, Report, Results, compute_load, plot, write_record
from jobs.benchmark.scripted_model import SHAPES, Script, write_shape
from jobs.benchmark.workloads import WORKLOADS, Row, Workload, choose_names
from jobs.common import checking, fail, start_logging
from pipeline.config.loading import apply_settings
from pipeline.config.sections import DecodingConfig, ModelConfig
from pipeline.decoding.types import Passage, Query, RetrievedPassage
from pipeline.engine.arguments import check_engine_arguments

# Maximum tokens of a segment.
MAX_TOKENS = 60
# Tokens of a scripted segment with its critique.
SEGMENT_TOKENS = 40
# Maximum warm-up queries of the job's engine.
WARM_ROWS = 96
# Queries of *released*, which answers one at a time: by default, with --quick, and with --shape.
SERIAL_ROWS, QUICK_SERIAL_ROWS, SHAPE_SERIAL_ROWS = 24, 4, 3
Shape = StrEnum("Shape", {name: name for name in SHAPES})  # type: ignore[misc]


@dataclass(frozen=True)
class ComparisonPlan:
    """The parameters of a comparison.

    Attributes:
        rows, serial_rows: queries of each repeat, and those that *released* answers, which takes one at a time.
        model: model of all variants.
        folder: folder for the files of the jobs.
        passages: passages for each query.
        shaped: whether the model has dummy weights.
        tokens: tokens of a scripted segment.
        without: variants to leave out.
    """

    workloads: Sequence[Workload]
    rows: int
    serial_rows: int
    repeats: int
    model: ModelConfig
    folder: Path
    passages: int = 3
    shaped: bool = False
    tokens: int = SEGMENT_TOKENS
    without: Collection[str] = ()

    def build_decoding(self, workload: Workload) -> DecodingConfig:
        """Return the decoding settings of a workload."""
        longest = max(MAX_TOKENS, self.tokens if self.is_scripted(workload) else 0)
        return DecodingConfig(**{"passages": self.passages, "max_tokens": longest, **workload.decoding})

    def is_scripted(self, workload: Workload) -> bool:
        """Whether the output is scripted: with dummy weights, and in the embedded model's long form.

        The embedded model's own answers end after one segment, without a beam.
        """
        return self.shaped or (self.model.name == "demo" and not workload.short_form)

    def build_script(self, workload: Workload) -> Script | None:
        """Return the script of a workload; None if the model's own output is used."""
        if not self.is_scripted(workload):
            return None
        return Script(workload.questions, self.tokens, self.build_decoding(workload).segments)

    def build_job(self, workload: Workload, prepared: "Prepared") -> Job:
        """Return the job that annotates the workload's rows."""
        folder, decoding = Path(tempfile.mkdtemp(dir=self.folder)), self.build_decoding(workload)
        return Job(folder, self.model, decoding, prepared.warming, prepared.repeats, self.build_script(workload))


@dataclass(frozen=True)
class Prepared:
    """The queries of a workload, each of which occurs once.

    Attributes:
        warming: rows that warm up the job's engine.
        repeats: rows of each repeat.
        found: passages of each row of each repeat, for the baselines that receive them.
    """

    warming: list[Row]
    repeats: list[list[Row]]
    found: list[list[list[RetrievedPassage]]]


async def prepare_inputs(bench: Bench, workload: Workload, plan: ComparisonPlan) -> Prepared:
    """Retrieve the passages of all queries, and split the queries into warm-up and repeats."""
    warm = min(plan.rows, WARM_ROWS)
    rows = workload.build_rows(warm + plan.repeats * plan.rows)
    searched = await asyncio.gather(*(bench.retriever.retrieve(row["query"], plan.passages) for row in rows))
    found = [workload.replace_bodies(retrieved.passages) for retrieved in searched]
    if workload.body is not None:
        rows = [_add_passages(row, passages) for row, passages in zip(rows, found, strict=True)]
    parts = [slice(n, n + plan.rows) for n in range(warm, len(rows), plan.rows)]
    repeats = [rows[part] for part in parts]
    return Prepared(rows[:warm], repeats, [found[part] for part in parts])


def _add_passages(row: Row, found: Sequence[RetrievedPassage]) -> Row:
    return {**row, "passages": [vars(one.passage) for one in found]}


def to_queries(rows: Sequence[Row]) -> list[Query]:
    """Convert rows to the queries that the decoding takes."""
    return [_to_query(row) for row in rows]


def _to_query(row: Row) -> Query:
    passages = None
    if "passages" in row:
        passages = tuple(Passage(**passage) for passage in row["passages"])
    return Query(row["id"], row["query"], choices=tuple(row.get("choices", ())), passages=passages)


@dataclass(frozen=True)
class Measurement:
    """A benchmark in progress.

    Attributes:
        report: report to which the figures of each variant are added.
        file: JSON file to which the report is written after each variant.
    """

    plan: ComparisonPlan
    report: Report
    file: Path | None = None

    def run(self) -> Report:
        """Measure the variants on the shared engine and then the jobs, since one GPU does not hold two engines."""
        prepared = asyncio.run(self.measure_shared())
        for workload in self.plan.workloads:
            rates, self.report.stages[workload.name] = self.plan.build_job(workload, prepared[workload.name]).run()
            self.add_rates(workload, "ours", *rates)
        return self.write_report(finished=True)

    async def measure_shared(self) -> dict[str, Prepared]:
        """Measure all variants but *ours*; return the queries of each workload by its name."""
        bench = Bench.open(self.plan.model)
        try:
            self.report.memory.update(bench.memory)
            prepared = {w.name: await prepare_inputs(bench, w, self.plan) for w in self.plan.workloads}
            for number in range(self.plan.repeats):
                for workload in self.plan.workloads:
                    await self.measure_repeat(bench, workload, number, prepared[workload.name])
        finally:
            bench.close()
        return prepared

    async def measure_repeat(self, bench: Bench, workload: Workload, number: int, prepared: Prepared) -> None:
        """Measure one repeat of a workload on the shared engine, one variant after the other."""
        plan, queries = self.plan, to_queries(prepared.repeats[number])
        trial = await Trial.begin(bench, plan.build_decoding(workload), plan.build_script(workload), queries)
        self.report.tokens[workload.name] = trial.count_tokens()
        own = trial.list_own_variants(backwards=number % 2 == 1)
        baselines = trial.list_baselines(prepared.found[number], plan.serial_rows) if workload.short_form else {}
        runs = {**own, **baselines}
        for name in [name for name in runs if name not in plan.without]:
            rows, run = runs[name]
            measured = self.report.results[workload.name].setdefault(name, Measured(rows))
            rate, outcome = await trial.time_variant(rows, run)
            if name == "direct":
                measured.load = compute_load(outcome, bench.generator.load.slots)
            elif name in baselines:
                measured.agreement = measure_agreement(trial.ours, outcome)
            self.add_rates(workload, name, rate)

    def add_rates(self, workload: Workload, name: str, *rates: float) -> None:
        """Add a variant's rates to the report, print them and write the report."""
        self.report.results[workload.name][name].rates.extend(rates)
        told = ", ".join(f"{rate:.3f}" for rate in rates)
        Console(stderr=True, soft_wrap=True).print(f"{workload.name}: {name} {told} queries/s")
        self.write_report()

    def write_report(self, finished: bool = False) -> Report:
        """Write the report to the file, if there is one, and return it."""
        report = dataclasses.replace(self.report, finished=finished)
        if self.file:
            write_record(report.to_record(self.plan.model), self.file)
        return report


def run_comparison(plan: ComparisonPlan, file: Path | None) -> Report:
    """Run a comparison; write the report to ``file``, if given, after each variant and at the end."""
    results: Results = {workload.name: {"ours": Measured(plan.rows)} for workload in plan.workloads}
    scripted = [workload.name for workload in plan.workloads if plan.is_scripted(workload)]
    return Measurement(plan, Report(results, scripted=scripted), file).run()


SerialRows = Annotated[
    int | None,
    typer.Option(min=1, help=f"Queries for 'released', which answers one at a time; {SHAPE_SERIAL_ROWS} with --shape."),
]
LeftOut = Annotated[
    list[str] | None,
    typer.Option(help=f"A variant to skip: {', '.join(OPTIONAL)}; 'ours' and 'direct' are always measured."),
]


def benchmark(
    quick: Annotated[bool, typer.Option("--quick", help="One workload, few rows, one repeat.")] = False,
    rows: Annotated[int | None, typer.Option(min=4, help="Queries per workload and repeat.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1)] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Start of the names of the workloads to run; all by default.")
    ] = None,
    without: LeftOut = None,
    model: Annotated[str | None, typer.Option(help="Model: hub name, folder, or 'demo', which is the default.")] = None,
    shape: Annotated[Shape | None, typer.Option(help="Model size, with dummy weights and scripted output.")] = None,
    tokens: Annotated[
        int, typer.Option(min=5, help="Tokens of a scripted segment, critique included.")
    ] = SEGMENT_TOKENS,
    passages: Annotated[int, typer.Option(min=1, help="Passages per query.")] = 3,
    serial_rows: SerialRows = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="An engine argument for all variants, such as dtype=bfloat16.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file after each variant.")
    ] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write a plot to this file.")] = None,
) -> None:
    """Compare our job with other implementations and with the bare engine, side by side in one run."""
    start_logging()
    if shape and model:
        fail("--shape replaces the model and cannot be combined with --model", 2)
    count = rows or (24 if quick else 64)
    serial = serial_rows or _choose_serial_rows(shape, quick)
    with tempfile.TemporaryDirectory() as folder:
        with checking():
            names = choose_names(only, [workload.name for workload in WORKLOADS])
            chosen = names[:1] if quick else names
            plan = ComparisonPlan(
                workloads=[workload for workload in WORKLOADS if workload.name in chosen],
                rows=count,
                serial_rows=min(count, serial),
                repeats=repeats or (1 if quick else 3),
                model=build_model_config(shape, model or "demo", settings or [], Path(folder)),
                folder=Path(folder),
                passages=passages,
                shaped=shape is not None,
                tokens=tokens,
                without=check_left_out(without or []),
            )
        print_tables(run_comparison(plan, json_file), plot_file)


def _choose_serial_rows(shape: Shape | None, quick: bool) -> int:
    if shape:
        return SHAPE_SERIAL_ROWS
    return QUICK_SERIAL_ROWS if quick else SERIAL_ROWS


def check_left_out(names: Sequence[str]) -> frozenset[str]:
    """Check and return the variants to leave out.

    Raises:
        ValueError: one of them is not a variant, or is always measured.
    """
    for name in names:
        if name not in OPTIONAL:
            raise ValueError(f"--without {name!r}: expected one of {', '.join(OPTIONAL)}")
    return frozenset(names)


def build_model_config(shape: Shape | None, name: str, settings: Sequence[str], folder: Path) -> ModelConfig:
    """Return the model of all variants: a shape with dummy weights, or the model of that name.

    Raises:
        ValueError: a setting is not an engine argument.
    """
    engine: dict[str, Any] = {"load_format": "dummy"} if shape else {}
    apply_settings(engine, settings)
    model = ModelConfig(name=str(write_shape(shape.value, folder / shape.value)) if shape else name, engine=engine)
    check_engine_arguments(model)
    return model


def print_tables(report: Report, plot_file: Path | None) -> None:
    """Print all tables, and draw the plot if a file for it is given."""
    console = Console(width=None if os.isatty(1) else 140)
    for workload in report.results:
        console.print(report.build_table(workload))
    console.print(report.build_times_table())
    if plot_file:
        plot(report, plot_file)
