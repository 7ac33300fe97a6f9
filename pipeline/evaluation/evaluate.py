"""Evaluates an annotated set: judges its rows and aggregates the metrics, overall and by the values of a column."""

import logging
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import dataset

from pipeline.config.sections import Columns, Profile
from pipeline.decoding.choose import match_choice
from pipeline.decoding.profiles import load_built_in_profiles
from pipeline.decoding.reflection import Retrieve
from pipeline.evaluation.judging import READ_COLUMNS, Judged, judge
from pipeline.evaluation.statistics import (
    Calibration,
    Difference,
    Estimate,
    JudgedPairs,
    compare,
    estimate,
    mean,
    measure_calibration,
)
from pipeline.evaluation.words import SplitPair, split_pair
from pipeline.output.folder import OutputFolder, get_columns
from pipeline.queries.schema import GOLD_TYPES, UNREADABLE, check_types
from pipeline.storage.location import Location

log = logging.getLogger(__name__)

NOTHING = "(none)"
Row = dict[str, Any]


@dataclass(frozen=True)
class Figures:
    """Aggregate figures of a set of rows.

    Attributes:
        rows: number of answered rows.
        errors: number of failed rows; the other figures leave them out.
        retrieval_rate: share of the answered rows that used a passage.
        metrics: estimates by metric, over the rows that have gold answers for it.
        isrel: calibration of p(Relevant); true if the candidate read the gold passage.
        issup: calibration of s(IsSup); true if the candidate gives a gold answer that a passage it read contains.
    """

    rows: int
    errors: int
    retrieval_rate: float | None
    metrics: dict[str, Estimate]
    isrel: Calibration | None
    issup: Calibration | None


@dataclass
class Tally:
    """Accumulates judged rows; keeps a few numbers and the id of each, so that millions of rows fit in memory.

    Attributes:
        errors: number of failed rows.
        retrieved: whether each answered row used a passage.
        metrics: ids of the rows and their values, by metric.
        relevance, support: (truth, probability) pairs of IsRel and of IsSup, by row, as in :class:`Judged`.
    """

    errors: int = 0
    retrieved: list[bool] = field(default_factory=list)
    metrics: "dict[str, tuple[list[str], array[float]]]" = field(default_factory=dict)
    relevance: list[JudgedPairs] = field(default_factory=list)
    support: list[JudgedPairs] = field(default_factory=list)

    def add(self, id_: str, row: Judged) -> None:
        """Add one answered row."""
        self.retrieved.append(row.retrieved)
        self.relevance.append(row.relevance)
        self.support.append(row.support)
        for name, value in row.metrics.items():
            ids, values = self.metrics.setdefault(name, ([], array("d")))
            ids.append(id_)
            values.append(value)

    def merge(self, other: "Tally") -> None:
        """Add the rows of another tally."""
        self.errors += other.errors
        self.retrieved.extend(other.retrieved)
        self.relevance.extend(other.relevance)
        self.support.extend(other.support)
        for name, (ids, values) in other.metrics.items():
            own_ids, own_values = self.metrics.setdefault(name, ([], array("d")))
            own_ids.extend(ids)
            own_values.extend(values)

    def get_values(self, metric: str) -> dict[str, float]:
        """Return the values of a metric by row id."""
        ids, values = self.metrics.get(metric, ([], array("d")))
        return dict(zip(ids, values, strict=True))

    def compute_figures(self) -> Figures:
        """Compute the figures of all rows."""
        return Figures(
            rows=len(self.retrieved),
            errors=self.errors,
            retrieval_rate=mean(self.retrieved),
            metrics={name: estimate(values) for name, (_, values) in self.metrics.items()},
            isrel=measure_calibration(self.relevance),
            issup=measure_calibration(self.support),
        )


@dataclass(frozen=True)
class Evaluation:
    """The judged rows of an annotated set.

    Attributes:
        annotations: URI of the annotated set.
        groups: tallies by the value of the grouping column.
    """

    annotations: str
    groups: Mapping[str, Tally]

    @cached_property
    def all(self) -> Tally:
        """The tally of all rows."""
        total = Tally()
        for tally in self.groups.values():
            total.merge(tally)
        return total

    @cached_property
    def overall(self) -> Figures:
        """The figures of all rows."""
        return self.all.compute_figures()

    @cached_property
    def by_group(self) -> dict[str, Figures]:
        """The figures of each group, by name."""
        return {name: self.groups[name].compute_figures() for name in sorted(self.groups)}

    def compare_with(self, other: "Evaluation") -> dict[str, Difference]:
        """Subtract another set's metrics: paired differences over the rows with equal ids, by metric."""
        found = {name: compare(self.all.get_values(name), other.all.get_values(name)) for name in self.all.metrics}
        return {name: difference for name, difference in found.items() if difference is not None}


View = Callable[[Row], Row | None]


def keep_row(row: Row) -> Row:
    """Return the row unchanged."""
    return row


def answer_from_first_passage(row: Row) -> Row | None:
    """Return the row with its answer from the top-ranked passage alone.

    None for answers of several segments, and for those from passages that were read together.
    """
    if any(c.get("beside") for c in row.get("candidates") or ()):
        return None
    return _replace_answer(row, lambda c: c["rank"] == 1, retrieved=True)


def answer_without_retrieval(row: Row) -> Row | None:
    """Return the row with the answer without retrieval, if it was explored; None for answers of several segments."""
    return _replace_answer(row, lambda c: c["opening"] == Retrieve.NO, retrieved=False)


