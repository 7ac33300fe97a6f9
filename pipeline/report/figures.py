"""Computes the figures of a report from the files of an annotated set, in one pass over the columns they need.

Rows, errors by type, tokens and times are those of all units, from their summaries. The other figures need rows: those
of all units of a small set, and of a sample of the units of a large one. Memory holds a few kilobytes per unit and per
task, and the columns of the units that are being read. Texts are read only for the examples.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.sections import Columns, Weights
from pipeline.decoding.types import REQUEST_SECONDS, ROW_SECONDS, USAGE_COUNTS
from pipeline.evaluation.evaluate import NOTHING
from pipeline.output.folder import OutputFolder, get_columns
from pipeline.output.unit_files import UnitSummary
from pipeline.report.durations import Durations, Floats
from pipeline.report.examples import Pick, keep_best, pick_rows
from pipeline.report.units import FinishedUnit, check_columns, choose_units, find_units, map_units
from pipeline.storage.parquet import read_columns

SEGMENT_SCORES = ("is_rel", "is_sup", "is_use", "score")
SCORES = ("retrieve_probability", *SEGMENT_SCORES)
# Name of a derived duration: the seconds of a row without those of the first decision and of waiting for passages.
WRITING = "write_seconds"
COUNTED = [
    "retrieved",
    "retrieve_probability",
    *(f"segments.list.element.{name}" for name in SEGMENT_SCORES),
    *(f"usage.{name}" for name in (*ROW_SECONDS, *REQUEST_SECONDS, *USAGE_COUNTS)),
]
BINS = 20
# Maximum number of tasks reported separately; later ones are merged into ``OTHERS``. A task column that holds something
# else, such as ids, must not fill the memory or the page.
MOST_TASKS = 30
OTHERS = "(others)"
# Task of the failures of a sampled set: the summaries of the units count them by error type alone.
ALL_TASKS = "(all)"
LONGEST_MESSAGE = 500


@dataclass(frozen=True, eq=False)
class Histogram:
    """A histogram of values, with their sum.

    Attributes:
        low, high: limits of the histogram; values outside are counted in the first or the last bin.
        counts: int64 [BINS], number of values in each bin; all bins have the same width.
        total: sum of the values.
        missing: number of missing values.
    """

    low: float
    high: float
    counts: npt.NDArray[np.int64]
    total: float
    missing: int

    @classmethod
    def of(cls, values: Floats, low: float, high: float) -> "Histogram":
        """Count values in bins from ``low`` to ``high``; NaN and infinities count as missing."""
        known = values[np.isfinite(values)]
        counts, _ = np.histogram(np.clip(known, low, high), bins=BINS, range=(low, high))
        return cls(low, high, counts, float(known.sum()), len(values) - len(known))

    def __add__(self, other: "Histogram") -> "Histogram":
        counts, total = self.counts + other.counts, self.total + other.total
        return Histogram(self.low, self.high, counts, total, self.missing + other.missing)

    @property
    def values(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float | None:
        """Mean, or None if there are no values."""
        return self.total / self.values if self.values else None


@dataclass(frozen=True)
class GroupFigures:
    """The figures of a group of rows, such as a task.

    Attributes:
        rows: number of answered rows.
        errors: number of rows in ``errors/``.
        retrieved: number of answered rows that used a passage.
        spreads: histograms by the names in :data:`SCORES`; ``retrieve_probability`` counts rows, the others count
            segments of answers.
    """

    rows: int = 0
    errors: int = 0
    retrieved: int = 0
    spreads: Mapping[str, Histogram] = field(default_factory=dict)

    def __add__(self, other: "GroupFigures") -> "GroupFigures":
        return GroupFigures(
            self.rows + other.rows,
            self.errors + other.errors,
            self.retrieved + other.retrieved,
            add_up(self.spreads, other.spreads),
        )

    @property
    def retrieval_rate(self) -> float | None:
        """Share of the answered rows that used a passage, or None if no row is answered."""
        return self.retrieved / self.rows if self.rows else None

    @property
    def error_rate(self) -> float | None:
        """Share of all rows that failed, or None if there are no rows."""
        return self.errors / (self.rows + self.errors) if self.rows + self.errors else None


@dataclass(frozen=True)
class Failure:
    """The failed rows of one error type and task: their number, and the message of one of them."""

    rows: int
    message: str

    def __add__(self, other: "Failure") -> "Failure":
        return Failure(self.rows + other.rows, self.message)


@dataclass(frozen=True)
class UnitFigures:
    """The figures of the rows of one unit.

    Attributes:
        groups: figures of the unit's rows, by task.
        durations: durations of the answered rows, by field of ``usage``, and ``WRITING``.
        counts: sums over the answered rows, by field of ``usage``.
        failures: failed rows, by error type and task.
        picks: candidates for the examples.
    """

    groups: Mapping[str, GroupFigures]
    durations: Mapping[str, Durations]
    counts: Mapping[str, int]
    failures: Mapping[tuple[str, str], Failure]
    picks: tuple[Pick, ...]


@dataclass(frozen=True)
class SampleSize:
    """The part of a set whose rows were read: its number of rows, failed ones included, and of units."""

    rows: int
    units: int


@dataclass
class SetFigures:
    """The figures of a set.

    The attributes that are not listed here are those of :class:`UnitFigures`, added up over the units that were read,
    with two differences: tasks beyond ``MOST_TASKS`` are merged into ``OTHERS``, and ``picks`` holds only the best
    candidates, by task and kind.

    Attributes:
        units: summaries of all units.
        sample: the part of the set that was read; None if it was read as a whole.
        failures: failed rows by error type and task; of a sampled set, those of all units, for ``ALL_TASKS``.
    """

    units: list[UnitSummary] = field(default_factory=list)
    sample: SampleSize | None = None
    groups: dict[str, GroupFigures] = field(default_factory=dict)
    durations: dict[str, Durations] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    failures: dict[tuple[str, str], Failure] = field(default_factory=dict)
    picks: dict[tuple[str, str], list[Pick]] = field(default_factory=dict)

    def add(self, part: UnitFigures) -> None:
        """Add the figures of one more unit that was read."""
        names = {}
        for task, group in part.groups.items():
            name = names[task] = self._choose_name(task)
            self.groups = add_up(self.groups, {name: group})
        for (kind, task), failure in part.failures.items():
            self.failures = add_up(self.failures, {(kind, names[task]): failure})
        self.durations = add_up(self.durations, part.durations)
        self.counts = add_up(self.counts, part.counts)
        keep_best(self.picks, part.picks, names)

    def _choose_name(self, task: str) -> str:
        return task if task in self.groups or len(self.groups) < MOST_TASKS else OTHERS

    @property
    def overall(self) -> GroupFigures:
        """Figures of all rows; the histograms are those of the rows that were read."""
        failed = sum(unit.failed for unit in self.units)
        rows = sum(unit.rows for unit in self.units) - failed
        spreads = sum(self.groups.values(), GroupFigures()).spreads
        return GroupFigures(rows, failed, sum(unit.retrieved for unit in self.units), spreads)

    @property
    def answered(self) -> int:
        """Number of answered rows that were read."""
        return sum(group.rows for group in self.groups.values())


def add_up(ours: Mapping[Any, Any], theirs: Mapping[Any, Any]) -> dict[Any, Any]:
    """Merge two mappings; the values of a key that is in both are added."""
    merged = dict(ours)
    for key, value in theirs.items():
        merged[key] = merged[key] + value if key in merged else value
    return merged


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading the files of a set.

    Attributes:
        columns: names of the columns of the query set.
        scores: lowest and highest score that the weights allow.
    """

    columns: Columns
    scores: tuple[float, float]

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "ReadOptions":
        """Derive the options from a run's manifest."""
        return cls(get_columns(manifest), compute_score_range(manifest))

    def get_limits(self, score: str) -> tuple[float, float]:
        """Return the lowest and highest possible value of one of ``SCORES``."""
        if score == "score":
            return self.scores
        return (-1.0, 1.0) if score == "is_use" else (0.0, 1.0)


