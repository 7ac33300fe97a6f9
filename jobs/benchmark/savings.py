"""Run ablations: measure what each optimization saves, on the same queries with it and without it, alternately.

``python -m jobs.benchmark.savings [--rows N] [--repeats N] [--only NAME …] [--engine KEY=VALUE …] [--json FILE]``

Each optimization is removed by replacing the generator or the critic of the decoding
(``jobs.benchmark.savings_variants``). Engine arguments are compared with the defaults, each on its own engine.
"""

import asyncio
import dataclasses
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jobs.benchmark.baselines import BareEngine, Bench, Recorder
from jobs.benchmark.compare import MAX_TOKENS, SEGMENT_TOKENS, to_queries
from jobs.benchmark.results import describe_machine
from jobs.benchmark.savings_variants import (
    AskingCritic,
    DictLogprobs,
    ForgetfulCritic,
    Gathered,
    WholeDecisions,
)
from jobs.benchmark.scripted_model import Prompter, Script, ScriptedGenerator, make_endless
from jobs.benchmark.workloads import Workload, choose_names
from jobs.common import checking, start_logging
from jobs.shell import run
from pipeline.config.loading import apply_settings
from pipeline.config.sections import DecodingConfig, ModelConfig, Weights
from pipeline.decoding.answer_cache import AnsweredOnce, Answering
from pipeline.decoding.critique import segment_score
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.protocols import Generator
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.decoding.self_rag import SelfRag
from pipeline.decoding.types import Candidate, Query
from pipeline.engine.arguments import check_engine_arguments

SHORT = Workload("short form, 50 % retrieve", questions=0.5)
READING = Workload("short form, all retrieve", decoding={"mode": "always"})
LONG = Workload("long form, beam of 2", decoding={"segments": 3, "beam_width": 2})
ENGINE = ("enable_prefix_caching=false", "max_num_batched_tokens=512", "dtype=bfloat16", "dtype=float16")
DEFAULTS = "the defaults"
# Slots of the engine: fewer than the requests of all queries, as in a long run.
SLOTS = 32


@dataclass(frozen=True)
class Setting:
    """A workload on an engine.

    Attributes:
        generator: generator of the bench, or a scripted one on top of it.
    """

    bench: Bench
    queries: list[Query]
    config: DecodingConfig
    generator: Generator

    def build_system(
        self, generator: Generator | None = None, critic: type[ReflectionCritic] = ReflectionCritic
    ) -> SelfRag:
        """Return our decoding, with another generator or critic if given."""
        tasks, engine = Tasks(self.config), generator or self.generator
        return SelfRag(engine, critic(self.bench.tokenizer), tasks, self.bench.retriever)

    async def answer(self, system: Answering, queries: Sequence[Query] | None = None) -> int:
        """Answer all queries concurrently; return their number."""
        answers = await asyncio.gather(*(system.answer(query) for query in queries or self.queries))
        return len(answers)

    def build_gathered(self, apart: bool) -> SelfRag:
        """Return our decoding with the passages of all rows submitted together, those of a row adjacent or apart."""
        siblings = self.config.passages
        return self.build_system(Gathered(self.generator, siblings, siblings * len(self.queries), apart))

    def double_queries(self) -> list[Query]:
        """Return every query twice, with different ids."""
        return [
            dataclasses.replace(query, id=f"{n}-{query.id}") for query, n in itertools.product(self.queries, range(2))
        ]


Run = Callable[[Setting], Awaitable[int]]


@dataclass(frozen=True)
class Saving:
    """An optimization to measure.

    Attributes:
        with_it, without: functions that answer the queries with and without the optimization.
    """

    name: str
    workload: Workload
    with_it: Run
    without: Run


def answer_unchanged(setting: Setting) -> Awaitable[int]:
    """Answer all queries with our decoding, unchanged; return their number."""
    return setting.answer(setting.build_system())


SAVINGS = (
    Saving(
        "a decision of one token, not a whole answer",
        SHORT,
        answer_unchanged,
        lambda s: s.answer(s.build_system(WholeDecisions(s.generator))),
    ),
    Saving(
        "later decisions read where segments end, not asked for",
        LONG,
        answer_unchanged,
        lambda s: s.answer(s.build_system(critic=AskingCritic)),
    ),
    Saving(
        "passages tokenized once for a row",
        LONG,
        answer_unchanged,
        lambda s: s.answer(s.build_system(critic=ForgetfulCritic)),
    ),
    Saving(
        "equal queries answered once (each comes twice)",
        SHORT,
        lambda s: s.answer(AnsweredOnce(s.build_system()), s.double_queries()),
        lambda s: s.answer(s.build_system(), s.double_queries()),
    ),
    Saving(
        "flat log-probabilities, not dictionaries",
        SHORT,
        answer_unchanged,
        lambda s: s.answer(s.build_system(DictLogprobs(BareEngine(s.bench.generator)))),
    ),
    Saving(
        "a row's passages beside one another in the queue",
        READING,
        lambda s: s.answer(s.build_gathered(apart=False)),
        lambda s: s.answer(s.build_gathered(apart=True)),
    ),
)


