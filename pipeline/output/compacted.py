"""The record of a compacted set: which units of its run lie in which of its files, and where.

A compacted set has the form of any other: ``data/``, ``errors/``, and a list of units with their summaries. Its files
hold several units of the run each, one after another in the order of the queries, as row groups. What the run has
measured of its units is kept beside them.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa

from pipeline.output.folder import COMPACTED, OutputFolder
from pipeline.output.inventory import Inventory, take_inventory
from pipeline.output.unit_files import NO_ERRORS, UnitSummary
from pipeline.output.unit_log import SCHEMA, UNITS, decode_units, encode_units, read_units
from pipeline.storage.location import Location, MissingFileError
from pipeline.storage.parquet import RowRange, encode_parquet, read_checked, read_row_range

# Column of the record for the id of the file that holds a unit.
FILE = pa.field("file", pa.string())

# The units of the run in each file of a compacted set, in their order; by the id of the file.
Members = Mapping[str, Sequence[UnitSummary]]


def read_members(output: Location) -> dict[str, list[UnitSummary]]:
    """Read which units of the run lie in which file, in the order of the queries; empty if the set is not compacted.

    Raises:
        ValueError: the record is damaged, or of another version.
        StorageError: it cannot be read.
    """
    file = output / COMPACTED
    try:
        table = read_checked(file)
    except MissingFileError:
        return {}
    if not table.schema.equals(pa.schema([FILE, *SCHEMA])):
        raise ValueError(f"{file.uri}: not the record of a compacted set of this version")
    found: dict[str, list[UnitSummary]] = {}
    units = decode_units(table.drop_columns(FILE.name), file)
    for name, unit in zip(table[FILE.name].to_pylist(), units, strict=True):
        found.setdefault(name, []).append(unit)
    return found


def write_members(output: Location, members: Members) -> None:
    """Write which units of the run lie in which file."""
    names = [name for name, units in members.items() for _ in units]
    table = encode_units(unit for units in members.values() for unit in units)
    (output / COMPACTED).write(encode_parquet(table.add_column(0, FILE, pa.array(names, FILE.type))))


def read_run_units(output: Location) -> dict[str, UnitSummary]:
    """Read the summaries of the units as the run annotated them, whatever file they lie in, by unit.

    Raises:
        ValueError: the list is damaged, or of another version.
        StorageError: it cannot be read.
    """
    members = read_members(output)
    return {unit.unit: unit for units in members.values() for unit in units} if members else read_units(output)


def name_file(number: int, units: Sequence[UnitSummary]) -> str:
    """Return the id of a compacted file, which depends on the attempts that annotated its units.

    Files sorted by name are in the order of the queries.

    Args:
        number: number of the file in the set, from 0.
        units: the units of the run that it holds.
    """
    content = "".join(f"{unit.unit}:{unit.attempt}:{unit.rows}:{unit.failed}:{unit.data_bytes};" for unit in units)
    return f"{number:08x}{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def join_summaries(name: str, units: Sequence[UnitSummary]) -> UnitSummary:
    """Return the summary of a file that holds units of the run; the actors' times are kept with the units alone."""
    errors: dict[str, int] = {}
    for unit in units:
        errors = {kind: errors.get(kind, 0) + unit.errors.get(kind, 0) for kind in [*errors, *unit.errors]}
    return UnitSummary(
        unit=name,
        rows=sum(unit.rows for unit in units),
        errors=errors,
        retrieved=sum(unit.retrieved for unit in units),
        generated_tokens=sum(unit.generated_tokens for unit in units),
        prompt_tokens=sum(unit.prompt_tokens for unit in units),
        carried=sum(unit.carried for unit in units),
        run=units[0].run,
    )


