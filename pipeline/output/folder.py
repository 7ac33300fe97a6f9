"""Read and write the output folder: atomic unit files, manifest and success marker.

The visible data files are the commit log. A unit writes its errors file first, if it has errors, and always its data
file last. Both names are derived from the unit id, so a unit that runs twice writes the same files.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.sections import Columns
from pipeline.output.partial import clear_partial
from pipeline.output.schema import build_data_schema, build_error_schema, get_output_name
from pipeline.storage.location import Location
from pipeline.storage.parquet import encode_parquet, map_in_threads, read_columns

FORMAT_VERSION = 1
REPORT = "report.html"
CARD = "README.md"
UNIT_FILE = re.compile(r"part-[0-9a-f]{20}\.parquet")
# Metadata key of a data file for the start and end times of its unit.
TIMES = b"selfrag.times"


@dataclass(frozen=True)
class UnitSummary:
    """Counts of a finished unit.

    Attributes:
        unit: id of the unit.
        rows: number of rows, failed ones included.
        errors: number of failed rows by error type.
        retrieved: number of answered rows that used a passage.
        generated_tokens: tokens generated for answered rows.
        prompt_tokens: prompt tokens of answered rows.
        began: time when an actor started the unit, after the engine's first request, in seconds since the epoch;
            None if unknown.
        ended: time when all rows were annotated, in seconds since the epoch; None if unknown.
    """

    unit: str
    rows: int
    errors: dict[str, int] = field(default_factory=dict)
    retrieved: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    began: float | None = None
    ended: float | None = None

    def to_record(self) -> dict[str, Any]:
        """Return the unit's entry in the manifest."""
        return {"rows": self.rows, "errors": sum(self.errors.values()), "began": self.began, "ended": self.ended}


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

    def list_data_files(self) -> list[Location]:
        """List the data files, one for each finished unit."""
        return (self.location / "data").list_files(".parquet")

    def list_done_units(self) -> frozenset[str]:
        """Return the ids of the finished units: those that have a data file."""
        return frozenset(parse_unit_id(file) for file in self.list_data_files())

    def find_foreign_file(self) -> str | None:
        """Return the URI of a file that no run has written, in a folder without a manifest; None if there is none.

        A dataset card does not count: it may be left over from a set that was deleted.
        """
        found = [file for file in self.location.list_files() if file.path != (self.location / CARD).path]
        return found[0].uri if found and not self._manifest.exists() else None

    def clear(self) -> None:
        """Delete the files that runs have written and nothing else; the success marker first, the manifest last.

        As long as the manifest exists, the folder is recognized as an annotated set.
        """
        if self._success.exists():
            self._success.delete()
        for folder in ("data", "errors"):
            for file in (self.location / folder).list_files(".parquet"):
                if UNIT_FILE.fullmatch(file.path.removeprefix(f"{self.location.path}/{folder}/")):
                    file.delete()
        clear_partial(self.location)
        for file in (self.location / REPORT, self._manifest):
            if file.exists():
                file.delete()

    def begin(self, manifest: dict[str, Any]) -> None:
        """Write the manifest of a run that starts; removes a stale ``_SUCCESS``."""
        if self._success.exists():
            self._success.delete()
        self._write_manifest({**manifest, "status": "running"})

    def finish(self, manifest: dict[str, Any]) -> None:
        """Delete what units in progress have left, then write the manifest of a finished run, then ``_SUCCESS``."""
        clear_partial(self.location)
        self._write_manifest({**manifest, "status": "finished"})
        self._success.write(b"")

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        content = {"format_version": FORMAT_VERSION, **manifest}
        self._manifest.write(json.dumps(content, indent=2, ensure_ascii=False).encode())

    def write_unit(
        self,
        unit: str,
        annotated: pa.Table,
        inputs: pa.Schema,
        keep_candidates: bool,
        times: tuple[float, float] | None = None,
    ) -> UnitSummary:
        """Write the data file of a unit, and its errors file if rows failed.

        The files of a finished unit are kept, since two files cannot be replaced atomically.

        Args:
            unit: id of the unit.
            annotated: input, answer and error columns; rows with an ``error_type`` have failed.
            inputs: schema of the query set.
            keep_candidates: whether to write the columns of candidates.
            times: start and end of the unit; kept in the data file's metadata, so that they survive a resume.
        """
        errors_file = self.location / "errors" / f"part-{unit}.parquet"
        if self._locate_data_file(unit).exists():
            return self._summarize_files(unit, errors_file.exists())
        failed = pc.is_valid(annotated["error_type"])
        answers = annotated.filter(pc.invert(failed)).select(build_data_schema(inputs, keep_candidates).names)
        answers = answers.replace_schema_metadata({TIMES: json.dumps(times)} if times else None)
        errors = annotated.filter(failed).select(build_error_schema(inputs).names)
        if errors.num_rows:
            errors_file.write(encode_parquet(errors))
        elif errors_file.exists():
            errors_file.delete()  # left by an attempt that died before it wrote the data file
        self._locate_data_file(unit).write(encode_parquet(answers))
        return summarize_unit(unit, answers, errors)

    def _locate_data_file(self, unit: str) -> Location:
        return self.location / "data" / f"part-{unit}.parquet"

    def withdraw(self, unit: str) -> None:
        """Delete the unit's data file, so that it is annotated again."""
        self._locate_data_file(unit).delete()

    def count_error_rows(self, units: Iterable[str]) -> int:
        """Count the rows of units in ``errors/``."""
        wanted = frozenset(units)
        files = [file for file in (self.location / "errors").list_files(".parquet") if parse_unit_id(file) in wanted]
        return sum(table.num_rows for table in map_in_threads(lambda file: read_columns(file, ["error_type"]), files))

    def summarize_units(self, units: Iterable[str]) -> list[UnitSummary]:
        """Count the rows of finished units; units without a data file are left out.

        Raises:
            StorageError: a file cannot be read.
        """
        failed = frozenset(parse_unit_id(file) for file in (self.location / "errors").list_files(".parquet"))
        done = self.list_done_units()
        finished = [unit for unit in units if unit in done]
        return map_in_threads(lambda unit: self._summarize_files(unit, unit in failed), finished)

    def _summarize_files(self, unit: str, failed: bool) -> UnitSummary:
        answers = read_columns(self._locate_data_file(unit), ["retrieved", "usage"])
        errors = self.location / "errors" / f"part-{unit}.parquet"
        return summarize_unit(unit, answers, read_columns(errors, ["error_type"]) if failed else NO_ERRORS)


