"""What a row costs, side by side in one run: ours, the shapes of other implementations, and the bare engine.

``python -m jobs.benchmark [--quick] [--json FILE] [--plot FILE]``

Ours is ``jobs.annotate`` itself, Parquet to Parquet (``jobs.benchmark_job``), on an engine of its own that has answered
other queries before, since its start and its slow first rows are paid once for any number of rows. The shapes and the
bare engine are in ``jobs.benchmark_shapes``; they share an engine that has answered the same queries before, and the
shapes get their passages for nothing. Where a script says what is written, ours is ``jobs.benchmark_script``. Ratios of
one run belong together; absolute rates belong to the machine.
"""

import asyncio
import dataclasses
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jobs.benchmark_job import Job
from jobs.benchmark_report import CALL, FILES, STAGES, Measured, Report, Results, Step, load_of, plot
from jobs.benchmark_script import SHAPES, Prompter, Script, ScriptedGenerator, endless, write_shape
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
from jobs.benchmark_workloads import WORKLOADS, Row, Workload, chosen, with_passages
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
from pipeline.types import Answer, Passage, Query, RetrievedPassage

# Most tokens of a segment.
MAX_TOKENS = 60
# Tokens of a segment and its critique, where a script says what is written.
SEGMENT_TOKENS = 40
# Variants with the very tokens of our decoding.
OWN = ("direct", "ceiling", "scored")
# Most queries that the job's engine answers before it is measured.
WARM_ROWS = 96
# Most queries for the shape that answers one at a time.
SERIAL_ROWS = 24
# Most queries for the shape that asks for thousands of log-probabilities: their decoding takes a core for minutes.
NAIVE_ROWS = 64
Shape = StrEnum("Shape", {name: name for name in SHAPES})  # type: ignore[misc]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        rows, serial_rows: queries for each variant, and for the one that answers one at a time.
        model: of all variants.
        passages: for each query.
        shaped: whether the model has no weights.
        tokens: of a segment, where a script says what is written.
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

    def decoding_of(self, workload: Workload) -> DecodingConfig:
        """The workload's settings."""
        longest = max(MAX_TOKENS, self.tokens if self.scripted(workload) else 0)
        return DecodingConfig(**{"passages": self.passages, "max_tokens": longest, **workload.decoding})

    def scripted(self, workload: Workload) -> bool:
        """Whether a script says what is written: the embedded model's answers end after one segment, without a beam."""
        return self.shaped or (self.model.name == "demo" and not workload.short_form)

    def script_of(self, workload: Workload) -> Script | None:
        """What is written in this workload; None where that is the model's own matter."""
        if not self.scripted(workload):
            return None
        return Script(workload.questions, self.tokens, self.decoding_of(workload).segments)

    def job_of(self, workload: Workload, shaped: "Shaped") -> Job:
        """``jobs.annotate`` on the workload's rows."""
        folder, decoding = Path(tempfile.mkdtemp(dir=self.folder)), self.decoding_of(workload)
        return Job(folder, self.model, decoding, shaped.warming, shaped.rows, self.script_of(workload))


@dataclass(frozen=True)
class Shaped:
    """A workload's rows, those that warm an engine, and the mean tokens of a query that our decoding read and wrote."""

    rows: list[Row]
    warming: list[Row]
    tokens: dict[str, float]


@dataclass(frozen=True)
class Bench:
    """The engine that shapes and ceiling share, with everything around it.

    Attributes:
        memory: MB of the card by what took it; empty without one.
    """

    generator: VllmGenerator
    tokenizer: PromptTokenizer
    retriever: IndexRetriever
    memory: dict[str, float]

    @classmethod
    def open(cls, model: ModelConfig) -> "Bench":
        """Start the engine and open the demo's index."""
        tokenizer = PromptTokenizer.of(load_tokenizer(model), model.name)
        free = [free_memory()]
        retriever = IndexRetriever.open(locate(str(demo_index()), StorageConfig()), RetrievalConfig(), gpu_share(model))
        free.append(free_memory())
        wide = model.model_copy(update={"engine": {**model.engine, "max_logprobs": -1}})
        generator = VllmGenerator.start(wide, ReflectionCritic(tokenizer).watched)
        free.append(free_memory())
        taken = {name: a - b for name, a, b in zip(("index and encoder", "engine"), free, free[1:], strict=False) if a}
        return cls(generator, tokenizer, retriever, taken)

    def close(self) -> None:
        """End the engine."""
        self.generator.shutdown()
        self.retriever.close()


