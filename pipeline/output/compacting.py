"""Compact an annotated set: rewrite the many files of its units as few files, in the order of the queries."""

import io
import logging
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.sections import StorageConfig
from pipeline.output.compacted import (
    PlacedUnit,
    check_listed_files,
    join_summaries,
    locate_units,
    name_file,
    write_members,
)
from pipeline.output.folder import CARD, COMPACTED, INSPECTION, REPORT, OutputFolder, hash_identity
from pipeline.output.inventory import complete_output
from pipeline.output.partial import FOLDER
from pipeline.output.unit_files import UnitSummary, is_unit_file
from pipeline.storage.exchange import exchange_folders
from pipeline.storage.lease import Lease
from pipeline.storage.location import Location, check_apart, check_writable, locate
from pipeline.storage.parquet import THREADS, WRITING, map_in_threads

log = logging.getLogger(__name__)

MEGABYTE = 10**6
# What a copy of a set takes along, apart from its rows and records: the selected queries are in the folder.
TAKEN_ALONG = (REPORT, CARD, INSPECTION)
SELECTED = "_queries"


@dataclass(frozen=True)
class Compaction:
    """A checked compaction.

    Attributes:
        source: folder of the set.
        target: folder that is written; beside the set if the set is replaced.
        in_place: whether the target then takes the place of the set.
        manifest: manifest of the set.
        files: the units of the run that each new file holds, by the file's id.
        before: number of files that hold these rows now.
        file_mb: size of a file, in megabytes.
    """

    source: OutputFolder
    target: OutputFolder
    in_place: bool
    manifest: Mapping[str, Any]
    files: Mapping[str, Sequence[PlacedUnit]]
    before: int
    file_mb: int

    @property
    def members(self) -> dict[str, list[UnitSummary]]:
        """The summaries of the units in each new file."""
        return {name: [unit.summary for unit in units] for name, units in self.files.items()}


@dataclass(frozen=True)
class Compacted:
    """The outcome of a compaction: where the set is, its rows, and the number of data files before and after."""

    output: str
    rows: int
    errors: int
    before: int
    files: int


def check_compaction(
    annotations: str, output: str | None, file_mb: int, storage: StorageConfig, overwrite: bool
) -> Compaction:
    """Check a compaction and plan its files.

    Args:
        annotations: URI of a finished annotated set.
        output: URI of the folder for the compacted set; None to replace the set.
        file_mb: size of a file in megabytes; a larger unit has a file of its own.
        overwrite: whether a set in the output is replaced.

    Raises:
        ValueError: there is no finished set, it has lost a file, or holds one that no run has written; its store
            cannot replace a folder; or the output is taken.
        StorageError: the storage cannot be read.
    """
    source = OutputFolder(locate(annotations, storage))
    manifest = source.read_manifest()
    if manifest is None or not source.is_finished():
        raise ValueError(f"{annotations}: not a finished annotated set")
    files = check_listed_files(source)
    units = [_note_size(unit, files[unit.file]) for unit in locate_units(source).values()]
    if strange := [file for part in ("data", "errors") for file in _list_strange(source.location, part)]:
        raise ValueError(f"{strange[0].uri}: was not written by a run; move it elsewhere first")
    target = _choose_target(source, output, storage)
    check_writable(target.location)
    plan = Compaction(
        source=source,
        target=target,
        in_place=output is None,
        manifest=manifest,
        files=plan_files(units, file_mb * MEGABYTE),
        before=len({unit.file for unit in units}),
        file_mb=file_mb,
    )
    if output is not None:
        _check_output(plan, overwrite)
    return plan


def _note_size(unit: PlacedUnit, file: Location) -> PlacedUnit:
    """Return a unit with the size of its file, if the run has not recorded it."""
    size = unit.summary.data_bytes or (file.stamp.size if file.stamp else 0)
    return replace(unit, summary=replace(unit.summary, data_bytes=size))


def _list_strange(place: Location, part: str) -> list[Location]:
    return [file for file in (place / part).list_files() if not is_unit_file(file, part)]


def _choose_target(source: OutputFolder, output: str | None, storage: StorageConfig) -> OutputFolder:
    place = source.location
    if output is not None:
        target = locate(output, storage)
        check_apart(place, target)
        return OutputFolder(target)
    if not place.local:
        raise ValueError(
            f"{place.uri}: an object store cannot replace the files of a set all at once; name a folder for the "
            "compacted set with --output"
        )
    path = Path(place.path).resolve()
    return OutputFolder(locate(str(path.with_name(f".{path.name}.compacting")), storage))


def _check_output(plan: Compaction, overwrite: bool) -> None:
    """Check that the output is free, or holds this compaction, unfinished.

    Raises:
        ValueError: it is not.
    """
    uri = plan.target.location.uri
    if foreign := plan.target.find_foreign_file():
        raise ValueError(
            f"--output {uri} contains files that are not part of an annotated set ({foreign}); choose another"
        )
    found = plan.target.read_manifest()
    if found is None or overwrite:
        return
    same = found.get("compacted") and hash_identity(found) == hash_identity(plan.manifest)
    if plan.target.is_finished() or not same:
        raise ValueError(
            f"--output {uri} already contains an annotated set; choose another, or replace it with --overwrite"
        )


