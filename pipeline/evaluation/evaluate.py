"""An annotated set → figures: its rows judged one by one, added up overall and by a column."""

import logging
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pyarrow import dataset

from pipeline.config.sections import Columns, Profile
from pipeline.decoding.choose import closed_answer
from pipeline.decoding.profiles import built_in_profiles
from pipeline.decoding.reflection import Retrieve
from pipeline.evaluation.judging import READ_COLUMNS, Judged, judge
from pipeline.evaluation.statistics import Calibration, Difference, Estimate, calibration, compare, estimate, mean
from pipeline.output.folder import OutputFolder, columns_of
from pipeline.queries.schema import GOLD_TYPES, check_types
from pipeline.storage.location import Location

log = logging.getLogger(__name__)

NOTHING = "(none)"
Row = dict[str, Any]


@dataclass(frozen=True)
class Figures:
    """Figures of some rows.

    Attributes:
        rows: answered rows.
        errors: rows that failed; they are in none of the figures below.
        retrieval_rate: share of the answered rows that used a passage.
        metrics: by name, over the rows that have gold for them.
        isrel: p(Relevant) against being the gold passage.
        issup: s(IsSup) against the passage bearing a gold answer that the candidate gives.
    """

    rows: int
    errors: int
    retrieval_rate: float | None
    metrics: dict[str, Estimate]
    isrel: Calibration | None
    issup: Calibration | None


@dataclass
class Tally:
    """Judged rows added up: some numbers for each, and its id once, so that a set of millions fits.

    Attributes:
        metrics: for each, the ids of the rows that have it and its values.
    """

    errors: int = 0
    retrieved: list[bool] = field(default_factory=list)
    metrics: "dict[str, tuple[list[str], array[float]]]" = field(default_factory=dict)
    relevance: list[tuple[bool, float]] = field(default_factory=list)
    support: list[tuple[bool, float]] = field(default_factory=list)

    def add(self, id_: str, row: Judged) -> None:
        """Count one answered row."""
        self.retrieved.append(row.retrieved)
        self.relevance.extend(row.relevance)
        self.support.extend(row.support)
        for name, value in row.metrics.items():
            ids, values = self.metrics.setdefault(name, ([], array("d")))
            ids.append(id_)
            values.append(value)

    def merge(self, other: "Tally") -> None:
        """Count another tally's rows too."""
        self.errors += other.errors
        self.retrieved.extend(other.retrieved)
        self.relevance.extend(other.relevance)
        self.support.extend(other.support)
        for name, (ids, values) in other.metrics.items():
            own_ids, own_values = self.metrics.setdefault(name, ([], array("d")))
            own_ids.extend(ids)
            own_values.extend(values)

    def values(self, metric: str) -> dict[str, float]:
        """A metric by id."""
        ids, values = self.metrics.get(metric, ([], array("d")))
        return dict(zip(ids, values, strict=True))

    def figures(self) -> Figures:
        """The figures of all rows."""
        return Figures(
            rows=len(self.retrieved),
            errors=self.errors,
            retrieval_rate=mean(self.retrieved),
            metrics={name: estimate(values) for name, (_, values) in self.metrics.items()},
            isrel=calibration(self.relevance),
            issup=calibration(self.support),
        )


@dataclass(frozen=True)
class Evaluation:
    """An annotated set, judged.

    Attributes:
        annotations: its URI.
        groups: its rows by the value of a column.
    """

    annotations: str
    groups: Mapping[str, Tally]

    @cached_property
    def all(self) -> Tally:
        """All rows together."""
        total = Tally()
        for tally in self.groups.values():
            total.merge(tally)
        return total

    @cached_property
    def overall(self) -> Figures:
        """Figures of all rows."""
        return self.all.figures()

    @cached_property
    def by_group(self) -> dict[str, Figures]:
        """Figures of each group, by name."""
        return {name: self.groups[name].figures() for name in sorted(self.groups)}

    def against(self, other: "Evaluation") -> dict[str, Difference]:
        """Paired differences to another set's rows of the same ids, by metric."""
        found = {name: compare(self.all.values(name), other.all.values(name)) for name in self.all.metrics}
        return {name: difference for name, difference in found.items() if difference is not None}


View = Callable[[Row], Row | None]


def as_it_is(row: Row) -> Row:
    """The row that was annotated."""
    return row


