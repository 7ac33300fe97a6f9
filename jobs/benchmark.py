"""What a row costs, side by side in one run: ours, the shapes of other implementations, and the bare engine.

``python -m jobs.benchmark [--quick] [--json FILE] [--plot FILE]``

Ours is ``jobs.annotate`` itself, Parquet to Parquet; its rate counts from the first unit that an actor takes up to the
finished manifest, since an engine's start is paid once for any number of rows. The shapes and the bare engine are in
``jobs.benchmark_shapes``; they share an engine that is warm, and get their passages for nothing, while each repeat of
ours pays for its first steps. Ratios of one run belong together; absolute rates belong to the machine.
"""

import asyncio
import dataclasses
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import typer
import yaml
from rich.console import Console
from rich.table import Table

from jobs.benchmark_shapes import (
    FLASHRAG_CANDIDATE,
    FLASHRAG_DECISION,
    RELEASED_CANDIDATE,
    BareEngine,
    Outcome,
    Recorder,
    Released,
    direct,
)
from jobs.benchmark_workloads import WORKLOADS, Row, Workload, with_passages
from jobs.demo import demo_index
from pipeline.config import DecodingConfig, ModelConfig, RetrievalConfig, StorageConfig
from pipeline.engine import VllmGenerator, check_engine_arguments, gpu_share, load_tokenizer
from pipeline.profiles import Tasks
from pipeline.prompts import PromptTokenizer
from pipeline.reader import ReflectionCritic
from pipeline.retrieve import IndexRetriever
from pipeline.self_rag import SelfRag
from pipeline.settings import apply_settings
from pipeline.storage import locate
from pipeline.types import Passage, Query

# Passages for each query, and most tokens of a segment: those of the demo.
DECODING = {"passages": 3, "max_tokens": 60}
# Queries of a unit; so many units are in flight that all rows are.
UNIT_ROWS = 8
STAGES = ("seconds", "decide_seconds", "retrieve_seconds", "queue_seconds", "prefill_seconds", "decode_seconds")
CALL = "call_seconds"


@dataclass
class Measured:
    """One variant on one workload.

    Attributes:
        rates: queries/s of each repeat.
        rows: queries of a repeat.
        agreement: shares of queries with our decision and with our answer, where there is something to compare.
        half_full: share of the engine's steps with more than half of its slots taken, where it was counted.
    """

    rows: int
    rates: list[float] = field(default_factory=list)
    agreement: dict[str, float] = field(default_factory=dict)
    half_full: float | None = None

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(self.rates)


Results = dict[str, dict[str, Measured]]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        rows, serial_rows: queries for each variant, and for the one that answers one at a time.
        model: of all variants.
    """

    workloads: Sequence[Workload]
    rows: int
    serial_rows: int
    repeats: int
    model: ModelConfig
    folder: Path


@dataclass(frozen=True)
class Bench:
    """The engine that shapes and ceiling share, with everything around it."""

    generator: VllmGenerator
    tokenizer: PromptTokenizer
    retriever: IndexRetriever

    @classmethod
    def open(cls, model: ModelConfig) -> "Bench":
        """Start the engine and open the demo's index."""
        tokenizer = PromptTokenizer.of(load_tokenizer(model), model.name)
        retriever = IndexRetriever.open(locate(str(demo_index()), StorageConfig()), RetrievalConfig(), gpu_share(model))
        wide = model.model_copy(update={"engine": {**model.engine, "max_logprobs": -1}})
        generator = VllmGenerator.start(wide, ReflectionCritic(tokenizer).watched)
        return cls(generator, tokenizer, retriever)

    def close(self) -> None:
        """End the engine."""
        self.generator.shutdown()
        self.retriever.close()


async def prepare(bench: Bench, workload: Workload, plan: Plan) -> tuple[list[Row], list[list[Any]]]:
    """The workload's rows, and the passages found for each."""
    rows = workload.rows(plan.rows)
    found = await asyncio.gather(*(bench.retriever.retrieve(row["query"], DECODING["passages"]) for row in rows))
    return [with_passages(row, passages, workload) for row, passages in zip(rows, found, strict=True)], list(found)


def queries_of(rows: Sequence[Row]) -> list[Query]:
    """Rows as the decoding takes them."""
    return [
        Query(
            row["id"],
            row["query"],
            choices=tuple(row.get("choices", ())),
            passages=tuple(Passage(**p) for p in row["passages"]) if "passages" in row else None,
        )
        for row in rows
    ]