async def prepare(bench: Bench, workload: Workload, plan: Plan) -> tuple[list[Row], list[Row], list[list[Any]]]:
    """Rows that warm the engine, the rows that are measured, and the passages found for each of these."""
    rows = workload.rows(min(plan.rows, WARM_ROWS) + plan.rows)
    found = await asyncio.gather(*(bench.retriever.retrieve(row["query"], plan.passages) for row in rows))
    rows = [with_passages(row, passages, workload) for row, passages in zip(rows, found, strict=True)]
    return rows[: -plan.rows], rows[-plan.rows :], found[-plan.rows :]


def free_memory() -> float:
    """MB that the card has left; 0 without a card."""
    import torch

    return torch.cuda.mem_get_info()[0] / 1e6 if torch.cuda.is_available() else 0.0


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


async def measure_shapes(bench: Bench, workload: Workload, plan: Plan, measured: dict[str, Measured]) -> Shaped:
    """All variants that run on one engine, one after the other."""
    warming, rows, found = await prepare(bench, workload, plan)
    queries, config, script = queries_of(rows), plan.decoding_of(workload), plan.script_of(workload)
    if workload.body is not None:
        found = [
            [dataclasses.replace(f, passage=p) for f, p in zip(fs, q.passages or (), strict=True)]
            for fs, q in zip(found, queries, strict=True)
        ]
    engine, critic = BareEngine(bench.generator), ReflectionCritic(bench.tokenizer)
    prompter = Prompter(bench.tokenizer, script) if script else None
    recorder = Recorder(ScriptedGenerator(endless(bench.generator), prompter) if prompter else bench.generator)
    system = SelfRag(recorder, critic, Tasks(config), bench.retriever)
    shapes = shapes_of(Released(engine, bench.tokenizer, config, prompter=prompter), queries, found, plan)
    for name in (*OWN, *(shapes if workload.short_form else ())):
        measured.setdefault(name, Measured(shapes[name][0] if name in shapes else len(rows)))
    await direct(system, queries)  # warms the engine and says what our decoding asks of it
    work, answers = list(recorder.work), list[Answer]()
    load, steps = bench.generator.load, list[Step]()

    async def decode() -> None:
        load.watcher = lambda *counts: steps.append(Step(time.perf_counter(), *counts))
        answers.extend(await direct(system, queries))
        load.watcher = None

    own: dict[str, Callable[[], Awaitable[Any]]] = {
        "direct": decode,
        "ceiling": lambda: engine.replay(work),
        "scored": lambda: engine.replay(work, critic.watched),
    }
    # In turns, so that what drifts favours none.
    for name in OWN if len(measured["direct"].rates) % 2 == 0 else reversed(OWN):
        await timed(engine, measured[name], own[name]())
    measured["direct"].load = load_of(steps, load.slots)
    ours = [Outcome(a.retrieved, a.segments[0].text if a.segments else "") for a in answers]
    for name, (_, run) in shapes.items() if workload.short_form else ():
        theirs = await timed(engine, measured[name], run())
        measured[name].agreement = agreement(ours, theirs)
    tell(workload.name, measured, [name for name in measured if name != "ours"])
    read, wrote = sum(len(prompt) for prompt, _ in work), sum(written for _, written in work)
    return Shaped(rows, warming, {"prompt": read / len(rows), "written": wrote / len(rows)})


def tell(workload: str, measured: dict[str, Measured], names: Sequence[str]) -> None:
    """What was measured last."""
    rates = ", ".join(f"{name} {measured[name].rates[-1]:.3f}" for name in names)
    Console(stderr=True, soft_wrap=True).print(f"{workload}: {rates} queries/s")


def shapes_of(
    released: Released, queries: Sequence[Query], found: Sequence[Sequence[RetrievedPassage]], plan: Plan
) -> dict[str, tuple[int, Callable[[], Awaitable[list[Outcome]]]]]:
    """The shapes of other implementations: queries of each, and its run."""
    naive = dataclasses.replace(released, decision=RELEASED_CANDIDATE)
    flashrag = dataclasses.replace(
        released, decision=FLASHRAG_DECISION, candidate=FLASHRAG_CANDIDATE, decision_tokens=1
    )
    few, some = plan.serial_rows, min(plan.rows, NAIVE_ROWS)
    return {
        "released": (few, lambda: released.serially(queries[:few], found[:few])),
        "naive": (some, lambda: naive.in_waves(queries[:some], found[:some])),
        "flashrag": (len(queries), lambda: flashrag.in_waves(queries, found)),
    }


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


