"""The folder of an annotated set: its manifest, its success marker, and the files of its units.

The visible data files are the commit log: a unit is finished when its data file exists.
"""

import json
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.config.loading import hash_tree
from pipeline.config.sections import Columns
from pipeline.output.partial import clear_partial
from pipeline.output.schema import get_output_name
from pipeline.output.unit_files import UNKNOWN, UnitSummary, Work, parse_unit_id, summarize_unit
from pipeline.output.unit_log import UNITS, write_units
from pipeline.storage.location import Location, MissingFileError
from pipeline.storage.parquet import encode_parquet, read_footer

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
REPORT = "report.html"
CARD = "README.md"
# Which units of the run lie in which file of a set that was compacted.
COMPACTED = "_compacted.parquet"
# The tables in which the set is, or was about to be, registered.
PUBLISHED = "_published.json"
# What the inspection of the query set has found.
INSPECTION = "_inspection.parquet"
# Keys of a manifest that decide the results; an output holds rows of one identity only.
IDENTITY = ("settings", "queries", "model", "index", "reranker", "stale")


@dataclass(frozen=True)
class OutputFolder:
    """The folder of an annotated set."""

    location: Location

    @property
    def _manifest(self) -> Location:
        return self.location / "_manifest.json"

    @property
    def _success(self) -> Location:
        return self.location / "_SUCCESS"

    def read_manifest(self) -> dict[str, Any] | None:
        """Read the manifest; None if no run has started here.

        Raises:
            ValueError: the file is not a manifest of this format version.
        """
        if not self._manifest.exists():
            return None
        try:
            found = json.loads(self._manifest.read())
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{self._manifest.uri}: not a manifest of this version; choose another folder")
        return found

    def is_finished(self) -> bool:
        """Whether a run has finished here."""
        return self._success.exists()

    def list_unit_files(self, folder: str) -> dict[str, Location]:
        """List the files of units in ``data``, one for each finished unit, or in ``errors``, by the unit's id."""
        found = ((parse_unit_id(file), file) for file in (self.location / folder).list_files(".parquet"))
        return {unit: file for unit, file in found if unit and file.path == self.locate_unit_file(folder, unit).path}

    def note_published(self, tables: Iterable[str]) -> None:
        """Note the names of tables that list the files of the set from now on."""
        file, known = self.location / PUBLISHED, self._read_published()
        if more := [table for table in tables if table not in known]:
            file.write(json.dumps([*known, *more], indent=2, ensure_ascii=False).encode())

    def check_replaceable(self) -> None:
        """Check that no table lists the files of the set, so that they may be replaced.

        Raises:
            ValueError: a table does; names it.
        """
        if known := self._read_published():
            raise ValueError(
                f"{self.location.uri}: is published in {', '.join(known)}, which lists its files; use another output "
                f"(if the table is gone, delete {PUBLISHED})"
            )

    def _read_published(self) -> list[str]:
        try:
            return list(json.loads((self.location / PUBLISHED).read()))
        except MissingFileError:
            return []

    def find_foreign_file(self) -> str | None:
        """Return the URI of a file that no run has written, in a folder without a manifest; None if there is none.

        A dataset card does not count: it may be left over from a set that was deleted.
        """
        if self._manifest.exists():
            return None
        card = (self.location / CARD).path
        return next((file.uri for file in self.location.list_files() if file.path != card), None)

    def check_free(self, overwrite: bool, continues: Callable[[Mapping[str, Any]], bool]) -> None:
        """Check that a set can be written here.

        Args:
            overwrite: whether a set that is here is replaced.
            continues: whether the work to do is that of an unfinished set with a manifest.

        Raises:
            ValueError: other files are here, or another set, or one that a table lists.
        """
        uri = self.location.uri
        if foreign := self.find_foreign_file():
            raise ValueError(
                f"--output {uri} contains files that are not part of an annotated set ({foreign}); choose another"
            )
        if (found := self.read_manifest()) is None:
            return
        if overwrite:
            self.check_replaceable()
        elif self.is_finished() or not continues(found):
            raise ValueError(
                f"--output {uri} already contains an annotated set; choose another, or replace it with --overwrite"
            )

    def clear(self) -> None:
        """Delete the files that runs have written and nothing else; the success marker first, the manifest last.

        As long as the manifest exists, the folder is recognized as an annotated set.
        """
        if self._success.exists():
            self._success.delete()
        for folder in ("data", "errors"):
            for file in self.list_unit_files(folder).values():
                file.delete()
        clear_partial(self.location)
        records = [self.location / name for name in (REPORT, UNITS, COMPACTED, INSPECTION)]
        for file in [*records, self._manifest]:
            if file.exists():
                file.delete()

    def begin(self, manifest: dict[str, Any]) -> None:
        """Write the manifest of a run that starts; removes a stale ``_SUCCESS``."""
        if self._success.exists():
            self._success.delete()
        self._write_manifest({**manifest, "status": "running"})

    def finish(self, manifest: dict[str, Any], units: Iterable[UnitSummary]) -> None:
        """Write the summaries of the units and the manifest of a finished run, then ``_SUCCESS``.

        What units in progress have left is deleted before.
        """
        clear_partial(self.location)
        write_units(self.location, units)
        self._write_manifest({**manifest, "status": "finished"})
        self._success.write(b"")

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        content = {"format_version": FORMAT_VERSION, **manifest}
        self._manifest.write(json.dumps(content, indent=2, ensure_ascii=False).encode())

    def write_unit(
        self,
        unit: str,
        answers: pa.Table,
        errors: pa.Table,
        run: str,
        work: Work = UNKNOWN,
    ) -> UnitSummary:
        """Write the errors file of a unit, if rows failed, and then its data file.

        Files that this run has already written are kept, since two files cannot be replaced atomically.

        Args:
            unit: id of the unit.
            answers: rows of the data file.
            errors: rows of the errors file.
            run: digest of the run's identity.
            work: when the unit was annotated, and by which actor.
        """
        if kept := self.read_unit(unit, run):
            return kept
        counted = summarize_unit(unit, answers, errors)
        summary = replace(counted, **vars(work), run=run, attempt=uuid.uuid4().hex)
        metadata = summary.to_metadata()
        failed = encode_parquet(errors.replace_schema_metadata(metadata)) if errors.num_rows else None
        return self.publish_unit(summary, encode_parquet(answers.replace_schema_metadata(metadata)), failed)

    def publish_unit(self, summary: UnitSummary, answers: bytes, errors: bytes | None) -> UnitSummary:
        """Write the two files of a unit, the errors first, and return its summary with the size of its data file.

        Args:
            summary: summary of the unit, as in the metadata of both files.
            answers: content of the data file.
            errors: content of the errors file; None if no row has failed.
        """
        errors_file = self.locate_unit_file("errors", summary.unit)
        if errors is not None:
            errors_file.write(errors)
        elif errors_file.exists():
            errors_file.delete()  # left by an attempt that died before it wrote the data file
        self.locate_unit_file("data", summary.unit).write(answers)
        return replace(summary, data_bytes=len(answers))

    def read_unit(self, unit: str, run: str) -> UnitSummary | None:
        """Read the summary of a finished unit; None if it has no data file, or if it must be annotated again.

        That is the case if its files are damaged, of different attempts, or of another run.

        Raises:
            StorageError: a file cannot be read.
        """
        try:
            return self.check_unit(unit, run)
        except ValueError as problem:
            log.warning("%s: unit %s is annotated again: %s", self.location.uri, unit, problem)
            return None

    def check_unit(self, unit: str, run: str) -> UnitSummary | None:
        """Read the summary of a finished unit; None if it has no data file.

        Raises:
            ValueError: its files are damaged, of different attempts, or of another run.
            StorageError: a file cannot be read.
        """
        answers = _read_summary(self.locate_unit_file("data", unit))
        errors = _read_summary(self.locate_unit_file("errors", unit)) if answers else None
        return _join_summaries(answers, errors, run) if answers else None

    def locate_unit_file(self, folder: str, unit: str) -> Location:
        """Return the location of a unit's file in ``data`` or ``errors``."""
        return self.location / folder / f"part-{unit}.parquet"

    def withdraw(self, unit: str) -> None:
        """Delete the unit's files, its data file first."""
        for folder in ("data", "errors"):
            if (file := self.locate_unit_file(folder, unit)).exists():
                file.delete()


