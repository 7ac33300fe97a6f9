"""Count what an output holds, before anybody says that it is complete."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pipeline.output.folder import OutputFolder
from pipeline.output.unit_files import UnitSummary
from pipeline.storage.location import Location
from pipeline.storage.parquet import map_in_threads

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inventory:
    """The units of an output.

    Attributes:
        whole: summaries of the units of the run that have all their rows, in the run's order.
        broken: ids of units of the run whose files are wrong or do not belong together.
        strays: ids of units that are not the run's.
        missing: number of units of the run that are not whole.
    """

    whole: tuple[UnitSummary, ...]
    broken: frozenset[str]
    strays: frozenset[str]
    missing: int

    @property
    def complete(self) -> bool:
        """Whether the output holds all rows of the run, once, and nothing else."""
        return not (self.missing or self.strays)


EMPTY = Inventory((), frozenset(), frozenset(), 0)


def take_inventory(
    output: OutputFolder,
    rows: Mapping[str, int],
    run: str,
    logged: Mapping[str, UnitSummary],
    look_up: bool = False,
) -> Inventory:
    """Count the units of an output.

    A logged unit without errors counts if its data file has the logged size. The files of the others are opened, since
    attempts that differ in the rows that failed may have written one of them each.

    Args:
        rows: number of rows by unit.
        run: digest of the run's identity.
        logged: summaries of units by unit, from the log.
        look_up: whether to look up units by their names that the store does not list, or not yet.

    Raises:
        StorageError: a file cannot be read.
    """
    data, errors = output.list_unit_files("data"), output.list_unit_files("errors")

    def find(unit: str) -> UnitSummary | None:
        known = logged.get(unit)
        if known and known.run == run and not known.failed and unit not in errors and known.has_size_of(data.get(unit)):
            return known
        found = output.read_unit(unit, run) if look_up or unit in data else None
        return _note_size(found, data.get(unit)) if found else None

    found = map_in_threads(find, rows)
    whole = tuple(unit for unit in found if unit and unit.rows == rows[unit.unit])
    there, known = data.keys() | errors.keys(), {unit.unit for unit in whole}
    broken, strays = frozenset(there & rows.keys() - known), frozenset(there - rows.keys())
    return Inventory(whole, broken, strays, len(rows) - len(whole))


def _note_size(unit: UnitSummary, file: Location | None) -> UnitSummary:
    return replace(unit, data_bytes=file.stamp.size) if file and file.stamp else unit


def complete_output(
    output: OutputFolder, rows: Mapping[str, int], run: str, logged: Mapping[str, UnitSummary]
) -> tuple[UnitSummary, ...]:
    """Return the summaries of all units, in the order of ``rows``, after a check that the output is complete.

    Files that are wrong are deleted, so that their units are annotated again; so are files of other units, which a run
    with other settings may have written after this one had replaced it.

    Raises:
        RuntimeError: rows are missing.
        StorageError: a file cannot be read.
    """
    found = take_inventory(output, rows, run, logged, look_up=True)
    for unit in sorted(found.broken | found.strays):
        log.warning("%s: the files of unit %s are deleted", output.location.uri, unit)
        output.withdraw(unit)
    if found.missing:
        raise RuntimeError(
            f"{output.location.uri}: {sum(unit.rows for unit in found.whole)} of {sum(rows.values())} rows are "
            f"complete, in {len(found.whole)} of {len(rows)} units; rerun the same command to continue"
        )
    return found.whole