async def _shapes(plan: Plan, results: Results) -> tuple[dict[str, Shaped], dict[str, float]]:
    bench = Bench.open(plan.model)
    try:
        shaped = {w.name: await measure_shapes(bench, w, plan, results[w.name]) for w in plan.workloads}
    finally:
        bench.close()
    return shaped, bench.memory


def execute(plan: Plan) -> Iterator[Report]:
    """Measure everything, one repeat after the other, so that what changes meanwhile changes all variants.

    Engines take turns: one card does not hold two.

    Yields:
        What all repeats so far measured.
    """
    results: Results = {workload.name: {"ours": Measured(plan.rows)} for workload in plan.workloads}
    stages: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(1, plan.repeats + 1):
        shaped, memory = asyncio.run(_shapes(plan, results))
        for workload in plan.workloads:
            ours = results[workload.name]["ours"]
            rate, seconds = plan.job_of(workload, shaped[workload.name]).run()
            ours.rates.append(rate)
            stages[workload.name].append(seconds)
            tell(workload.name, results[workload.name], ["ours"])
        Console(stderr=True).print(f"repeat {number} of {plan.repeats} measured")
        means = {
            name: {stage: statistics.mean(one[stage] for one in repeats) for stage in (*STAGES, FILES, CALL)}
            for name, repeats in stages.items()
        }
        scripted = [workload.name for workload in plan.workloads if plan.scripted(workload)]
        yield Report(results, means, {name: one.tokens for name, one in shaped.items()}, memory, scripted)


def benchmark(
    quick: Annotated[bool, typer.Option("--quick", help="One workload, few rows, one repeat.")] = False,
    rows: Annotated[int | None, typer.Option(min=4, help="Queries of a workload.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1)] = None,
    only: Annotated[list[str] | None, typer.Option(help="Workloads whose name begins so; all by default.")] = None,
    model: Annotated[str | None, typer.Option(help="Model: hub name, folder, or 'demo', which is the default.")] = None,
    shape: Annotated[
        Shape | None,
        typer.Option(help="In place of a model: its size with dummy weights; a script says what it writes."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=5, help="Tokens of a segment and its critique, where a script says them.")
    ] = SEGMENT_TOKENS,
    passages: Annotated[int, typer.Option(min=1, help="Passages for each query.")] = 3,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="An engine argument of all variants, such as dtype=bfloat16.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here, after each repeat.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write a plot here.")] = None,
) -> None:
    """Compare ours with the shapes of other implementations and with the bare engine, side by side."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    if shape and model:
        raise typer.BadParameter("--shape stands in the place of a model: --model does not go with it")
    count = rows or (24 if quick else 64)
    with tempfile.TemporaryDirectory() as folder:
        try:
            names = chosen(only, [workload.name for workload in WORKLOADS])
            chosen_model = model_of(shape, model or "demo", settings or [], Path(folder))
        except ValueError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        plan = Plan(
            workloads=[w for w in WORKLOADS if w.name in names[: 1 if quick else None]],
            rows=count,
            serial_rows=min(count, 4 if quick else SERIAL_ROWS),
            repeats=repeats or (1 if quick else 3),
            model=chosen_model,
            folder=Path(folder),
            passages=passages,
            shaped=shape is not None,
            tokens=tokens,
        )
        for report in execute(plan):
            if json_file:
                json_file.write_text(json.dumps(report.record(plan.model), indent=2))
    show(report)
    if plot_file:
        plot(report, plot_file)


def model_of(shape: Shape | None, name: str, settings: Sequence[str], folder: Path) -> ModelConfig:
    """The model of all variants: a size without weights, or one by its name.

    Raises:
        ValueError: a setting is no engine argument.
    """
    engine: dict[str, Any] = {"load_format": "dummy"} if shape else {}
    apply_settings(engine, settings)
    model = ModelConfig(name=str(write_shape(shape.value, folder / shape.value)) if shape else name, engine=engine)
    check_engine_arguments(model)
    return model


def show(report: Report) -> None:
    """Print all tables."""
    console = Console(width=None if os.isatty(1) else 140)
    for workload in report.results:
        console.print(report.table(workload))
    console.print(report.times())


if __name__ == "__main__":
    typer.run(benchmark)
