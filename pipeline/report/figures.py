"""An annotated set's files → the figures of its report, in one pass that reads only the columns it counts.

Held at once: some kilobytes for each unit and for each task, and the columns of the units that are being read.
Texts are read for the examples alone, and where answers are compared with another set's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.sections import Columns, Weights
from pipeline.decoding.types import REQUEST_SECONDS, ROW_SECONDS, USAGE_COUNTS
from pipeline.evaluation.evaluate import NOTHING
from pipeline.output.folder import NO_ERRORS, OutputFolder, UnitSummary, columns_of, summarise_unit, unit_of
from pipeline.report.changes import Answers, hashed
from pipeline.report.durations import Durations, Floats
from pipeline.report.examples import Pick, keep, picks_of
from pipeline.storage.location import Location
from pipeline.storage.parquet import THREADS, map_in_threads, read_columns

SEGMENT_SCORES = ("is_rel", "is_sup", "is_use", "score")
SCORES = ("retrieve_probability", *SEGMENT_SCORES)
# What a row's seconds hold beside deciding and waiting for passages.
WRITING = "write_seconds"
COUNTED = [
    "retrieved",
    "retrieve_probability",
    *(f"segments.list.element.{name}" for name in SEGMENT_SCORES),
    *(f"usage.{name}" for name in (*ROW_SECONDS, *REQUEST_SECONDS, *USAGE_COUNTS)),
]
BINS = 20
# Tasks that are told apart; a column of other things than tasks must not fill the memory or the page.
MOST_TASKS = 30
OTHERS = "(others)"
LONGEST_MESSAGE = 500


@dataclass(frozen=True, eq=False)
class Spread:
    """How values are spread.

    Attributes:
        low, high: of all bins together; what lies outside is in the first or the last one.
        counts: int64 [BINS], values in bins of equal width.
        total: sum of the values.
        missing: places without a value.
    """

    low: float
    high: float
    counts: npt.NDArray[np.int64]
    total: float
    missing: int

    @classmethod
    def of(cls, values: Floats, low: float, high: float) -> "Spread":
        """Of some values; NaN counts as missing."""
        known = values[np.isfinite(values)]
        counts, _ = np.histogram(np.clip(known, low, high), bins=BINS, range=(low, high))
        return cls(low, high, counts, float(known.sum()), len(values) - len(known))

    def __add__(self, other: "Spread") -> "Spread":
        counts, total = self.counts + other.counts, self.total + other.total
        return Spread(self.low, self.high, counts, total, self.missing + other.missing)

    @property
    def values(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float | None:
        """None of no values."""
        return self.total / self.values if self.values else None


@dataclass(frozen=True)
class GroupFigures:
    """Figures of some rows.

    Attributes:
        rows: answered ones.
        errors: in ``errors/``.
        retrieved: answered with a passage.
        spreads: of :data:`SCORES`; ``retrieve_probability`` of rows, the others of the segments of their answers.
    """

    rows: int = 0
    errors: int = 0
    retrieved: int = 0
    spreads: Mapping[str, Spread] = field(default_factory=dict)

    def __add__(self, other: "GroupFigures") -> "GroupFigures":
        return GroupFigures(
            self.rows + other.rows,
            self.errors + other.errors,
            self.retrieved + other.retrieved,
            add_up(self.spreads, other.spreads),
        )

    @property
    def retrieval_rate(self) -> float | None:
        """Share of the answered rows that used a passage; None of no rows."""
        return self.retrieved / self.rows if self.rows else None

    @property
    def error_rate(self) -> float | None:
        """Share of all rows that failed; None of no rows."""
        return self.errors / (self.rows + self.errors) if self.rows + self.errors else None


@dataclass(frozen=True)
class Failure:
    """Error rows of one type and task, and what one of them says."""

    rows: int
    message: str

    def __add__(self, other: "Failure") -> "Failure":
        return Failure(self.rows + other.rows, self.message)


@dataclass(frozen=True)
class UnitFigures:
    """What the files of one unit hold.

    Attributes:
        groups: by task.
        durations: of its answered rows, by column of ``usage``.
        counts: columns of ``usage`` added up.
        failures: by error type and task.
        picks: rows that may become examples.
        answers: where they are to be compared.
    """

    unit: UnitSummary
    groups: Mapping[str, GroupFigures]
    durations: Mapping[str, Durations]
    counts: Mapping[str, int]
    failures: Mapping[tuple[str, str], Failure]
    picks: tuple[Pick, ...]
    answers: Answers | None


@dataclass
class SetFigures:
    """What the files of a set hold; attributes as those of :class:`UnitFigures`, over all units."""

    units: list[UnitSummary] = field(default_factory=list)
    groups: dict[str, GroupFigures] = field(default_factory=dict)
    durations: dict[str, Durations] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    failures: dict[tuple[str, str], Failure] = field(default_factory=dict)
    picks: dict[tuple[str, str], list[Pick]] = field(default_factory=dict)
    answers: list[Answers] = field(default_factory=list)

    def add(self, part: UnitFigures) -> None:
        """Count one more unit."""
        self.units.append(part.unit)
        names = {}
        for task, group in part.groups.items():
            name = names[task] = self._name(task)
            self.groups = add_up(self.groups, {name: group})
        for (kind, task), failure in part.failures.items():
            self.failures = add_up(self.failures, {(kind, names[task]): failure})
        self.durations = add_up(self.durations, part.durations)
        self.counts = add_up(self.counts, part.counts)
        keep(self.picks, part.picks, names)
        if part.answers is not None:
            self.answers.append(part.answers)

    def _name(self, task: str) -> str:
        return task if task in self.groups or len(self.groups) < MOST_TASKS else OTHERS

    @property
    def overall(self) -> GroupFigures:
        """All rows together."""
        return sum(self.groups.values(), GroupFigures())


def add_up(ours: Mapping[Any, Any], theirs: Mapping[Any, Any]) -> dict[Any, Any]:
    """Values of both, added up where both have one."""
    return {**ours, **{key: ours[key] + value if key in ours else value for key, value in theirs.items()}}


@dataclass(frozen=True)
class ReadOptions:
    """How a set's files are read.

    Attributes:
        scores: lowest and highest score that the weights allow.
        compared: hash the answers of the ids whose hash this number divides; of none at 0.
    """

    columns: Columns
    scores: tuple[float, float]
    compared: int = 0

    @classmethod
    def of(cls, manifest: Mapping[str, Any], compared: int = 0) -> "ReadOptions":
        """As a run's manifest says."""
        return cls(columns_of(manifest), score_range(manifest), compared)

    def limits(self, score: str) -> tuple[float, float]:
        """Between which values a score lies."""
        return self.scores if score == "score" else (-1.0, 1.0) if score == "is_use" else (0.0, 1.0)