def compute_score_range(manifest: Mapping[str, Any]) -> tuple[float, float]:
    """Return the lowest and highest segment score under the weights of the run and its tasks (paper, equation 4)."""
    settings = [task["decoding"] for task in manifest.get("tasks", {}).values()]
    settings.append(manifest.get("configuration", {}).get("decoding", {}))
    weights = [Weights.model_validate(decoding.get("weights", {})) for decoding in settings]
    high = max(w.sequence + w.relevance + w.support + w.utility for w in weights)
    return 0.0 - max(w.utility for w in weights), high or 1.0


def read_set(output: OutputFolder, reading: ReadOptions) -> SetFigures:
    """Compute the figures of an annotated set; units without a data file are unfinished and left out.

    Raises:
        ValueError: a column of the output is missing.
        StorageError: a file cannot be read.
    """
    units = find_units(output)
    chosen = choose_units(units)
    figures = SetFigures([member for unit in units for member in unit.members])
    for part in map_units(lambda unit: count_unit(unit, reading), chosen):
        figures.add(part)
    if len(chosen) < len(units):
        figures.sample = SampleSize(sum(unit.summary.rows for unit in chosen), len(chosen))
        figures.failures = _count_all_failures(units, figures.failures, reading)
    return figures


def _count_all_failures(
    units: Sequence[FinishedUnit], sampled: Mapping[tuple[str, str], Failure], reading: ReadOptions
) -> dict[tuple[str, str], Failure]:
    """Count the failed rows of all units by error type; one file is read for the message of each type not sampled."""
    messages: dict[str, str] = {}

    def keep_messages(failures: Mapping[tuple[str, str], Failure]) -> None:
        for (kind, _), failure in failures.items():
            messages.setdefault(kind, failure.message)

    keep_messages(sampled)
    rows: Counter[str] = Counter()
    for unit in units:
        rows.update(unit.summary.errors)
        if unit.summary.errors.keys() - messages.keys():
            keep_messages(_count_failures(unit, reading.columns.task))
    return {(kind, ALL_TASKS): Failure(count, messages.get(kind, "")) for kind, count in rows.items()}


