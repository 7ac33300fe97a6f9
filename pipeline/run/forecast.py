"""Forecasts what a run takes, from the units of a finished set: a sample of it, or an earlier run of the same kind."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pyarrow import fs

from pipeline.config.sections import ExecutionConfig
from pipeline.output.compacted import read_run_units
from pipeline.output.folder import OutputFolder
from pipeline.output.unit_files import UnitSummary
from pipeline.run.driver import record_plan
from pipeline.run.plan import RunPlan
from pipeline.storage.location import Location, StorageError, locate
from pipeline.storage.parquet import map_in_threads

log = logging.getLogger(__name__)

CONFIDENCE = 0.95
# A set of fewer rows, such as that of a night without many new queries, tells too little of others.
FEWEST_ROWS = 50
# Keys of ``execution`` that a run must share with an earlier one.
SHARED = ("cpus_per_actor", "gpus_per_actor", "units_in_flight")
# Settings by which a run may differ from an earlier one and still take as long for a row.
APART = ("sample.rows", "sample.seed", "execution.unit_rows")


@dataclass(frozen=True)
class Share:
    """A share of the rows with its exact 95 % interval (Clopper and Pearson); all in [0, 1]."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, count: int, rows: int) -> "Share":
        """Return the share that ``count`` of at least one row are."""
        from scipy.stats import binomtest

        interval = binomtest(count, rows).proportion_ci(CONFIDENCE, "exact")
        return cls(count / rows, float(interval.low), float(interval.high))


@dataclass(frozen=True)
class Between:
    """A quantity between two bounds. An unknown one is None: the upper one of a speed, the lower one of a duration."""

    low: float | None
    high: float | None

    def map(self, change: Callable[[float], float]) -> "Between":
        """Return the quantity with a rising function applied to both bounds."""
        low, high = (None if bound is None else change(bound) for bound in (self.low, self.high))
        return Between(low, high)

    def format(self, digits: int) -> str:
        """Format the bounds, as in ``1.02 to 1.14``."""
        low, high = (None if bound is None else f"{bound:,.{digits}f}" for bound in (self.low, self.high))
        if low is None:
            return f"at most {high}"
        return f"at least {low}" if high is None else f"{low} to {high}"


@dataclass(frozen=True)
class Forecast:
    """A forecast of what a run takes.

    Attributes:
        source: URI of the annotated set that the forecast rests on.
        measured: number of rows of that set.
        rows: number of rows of the run.
        actors: number of actors of the run.
        rows_per_second: rows per second of all actors in the steady state; None if the set has no times.
        start_seconds: seconds from the start of the run to its first unit; None if unknown.
        hours: duration of the run with its start; None if its speed is unknown.
        cost: cost of the run in the currency of ``execution.price_per_hour``; None if unknown.
        errors: share of the rows that fail.
        retrieved: share of the answered rows that use a passage; None if no row was answered.
        prompt_tokens, generated_tokens: tokens of an answered row.
    """

    source: str
    measured: int
    rows: int
    actors: int
    rows_per_second: Between | None
    start_seconds: float | None
    hours: Between | None
    cost: Between | None
    errors: Share
    retrieved: Share | None
    prompt_tokens: float
    generated_tokens: float

    def describe(self) -> list[str]:
        """Describe the forecast in lines of text."""
        lines = [
            f"forecast for {self.rows} rows on {self.actors} actor(s), from {self.measured} rows of {self.source}:"
        ]
        lines += self._describe_speed()
        low, high = round(self.errors.low * self.rows), round(self.errors.high * self.rows)
        lines.append(f"errors   {round(self.errors.value * self.rows)} rows ({low} to {high}, 95 % interval)")
        if (used := self.retrieved) is not None:
            lines.append(f"passages used by {used.value:.1%} of the answered rows ({used.low:.1%} to {used.high:.1%})")
            lines.append(
                f"tokens   {self.prompt_tokens:.0f} in prompts and {self.generated_tokens:.0f} generated per row"
            )
        return lines

    def _describe_speed(self) -> list[str]:
        if self.rows_per_second is None or self.hours is None:
            return ["speed    unknown: the set has no times"]
        start = f" after a start of {self.start_seconds:.0f} s" if self.start_seconds is not None else ""
        lines = [f"speed    {self.rows_per_second.format(2)} rows/s in the steady state{start}"]
        longest = self.hours.high or 0.0
        minutes = self.hours.map(lambda hours: 60 * hours)
        lines.append(f"time     {self.hours.format(1)} h" if longest >= 1 else f"time     {minutes.format(1)} min")
        if self.cost is not None:
            lines.append(f"cost     {self.cost.format(2)}")
        if self.rows_per_second.high is None:
            lines.append("no request waited for an engine, so larger samples may be faster; take more rows")
        return lines


def forecast_run(source: OutputFolder, rows: int, execution: ExecutionConfig) -> Forecast:
    """Forecast a run from a finished annotated set.

    Args:
        source: the set.
        rows: number of rows of the run.
        execution: actors and price of the run.

    Raises:
        ValueError: the set is not finished, or of another version.
        StorageError: a file cannot be read.
    """
    manifest, units = source.read_manifest() or {}, list(read_run_units(source.location).values())
    measured, failed = sum(unit.rows for unit in units), sum(unit.failed for unit in units)
    if not measured:
        raise ValueError(f"{source.location.uri}: not a finished annotated set")
    answered = measured - failed
    pace, start = measure_pace(units), measure_start(manifest, units)
    speed = pace and pace.map(lambda rate: rate * execution.actors)
    hours = speed and Between(*(bound and ((start or 0.0) + rows / bound) / 3600 for bound in (speed.high, speed.low)))
    price = execution.price_per_hour
    return Forecast(
        source=source.location.uri,
        measured=measured,
        rows=rows,
        actors=execution.actors,
        rows_per_second=speed,
        start_seconds=start,
        hours=hours,
        cost=hours.map(lambda time: time * execution.actors * price) if hours and price is not None else None,
        errors=Share.of(failed, measured),
        retrieved=Share.of(sum(unit.retrieved for unit in units), answered) if answered else None,
        prompt_tokens=sum(unit.prompt_tokens for unit in units) / max(answered, 1),
        generated_tokens=sum(unit.generated_tokens for unit in units) / max(answered, 1),
    )


