"""Finds the units of an annotated set, and chooses those whose rows a report reads."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

from pipeline.output.compacted import read_members
from pipeline.output.folder import OutputFolder
from pipeline.output.unit_files import NO_ERRORS, UnitSummary, summarize_unit
from pipeline.output.unit_log import read_units
from pipeline.storage.location import Location
from pipeline.storage.parquet import THREADS, map_in_threads, read_columns

log = logging.getLogger(__name__)

# A report reads about this many rows at most, in a few minutes; of a larger set, it reads whole units as a sample.
MOST_ROWS = 1_000_000

# Units read at once: enough for a store that answers slowly, and few enough for the driver's memory.
BATCH_UNITS = 4 * THREADS
BATCH_ROWS = 150_000

Result = TypeVar("Result")


@dataclass(frozen=True)
class FinishedUnit:
    """A unit that has a data file.

    Attributes:
        summary: summary of the unit.
        data: its data file.
        errors: its errors file, if it has one.
        members: summaries of the run's units that its files hold; of a set that is not compacted, its own.
    """

    summary: UnitSummary
    data: Location
    errors: Location | None
    members: tuple[UnitSummary, ...]


def find_units(output: OutputFolder) -> list[FinishedUnit]:
    """Find the finished units of a set and their summaries, in the order of their ids.

    The data files decide which units are finished. The summary of a unit is the one in the log of the run, if its data
    file has the size in there. Otherwise it is read from the unit's files, as of units that a run at work has finished
    since it last wrote the log.

    Raises:
        ValueError: a column of the output is missing.
        StorageError: a file cannot be read.
    """
    logged = _read_log(output)
    data, errors = output.list_unit_files("data"), output.list_unit_files("errors")
    unknown = [unit for unit, file in data.items() if unit not in logged or not logged[unit].has_size_of(file)]
    read = map_in_threads(lambda unit: _read_summary(unit, data[unit], errors.get(unit)), unknown)
    summaries = logged | dict(zip(unknown, read, strict=True))
    members: dict[str, tuple[UnitSummary, ...]] = {unit: (summary,) for unit, summary in summaries.items()}
    members |= {file: tuple(units) for file, units in read_members(output.location).items()}
    return [FinishedUnit(summaries[unit], file, errors.get(unit), members[unit]) for unit, file in data.items()]


def _read_log(output: OutputFolder) -> dict[str, UnitSummary]:
    try:
        return read_units(output.location)
    except ValueError as problem:
        log.warning("%s (the report reads the files of the units instead)", problem)
        return {}


def _read_summary(unit: str, data: Location, errors: Location | None) -> UnitSummary:
    """Read the summary in the metadata of a unit's data file; without one, as in older sets, count the rows."""
    if kept := UnitSummary.from_metadata(read_columns(data, []).schema.metadata):
        return kept
    rows = read_columns(data, ["retrieved", "usage.generated_tokens", "usage.prompt_tokens", "carried_from"])
    check_columns(data, rows, ["retrieved", "usage"])
    return summarize_unit(unit, rows, read_columns(errors, ["error_type"]) if errors else NO_ERRORS)


def check_columns(data: Location, rows: pa.Table, names: Iterable[str]) -> None:
    """Check that columns of a data file were there to read.

    Raises:
        ValueError: one is missing.
    """
    for name in names:
        if name not in rows.column_names:
            raise ValueError(f"{data.uri}: no column {name!r}; pass the --output of jobs.annotate as --annotations")


def choose_units(units: Sequence[FinishedUnit]) -> list[FinishedUnit]:
    """Choose the units whose rows are read: all, or the first ones, of at most ``MOST_ROWS`` rows but at least one.

    Args:
        units: the finished units. They are taken in the order of the last digits of their ids, which are those of a
            digest: this order tells nothing about the rows, and the same units are chosen each time.
    """
    chosen, rows = [], 0
    for unit in sorted(units, key=lambda unit: unit.summary.unit[::-1]):
        if rows and rows + unit.summary.rows > MOST_ROWS:
            break
        chosen.append(unit)
        rows += unit.summary.rows
    return chosen


def map_units(work: Callable[[FinishedUnit], Result], units: Iterable[FinishedUnit]) -> Iterator[Result]:
    """Map a function over units in threads; results in the order of the units.

    A batch of units at a time is in memory: at most ``BATCH_UNITS``, of at most ``BATCH_ROWS`` rows unless one alone
    has more.
    """
    batch: list[FinishedUnit] = []
    rows = 0
    for unit in units:
        if len(batch) == BATCH_UNITS or (batch and rows + unit.summary.rows > BATCH_ROWS):
            yield from map_in_threads(work, batch)
            batch, rows = [], 0
        batch.append(unit)
        rows += unit.summary.rows
    yield from map_in_threads(work, batch)
