"""Renders the figures of an annotated set as one HTML file without scripts that makes no requests."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.config.loading import flatten
from pipeline.evaluation.evaluate import NOTHING
from pipeline.output.folder import OutputFolder
from pipeline.report.changes import ChangedAnswer, Changes
from pipeline.report.durations import Timeline, build_timeline
from pipeline.report.examples import ExampleRow
from pipeline.report.figures import BINS, OTHERS, Histogram, SetFigures

HERE = Path(__file__).parent
NONE = "–"
# Number of headlines shown at the head of the page.
AT_THE_HEAD = 6
TITLES = {
    "retrieve_probability": "p(Retrieve)",
    "is_rel": "IsRel",
    "is_sup": "IsSup",
    "is_use": "IsUse",
    "score": "score",
}


@dataclass(frozen=True)
class ReportedSet:
    """An annotated set and its figures.

    Attributes:
        output: folder of the set.
        manifest: manifest of the run.
        finished: whether the set has its success marker.
        figures: figures counted from the files.
    """

    output: OutputFolder
    manifest: Mapping[str, Any]
    finished: bool
    figures: SetFigures

    @cached_property
    def timeline(self) -> Timeline:
        """Stretches of time in which the units were annotated."""
        return build_timeline(self.figures.units)

    @property
    def actors(self) -> int:
        """Number of actors in the last run that worked on the set."""
        return int(self.manifest.get("configuration", {}).get("execution", {}).get("actors", 1))

    @property
    def rows(self) -> int:
        """Number of annotated rows, including failed ones."""
        return sum(unit.rows for unit in self.figures.units)

    @property
    def prompt_tokens(self) -> int:
        """Number of prompt tokens of all answered rows."""
        return sum(unit.prompt_tokens for unit in self.figures.units)

    @property
    def generated_tokens(self) -> int:
        """Number of tokens generated for all answered rows."""
        return sum(unit.generated_tokens for unit in self.figures.units)

    @property
    def unseen_tasks(self) -> list[str]:
        """Tasks of the run without a row among those that were read, as far as tasks are reported separately."""
        seen = self.figures.groups
        named = {task or NOTHING for task in self.manifest.get("tasks", {})}
        return sorted(named - seen.keys()) if OTHERS not in seen else []


@dataclass(frozen=True)
class Cost:
    """The cost of a run's machines.

    Attributes:
        price: price of one actor's machine per hour, in any currency.
        actors: number of actors.
        hours: hours with a unit in progress, without pauses.
        rows: number of rows annotated in these hours.
    """

    price: float
    actors: int
    hours: float
    rows: int

    @classmethod
    def of(cls, annotated: ReportedSet, price: float | None) -> "Cost | None":
        """Compute the cost of a set; None if the price or the times are unknown."""
        times = annotated.timeline
        return cls(price, annotated.actors, times.busy / 3600, times.rows) if price and times.busy else None

    @property
    def total(self) -> float:
        """Total cost in the currency of the price."""
        return self.price * self.actors * self.hours

    @property
    def per_thousand(self) -> float:
        """Cost of a thousand rows in the currency of the price."""
        return 1000 * self.total / self.rows


@dataclass(frozen=True)
class Headline:
    """A figure of a whole set; ``unit`` is ``rows``, ``share``, ``rate``, ``seconds``, ``score`` or ``money``."""

    name: str
    value: float | None
    unit: str


def compute_headlines(annotated: ReportedSet, price: float | None) -> list[Headline]:
    """Return the figures by which runs are compared; the value of an unknown figure is None."""
    figures, times, overall = annotated.figures, annotated.timeline, annotated.figures.overall
    cost = Cost.of(annotated, price)
    seconds = figures.durations.get("seconds")
    median, p95 = (seconds.quantile(0.5), seconds.quantile(0.95)) if seconds else (None, None)
    means = {name: spread.mean for name, spread in overall.spreads.items()}
    return [
        Headline("Rows", annotated.rows, "rows"),
        Headline("Used a passage", overall.retrieval_rate, "share"),
        Headline("Errors", overall.error_rate, "share"),
        Headline("Rows per second", times.compute_rate(times.rows), "rate"),
        Headline("Generated tokens per second", times.compute_rate(times.generated_tokens), "rate"),
        Headline("Cost of 1,000 queries", cost.per_thousand if cost else None, "money"),
        Headline("Latency of a row, median", median, "seconds"),
        Headline("Latency of a row, p95", p95, "seconds"),
        Headline("Generated tokens per row", divide(annotated.generated_tokens, overall.rows), "rate"),
        Headline("Searches per row", divide(figures.counts.get("retrievals"), figures.answered), "rate"),
        Headline("Carried over", divide(_count_carried(annotated) or None, overall.rows), "share"),
        *(Headline(f"Mean {TITLES[name]}", means.get(name), "score") for name in TITLES),
    ]


def _count_carried(annotated: ReportedSet) -> int:
    return sum(unit.carried for unit in annotated.figures.units)


def divide(part: float | None, whole: float) -> float | None:
    """Divide; None if the part is unknown or the whole is zero."""
    return part / whole if part is not None and whole else None


def collect_facts(annotated: ReportedSet) -> dict[str, dict[str, Any]]:
    """Describe the run, model, index, decoding and versions: names and values by heading, without None values."""
    manifest = annotated.manifest
    config = manifest.get("configuration", {})
    found = {
        "Run": _describe_run(annotated),
        "Model": _describe_model(config.get("model", {}), manifest.get("model") or {}),
        "Index": _describe_index(manifest),
        "Decoding": flatten(config.get("decoding", {})),
        "Versions": dict(manifest.get("versions", {})),
    }
    known = {title: _drop_unknown(entries) for title, entries in found.items()}
    return {title: entries for title, entries in known.items() if entries}


def _describe_run(annotated: ReportedSet) -> dict[str, Any]:
    manifest, times = annotated.manifest, annotated.timeline.stretches
    config = manifest.get("configuration", {})
    execution = config.get("execution", {})
    began, ended = manifest.get("started"), manifest.get("finished")
    active = pauses = None
    if times:
        began, ended = format_time(times[0].began), format_time(times[-1].ended)
        active = format_duration(annotated.timeline.busy)
    if len(times) > 1:
        pauses = f"{len(times) - 1}, {format_duration(sum(annotated.timeline.pauses))} in total"
    return {
        "Output": annotated.output.location.uri,
        "Query set": config.get("queries"),
        "Sampled from": (rows := manifest.get("population")) and f"{rows:,} rows",
        "Carried over from": config.get("stale"),
        "Rows carried over": _count_carried(annotated) or None,
        "Rescored from": manifest.get("settings", {}).get("rescored"),
        "First unit started": began,
        "Last unit finished": ended,
        "Active time": active,
        "Pauses": pauses,
        "Actors": execution.get("actors"),
        "GPUs per actor": execution.get("gpus_per_actor"),
    }


def _describe_model(model: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "Name": model.get("name"),
        "Revision": model.get("revision"),
        "Digest": shorten_digest(identity.get("digest")),
        "Adapter": model.get("lora"),
        **flatten(model.get("engine", {})),
    }


def _describe_index(manifest: Mapping[str, Any]) -> dict[str, Any]:
    index, config = manifest.get("index") or {}, manifest.get("configuration", {})
    if not index:
        return {}
    retrieval = config.get("retrieval", {})
    return {
        "Folder": config.get("index"),
        "Encoder": (manifest.get("encoder") or {}).get("name"),
        "Passages": index.get("passages"),
        "Shards": index.get("shards"),
        "Digest": shorten_digest(index.get("digest")),
        "Topology": retrieval.get("topology"),
        "Search": retrieval.get("search") or None,
        "Reranker": retrieval["rerank"]["model"] if manifest.get("reranker") else None,
    }


def _drop_unknown(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if value is not None}


def collect_thresholds(annotated: ReportedSet) -> dict[str, float]:
    """Return the threshold δ of each task in adaptive mode; ``""`` is for rows without a task."""
    tasks = annotated.manifest.get("tasks", {})
    decoding = {name: task["decoding"] for name, task in tasks.items()}
    return {name: d["threshold"] for name, d in decoding.items() if d.get("mode") == "adaptive"}


@dataclass(frozen=True)
class Compared:
    """An earlier set as the baseline of a report.

    Attributes:
        annotated: the earlier set.
        figures: headlines of the earlier set, in the same order as those of the report's own set.
        changes: differences between the answers of both sets.
        examples: some of the answers that changed.
    """

    annotated: ReportedSet
    figures: Sequence[Headline]
    changes: Changes
    examples: Sequence[ChangedAnswer] = ()


def render_page(
    annotated: ReportedSet, examples: Sequence[ExampleRow], price: float | None = None, baseline: Compared | None = None
) -> str:
    """Render the page of an annotated set.

    The page's content security policy allows one style sheet, by its hash, and nothing else: no script, no request.
    https://developer.mozilla.org/docs/Web/HTTP/Reference/Headers/Content-Security-Policy
    """
    style = (HERE / "report.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters.update(
        {
            "shown": format_headline,
            "number": format_number,
            "when": format_time,
            "duration": format_duration,
            "change": format_change,
            "bars": build_bars,
            "fact": format_fact,
            "amount": format_amount,
        }
    )
    return environment.get_template("report.html.j2").render(
        run=annotated,
        overall=annotated.figures.overall,
        groups=dict(sorted(annotated.figures.groups.items(), key=lambda item: -item[1].rows - item[1].errors)),
        headlines=compute_headlines(annotated, price),
        at_the_head=AT_THE_HEAD,
        facts=collect_facts(annotated),
        thresholds=collect_thresholds(annotated),
        titles=TITLES,
        examples=examples,
        cost=Cost.of(annotated, price),
        baseline=baseline,
        style=Markup(style),  # noqa: S704  our own file
        digest=digest,
        now=datetime.now(UTC).timestamp(),
    )


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram.

    Attributes:
        low, high: limits of the bin.
        count: number of values in the bin.
        height: height in percent of the highest bar.
    """

    low: float
    high: float
    count: int
    height: float