def _replace_answer(row: Row, wanted: Callable[[Row], bool], retrieved: bool) -> Row | None:
    """Return the row with the first wanted candidate as its answer, unchanged if there is none.

    None if a candidate continues another one.
    """
    candidates = row.get("candidates") or []
    if any(c["parent"] is not None for c in candidates):
        return None
    text = next((c["text"] for c in candidates if wanted(c)), None)
    if text is None:
        return row
    read: Row = {} if retrieved else {"candidates": []}
    answer = match_choice(text, row.get("choices") or ()) or text
    return {**row, "answer": answer, "retrieved": retrieved and bool(text), **read}


def evaluate_set(
    folder: Location,
    by: str | None = None,
    task: str | None = None,
    view: View = keep_row,
    split: SplitPair = split_pair,
) -> Evaluation:
    """Judge the annotated set in a folder.

    Args:
        by: column to group by; by default the column of the tasks.
        task: task to evaluate; by default all rows are evaluated.
        view: function applied to each row first, such as :func:`answer_from_first_passage`; rows for which it returns
            None are left out.
        split: splits answers and gold answers into words.

    Raises:
        ValueError: the folder has no annotated set or no rows of the task, or a column is missing or of the wrong
            type.
        OSError: the set cannot be read.
    """
    manifest = OutputFolder(folder).read_manifest() or {}
    columns = get_columns(manifest)
    groups: defaultdict[str, Tally] = defaultdict(Tally)
    group = by or columns.task
    wanted = [columns.id, columns.task, columns.choices, group, *READ_COLUMNS]
    required = [columns.id, "answer", "retrieved", *([by] if by else [])]
    for row in iterate_rows(folder / "data", wanted, required):
        if task in (None, row.get(columns.task)) and (seen := view(row)) is not None:
            judged = judge(seen, *_find_grading(row, columns, manifest.get("tasks", {})), split)
            groups[_get_group(row, group)].add(row[columns.id], judged)
    for row in iterate_rows(folder / "errors", [columns.task, group], required=None):
        if task in (None, row.get(columns.task)):
            groups[_get_group(row, group)].errors += 1
    if not groups:
        raise ValueError(f"{folder.uri}: no rows of task {task!r}" if task else f"{folder.uri}: no rows")
    if not (folder / "_SUCCESS").exists():
        log.warning("%s has no _SUCCESS: its run is not finished", folder.uri)
    if not any(tally.metrics for tally in groups.values()):
        log.warning(
            "%s has no gold answers or passages (columns %s): nothing can be graded", folder.uri, ", ".join(GOLD_TYPES)
        )
    return Evaluation(folder.uri, groups)


def _get_group(row: Row, by: str) -> str:
    value = row.get(by)
    return NOTHING if value is None else str(value)


def _find_grading(row: Row, columns: Columns, tasks: Mapping[str, Any]) -> tuple[str, bool, bool]:
    """Return the headline metric of a row's task, whether its set of answers is closed, and whether answers cite."""
    name = row.get(columns.task) or ""
    if name in tasks:
        task = tasks[name]
        metric, choices, cites = task["metric"], task["choices"], task["decoding"]["citations"]
    else:
        profile = load_built_in_profiles().get(name, Profile())
        metric, choices, cites = profile.metric, profile.choices, bool(profile.decoding.get("citations"))
    return metric, bool(row.get(columns.choices) or choices), cites


def iterate_rows(folder: Location, columns: list[str], required: list[str] | None) -> Iterator[Row]:
    """Yield the rows of a folder's Parquet files; missing columns are left out.

    Args:
        columns: columns to read.
        required: columns that must exist; None if the folder may be missing as well.

    Raises:
        ValueError: there are no files, a required column is missing, or a gold column is of the wrong type.
    """
    files = folder.list_files(".parquet")
    if not files:
        if required is not None:
            raise ValueError(f"{folder.uri}: no Parquet files; pass the --output of jobs.annotate as --annotations")
        return
    data = dataset.dataset([file.path for file in files], filesystem=folder.filesystem, format="parquet")
    missing = [name for name in required or () if name not in data.schema.names]
    if missing:
        raise ValueError(f"{folder.uri}: no column {missing[0]!r}; it has {', '.join(data.schema.names)}")
    check_types(data.schema, GOLD_TYPES, folder.uri)
    for batch in data.to_batches(columns=[name for name in dict.fromkeys(columns) if name in data.schema.names]):
        values = [_read_column(batch, name, folder) for name in batch.schema.names]
        for row in zip(*values, strict=True):
            yield dict(zip(batch.schema.names, row, strict=True))


def _read_column(batch: pa.RecordBatch, name: str, folder: Location) -> list[Any]:
    try:
        return list(_format_times(batch[name]).to_pylist())
    except UNREADABLE as error:
        raise ValueError(f"{folder.uri}: column {name!r} has a value that cannot be read: {error}") from None


def _format_times(values: pa.Array) -> pa.Array:
    """Convert dates and times, of which Python holds only some, to text; times of a zone in UTC."""
    kind = values.type
    if not pa.types.is_temporal(kind) or pa.types.is_interval(kind):
        return values
    if pa.types.is_timestamp(kind):
        values = values.cast(pa.timestamp(kind.unit))
    texts = values.cast(pa.string())
    return pc.binary_join_element_wise(texts, kind.unit, " ") if pa.types.is_duration(kind) else texts