def _read_summary(file: Location) -> tuple[UnitSummary | None, int] | None:
    """Read the summary in a unit file and the number of its rows; None if there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        footer = read_footer(file)
    except MissingFileError:
        return None
    return UnitSummary.from_metadata(footer.metadata), footer.num_rows


def _join_summaries(
    answers: tuple[UnitSummary | None, int], errors: tuple[UnitSummary | None, int] | None, run: str
) -> UnitSummary:
    """Return the summary of a unit whose files belong together, given what each of them holds.

    Raises:
        ValueError: they do not, or another run wrote them.
    """
    summary, answered = answers
    beside, failed = errors or (None, 0)
    if summary is None or summary.run != run:
        raise ValueError("another run wrote its data file")
    if beside != (summary if summary.failed else None) or bool(errors) != bool(summary.failed):
        raise ValueError("its two files are from different attempts")
    if (answered + failed, failed) != (summary.rows, summary.failed):
        raise ValueError(f"its files hold {answered + failed} rows, {failed} of them failed, instead of those counted")
    return summary


def hash_identity(manifest: Mapping[str, Any]) -> str:
    """Return the digest of a run's identity, which the files of its units carry.

    Without a reranker, or a stale set, it is that of earlier versions, which knew none.
    """
    identity = {key: manifest.get(key) for key in IDENTITY}
    return hash_tree({key: part for key, part in identity.items() if part or key not in ("reranker", "stale")})


def get_columns(manifest: Mapping[str, Any]) -> Columns:
    """Return the names in an annotated set of the query set's columns that it was made with."""
    columns = Columns.model_validate(manifest.get("configuration", {}).get("columns", {}))
    return Columns(**{key: get_output_name(name) for key, name in columns})