def first_passage(row: Row) -> Row | None:
    """The row as it would be had the model believed the first passage found; None for answers of several segments."""
    return _instead(row, lambda c: c["rank"] == 1, retrieved=True)


def without_retrieval(row: Row) -> Row | None:
    """The row as it would be without any passage, where its run explored; None for answers of several segments."""
    return _instead(row, lambda c: c["opening"] == Retrieve.NO, retrieved=False)


def _instead(row: Row, wanted: Callable[[Row], bool], retrieved: bool) -> Row | None:
    """The row with another of its first candidates as its answer; as it is where there is none such."""
    candidates = row.get("candidates") or []
    if any(c["parent"] is not None for c in candidates):
        return None
    text = next((c["text"] for c in candidates if wanted(c)), None)
    if text is None:
        return row
    read: Row = {} if retrieved else {"candidates": []}
    return {**row, "answer": closed_answer(text, row.get("choices") or ()) or text, "retrieved": retrieved, **read}


def evaluate_set(folder: Location, by: str | None = None, task: str | None = None, view: View = as_it_is) -> Evaluation:
    """Judge the annotated set in a folder.

    Args:
        by: column to group by; the task's by default.
        task: take the rows of this task only.
        view: applied to each row first, such as :func:`first_passage`; rows that it has none for are left out.

    Raises:
        ValueError: no annotated set there, a column is missing or of the wrong type, or no rows of the task.
        OSError: it cannot be read.
    """
    manifest = OutputFolder(folder).manifest() or {}
    columns = columns_of(manifest)
    groups: defaultdict[str, Tally] = defaultdict(Tally)
    group = by or columns.task
    wanted = [columns.id, columns.task, columns.choices, group, *READ_COLUMNS]
    required = [columns.id, "answer", "retrieved", *([by] if by else [])]
    for row in rows_of(folder / "data", wanted, required):
        if task in (None, row.get(columns.task)) and (seen := view(row)) is not None:
            judged = judge(seen, *_judged_as(row, columns, manifest.get("tasks", {})))
            groups[_group(row, group)].add(row[columns.id], judged)
    for row in rows_of(folder / "errors", [columns.task, group], required=None):
        if task in (None, row.get(columns.task)):
            groups[_group(row, group)].errors += 1
    if not groups:
        raise ValueError(f"{folder.uri}: no rows of task {task!r}" if task else f"{folder.uri}: no rows")
    if not (folder / "_SUCCESS").exists():
        log.warning("%s has no _SUCCESS: the run that writes it is not finished", folder.uri)
    if not any(tally.metrics for tally in groups.values()):
        log.warning("%s has no gold (columns %s): nothing can be graded", folder.uri, ", ".join(GOLD_TYPES))
    return Evaluation(folder.uri, groups)


def _group(row: Row, by: str) -> str:
    value = row.get(by)
    return NOTHING if value is None else str(value)


def _judged_as(row: Row, columns: Columns, tasks: Mapping[str, Any]) -> tuple[str, bool, bool]:
    """The metric that the row's task is known by, whether it has a closed set, and whether it cites."""
    name = row.get(columns.task) or ""
    if name in tasks:
        metric, choices, cites = tasks[name]["metric"], tasks[name]["choices"], tasks[name]["decoding"]["citations"]
    else:
        profile = built_in_profiles().get(name, Profile())
        metric, choices, cites = profile.metric, profile.choices, bool(profile.decoding.get("citations"))
    return metric, bool(row.get(columns.choices) or choices), cites


def rows_of(folder: Location, columns: list[str], required: list[str] | None) -> Iterator[Row]:
    """Rows of a folder's Parquet files, with those of the columns that are there.

    Args:
        required: columns that must be there; None where the folder itself may be missing.

    Raises:
        ValueError: there are no files, a column is missing, or one of gold is of the wrong type.
    """
    files = folder.files(".parquet")
    if not files:
        if required is not None:
            raise ValueError(f"{folder.uri}: no Parquet files; --annotations names the --output of jobs.annotate")
        return
    data = dataset.dataset([file.path for file in files], filesystem=folder.filesystem, format="parquet")
    missing = [name for name in required or () if name not in data.schema.names]
    if missing:
        raise ValueError(f"{folder.uri}: no column {missing[0]!r}; it has {', '.join(data.schema.names)}")
    check_types(data.schema, GOLD_TYPES, folder.uri)
    for batch in data.to_batches(columns=[name for name in dict.fromkeys(columns) if name in data.schema.names]):
        yield from batch.to_pylist()