def plan_files(units: Iterable[PlacedUnit], size: int) -> dict[str, list[PlacedUnit]]:
    """Divide units into files of about a size, without changing their order; returns the units by the file's id.

    Args:
        units: units in the order of the queries; the size of a unit is that of its data file, as the run wrote it.
        size: size of a file in bytes; a file ends before the unit that would exceed it.
    """
    groups: list[list[PlacedUnit]] = []
    filled = 0
    for unit in units:
        if not groups or filled + unit.summary.data_bytes > size:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += unit.summary.data_bytes
    return {name_file(number, [unit.summary for unit in group]): group for number, group in enumerate(groups)}


def compact_set(plan: Compaction, overwrite: bool = False) -> Compacted:
    """Write the compacted set, count its rows, and then put it in its place.

    Memory: the encoded content of a file, and the rows of ``THREADS`` units.

    Raises:
        OutputInUseError: a run is using the set or the output.
        ValueError: a file of the set is damaged.
        RuntimeError: rows are missing at the end.
        StorageError: the storage cannot be read or written.
    """
    with Lease(plan.source.location) as lease:
        if plan.in_place:
            if plan.target.is_finished():  # a compaction was killed before it had deleted the replaced set
                shutil.rmtree(plan.target.location.path)
            done = _write_set(plan, lease)
            _replace_set(plan, lease)
            return done
        with Lease(plan.target.location) as held:
            _check_output(plan, overwrite)  # another run may have held the lease until now
            if overwrite:
                plan.target.clear()
            return _write_set(plan, held)


def _write_set(plan: Compaction, lease: Lease) -> Compacted:
    target, run = plan.target, hash_identity(plan.manifest)
    compacted = {"files": len(plan.files), "file_mb": plan.file_mb, "at": datetime.now(UTC).isoformat()}
    target.begin({**plan.manifest, "compacted": compacted})
    for number, (name, units) in enumerate(plan.files.items(), start=1):
        if target.read_unit(name, run) is None:
            _write_file(target, name, units)
        log.info("%d of %d files written", number, len(plan.files))
    rows = {name: sum(unit.summary.rows for unit in units) for name, units in plan.files.items()}
    written = complete_output(target, rows, run, {})
    write_members(target.location, plan.members)
    _take_along(plan)
    lease.renew()
    output = plan.source.location.uri if plan.in_place else target.location.uri
    counts = {**plan.manifest["counts"], "output": output}
    target.finish({**plan.manifest, "counts": counts, "compacted": compacted}, written)
    errors = sum(unit.failed for unit in written)
    return Compacted(output, sum(rows.values()), errors, plan.before, len(rows))


def _write_file(target: OutputFolder, name: str, units: Sequence[PlacedUnit]) -> None:
    joined = join_summaries(name, [unit.summary for unit in units])
    summary = replace(joined, attempt=uuid.uuid4().hex)
    answers = _encode_groups(_read_ahead(PlacedUnit.read_answers, units), summary)
    failed = [unit for unit in units if unit.summary.failed]
    errors = _encode_groups(_read_ahead(PlacedUnit.read_failures, failed), summary) if failed else None
    target.publish_unit(summary, answers, errors)


def _read_ahead(read: Callable[[PlacedUnit], pa.Table], units: Sequence[PlacedUnit]) -> Iterator[pa.Table]:
    """Read units in threads, ``THREADS`` at a time, so that no more are in memory."""
    for start in range(0, len(units), THREADS):
        yield from map_in_threads(read, units[start : start + THREADS])


def _encode_groups(tables: Iterator[pa.Table], summary: UnitSummary) -> bytes:
    """Encode tables, at least one, as a Parquet file with a row group for each of them that has rows."""
    first, buffer = next(tables), io.BytesIO()
    schema = first.schema.with_metadata(summary.to_metadata())
    with pq.ParquetWriter(buffer, schema, **WRITING) as writer:
        for table in chain([first], tables):
            if table.num_rows:
                writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=table.num_rows)
    return buffer.getvalue()


def _take_along(plan: Compaction) -> None:
    """Copy the other files of the set: those that loaders and commands know, or, if the set is replaced, all."""
    source, target = plan.source.location, plan.target.location
    if plan.in_place:
        known = ("data", "errors", FOLDER, "_running", "_manifest.json", "_units.parquet", COMPACTED, "_SUCCESS")
        shutil.copytree(source.path, target.path, ignore=_ignoring(source.path, known), dirs_exist_ok=True)
        return
    named = [name for name in TAKEN_ALONG if (source / name).exists()]
    selected = [f"{SELECTED}/{file.name}" for file in (source / SELECTED).list_files()]
    for name in [*named, *selected]:
        (target / name).write((source / name).read())


def _ignoring(top: str, names: Iterable[str]) -> Any:
    """Return a filter for ``shutil.copytree`` that leaves out files and folders of these names at the top."""
    left_out = set(names)
    return lambda folder, _: left_out if Path(folder) == Path(top) else set[str]()


def _replace_set(plan: Compaction, lease: Lease) -> None:
    place, written = Path(plan.source.location.path).resolve(), Path(plan.target.location.path)
    with lease.moving():
        exchange_folders(place, written)
    shutil.rmtree(written)