NO_ERRORS = pa.table({"error_type": pa.array([], pa.string())})


def summarize_unit(unit: str, answers: pa.Table, errors: pa.Table) -> UnitSummary:
    """Count a unit's rows."""
    usage = answers["usage"].combine_chunks()
    began, ended = json.loads((answers.schema.metadata or {}).get(TIMES, b"[null, null]"))
    return UnitSummary(
        unit=unit,
        rows=answers.num_rows + errors.num_rows,
        errors=dict(Counter(errors["error_type"].to_pylist())),
        retrieved=pc.sum(answers["retrieved"]).as_py() or 0,
        generated_tokens=pc.sum(pc.struct_field(usage, "generated_tokens")).as_py() or 0,
        prompt_tokens=pc.sum(pc.struct_field(usage, "prompt_tokens")).as_py() or 0,
        began=began,
        ended=ended,
    )


def is_unit_file(file: Location, folder: str) -> bool:
    """Whether a file is a unit file in ``folder``, which is ``data`` or ``errors``."""
    *_, parent, _ = ["", *file.path.split("/")]
    return parent == folder and UNIT_FILE.fullmatch(file.name) is not None


def parse_unit_id(file: Location) -> str:
    """Return the unit id in the name of a unit file."""
    return file.name.removeprefix("part-").removesuffix(".parquet")


def get_columns(manifest: Mapping[str, Any]) -> Columns:
    """Return the names in an annotated set of the query set's columns that it was made with."""
    columns = Columns.model_validate(manifest.get("configuration", {}).get("columns", {}))
    return Columns(**{key: get_output_name(name) for key, name in columns})