def score_range(manifest: Mapping[str, Any]) -> tuple[float, float]:
    """Lowest and highest score of a segment under the weights of the run and of its tasks (paper, equation 4)."""
    settings = [task["decoding"] for task in manifest.get("tasks", {}).values()]
    settings.append(manifest.get("configuration", {}).get("decoding", {}))
    weights = [Weights.model_validate(decoding.get("weights", {})) for decoding in settings]
    high = max(w.sequence + w.relevance + w.support + w.utility for w in weights)
    return 0.0 - max(w.utility for w in weights), high or 1.0


def read_set(output: OutputFolder, reading: ReadOptions) -> SetFigures:
    """Add up what an annotated set holds; units without a data file are not finished, and do not count.

    Raises:
        ValueError: a column of the output is missing.
        StorageError: a file cannot be read.
    """
    failed = {unit_of(file): file for file in (output.location / "errors").files(".parquet")}
    figures = SetFigures()
    for part in _read(output.data_files(), failed, reading):
        figures.add(part)
    return figures


def _read(files: list[Location], failed: Mapping[str, Location], reading: ReadOptions) -> Iterator[UnitFigures]:
    for start in range(0, len(files), 4 * THREADS):  # bounds how many units' figures are in memory
        some = files[start : start + 4 * THREADS]
        yield from map_in_threads(lambda file: count_unit(file, failed.get(unit_of(file)), reading), some)