def build_bars(spread: Histogram) -> list[Bar]:
    """Return the bars of a histogram; a bin with few values still gets a visible bar."""
    width, most = (spread.high - spread.low) / BINS, max(1, int(spread.counts.max()))
    bars = []
    for n, count in enumerate(spread.counts):
        low, high = spread.low + n * width, spread.low + (n + 1) * width
        height = max(100 * count / most, 1.5 * (count > 0))
        bars.append(Bar(low, high, int(count), height))
    return bars


def format_headline(value: float | None, unit: str) -> str:
    """Format the value of a headline by its unit."""
    if value is None:
        return NONE
    if unit == "share":
        digits = 1 if value in (0, 1) or 0.001 <= value <= 0.999 else 3
        return f"{100 * value:.{digits}f} %"
    return {
        "rows": f"{value:,.0f}",
        "rate": format_number(value),
        "seconds": format_duration(value),
        "score": f"{value:.3f}",
        "money": f"{value:,.2f}" if value >= 0.1 else format_number(value),
    }[unit]


def format_amount(part: int, whole: int, sampled: bool) -> str:
    """Format a number of rows or values; as a share of the whole if they are a sample of those of the set."""
    return format_headline(divide(part, whole), "share") if sampled else f"{part:,}"


def format_fact(value: Any) -> str:
    """Format a value from :func:`collect_facts`."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format_number(value) if isinstance(value, int | float) else str(value)


def format_change(now: Headline, before: Headline) -> str:
    """Format the difference between two headlines.

    Shares differ by percentage points, scores by their plain difference, and all others by percent.
    """
    if now.value is None or before.value is None:
        return NONE
    if now.unit == "share":
        return f"{100 * (now.value - before.value):+.1f} points"
    if now.unit == "score":
        return f"{now.value - before.value:+.3f}"
    return f"{100 * (now.value / before.value - 1):+.1f} %" if before.value else NONE


def format_number(value: float | None, digits: int = 3) -> str:
    """Format a number: integers and large ones with thousands separators, others with ``digits`` significant digits."""
    if value is None:
        return NONE
    if abs(value) >= 10**digits or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def format_duration(seconds: float | None, digits: int = 3) -> str:
    """Format seconds with suitable units, such as ``2 h 5 min``."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.{digits}g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def format_time(seconds: float) -> str:
    """Format seconds since the epoch as date and time in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def shorten_digest(digest: str | None) -> str | None:
    """Shorten a digest to its first 12 characters."""
    return digest and digest[:12]