@dataclass(frozen=True)
class Pruning:
    """Prompt tokens, generated tokens, and the generated tokens that pruning would save."""

    read: int
    written: int
    hopeless: int


def count_prunable(siblings: Sequence[Candidate], weights: Weights) -> int:
    """Count the tokens that aborting hopeless candidates would save.

    Siblings are assumed to be generated in step. A candidate is hopeless once a sibling has ended with a score that it
    cannot reach: with its own IsRel, which is known from its first token, and the best value of all other terms.
    """
    ends = [(len(one.segment.token_ids), one.segment.critique.score) for one in siblings]
    saved = 0
    for one, (length, _) in zip(siblings, ends, strict=True):
        best = segment_score(1.0, one.segment.critique.is_rel, 1.0, 1.0, weights)
        hopeless = [end for end, score in ends if score > best and end < length]
        saved += length - max(1, min(hopeless)) if hopeless else 0
    return saved


async def measure_pruning(setting: Setting) -> Pruning:
    """Measure how many tokens pruning would save in the short form."""
    recorder = Recorder(setting.generator)
    config = setting.config.model_copy(update={"keep_candidates": True})
    system = dataclasses.replace(setting.build_system(recorder), tasks=Tasks(config))
    answers = await asyncio.gather(*(system.answer(query) for query in setting.queries))
    return Pruning(
        read=sum(len(prompt) for prompt, _ in recorder.work),
        written=sum(written for _, written in recorder.work),
        hopeless=sum(count_prunable(answer.candidates, config.weights) for answer in answers),
    )


@dataclass
class SavingsFigures:
    """The figures measured so far.

    Attributes:
        rates: queries/s of each repeat, by optimization, with it and without it.
        engines: queries/s of each repeat, by engine argument.
        pruning: tokens that pruning would save, from the last repeat; None if not measured.
    """

    rates: dict[str, dict[str, list[float]]]
    engines: dict[str, list[float]]
    pruning: Pruning | None = None

    @classmethod
    def create_empty(cls, savings: Sequence[Saving], engine: Sequence[str]) -> "SavingsFigures":
        """Return empty figures for the given optimizations and engine arguments."""
        rates: dict[str, dict[str, list[float]]] = {saving.name: {"with": [], "without": []} for saving in savings}
        return cls(rates, {name: [] for name in (DEFAULTS, *engine)} if engine else {})

    @property
    def savings(self) -> list[Saving]:
        """The optimizations to measure."""
        return [saving for saving in SAVINGS if saving.name in self.rates]


async def measure_rate(setting: Setting, run: Run) -> float:
    """Run from an empty prefix cache and return queries/s."""
    await BareEngine(setting.bench.generator).clear_cache()
    began = time.perf_counter()
    return await run(setting) / (time.perf_counter() - began)


