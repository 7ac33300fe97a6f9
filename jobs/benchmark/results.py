"""Figures of the benchmark: rates, ratios and the seconds of a row by stage, as tables, a plot and a JSON record."""

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.config.sections import ModelConfig
from pipeline.decoding.types import REQUEST_SECONDS, ROW_SECONDS
from pipeline.versions import read_versions

STAGES = (*ROW_SECONDS, *REQUEST_SECONDS)
# Figures beside the stages: a row's share of the seconds from the end of its unit's annotation to the last byte of the
# data file, and the seconds of the whole call.
FILES = "files_seconds"
CALL = "call_seconds"


@dataclass
class Measured:
    """The figures of one variant on one workload.

    Attributes:
        rows: queries of a repeat.
        rates: queries/s of each measured repeat.
        agreement: shares of the last repeat's queries with our decision, and with our decision and answer; empty for
            variants that are not compared.
        load: figures of :func:`compute_load` in the last repeat; empty if the steps were not recorded.
    """

    rows: int
    rates: list[float] = field(default_factory=list)
    agreement: dict[str, float] = field(default_factory=dict)
    load: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Median rate, in queries/s."""
        return statistics.median(self.rates)


Results = dict[str, dict[str, Measured]]


@dataclass(frozen=True)
class Step:
    """A step of the engine.

    Attributes:
        ended: end of the step, in seconds by any clock.
        running, waiting, finished: requests that keep their slots after the step, requests that wait for a slot, and
            requests that ended in the step, such as a decision of one token in its first step.
    """

    ended: float
    running: int
    waiting: int
    finished: int

    @property
    def taken(self) -> int:
        """Slots in use during the step."""
        return self.running + self.finished


def compute_load(steps: Sequence[Step], slots: int) -> dict[str, float]:
    """Compute how full the engine was.

    A step begins when the one before it ends. A step that follows an idle engine is not counted.

    Args:
        slots: maximum number of requests that run at once.

    Returns:
        Shares of the counted time: ``half_full`` with more than half of the slots in use; ``steady`` likewise, but only
        up to the last step that left requests waiting, before the batch runs down (0 if none ever waited); ``fed`` with
        more than half of the slots in use or requests waiting. If requests wait while slots are free, the limit is the
        engine's: a step's tokens or the memory are used up. ``taken`` is the mean number of slots in use, and ``slots``
        is the argument.
    """
    spans = [(b.ended - a.ended, b) for a, b in pairwise(steps) if a.running or a.waiting]
    rundown = next((n for n, (_, step) in enumerate(reversed(spans)) if step.waiting), len(spans))
    steady = spans[: len(spans) - rundown]

    def mean(timed: Sequence[tuple[float, Step]], value: Callable[[Step], float]) -> float:
        total = sum(seconds for seconds, _ in timed)
        return sum(seconds * value(step) for seconds, step in timed) / total if total else 0.0

    return {
        "slots": slots,
        "half_full": mean(spans, lambda step: 2 * step.taken > slots),
        "steady": mean(steady, lambda step: 2 * step.taken > slots),
        "fed": mean(spans, lambda step: 2 * step.taken > slots or step.waiting > 0),
        "taken": mean(spans, lambda step: step.taken),
    }


@dataclass(frozen=True)
class Report:
    """All figures, possibly of an unfinished benchmark.

    Attributes:
        results: figures by workload and variant.
        stages: mean seconds of a row by workload and stage. ``seconds`` is the time from its first step to its last,
            ``files_seconds`` its share of writing the files, and ``call_seconds`` the duration of the whole call.
        tokens: mean tokens of a query by workload in the last repeat: of all its prompts, and generated for it.
        memory: MB of GPU memory by component; empty without a GPU.
        scripted: names of the workloads with scripted output.
        finished: whether all variants have been measured.
    """

    results: Results
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    tokens: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    scripted: Sequence[str] = ()
    finished: bool = False

    def get_measured(self, workload: str) -> dict[str, Measured]:
        """Return the variants that have been measured at least once."""
        return {name: one for name, one in self.results[workload].items() if one.rates}

    def compute_ratios(self, workload: str) -> dict[str, dict[str, float]]:
        """Return the ratios of ours to each variant: of the medians, and the least and greatest of all pairs."""
        measured = self.get_measured(workload)
        if (ours := measured.pop("ours", None)) is None:
            return {}
        return {
            name: {
                "median": ours.rate / other.rate,
                "min": min(ours.rates) / max(other.rates),
                "max": max(ours.rates) / min(other.rates),
            }
            for name, other in measured.items()
        }

    def to_record(self, model: ModelConfig) -> dict[str, Any]:
        """Return all figures as a JSON record; its ``ratios`` and ``absolute`` are those of the first workload."""
        first = next(iter(self.results))
        rates = {variant: measured.rate for variant, measured in self.get_measured(first).items()}
        return {
            "finished": self.finished,
            "ratios": {name: ratio["median"] for name, ratio in self.compute_ratios(first).items()},
            "workloads": {name: self._describe_workload(name) for name in self.results},
            "absolute": rates,
            "machine": describe_machine(),
            "versions": read_versions(),
            "memory": self.memory,
            "model": model.model_dump(mode="json"),
        }

    def _describe_workload(self, name: str) -> dict[str, Any]:
        figures = {variant: dataclasses.asdict(measured) for variant, measured in self.get_measured(name).items()}
        return {
            "ratios": self.compute_ratios(name),
            "absolute": figures,
            "stages": self.stages.get(name, {}),
            "tokens": self.tokens.get(name, {}),
            "scripted": name in self.scripted,
        }

    def build_table(self, workload: str) -> Table:
        """Return a table of the variants of one workload."""
        script = "; scripted output" if workload in self.scripted else ""
        title = f"{workload} ({self.results[workload]['ours'].rows} queries{script})"
        table = Table(title=title, caption=self.build_caption(workload))
        for heading in ("variant", "queries/s", "ours / variant", "min … max", "same decision", "same answer"):
            table.add_column(heading, justify="left" if heading == "variant" else "right")
        ratios = self.compute_ratios(workload)
        for name, measured in self.results[workload].items():
            ratio = ratios.get(name)
            shares = [f"{100 * s:.0f} %" for s in measured.agreement.values()] or ["", ""]
            spread = [f"{ratio['median']:.2f}", f"{ratio['min']:.2f} … {ratio['max']:.2f}"] if ratio else ["", ""]
            table.add_row(name, f"{measured.rate:.3f}", *spread, *shares)
        return table

    def build_caption(self, workload: str) -> str:
        """Describe the tokens of a query, and how full the engine was in our decoding."""
        parts = []
        if tokens := self.tokens.get(workload):
            rate = self.results[workload]["ours"].rate
            parts.append(
                f"{tokens['prompt']:.0f} prompt tokens and {tokens['written']:.0f} generated tokens per query: ours "
                f"processes {rate * tokens['prompt']:,.0f} and generates {rate * tokens['written']:,.0f} per second"
            )
        if load := self.results[workload].get("direct", Measured(0)).load:
            parts.append(
                f"engine in our decoding: {100 * load['half_full']:.0f} % of its busy time with more than half of "
                f"{load['slots']:.0f} slots in use ({100 * load['steady']:.0f} % before the batch drained), "
                f"{100 * load['fed']:.0f} % with that or with requests waiting"
            )
        return "; ".join(parts)

    def build_times_table(self) -> Table:
        """Return a table of the seconds of a row by workload and stage."""
        table = Table(title="Mean seconds per row (queue, prefill and decode: of requests, which run concurrently)")
        table.add_column("workload")
        stages = [name.removesuffix("_seconds") for name in STAGES if name != "seconds"]
        for name in ("total", *stages, "files written", "retrieve share"):
            table.add_column(name, justify="right")
        for workload, seconds in self.stages.items():
            share = seconds["retrieve_seconds"] / seconds["seconds"]
            table.add_row(
                workload, *(f"{seconds.get(stage, 0.0):.3g}" for stage in (*STAGES, FILES)), f"{100 * share:.1f} %"
            )
        return table


def describe_machine() -> dict[str, Any]:
    """Describe the machine that the figures were measured on."""
    from vllm.platforms import current_platform

    device = "CPU" if current_platform.is_cpu() else str(current_platform.get_device_name())
    return {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "device": device}


def write_record(record: dict[str, Any], file: Path) -> None:
    """Write a record as JSON, atomically: a reader finds the old file or the new one, never a part."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(record, indent=2))
    new.replace(file)


def plot(report: Report, file: Path) -> None:
    """Draw the rates of all variants by workload."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.9 * len(report.results)), layout="constrained")
    axes = figure.subplots()
    names = ["ceiling", "scored", "direct", "ours", "flashrag", "naive", "released"]
    for place, name in enumerate(names):
        there = [(n, m[name].rate) for n, m in enumerate(report.results.values()) if name in m]
        heights = [n + 0.12 * (place - 3) for n, _ in there]
        axes.barh(heights, [rate for _, rate in there], height=0.11, label=name)
    axes.set(yticks=range(len(report.results)), yticklabels=list(report.results), xlabel="queries/s", xscale="log")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(file, dpi=120)