def count_unit(data: Location, errors: Location | None, reading: ReadOptions) -> UnitFigures:
    """Count one unit's files.

    Raises:
        ValueError: a column of the output is missing.
        StorageError: a file cannot be read.
    """
    task, texts = reading.columns.task, [reading.columns.id, "answer"] if reading.compared else []
    rows = read_columns(data, [task, *COUNTED, *texts])
    for name in ("retrieved", "retrieve_probability", "segments", "usage", *texts):
        if name not in rows.column_names:
            raise ValueError(f"{data.uri}: no column {name!r}; --annotations names the --output of jobs.annotate")
    failed = read_columns(errors, [task, "error_type", "error_message"]) if errors else NO_ERRORS
    tasks, scores = _tasks(rows, task), row_scores(rows)
    spent = rows["usage"].combine_chunks()
    usage = {name: numbers(spent, name) for name in (*ROW_SECONDS, *REQUEST_SECONDS, *USAGE_COUNTS)}
    writing = np.maximum(usage["seconds"] - usage["decide_seconds"] - usage["retrieve_seconds"], 0.0)
    times = {**{name: usage[name] for name in (*ROW_SECONDS, *REQUEST_SECONDS)}, WRITING: writing}
    failures = _failures(failed, task)
    return UnitFigures(
        unit=summarise_unit(unit_of(data), rows, failed),
        groups=_groups(rows, tasks, failures, reading),
        durations={name: Durations.of(values) for name, values in times.items()},
        counts={name: int(np.nansum(usage[name])) for name in USAGE_COUNTS},
        failures=failures,
        picks=picks_of(data, tasks, scores, np.asarray(rows["retrieved"].fill_null(False))),
        answers=hashed(rows[reading.columns.id], rows["answer"], reading.compared) if reading.compared else None,
    )


def _tasks(rows: pa.Table, column: str) -> npt.NDArray[np.object_]:
    """The task of each row, by name."""
    if column not in rows.column_names:
        return np.full(rows.num_rows, NOTHING, object)
    return np.array([name or NOTHING for name in rows[column].to_pylist()], object)


def numbers(structures: pa.StructArray, name: str) -> Floats:
    """A field as float64 [N]; NaN where it is null, or missing altogether."""
    if name not in [f.name for f in structures.type]:
        return np.full(len(structures), np.nan)
    values = pc.cast(pc.struct_field(structures, name), pa.float64())
    return np.asarray(values.to_numpy(zero_copy_only=False), np.float64)


def row_scores(rows: pa.Table) -> Floats:
    """The score of each answer, float64 [N]: the mean of its segments' scores; 0 without any."""
    segments, parents = _segments(rows)
    scores = np.nan_to_num(numbers(segments, "score"))
    count = np.bincount(parents, minlength=rows.num_rows)
    total = np.bincount(parents, weights=scores, minlength=rows.num_rows)
    return np.asarray(total / np.maximum(count, 1), np.float64)


def _segments(rows: pa.Table) -> tuple[pa.StructArray, npt.NDArray[np.int64]]:
    """All segments, and the row that each is of."""
    lists = rows["segments"].combine_chunks()
    return lists.flatten(), np.asarray(pc.list_parent_indices(lists), np.int64)


def _groups(
    rows: pa.Table,
    tasks: npt.NDArray[np.object_],
    failures: Mapping[tuple[str, str], Failure],
    reading: ReadOptions,
) -> dict[str, GroupFigures]:
    segments, parents = _segments(rows)
    values = {name: numbers(segments, name) for name in SEGMENT_SCORES}
    probability = np.asarray(rows["retrieve_probability"].cast(pa.float64()), np.float64)
    retrieved = np.asarray(rows["retrieved"].fill_null(False))
    groups = {}
    for task in dict.fromkeys(tasks):
        here = tasks == task
        chosen = here[parents]
        spreads = {"retrieve_probability": Spread.of(probability[here], *reading.limits("retrieve_probability"))}
        spreads |= {name: Spread.of(found[chosen], *reading.limits(name)) for name, found in values.items()}
        groups[task] = GroupFigures(int(here.sum()), 0, int(retrieved[here].sum()), spreads)
    for (_, task), failure in failures.items():
        groups[task] = groups.get(task, GroupFigures()) + GroupFigures(errors=failure.rows)
    return groups


def _failures(failed: pa.Table, task: str) -> dict[tuple[str, str], Failure]:
    if not failed.num_rows:
        return {}
    found: dict[tuple[str, str], Failure] = {}
    kinds, messages = failed["error_type"].to_pylist(), failed["error_message"].to_pylist()
    for name, kind, message in zip(_tasks(failed, task), kinds, messages, strict=True):
        example = Failure(1, (message or "")[:LONGEST_MESSAGE])
        found[kind, name] = found[kind, name] + example if (kind, name) in found else example
    return found
