"""Plan the compaction of an annotated set: check it, and divide its units into files."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.paths import is_writable
from pipeline.config.sections import StorageConfig
from pipeline.output.compacted import PlacedUnit, check_listed_files, locate_units, name_file
from pipeline.output.folder import OutputFolder, hash_identity
from pipeline.output.unit_files import UnitSummary
from pipeline.storage.exchange import can_exchange
from pipeline.storage.location import Location, check_apart, check_writable, locate

MEGABYTE = 10**6
# Units of a file at most: reading one of them parses the footer, which describes all.
MOST_UNITS = 1_000
# What writers of unit files leave behind when they are killed.
TEMPORARY = re.compile(r"\.part-[0-9a-f]{20}\.parquet\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class Compaction:
    """A checked compaction.

    Attributes:
        source: folder of the set.
        target: folder that is written; beside the set if the set is replaced.
        in_place: whether the target then takes the place of the set.
        manifest: manifest of the set.
        files: the units of the run that each new file holds, by the file's id.
        before: ids of the files that hold these units now.
        file_mb: size of a file, in megabytes.
        overwrite: whether a set in the target is replaced.
        done: whether the target holds these files already.
    """

    source: OutputFolder
    target: OutputFolder
    in_place: bool
    manifest: Mapping[str, Any]
    files: Mapping[str, Sequence[PlacedUnit]]
    before: Sequence[str]
    file_mb: int
    overwrite: bool = False
    done: bool = False

    @property
    def place(self) -> OutputFolder:
        """The folder where the compacted set will be."""
        return self.source if self.in_place else self.target

    @property
    def members(self) -> dict[str, list[UnitSummary]]:
        """The summaries of the units in each new file."""
        return {name: [unit.summary for unit in units] for name, units in self.files.items()}


def plan_compaction(
    annotations: str, output: str | None, file_mb: int, storage: StorageConfig, overwrite: bool
) -> Compaction:
    """Check a compaction and plan its files.

    Args:
        annotations: URI of a finished annotated set.
        output: URI of the folder for the compacted set; None to replace the set.
        file_mb: size of a file in megabytes; a larger unit has a file of its own.
        overwrite: whether a set in the output is replaced.

    Raises:
        ValueError: there is no finished set, it has lost a file, or holds one that no run has written; it cannot be
            replaced in one step; or the output is taken.
        StorageError: the storage cannot be read.
    """
    source = OutputFolder(locate(annotations, storage))
    manifest = source.read_manifest()
    if manifest is None or not source.is_finished():
        raise ValueError(f"{annotations}: not a finished annotated set")
    files = check_listed_files(source)
    units = [_note_size(unit, files[unit.file]) for unit in locate_units(source).values()]
    plan = Compaction(
        source=source,
        target=_choose_target(source, output, storage),
        in_place=output is None,
        manifest=manifest,
        files=plan_files(units, file_mb * MEGABYTE),
        before=list(dict.fromkeys(unit.file for unit in units)),
        file_mb=file_mb,
        overwrite=overwrite,
    )
    check_strange_files(plan)
    done = (plan.in_place or not overwrite) and holds_files(plan)
    if plan.in_place and not done:
        source.check_replaceable()
    elif not done:
        check_output(plan)
    return replace(plan, done=done)


def _note_size(unit: PlacedUnit, file: Location) -> PlacedUnit:
    """Return a unit with the size of its file, if the run has not recorded it."""
    size = unit.summary.data_bytes or (file.stamp.size if file.stamp else 0)
    return replace(unit, summary=replace(unit.summary, data_bytes=size))


def plan_files(units: Iterable[PlacedUnit], size: int) -> dict[str, list[PlacedUnit]]:
    """Divide units into files of about a size, without changing their order; returns the units by the file's id.

    Args:
        units: units in the order of the queries; the size of a unit is that of its data file, as the run wrote it.
        size: size of a file in bytes; a file ends before the unit that would exceed it, or after ``MOST_UNITS``.
    """
    groups: list[list[PlacedUnit]] = []
    filled = 0
    for unit in units:
        if not groups or filled + unit.summary.data_bytes > size or len(groups[-1]) == MOST_UNITS:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += unit.summary.data_bytes
    return {name_file(number, [unit.summary for unit in group]): group for number, group in enumerate(groups)}


def check_strange_files(plan: Compaction) -> None:
    """Check that ``data`` and ``errors`` hold the files of the set and no others, which would be lost or left behind.

    Raises:
        ValueError: there is another file, or one of the folders is a link; names it.
    """
    failed = {unit.file for units in plan.files.values() for unit in units if unit.summary.failed}
    for part, expected in (("data", set(plan.before)), ("errors", failed)):
        folder = plan.source.location / part
        if folder.local and Path(folder.path).is_symlink():
            raise ValueError(f"{folder.uri}: is a link; compact the set into another folder with --output")
        known = {plan.source.locate_unit_file(part, name).path for name in expected}
        if strange := [file for file in _list_all(folder) if file.path not in known]:
            raise ValueError(f"{strange[0].uri}: is not a file of the set; move it elsewhere first")


def _list_all(folder: Location) -> list[Location]:
    """List the files and folders in a folder, hidden ones too where the disk is local."""
    if not folder.local:
        return folder.list_files()
    path = Path(folder.path)
    names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    return [folder / name for name in names if not TEMPORARY.fullmatch(name)]


def _choose_target(source: OutputFolder, output: str | None, storage: StorageConfig) -> OutputFolder:
    place = source.location
    if output is not None:
        target = locate(output, storage)
        check_apart(place, target)
        check_writable(target)
        return OutputFolder(target)
    if not place.local:
        raise ValueError(
            f"{place.uri}: an object store cannot replace the files of a set all at once; name a folder for the "
            "compacted set with --output"
        )
    path = Path(place.path).resolve()
    if not is_writable(path.parent) or not can_exchange(path):
        raise ValueError(
            f"{place.uri}: this folder cannot be replaced in one step (a mount point, NFS, or a parent folder that "
            "cannot be written to); name a folder for the compacted set with --output"
        )
    return OutputFolder(locate(str(path.with_name(f".{path.name}.compacting")), storage))


def holds_files(plan: Compaction) -> bool:
    """Whether the compacted set is in its place already, as far as its manifest and the names of its files tell."""
    found = plan.place.read_manifest() or {}
    same = bool(found.get("compacted")) and hash_identity(found) == hash_identity(plan.manifest)
    return same and plan.place.is_finished() and plan.place.list_unit_files("data").keys() == plan.files.keys()


def check_output(plan: Compaction) -> None:
    """Check that the output is free, or holds this compaction, unfinished.

    Raises:
        ValueError: it is not.
    """
    digest = hash_identity(plan.manifest)
    plan.target.check_free(
        plan.overwrite, lambda found: bool(found.get("compacted")) and hash_identity(found) == digest
    )


def check_unchanged(plan: Compaction) -> None:
    """Check that the set is the one that was planned for.

    Raises:
        ValueError: another command has written it meanwhile.
    """
    if plan.source.read_manifest() != plan.manifest or not plan.source.is_finished():
        raise ValueError(f"{plan.source.location.uri}: has changed meanwhile; run the same command again")