async def measure_shapes(bench: Bench, workload: Workload, plan: Plan, measured: dict[str, Measured]) -> list[Row]:
    """All variants that run on one engine, one after the other; the rows."""
    rows, found = await prepare(bench, workload, plan)
    queries, config = queries_of(rows), DecodingConfig(**{**DECODING, **workload.decoding})
    if workload.body is not None:
        found = [
            [dataclasses.replace(f, passage=p) for f, p in zip(fs, q.passages or (), strict=True)]
            for fs, q in zip(found, queries, strict=True)
        ]
    engine, critic = BareEngine(bench.generator), ReflectionCritic(bench.tokenizer)
    few = plan.serial_rows
    shapes: dict[str, tuple[int, Callable[[], Awaitable[list[Outcome]]]]] = {}
    if workload.short_form:
        released = Released(engine, bench.tokenizer, config)
        naive = dataclasses.replace(released, decision=RELEASED_CANDIDATE)
        flashrag = Released(engine, bench.tokenizer, config, FLASHRAG_DECISION, FLASHRAG_CANDIDATE, decision_tokens=1)
        shapes = {
            "released": (few, lambda: released.serially(queries[:few], found[:few])),
            "naive": (len(queries), lambda: naive.in_waves(queries, found)),
            "flashrag": (len(queries), lambda: flashrag.in_waves(queries, found)),
        }
    counts = {name: count for name, (count, _) in shapes.items()} | {"direct": len(rows), "ceiling": len(rows)}
    for name, count in counts.items():
        measured.setdefault(name, Measured(count))
    await SelfRag(bench.generator, critic, Tasks(config), bench.retriever).answer(queries[0])  # warms up
    recorder, before = Recorder(bench.generator), bench.generator.load.steps.copy()
    system = SelfRag(recorder, critic, Tasks(config), bench.retriever)
    answers = await timed(engine, measured["direct"], direct(system, queries))
    measured["direct"].half_full = half_full(bench.generator.load.steps - before, bench.generator.load.slots)
    ours = [Outcome(a.retrieved, a.segments[0].text if a.segments else "") for a in answers]
    await timed(engine, measured["ceiling"], engine.replay(recorder.work))
    for name, (_, run) in shapes.items():
        theirs = await timed(engine, measured[name], run())
        measured[name].agreement = agreement(ours, theirs)
    return rows


def half_full(steps: Counter[int], slots: int) -> float:
    """Share of steps in which more than half of the slots were taken.

    Args:
        steps: number of steps by requests that ran in them.
    """
    return sum(count for running, count in steps.items() if 2 * running > slots) / max(1, steps.total())


async def timed(engine: BareEngine, measured: Measured, work: Awaitable[Any]) -> Any:
    """Do something with an empty prefix cache and note its rate."""
    await engine.forget()
    began = time.perf_counter()
    outcome = await work
    measured.rates.append(measured.rows / (time.perf_counter() - began))
    return outcome