def measure_pace(units: Iterable[UnitSummary]) -> Between | None:
    """Measure the rows per second of an actor in the steady state; None if no actor's times are known.

    The lower bound counts the whole time of an actor, from its first unit to the end of its last one, in which the
    engine is no longer full. The upper bound counts the time until no request waits for the engine any more: by then
    all prompts are being read, which is most of the work, but some rows are not done. In a long run, the two are equal.
    """
    by_actor: defaultdict[str, list[UnitSummary]] = defaultdict(list)
    for unit in units:
        if unit.actor and unit.began is not None and unit.ended is not None:
            by_actor[unit.actor].append(unit)
    slow, fast = Throughput(), Throughput()
    for work in by_actor.values():
        began, rows = min(unit.began or 0.0 for unit in work), sum(unit.rows for unit in work)
        slow = slow.add(rows, max(unit.ended or 0.0 for unit in work) - began)
        if (full := max(unit.full_until or 0.0 for unit in work)) > began:
            fast = fast.add(rows, full - began)
    return Between(slow.rate, fast.rate) if slow.seconds else None


@dataclass(frozen=True)
class Throughput:
    """Rows, and the seconds that actors took for them, each for its own."""

    rows: int = 0
    seconds: float = 0.0

    def add(self, rows: int, seconds: float) -> "Throughput":
        """Return the throughput with the rows of another actor."""
        return Throughput(self.rows + rows, self.seconds + seconds)

    @property
    def rate(self) -> float | None:
        """Rows per second; None if there are none."""
        return self.rows / self.seconds if self.seconds else None


def measure_start(manifest: Mapping[str, Any], units: Iterable[UnitSummary]) -> float | None:
    """Return the seconds from the start of a run to its first unit; None if unknown, as after an interruption."""
    began = min((unit.began for unit in units if unit.began is not None), default=None)
    started = manifest.get("started")
    if began is None or started is None:
        return None
    seconds = began - datetime.fromisoformat(started).timestamp()
    return seconds if seconds >= 0 else None


def forecast_alike(plan: RunPlan) -> Forecast | None:
    """Forecast the rows that are left from the newest finished set of the same model, index and settings.

    Sets of fewer than ``FEWEST_ROWS`` rows, and sets that cannot be read, do not count.

    Returns:
        None if there is no such set directly beside the output or directly in the folder of ``skip_annotated``, or if
        some rows are carried over without an engine.
    """
    rows = plan.population or sum(unit.rows for unit in plan.todo)
    if not rows or plan.stale is not None:
        return None
    try:
        sources = _list_alike(plan)
    except StorageError as problem:
        log.warning("there is no forecast: %s", problem)
        return None
    for source in sources:
        try:
            found = forecast_run(source, rows, plan.config.execution)
        except (ValueError, StorageError) as problem:
            log.info("no forecast from %s: %s", source.location.uri, problem)
            continue
        if found.measured >= FEWEST_ROWS:
            return found
    return None


def _list_alike(plan: RunPlan) -> list[OutputFolder]:
    """List the finished sets of the same kind of run, the newest first."""
    kind = _describe_kind(record_plan(plan))
    places = {place.path: place for place in _list_neighbors(plan)}
    manifests = map_in_threads(_read_finished, places.values())
    alike = [
        (str(manifest.get("finished", "")), place.path)
        for place, manifest in zip(places.values(), manifests, strict=True)
        if _describe_kind(manifest) == kind
    ]
    return [OutputFolder(places[path]) for _, path in sorted(alike, reverse=True)]


def _list_neighbors(plan: RunPlan) -> Iterator[Location]:
    config = plan.config
    above, slash, _ = config.output.rstrip("/").rpartition("/")
    for parent in (above or slash, config.skip_annotated):
        if not parent or parent.endswith(":/"):  # a bucket has no neighbors
            continue
        place = locate(parent, config.storage)
        # The whole of Google's bucket would be listed.
        if "/" in place.path or not isinstance(place.filesystem, fs.GcsFileSystem):
            yield from place.list_folders()


def _read_finished(place: Location) -> dict[str, Any]:
    """Return the manifest of a finished set of answers of its own; empty if the folder holds none."""
    output = OutputFolder(place)
    try:
        manifest = output.read_manifest() if output.is_finished() else None
    except (ValueError, StorageError):
        return {}
    return manifest if manifest and not manifest.get("stale") else {}


def _describe_kind(manifest: Mapping[str, Any]) -> Any:
    """Return what two runs must share to take as long for a row; None if the manifest does not say it."""
    try:
        settings, configuration = dict(manifest["settings"]), manifest["configuration"]
        kept = {key: value for key, value in settings.items() if key not in APART and value is not None}
        execution = [configuration["execution"][key] for key in SHARED]
        engine, topology = configuration["model"]["engine"], configuration["retrieval"]["topology"]
        return kept, execution, engine, topology, [manifest.get(part) for part in ("model", "index", "reranker")]
    except (KeyError, TypeError, ValueError):
        return None
