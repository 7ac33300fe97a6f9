"""The files of a unit: answers in ``data/``, failed rows in ``errors/``, and the summary that both carry.

A unit writes its errors file first, if it has errors, and always its data file last. Both names are derived from the
unit's id, so attempts at a unit write the same files. Two files cannot be replaced together: they belong together if
their metadata hold the same summary, which names the attempt that wrote them.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.output.schema import build_data_schema, build_error_schema
from pipeline.storage.location import Location

UNIT_ID = re.compile(r"[0-9a-f]{20}")
UNIT_FILE = re.compile(rf"part-({UNIT_ID.pattern})\.parquet")
# Metadata key of both files for the summary of their unit.
SUMMARY = b"selfrag.unit"
NO_ERRORS = pa.table({"error_type": pa.array([], pa.string())})


@dataclass(frozen=True)
class Work:
    """When a unit was annotated, and by which actor. Times are in seconds since the epoch.

    Attributes:
        began: time when an actor started the unit, after the engine's first request; None if unknown.
        ended: time when all rows were annotated; None if unknown.
        full_until: last time when a request waited for the engine; None if none has waited, or if that is unknown.
        actor: id of the actor; empty if it is unknown, or if an earlier attempt had finished some of the rows.
    """

    began: float | None = None
    ended: float | None = None
    full_until: float | None = None
    actor: str = ""


UNKNOWN = Work()


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
        carried: number of answered rows that were carried over from an earlier set.
        began, ended, full_until, actor: as in :class:`Work`.
        run: digest of the run's identity: of everything that decides its results.
        attempt: random id of the attempt that wrote the files.
        data_bytes: size of the data file; 0 if unknown, as in the file's own metadata.
    """

    unit: str
    rows: int
    errors: dict[str, int] = field(default_factory=dict)
    retrieved: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    carried: int = 0
    began: float | None = None
    ended: float | None = None
    full_until: float | None = None
    actor: str = ""
    run: str = ""
    attempt: str = ""
    data_bytes: int = 0

    @property
    def failed(self) -> int:
        """Number of failed rows."""
        return sum(self.errors.values())

    @property
    def work(self) -> Work:
        """When the unit was annotated, and by which actor."""
        return Work(self.began, self.ended, self.full_until, self.actor)

    def has_size_of(self, file: Location | None) -> bool:
        """Whether a listed data file has the size of this unit's."""
        return file is not None and file.stamp is not None and file.stamp.size == self.data_bytes

    def to_metadata(self) -> dict[bytes, bytes]:
        """Return the metadata of the unit's files."""
        return {SUMMARY: json.dumps(asdict(self)).encode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> "UnitSummary | None":
        """Read the summary from the metadata of a file; None if they hold none, or one of another version."""
        try:
            return cls(**json.loads((metadata or {})[SUMMARY]))
        except (KeyError, ValueError, TypeError):
            return None


def split_failed(annotated: pa.Table, inputs: pa.Schema, keep_candidates: bool) -> tuple[pa.Table, pa.Table]:
    """Separate the answered rows of a unit from those that failed.

    Args:
        annotated: input, answer and error columns; rows with an ``error_type`` have failed.
        inputs: schema of the query set.
        keep_candidates: whether to keep the columns of candidates.

    Returns:
        The rows of the data file, and those of the errors file.
    """
    failed = pc.is_valid(annotated["error_type"])
    answers = annotated.filter(pc.invert(failed)).select(build_data_schema(inputs, keep_candidates).names)
    return answers, annotated.filter(failed).select(build_error_schema(inputs).names)


def summarize_unit(unit: str, answers: pa.Table, errors: pa.Table) -> UnitSummary:
    """Count a unit's rows."""
    usage = answers["usage"].combine_chunks()
    return UnitSummary(
        unit=unit,
        rows=answers.num_rows + errors.num_rows,
        errors=dict(Counter(errors["error_type"].to_pylist())),
        retrieved=pc.sum(answers["retrieved"]).as_py() or 0,
        generated_tokens=pc.sum(pc.struct_field(usage, "generated_tokens")).as_py() or 0,
        prompt_tokens=pc.sum(pc.struct_field(usage, "prompt_tokens")).as_py() or 0,
        carried=_count_carried(answers),
    )


def _count_carried(answers: pa.Table) -> int:
    if "carried_from" not in answers.schema.names:  # an earlier version annotated them
        return 0
    return int(pc.count(answers["carried_from"]).as_py())


def is_unit_file(file: Location, folder: str) -> bool:
    """Whether a file is a unit file in ``folder``, which is ``data`` or ``errors``."""
    *_, parent, _ = ["", *file.path.split("/")]
    return parent == folder and UNIT_FILE.fullmatch(file.name) is not None


def parse_unit_id(file: Location) -> str | None:
    """Return the unit's id from the name of its file; None if no run writes such a name."""
    found = UNIT_FILE.fullmatch(file.name)
    return found[1] if found else None
