"""Read every page of an annotated set, and compare its rows with its manifest and with the ids that were planned."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.output.compacted import find_record_problem
from pipeline.output.folder import OutputFolder, get_columns, hash_identity
from pipeline.output.unit_files import UnitSummary, is_unit_file, parse_unit_id
from pipeline.output.unit_log import UNITS, read_units
from pipeline.storage.hashes import HashRuns, hash_texts
from pipeline.storage.location import Location, StorageError, join_lines
from pipeline.storage.parquet import THREADS, open_pages, read_batches, read_parquet

log = logging.getLogger(__name__)

PROGRESS_S = 10.0


NO_IDS = pa.chunked_array([], pa.large_string())

# The ids of the rows of each unit: large_string.
PlannedIds = Mapping[str, pa.ChunkedArray]


@dataclass(frozen=True)
class Problem:
    """A fault of an annotated set.

    Attributes:
        text: one line that begins with the URI of the file.
        delete: URI of the file to delete, so that the command that wrote the set repairs it; None if there is none.
    """

    text: str
    delete: str | None = None


@dataclass(frozen=True)
class Verified:
    """The outcome of a verification.

    Attributes:
        output: URI of the set.
        units: number of units without a fault.
        rows: number of their rows.
        errors: number of these in ``errors/``.
        compared: whether the ids were compared with those of the query set.
        problems: all faults; empty if the set is whole.
        compacted: whether the set was compacted: its units are then files of several units of the run.
    """

    output: str
    units: int
    rows: int
    errors: int
    compared: bool
    problems: tuple[Problem, ...]
    compacted: bool = False

    def list_deletions(self) -> list[str]:
        """List the files to delete, each once."""
        return list(dict.fromkeys(problem.delete for problem in self.problems if problem.delete))


@dataclass(frozen=True)
class UnitFiles:
    """The files of a unit that has a data file; ``errors`` is None if no row has failed."""

    id: str
    data: Location
    errors: Location | None


@dataclass(frozen=True)
class CheckedUnit:
    """The outcome of a unit.

    Attributes:
        files: files of the unit.
        rows: number of rows.
        errors: number of these in ``errors/``.
        compared: whether the ids were compared with those of the query set.
        fault: its fault, if it has one; the numbers are then 0.
    """

    files: UnitFiles
    rows: int = 0
    errors: int = 0
    compared: bool = False
    fault: Problem | None = None


def verify_set(folder: OutputFolder, planned: PlannedIds | None) -> Verified:
    """Verify an annotated set: its state, its files, every page of every column, its rows and their ids.

    Files outside of ``data`` and ``errors``, which nothing reads as rows, are not looked at. Memory: for each of 16
    threads the ids of a unit and a batch. Each row takes 8 bytes on disk.

    Args:
        folder: folder of the set.
        planned: ids of each unit by the query set; None if they are unknown.

    Raises:
        ValueError: there is no annotated set of this version, or its manifest is damaged.
        StorageError: the storage cannot be read.
    """
    manifest = folder.read_manifest()
    if manifest is None:
        raise ValueError(f"{folder.location.uri}: not an annotated set (no _manifest.json); pass the --output of a run")
    # The list of an unfinished run lacks its latest units.
    recorded = read_units(folder.location) if manifest.get("status") == "finished" else {}
    known = (recorded if planned is None else planned).keys()
    units, strange = _list_units(folder, known)
    with HashRuns() as hashes:
        check = UnitCheck(folder, hash_identity(manifest), get_columns(manifest).id, recorded, planned, hashes)
        checked = list(_note_progress(check.check_all(units), len(units)))
        double = list(check.find_double_ids(checked))
    faults, compacted = [*(unit.fault for unit in checked if unit.fault), *double], bool(manifest.get("compacted"))
    if compacted:  # no run writes its files again
        faults = [replace(fault, delete=None) for fault in faults]
    problems = [
        *_check_state(folder, manifest, recorded),
        *(Problem(f"{file.uri}: was not written by this run", file.uri) for file in strange),
        *_name_missing(folder, known - {unit.id for unit in units}),
        *faults,
    ]
    rows, errors = sum(unit.rows for unit in checked), sum(unit.errors for unit in checked)
    whole = sum(unit.fault is None for unit in checked)
    compared = planned is not None and all(unit.compared for unit in checked if unit.fault is None)
    return Verified(folder.location.uri, whole, rows, errors, compared, tuple(problems), compacted)


def _list_units(folder: OutputFolder, known: Iterable[str]) -> tuple[list[UnitFiles], list[Location]]:
    """List the units that have a data file, in the order of the known ones, and the files that belong to no unit."""
    wanted, place = {unit: number for number, unit in enumerate(known)}, folder.location
    files = [file for part in ("data", "errors") for file in (place / part).list_files()]
    named = {file.path: file for file in files if _is_own(file, place, wanted)}
    found = sorted(set(filter(None, map(parse_unit_id, named.values()))))
    units = []
    for unit in sorted(found, key=lambda unit: wanted.get(unit, 0)):
        data, errors = (named.get((place / part / f"part-{unit}.parquet").path) for part in ("data", "errors"))
        if data is not None:
            units.append(UnitFiles(unit, data, errors))
    taken = {file.path for unit in units for file in (unit.data, unit.errors) if file}
    return units, [file for file in files if file.path not in taken]


def _is_own(file: Location, place: Location, wanted: Mapping[str, int]) -> bool:
    """Whether a file is a unit file directly in its folder, and its unit is known, if any is."""
    expected = [(place / part / file.name).path for part in ("data", "errors") if is_unit_file(file, part)]
    return file.path in expected and (not wanted or parse_unit_id(file) in wanted)


def _check_state(
    folder: OutputFolder, manifest: Mapping[str, Any], recorded: Mapping[str, UnitSummary]
) -> Iterator[Problem]:
    success, succeeded = folder.location / "_SUCCESS", folder.is_finished()
    if manifest.get("status") != "finished":
        file = (folder.location / "_manifest.json").uri
        yield Problem(f"{file}: the run has not finished", success.uri if succeeded else None)
    elif not succeeded:
        yield Problem(f"{success.uri}: is missing")
    elif not recorded:
        yield Problem(f"{(folder.location / UNITS).uri}: is missing")
    if manifest.get("compacted") and (problem := find_record_problem(folder, recorded)):
        yield Problem(f"{folder.location.uri}: {problem}")


def _name_missing(folder: OutputFolder, units: Iterable[str]) -> Iterator[Problem]:
    for unit in sorted(units):
        yield Problem(f"{folder.location.uri}: unit {unit!r} has no data file")


def _note_progress(units: Iterable[CheckedUnit], count: int) -> Iterator[CheckedUnit]:
    noted = time.monotonic()
    for number, unit in enumerate(units, start=1):
        if time.monotonic() - noted > PROGRESS_S:
            noted = time.monotonic()
            log.info("%d of %d units read", number, count)
        yield unit


@dataclass(frozen=True)
class UnitCheck:
    """Checks units.

    Attributes:
        folder: folder of the set.
        run: digest of the run's identity.
        id_column: column of the ids.
        recorded: summaries of the units; empty if the run has not finished.
        planned: ids of each unit by the query set; None if they are unknown.
        hashes: takes the hashes of the ids.
    """

    folder: OutputFolder
    run: str
    id_column: str
    recorded: Mapping[str, UnitSummary]
    planned: PlannedIds | None
    hashes: HashRuns

    def check_all(self, units: Sequence[UnitFiles]) -> Iterator[CheckedUnit]:
        """Check units in parallel; yields the outcomes in the order of the units."""
        with ThreadPoolExecutor(THREADS) as threads:
            yield from threads.map(self._check_unit, units)

    def _check_unit(self, unit: UnitFiles) -> CheckedUnit:
        planned = self._read_planned(unit.id)
        try:
            answered, failed = self._read_ids(unit.data), self._read_ids(unit.errors)
            self._check_counts(unit, len(answered), len(failed))
            ids = _join([answered, failed])
            if planned is not None:
                _compare_ids(unit, ids, planned)
            self._check_writer(unit)
        except ValueError as error:
            return CheckedUnit(unit, fault=Problem(str(error), unit.data.uri))
        self.hashes.add(hash_texts(ids)[None])
        return CheckedUnit(unit, len(ids), len(failed), planned is not None)

    def _read_planned(self, unit: str) -> pa.ChunkedArray | None:
        """Read the ids of a unit from the query set; None if they cannot be read, which is no fault of the unit."""
        try:
            return None if self.planned is None else self.planned[unit]
        except (ValueError, StorageError) as error:
            log.warning("%s; the rows of unit %s are not compared with the query set", join_lines(error), unit)
            return None

    def _read_ids(self, file: Location | None) -> pa.ChunkedArray:
        """Read all columns of a file, page by page, and return its ids.

        Raises:
            ValueError: the file is damaged, or has no ids; names it.
        """
        if file is None:
            return NO_IDS

        def read(stream: Any) -> pa.ChunkedArray:
            parquet = open_pages(stream)
            if self.id_column not in parquet.schema_arrow.names:
                raise ValueError(f"{file.uri}: has no column {self.id_column!r} (columns.id)")
            batches = [batch[self.id_column].cast(pa.large_string()) for batch in read_batches(parquet)]
            return pa.chunked_array(batches, pa.large_string())

        return read_parquet(file, read)

    def _check_counts(self, unit: UnitFiles, answered: int, failed: int) -> None:
        if not self.recorded:
            return
        entry = self.recorded.get(unit.id) or UnitSummary(unit.id, 0)
        if answered != entry.rows - entry.failed:
            raise ValueError(_describe_count(unit.data.uri, answered, entry.rows - entry.failed))
        if failed != entry.failed:
            place = unit.errors.uri if unit.errors else f"{unit.data.uri}: its file in errors/"
            raise ValueError(_describe_count(place, failed, entry.failed))

    def _check_writer(self, unit: UnitFiles) -> None:
        """Check that one attempt of this run has written the files of a unit.

        Raises:
            ValueError: it has not.
        """
        try:
            self.folder.check_unit(unit.id, self.run)
        except ValueError as problem:
            raise ValueError(f"{unit.data.uri}: {problem}") from None

    def find_double_ids(self, units: Sequence[CheckedUnit]) -> Iterator[Problem]:
        """Find ids that occur twice in the set; if all units were compared with the query set, none can."""
        if all(unit.compared for unit in units):
            return
        repeated = np.concatenate([np.empty(0, np.uint64), *self.hashes.find_repeated()])
        seen: dict[str, str] = {}
        for unit in units if len(repeated) else ():
            if unit.fault:
                continue
            ids, file = _join([self._read_ids(unit.files.data), self._read_ids(unit.files.errors)]), unit.files.data.uri
            for value in ids.filter(pa.array(np.isin(hash_texts(ids), repeated))).to_pylist():
                if value in seen:
                    yield Problem(f"{file}: id {value!r} is also in {seen[value]}", file)
                seen[value] = file


def _describe_count(place: str, found: int, recorded: int) -> str:
    return f"{place}: has {found} rows, but {UNITS} records {recorded}"


def _join(columns: Iterable[pa.ChunkedArray]) -> pa.ChunkedArray:
    return pa.chunked_array(list(chain.from_iterable(column.chunks for column in columns)), pa.large_string())


def _compare_ids(unit: UnitFiles, found: pa.ChunkedArray, planned: pa.ChunkedArray) -> None:
    """Check that the rows of a unit are those of the query set, each once.

    Raises:
        ValueError: they are not; names the data file and an id.
    """
    lacking = planned.filter(pc.invert(pc.is_in(planned, value_set=found)))
    if len(lacking):
        raise ValueError(f"{unit.data.uri}: {len(lacking)} rows are missing, such as id {lacking[0].as_py()!r}")
    strange = found.filter(pc.invert(pc.is_in(found, value_set=planned)))
    if len(strange):
        raise ValueError(f"{unit.data.uri}: {len(strange)} rows are of no query, such as id {strange[0].as_py()!r}")
    if len(found) > len(planned):
        counts = pc.value_counts(found)
        double = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        raise ValueError(f"{unit.data.uri}: {len(double)} rows occur twice, such as id {double[0].as_py()!r}")