def build_setting(bench: Bench, workload: Workload, rows: int) -> Setting:
    """Return the setting of a workload; a long form has a third of the rows, and scripted output.

    The embedded model's own answers end after one segment.
    """
    config = DecodingConfig(**{"passages": 3, "max_tokens": MAX_TOKENS, **workload.decoding})
    if workload.short_form:
        return Setting(bench, to_queries(workload.build_rows(rows)), config, bench.generator)
    prompter = Prompter(bench.tokenizer, Script(tokens=SEGMENT_TOKENS, segments=config.segments))
    scripted = ScriptedGenerator(make_endless(bench.generator), prompter)
    return Setting(bench, to_queries(workload.build_rows(max(4, rows // 3))), config, scripted)


async def measure_savings(rows: int, number: int, figures: SavingsFigures) -> None:
    """Measure the optimizations on one full engine; the order of with and without alternates between repeats."""
    bench = Bench.open(ModelConfig(name="demo", engine={"max_num_seqs": SLOTS}))
    try:
        used = {saving.workload.name: saving.workload for saving in figures.savings}
        settings = {name: build_setting(bench, workload, rows) for name, workload in used.items()}
        for setting in settings.values():
            await answer_unchanged(setting)  # warms up
        for saving in figures.savings:
            setting, sides = settings[saving.workload.name], [("with", saving.with_it), ("without", saving.without)]
            for name, run in sides if number % 2 else reversed(sides):
                figures.rates[saving.name][name].append(await measure_rate(setting, run))
                print_rate(number, f"{saving.name}, {name}", figures.rates[saving.name][name])
        if SHORT.name in settings:
            figures.pruning = await measure_pruning(settings[SHORT.name])
    finally:
        bench.close()


async def measure_engine(rows: int, number: int, argument: str, figures: SavingsFigures) -> None:
    """Measure our decoding on a new engine with one argument changed, or with the defaults."""
    arguments: dict[str, Any] = {}
    apply_settings(arguments, [] if argument == DEFAULTS else [argument])
    bench = Bench.open(ModelConfig(name="demo", engine=arguments))
    try:
        setting = build_setting(bench, SHORT, rows)
        await answer_unchanged(setting)  # warms up
        figures.engines[argument].append(await measure_rate(setting, answer_unchanged))
        print_rate(number, argument, figures.engines[argument])
    finally:
        bench.close()


def print_rate(number: int, what: str, rates: Sequence[float]) -> None:
    """Print the rate that was measured last."""
    Console(stderr=True, soft_wrap=True).print(f"repeat {number}: {what}: {rates[-1]:.3f} queries/s")


def run_savings(rows: int, repeats: int, figures: SavingsFigures) -> Iterator[SavingsFigures]:
    """Run one repeat after the other; yield the figures of all repeats so far after each."""
    for number in range(1, repeats + 1):
        if figures.savings:
            asyncio.run(measure_savings(rows, number, figures))
        for argument in figures.engines:
            asyncio.run(measure_engine(rows, number, argument, figures))
        yield figures


def format_ratio(one: Sequence[float], other: Sequence[float]) -> list[str]:
    """Format the ratio of the medians, and the least and greatest ratio of all pairs."""
    middle = statistics.median(one) / statistics.median(other)
    return [f"{middle:.2f}", f"{min(one) / max(other):.2f} … {max(one) / min(other):.2f}"]


def build_savings_tables(figures: SavingsFigures) -> list[Table]:
    """Return tables of the optimizations and of the engine arguments; empty ones are left out."""
    savings = Table(title=f"Savings (at most {SLOTS} concurrent requests)")
    for heading in ("saving", "workload", "with, queries/s", "without", "with / without", "min … max"):
        savings.add_column(heading, justify="left" if heading in ("saving", "workload") else "right")
    for saving in figures.savings:
        rates = figures.rates[saving.name]
        cells = [f"{statistics.median(rates[name]):.2f}" for name in ("with", "without")]
        savings.add_row(saving.name, saving.workload.name, *cells, *format_ratio(rates["with"], rates["without"]))
    if (bound := figures.pruning) is not None:
        savings.caption = (
            f"Pruning by IsRel would save {bound.hopeless} of {bound.written} generated tokens "
            f"({100 * bound.hopeless / bound.written:.1f} %); the prompts have {bound.read} tokens."
        )
    arguments = Table(title=f"Engine arguments ({SHORT.name})")
    for heading in ("argument", "queries/s", f"argument / {DEFAULTS}", "min … max"):
        arguments.add_column(heading, justify="left" if heading == "argument" else "right")
    for name, rates_ in figures.engines.items():
        arguments.add_row(name, f"{statistics.median(rates_):.2f}", *format_ratio(rates_, figures.engines[DEFAULTS]))
    return [table for table in (savings, arguments) if table.row_count]


def benchmark_savings(
    rows: Annotated[int, typer.Option(min=4, help="Number of queries; a third of it in the long form.")] = 48,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Start of the names of the savings and engine arguments to measure; all by default."),
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help=f"Engine arguments to compare; by default {', '.join(ENGINE)}.")
    ] = None,
    json_file: Annotated[
        pathlib.Path | None, typer.Option("--json", help="Write all figures to this JSON file after each repeat.")
    ] = None,
) -> None:
    """Measure what each optimization saves: queries/s with it and without it."""
    start_logging()
    with checking():
        names = choose_names(only, [*(saving.name for saving in SAVINGS), *(engine or ENGINE)])
        settings = [setting for setting in engine or ENGINE if setting in names]
        figures = SavingsFigures.create_empty([saving for saving in SAVINGS if saving.name in names], settings)
        for setting in settings:
            arguments: dict[str, Any] = {}
            apply_settings(arguments, [setting])
            check_engine_arguments(ModelConfig(name="demo", engine=arguments))
    for measured in run_savings(rows, repeats, figures):
        if json_file:
            json_file.write_text(json.dumps({**dataclasses.asdict(measured), "machine": describe_machine()}, indent=2))
    for table in build_savings_tables(figures):
        Console(width=150).print(table)


if __name__ == "__main__":
    run(benchmark_savings)