def count_unit(unit: FinishedUnit, reading: ReadOptions) -> UnitFigures:
    """Compute the figures of the rows of one unit from its files.

    Raises:
        ValueError: a column of the output is missing.
        StorageError: a file cannot be read.
    """
    task = reading.columns.task
    rows = read_columns(unit.data, [task, *COUNTED])
    check_columns(unit.data, rows, ("retrieved", "retrieve_probability", "segments", "usage"))
    tasks, scores = _read_tasks(rows, task), compute_row_scores(rows)
    spent = rows["usage"].combine_chunks()
    usage = {name: to_floats(spent, name) for name in (*ROW_SECONDS, *REQUEST_SECONDS, *USAGE_COUNTS)}
    before = usage["decide_seconds"] + usage["retrieve_seconds"] + np.nan_to_num(usage["rerank_seconds"])
    writing = np.maximum(usage["seconds"] - before, 0.0)
    times = {name: usage[name] for name in (*ROW_SECONDS, *REQUEST_SECONDS)}
    times[WRITING] = writing
    failures = _count_failures(unit, task)
    return UnitFigures(
        groups=_group_rows(rows, tasks, failures, reading),
        durations={name: Durations.of(values) for name, values in times.items()},
        counts={name: int(np.nansum(usage[name])) for name in USAGE_COUNTS},
        failures=failures,
        picks=pick_rows(unit.data, tasks, scores, np.asarray(rows["retrieved"].fill_null(False))),
    )


def _read_tasks(rows: pa.Table, column: str) -> npt.NDArray[np.object_]:
    """Return the task of each row, object [N]; ``NOTHING`` for rows without one."""
    if column not in rows.column_names:
        return np.full(rows.num_rows, NOTHING, object)
    return np.array([name or NOTHING for name in rows[column].to_pylist()], object)


def to_floats(structures: pa.StructArray, name: str) -> Floats:
    """Return a field as float64 [N]; NaN where it is null, and everywhere if there is no such field."""
    if name not in [f.name for f in structures.type]:
        return np.full(len(structures), np.nan)
    values = pc.cast(pc.struct_field(structures, name), pa.float64())
    return np.asarray(values.to_numpy(zero_copy_only=False), np.float64)


def compute_row_scores(rows: pa.Table) -> Floats:
    """Return the score of each answer, float64 [N]: the mean score of its segments, or 0 if it has none."""
    segments, parents = _flatten_segments(rows)
    scores = np.nan_to_num(to_floats(segments, "score"))
    count = np.bincount(parents, minlength=rows.num_rows)
    total = np.bincount(parents, weights=scores, minlength=rows.num_rows)
    return np.asarray(total / np.maximum(count, 1), np.float64)


def _flatten_segments(rows: pa.Table) -> tuple[pa.StructArray, npt.NDArray[np.int64]]:
    """Return the segments of all rows, and the row number of each segment."""
    lists = rows["segments"].combine_chunks()
    return lists.flatten(), np.asarray(pc.list_parent_indices(lists), np.int64)


def _group_rows(
    rows: pa.Table,
    tasks: npt.NDArray[np.object_],
    failures: Mapping[tuple[str, str], Failure],
    reading: ReadOptions,
) -> dict[str, GroupFigures]:
    segments, parents = _flatten_segments(rows)
    values = {name: to_floats(segments, name) for name in SEGMENT_SCORES}
    probability = np.asarray(rows["retrieve_probability"].cast(pa.float64()), np.float64)
    retrieved = np.asarray(rows["retrieved"].fill_null(False))
    groups = {}
    for task in dict.fromkeys(tasks):
        here = tasks == task
        chosen = here[parents]
        spreads = {"retrieve_probability": Histogram.of(probability[here], *reading.get_limits("retrieve_probability"))}
        spreads |= {name: Histogram.of(found[chosen], *reading.get_limits(name)) for name, found in values.items()}
        groups[task] = GroupFigures(int(here.sum()), 0, int(retrieved[here].sum()), spreads)
    for (_, task), failure in failures.items():
        groups[task] = groups.get(task, GroupFigures()) + GroupFigures(errors=failure.rows)
    return groups


def _count_failures(unit: FinishedUnit, task: str) -> dict[tuple[str, str], Failure]:
    if not unit.errors:
        return {}
    failed = read_columns(unit.errors, [task, "error_type", "error_message"])
    found: dict[tuple[str, str], Failure] = {}
    kinds, messages = failed["error_type"].to_pylist(), failed["error_message"].to_pylist()
    for name, kind, message in zip(_read_tasks(failed, task), kinds, messages, strict=True):
        example = Failure(1, (message or "")[:LONGEST_MESSAGE])
        found[kind, name] = found[kind, name] + example if (kind, name) in found else example
    return found