def agreement(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> dict[str, float]:
    """Shares of queries with the same decision, and with the same answer too."""
    pairs = list(zip(ours, theirs, strict=False))
    return {
        "decision": statistics.mean(a.retrieved == b.retrieved for a, b in pairs),
        "answer": statistics.mean(a == b for a, b in pairs),
    }


def measure_job(workload: Workload, rows: Sequence[Row], plan: Plan, measured: Measured) -> dict[str, float]:
    """``jobs.annotate`` on the rows; mean seconds of a row by stage, and of the whole call."""
    folder = Path(tempfile.mkdtemp(dir=plan.folder))
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "queries.parquet")
    units = -(-len(rows) // UNIT_ROWS)
    settings = {
        "model": plan.model.model_dump(exclude_none=True),
        "decoding": {**DECODING, **workload.decoding},
        "execution": {"unit_rows": UNIT_ROWS, "units_in_flight": units},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    output = folder / "out"
    options = ["--config", folder / "run.yaml", "--queries", folder / "queries.parquet", "--index", demo_index()]
    command = [sys.executable, "-m", "jobs.annotate", *map(str, options), "--output", str(output), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own command
    if done.returncode != 0:
        raise RuntimeError(f"jobs.annotate ended with status {done.returncode}: {done.stderr[-2000:]}")
    manifest = json.loads((output / "_manifest.json").read_text())
    finished = datetime.fromisoformat(manifest["finished"]).timestamp()
    measured.rates.append(len(rows) / (finished - min(unit["began"] for unit in manifest["units"].values())))
    usage = ds.dataset(output / "data").to_table(columns=["usage"])["usage"].combine_chunks()
    seconds = {name: float(pc.mean(pc.struct_field(usage, name)).as_py()) for name in STAGES}
    return {**seconds, CALL: float(json.loads(done.stdout)["seconds"])}


@dataclass(frozen=True)
class Report:
    """All figures.

    Attributes:
        stages: by workload: mean seconds of a row by stage; ``seconds`` is from its first step to its last, and
            ``call_seconds`` what the whole call took.
    """

    results: Results
    stages: dict[str, dict[str, float]]

    def ratios(self, workload: str) -> dict[str, dict[str, float]]:
        """Ours against each variant: median of the rates, and the least and greatest of all pairs."""
        ours = self.results[workload]["ours"]
        return {
            name: {
                "median": ours.rate / other.rate,
                "min": min(ours.rates) / max(other.rates),
                "max": max(ours.rates) / min(other.rates),
            }
            for name, other in self.results[workload].items()
            if name != "ours"
        }

    def record(self, model: ModelConfig) -> dict[str, Any]:
        """Everything, for a file; ``ratios`` are those of the first workload."""
        first = next(iter(self.results))
        return {
            "ratios": {name: ratio["median"] for name, ratio in self.ratios(first).items()},
            "workloads": {
                name: {
                    "ratios": self.ratios(name),
                    "absolute": {variant: dataclasses.asdict(m) for variant, m in variants.items()},
                    "stages": self.stages[name],
                }
                for name, variants in self.results.items()
            },
            "absolute": {variant: m.rate for variant, m in self.results[first].items()},
            "machine": machine(),
            "model": model.model_dump(mode="json"),
        }

    def table(self, workload: str) -> Table:
        """One workload's variants."""
        table = Table(title=f"{workload} ({self.results[workload]['ours'].rows} queries)")
        for heading in ("variant", "queries/s", "ours / variant", "min … max", "same decision", "same answer"):
            table.add_column(heading, justify="left" if heading == "variant" else "right")
        ratios = self.ratios(workload)
        for name, measured in self.results[workload].items():
            ratio = ratios.get(name)
            shares = [f"{100 * s:.0f} %" for s in measured.agreement.values()] or ["", ""]
            spread = [f"{ratio['median']:.2f}", f"{ratio['min']:.2f} … {ratio['max']:.2f}"] if ratio else ["", ""]
            table.add_row(name, f"{measured.rate:.3f}", *spread, *shares)
        return table


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    from vllm.platforms import current_platform

    device = "CPU" if current_platform.is_cpu() else str(current_platform.get_device_name())
    return {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "device": device}


def plot(report: Report, file: Path) -> None:
    """Rates of all variants by workload."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.9 * len(report.results)), layout="constrained")
    axes = figure.subplots()
    names = ["ceiling", "direct", "ours", "flashrag", "naive", "released"]
    for place, name in enumerate(names):
        there = [(n, m[name].rate) for n, m in enumerate(report.results.values()) if name in m]
        axes.barh([n + 0.13 * (place - 2.5) for n, _ in there], [rate for _, rate in there], height=0.12, label=name)
    axes.set(yticks=range(len(report.results)), yticklabels=list(report.results), xlabel="queries/s", xscale="log")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(file, dpi=120)


async def _shapes(plan: Plan, results: Results) -> dict[str, list[Row]]:
    bench = Bench.open(plan.model)
    try:
        return {w.name: await measure_shapes(bench, w, plan, results[w.name]) for w in plan.workloads}
    finally:
        bench.close()


def execute(plan: Plan) -> Report:
    """Measure everything, one repeat after the other, so that what changes meanwhile changes all variants.

    Engines take turns: one card does not hold two.
    """
    results: Results = {workload.name: {"ours": Measured(plan.rows)} for workload in plan.workloads}
    stages: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(1, plan.repeats + 1):
        rows = asyncio.run(_shapes(plan, results))
        for workload in plan.workloads:
            ours = results[workload.name]["ours"]
            stages[workload.name].append(measure_job(workload, rows[workload.name], plan, ours))
        Console(stderr=True).print(f"repeat {number} of {plan.repeats} measured")
    means = {
        name: {stage: statistics.mean(one[stage] for one in repeats) for stage in (*STAGES, CALL)}
        for name, repeats in stages.items()
    }
    return Report(results, means)


def benchmark(
    quick: Annotated[bool, typer.Option("--quick", help="One workload, few rows, one repeat.")] = False,
    rows: Annotated[int | None, typer.Option(min=4, help="Queries of a workload.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1)] = None,
    only: Annotated[list[str] | None, typer.Option(help="Workloads whose name begins so; all by default.")] = None,
    model: Annotated[str, typer.Option(help="Model: hub name, folder, or 'demo'.")] = "demo",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="An engine argument of all variants, such as dtype=bfloat16.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write a plot here.")] = None,
) -> None:
    """Compare ours with the shapes of other implementations and with the bare engine, side by side."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    chosen = [w for w in WORKLOADS if not only or any(w.name.startswith(name) for name in only)]
    if not chosen:
        raise typer.BadParameter(f"--only: no workload begins so; there are {', '.join(w.name for w in WORKLOADS)}")
    count = rows or (24 if quick else 64)
    engine: dict[str, Any] = {}
    try:
        apply_settings(engine, settings or [])
        chosen_model = ModelConfig(name=model, engine=engine)
        check_engine_arguments(chosen_model)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            workloads=chosen[:1] if quick else chosen,
            rows=count,
            serial_rows=min(count, 4 if quick else 8),
            repeats=repeats or (1 if quick else 3),
            model=chosen_model,
            folder=Path(folder),
        )
        report = execute(plan)
    console = Console(width=None if os.isatty(1) else 140)
    for workload in report.results:
        console.print(report.table(workload))
    if json_file:
        json_file.write_text(json.dumps(report.record(plan.model), indent=2))
    if plot_file:
        plot(report, plot_file)


if __name__ == "__main__":
    typer.run(benchmark)
