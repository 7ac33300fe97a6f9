"""The output folder: atomic unit files, manifest, success marker, and what an earlier run left.

The visible data files are the commit log. A unit writes its errors file first and its data file last and
always, both under names that follow from the unit, so a unit that runs twice writes the same files.
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
from pipeline.output.schema import data_schema, error_schema
from pipeline.storage.location import Location
from pipeline.storage.parquet import encode_parquet, map_in_threads, read_columns

FORMAT_VERSION = 1
REPORT = "report.html"
CARD = "README.md"
UNIT_FILE = re.compile(r"part-[0-9a-f]{20}\.parquet")
# Where a data file keeps when its unit was begun and ended.
TIMES = b"selfrag.times"


@dataclass(frozen=True)
class UnitSummary:
    """What became of one unit.

    Attributes:
        rows: all of its rows, failed ones included.
        errors: failed rows by error type.
        retrieved: answered rows that used a passage.
        generated_tokens, prompt_tokens: of its answered rows.
        began, ended: when an actor took it up, after its engine's first request, and had annotated it, in seconds
            since the epoch; None where unknown.
    """

    unit: str
    rows: int
    errors: dict[str, int] = field(default_factory=dict)
    retrieved: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    began: float | None = None
    ended: float | None = None

    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"rows": self.rows, "errors": sum(self.errors.values()), "began": self.began, "ended": self.ended}


@dataclass(frozen=True)
class OutputFolder:
    """One annotated set."""

    location: Location

    @property
    def _manifest(self) -> Location:
        return self.location / "_manifest.json"

    @property
    def _success(self) -> Location:
        return self.location / "_SUCCESS"

    def manifest(self) -> dict[str, Any] | None:
        """The manifest; None where no run has begun here.

        Raises:
            ValueError: it is not one of ours.
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

    def finished(self) -> bool:
        """Whether a run has finished here."""
        return self._success.exists()

    def data_files(self) -> list[Location]:
        """Finished units' files."""
        return (self.location / "data").files(".parquet")

    def done_units(self) -> frozenset[str]:
        """Ids of the units whose data file is there."""
        return frozenset(unit_of(file) for file in self.data_files())

    def foreign(self) -> str | None:
        """A file that no run of ours has written, in a folder without manifest; None where there is none.

        A dataset card may be of a set that was cleared away.
        """
        found = [file for file in self.location.files() if file.path != (self.location / CARD).path]
        return found[0].uri if found and not self._manifest.exists() else None

    def clear(self) -> None:
        """Delete what a run has written and nothing else; the success marker first, the manifest last.

        Until the manifest is gone the folder can be told from somebody else's.
        """
        if self._success.exists():
            self._success.delete()
        for folder in ("data", "errors"):
            for file in (self.location / folder).files(".parquet"):
                if UNIT_FILE.fullmatch(file.path.removeprefix(f"{self.location.path}/{folder}/")):
                    file.delete()
        for file in (self.location / REPORT, self._manifest):
            if file.exists():
                file.delete()

    def begin(self, manifest: dict[str, Any]) -> None:
        """Record what is about to run; a success marker of before no longer holds."""
        if self._success.exists():
            self._success.delete()
        self._write_manifest({**manifest, "status": "running"})

    def finish(self, manifest: dict[str, Any]) -> None:
        """Record what ran, then mark success."""
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
        """Write a unit's two files; one that is finished is left as it is, since two files cannot be replaced at once.

        Args:
            annotated: input, answer and error columns together; a row is an error where ``error_type`` is set.
            times: when the unit was begun and ended; kept in the data file's metadata, so that they survive a resume.
        """
        errors_file = self.location / "errors" / f"part-{unit}.parquet"
        if self._data_file(unit).exists():
            return self._summary(unit, errors_file.exists())
        failed = pc.is_valid(annotated["error_type"])
        answers = annotated.filter(pc.invert(failed)).select(data_schema(inputs, keep_candidates).names)
        answers = answers.replace_schema_metadata({TIMES: json.dumps(times)} if times else None)
        errors = annotated.filter(failed).select(error_schema(inputs).names)
        if errors.num_rows:
            errors_file.write(encode_parquet(errors))
        elif errors_file.exists():
            errors_file.delete()  # of an attempt that died before its data file
        self._data_file(unit).write(encode_parquet(answers))
        return summarise_unit(unit, answers, errors)

    def _data_file(self, unit: str) -> Location:
        return self.location / "data" / f"part-{unit}.parquet"

    def withdraw(self, unit: str) -> None:
        """Make a finished unit unfinished, so that it is annotated again."""
        self._data_file(unit).delete()

    def error_rows(self, units: Iterable[str]) -> int:
        """Rows of these units that are in ``errors/``."""
        wanted = frozenset(units)
        files = [file for file in (self.location / "errors").files(".parquet") if unit_of(file) in wanted]
        return sum(table.num_rows for table in map_in_threads(lambda file: read_columns(file, ["error_type"]), files))

    def summaries(self, units: Iterable[str]) -> list[UnitSummary]:
        """What the files of these units hold; a unit without a data file is left out.

        Raises:
            StorageError: a file cannot be read.
        """
        failed = frozenset(unit_of(file) for file in (self.location / "errors").files(".parquet"))
        done = self.done_units()
        finished = [unit for unit in units if unit in done]
        return map_in_threads(lambda unit: self._summary(unit, unit in failed), finished)

    def _summary(self, unit: str, failed: bool) -> UnitSummary:
        answers = read_columns(self._data_file(unit), ["retrieved", "usage"])
        errors = self.location / "errors" / f"part-{unit}.parquet"
        return summarise_unit(unit, answers, read_columns(errors, ["error_type"]) if failed else NO_ERRORS)


NO_ERRORS = pa.table({"error_type": pa.array([], pa.string())})


def summarise_unit(unit: str, answers: pa.Table, errors: pa.Table) -> UnitSummary:
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
    """Whether a file is a unit's, in ``data`` or ``errors``."""
    *_, parent, _ = ["", *file.path.split("/")]
    return parent == folder and UNIT_FILE.fullmatch(file.name) is not None


def unit_of(file: Location) -> str:
    """The unit id in a unit file's name."""
    return file.name.removeprefix("part-").removesuffix(".parquet")


def columns_of(manifest: Mapping[str, Any]) -> Columns:
    """Which column of an annotated set holds what."""
    return Columns.model_validate(manifest.get("configuration", {}).get("columns", {}))