@dataclass(frozen=True)
class PlacedUnit:
    """The place of the rows of a unit of the run.

    Attributes:
        summary: summary of the unit.
        file: id of the file, in ``data`` and ``errors``, that holds it.
        answers: its rows in ``data``.
        failures: its rows in ``errors``; empty if no row has failed.
        answered, failed: number of rows that the two files hold.
    """

    summary: UnitSummary
    file: str
    answers: RowRange
    failures: RowRange
    answered: int
    failed: int

    def read_answers(self, columns: list[str] | None = None) -> pa.Table:
        """Read its answered rows.

        Raises:
            ValueError: the file is damaged, or has other rows.
            StorageError: the file cannot be read.
        """
        return read_row_range(self.answers, self.answered, columns)

    def read_failures(self) -> pa.Table:
        """Read its failed rows; raises what :meth:`read_answers` raises."""
        return read_row_range(self.failures, self.failed) if self.failures.rows else NO_ERRORS


def locate_units(output: OutputFolder) -> dict[str, PlacedUnit]:
    """Locate the rows of the units of a finished set, in the order of the queries, whether it is compacted or not.

    Raises:
        ValueError: the list of the units is damaged, or of another version.
        StorageError: the storage cannot be read.
    """
    place = output.location
    members = read_members(place) or {unit: [summary] for unit, summary in read_units(place).items()}
    return {rows.summary.unit: rows for name, units in members.items() for rows in locate_members(output, name, units)}


def check_listed_files(output: OutputFolder) -> dict[str, Location]:
    """Return the data files of a finished set by their ids, after a check that they are those that it lists.

    Raises:
        ValueError: a file is missing, or there is one that the set does not list.
        StorageError: the storage cannot be read.
    """
    listed, files = read_units(output.location), output.list_unit_files("data")
    if differing := sorted(files.keys() ^ listed.keys()):
        raise ValueError(
            f"{output.location.uri}: {len(differing)} units are in {UNITS} or in data/, but not in both "
            f"({differing[0]!r}); selfrag verify names the way to repair the set"
        )
    return files


def count_compacted(output: OutputFolder, rows: int, run: str) -> Inventory:
    """Count the files of a compacted set.

    Args:
        rows: number of rows of the query set.
        run: digest of the run's identity.

    Raises:
        ValueError: the set is not whole; a run cannot repair it.
        StorageError: a file cannot be read.
    """
    files, place = read_units(output.location), output.location.uri
    remedy = "repeat the compaction, restore its files from a copy, or replace it with --overwrite"
    if problem := find_record_problem(output, files):
        raise ValueError(f"{place} was compacted, and {problem}; {remedy}")
    found = take_inventory(output, {name: file.rows for name, file in files.items()}, run, files)
    counted = sum(file.rows for file in found.whole)
    if not found.complete or counted != rows:
        raise ValueError(f"{place} was compacted, and {counted} of {rows} rows are complete; {remedy}")
    return found


def find_record_problem(output: OutputFolder, files: Mapping[str, UnitSummary]) -> str | None:
    """Name what is wrong with the record of a compacted set; None if it agrees with the list of its files.

    Raises:
        StorageError: a file cannot be read.
    """
    if not output.is_finished():
        return "its compaction has not ended"
    try:
        members = read_members(output.location)
    except ValueError as problem:
        return str(problem)
    counted = {name: sum(unit.rows for unit in units) for name, units in members.items()}
    return (
        None if counted == {name: file.rows for name, file in files.items()} else f"{COMPACTED} does not list its files"
    )


def locate_members(output: OutputFolder, name: str, units: Sequence[UnitSummary]) -> Iterator[PlacedUnit]:
    """Locate the rows of the units that a file holds, in their order, given the file's id."""
    data, errors = (output.locate_unit_file(folder, name) for folder in ("data", "errors"))
    answered = [0, *accumulate(unit.rows - unit.failed for unit in units)]
    failed = [0, *accumulate(unit.failed for unit in units)]
    for number, unit in enumerate(units):
        answers = RowRange(data, answered[number], answered[number + 1])
        failures = RowRange(errors, failed[number], failed[number + 1])
        yield PlacedUnit(unit, name, answers, failures, answered[-1], failed[-1])
