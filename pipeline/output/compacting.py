"""Compact an annotated set: rewrite the many files of its units as few files, in the order of the queries."""

import io
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.output.compacted import PlacedUnit, join_summaries, write_members
from pipeline.output.compaction_plan import Compaction, check_output, check_unchanged, holds_files
from pipeline.output.folder import CARD, COMPACTED, INSPECTION, REPORT, OutputFolder, hash_identity
from pipeline.output.inventory import complete_output
from pipeline.output.partial import FOLDER
from pipeline.output.unit_files import UnitSummary
from pipeline.output.unit_log import UNITS, read_units
from pipeline.storage.exchange import exchange_folders
from pipeline.storage.lease import Lease
from pipeline.storage.parquet import THREADS, WRITING, map_in_threads

log = logging.getLogger(__name__)

# What a copy of a set takes along, apart from its rows and records: the selected queries are in the folder.
TAKEN_ALONG = (REPORT, CARD, INSPECTION)
SELECTED = "_queries"
# What is written anew in the folder that replaces a set.
REWRITTEN = {"data", "errors", FOLDER, "_running", "_manifest.json", UNITS, COMPACTED, "_SUCCESS"}


@dataclass(frozen=True)
class Compacted:
    """The outcome of a compaction: where the set is, its rows, and the number of data files before and after."""

    output: str
    rows: int
    errors: int
    before: int
    files: int

    @classmethod
    def of(cls, plan: Compaction) -> "Compacted":
        """Return the outcome of a plan that was carried out."""
        units = [unit.summary for units in plan.files.values() for unit in units]
        rows, errors = sum(unit.rows for unit in units), sum(unit.failed for unit in units)
        return cls(plan.place.location.uri, rows, errors, len(plan.before), len(plan.files))


def compact_set(plan: Compaction) -> Compacted:
    """Write the compacted set, count its rows, and then put it in its place; nothing, if it is there.

    Memory: the encoded content of a file, and the rows of ``THREADS`` units.

    Raises:
        OutputInUseError: a run is using the set or the output.
        ValueError: a file of the set is damaged or of another run, or the set has changed since it was planned for.
        RuntimeError: rows are missing at the end.
        StorageError: the storage cannot be read or written.
    """
    with Lease(plan.place.location) as lease:
        check_unchanged(plan)  # another run may have held the lease until now
        if plan.in_place:
            _clear_scratch(plan)
        elif not plan.done:
            check_output(plan)
            if plan.overwrite:
                plan.target.clear()
        if not plan.done:
            _write_set(plan, lease)
            if plan.in_place:
                _replace_set(plan, lease)
    return Compacted.of(plan)


def _clear_scratch(plan: Compaction) -> None:
    """Delete what an interrupted compaction has left beside the set, apart from files that this one would write."""
    folder = Path(plan.target.location.path)
    if plan.done or plan.files.keys().isdisjoint(plan.target.list_unit_files("data")):
        if folder.exists():
            shutil.rmtree(folder)
        return
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            if entry.name not in ("data", "errors"):
                shutil.rmtree(entry)
        else:
            entry.unlink()


def _write_set(plan: Compaction, lease: Lease) -> None:
    target, run = plan.target, hash_identity(plan.manifest)
    _check_writers(plan, run)
    compacted = {"files": len(plan.files), "file_mb": plan.file_mb, "at": datetime.now(UTC).isoformat()}
    target.begin({**plan.manifest, "compacted": compacted})
    for number, (name, units) in enumerate(plan.files.items(), start=1):
        joined = join_summaries(name, [unit.summary for unit in units])
        if not _is_written(target, joined):
            _write_file(target, joined, units)
        log.info("%d of %d files written", number, len(plan.files))
    rows = {name: sum(unit.summary.rows for unit in units) for name, units in plan.files.items()}
    written = complete_output(target, rows, run, {})
    write_members(target.location, plan.members)
    _take_along(plan)
    check_unchanged(plan)
    lease.renew()
    counts = plan.manifest["counts"] if plan.in_place else {**plan.manifest["counts"], "output": target.location.uri}
    target.finish({**plan.manifest, "counts": counts, "compacted": compacted}, written)
    if not holds_files(replace(plan, in_place=False)):
        raise RuntimeError(f"{target.location.uri}: files are missing; run the same command again")


def _check_writers(plan: Compaction, run: str) -> None:
    """Check that each file of the set is the one that its list describes, so that no foreign row is taken over.

    Raises:
        ValueError: a file is damaged, of another run, of another attempt, or of another unit.
    """
    source, listed = plan.source, read_units(plan.source.location)

    def check(name: str) -> None:
        if problem := _find_problem(source, listed[name], run):
            file = source.locate_unit_file("data", name).uri
            raise ValueError(f"{file}: {problem}; selfrag verify names the way to repair the set")

    map_in_threads(check, plan.before)


def _find_problem(source: OutputFolder, listed: UnitSummary, run: str) -> str | None:
    """Name what is wrong with the files of a unit; None if they are those that the list describes."""
    try:
        found = source.check_unit(listed.unit, run)
    except ValueError as problem:
        return str(problem)
    same = found is not None and replace(found, data_bytes=0) == replace(listed, data_bytes=0)
    return None if same else f"is not the file that {UNITS} lists"


def _is_written(target: OutputFolder, joined: UnitSummary) -> bool:
    found = target.read_unit(joined.unit, joined.run)
    return found is not None and replace(found, attempt="") == joined


def _write_file(target: OutputFolder, joined: UnitSummary, units: Sequence[PlacedUnit]) -> None:
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
        shutil.copytree(
            source.path, target.path, ignore=_ignore_rewritten(source.path), symlinks=True, dirs_exist_ok=True
        )
        return
    for file in reversed((target / SELECTED).list_files()):  # of a set that was replaced; its record first
        file.delete()
    named = [name for name in TAKEN_ALONG if (source / name).exists()]
    selected = [f"{SELECTED}/{file.name}" for file in (source / SELECTED).list_files()]
    for name in [*named, *selected]:
        (target / name).write((source / name).read())


def _ignore_rewritten(top: str) -> Callable[[str, list[str]], set[str]]:
    return lambda folder, _: REWRITTEN if Path(folder) == Path(top) else set()


def _replace_set(plan: Compaction, lease: Lease) -> None:
    place, written = Path(plan.source.location.path).resolve(), Path(plan.target.location.path)
    os.sync()  # what was copied must be on the disk before the files that it replaces are deleted
    with lease.moving():
        exchange_folders(place, written)
    shutil.rmtree(written)
