"""Count what an output holds, before anybody says that it is complete."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.output.folder import OutputFolder
from pipeline.output.unit_files import UnitSummary
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


def take_inventory(output: OutputFolder, rows: Mapping[str, int], run: str) -> Inventory:
    """Count the units of an output in their files.

    A unit that a store does not list yet is looked up by its name.

    Args:
        rows: number of rows by unit.
        run: digest of the run's identity.

    Raises:
        StorageError: a file cannot be read.
    """
    found = map_in_threads(lambda unit: output.read_unit(unit, run), rows)
    whole = tuple(unit for unit in found if unit and unit.rows == rows[unit.unit])
    there = output.list_unit_files("data").keys() | output.list_unit_files("errors").keys()
    known = frozenset(unit.unit for unit in whole)
    broken, strays = frozenset(there & rows.keys() - known), frozenset(there - rows.keys())
    return Inventory(whole, broken, strays, len(rows) - len(whole))


def complete_output(output: OutputFolder, rows: Mapping[str, int], run: str) -> list[UnitSummary]:
    """Return the summaries of all units, in the order of ``rows``, after a check that the output is complete.

    Files that are wrong are deleted, so that their units are annotated again; so are files of other units, which a run
    with other settings may have written after this one had replaced it.

    Raises:
        RuntimeError: rows are missing.
        StorageError: a file cannot be read.
    """
    found = take_inventory(output, rows, run)
    if not found.complete:
        output.reopen()
    for unit in sorted(found.broken | found.strays):
        log.warning("%s: the files of unit %s are deleted", output.location.uri, unit)
        output.withdraw(unit)
    if found.missing:
        raise RuntimeError(
            f"{output.location.uri}: {sum(unit.rows for unit in found.whole)} of {sum(rows.values())} rows are "
            f"complete, in {len(found.whole)} of {len(rows)} units; rerun the same command to continue"
        )
    return list(found.whole)
