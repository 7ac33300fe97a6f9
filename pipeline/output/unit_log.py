"""The summaries of the finished units in one file of the output, so that not every unit's files must be opened."""

import logging
import time
from collections.abc import Iterable
from dataclasses import asdict
from types import TracebackType

import pyarrow as pa

from pipeline.output.unit_files import UNIT_ID, UnitSummary
from pipeline.storage.lease import Lease
from pipeline.storage.location import Location, MissingFileError, StorageError
from pipeline.storage.parquet import encode_parquet, read_checked

log = logging.getLogger(__name__)

UNITS = "_units.parquet"
# Seconds between two writes while units are finished. The summaries that a killed driver has not written yet are read
# from the units' files by the next one.
WRITE_S = 30.0
SCHEMA = pa.schema(
    [
        pa.field("unit", pa.string()),
        pa.field("rows", pa.int64()),
        pa.field("errors", pa.map_(pa.string(), pa.int64())),
        pa.field("retrieved", pa.int64()),
        pa.field("generated_tokens", pa.int64()),
        pa.field("prompt_tokens", pa.int64()),
        pa.field("carried", pa.int64()),
        pa.field("began", pa.float64()),
        pa.field("ended", pa.float64()),
        pa.field("full_until", pa.float64()),
        pa.field("actor", pa.string()),
        pa.field("run", pa.string()),
        pa.field("attempt", pa.string()),
        pa.field("data_bytes", pa.int64()),
    ]
)


def read_units(output: Location) -> dict[str, UnitSummary]:
    """Read the summaries that a run has written, by unit; empty if it has written none.

    Raises:
        ValueError: the file is damaged, or of another version.
        StorageError: the file cannot be read.
    """
    file = output / UNITS
    try:
        table = read_checked(file)
    except MissingFileError:
        return {}
    if not table.schema.equals(SCHEMA):
        raise ValueError(f"{file.uri}: not a list of units of this version; delete it and run again")
    return {unit.unit: unit for unit in decode_units(table, file)}


def decode_units(table: pa.Table, file: Location) -> list[UnitSummary]:
    """Return the summaries that a table of ``SCHEMA`` holds.

    Args:
        file: the file that it was read from, for messages.

    Raises:
        ValueError: an id is not that of a unit.
    """
    rows = [{**row, "errors": dict(row["errors"])} for row in table.to_pylist()]
    if strange := [row["unit"] for row in rows if not UNIT_ID.fullmatch(row["unit"])]:
        raise ValueError(f"{file.uri}: {strange[0]!r} is not the id of a unit; delete the file and run again")
    return [UnitSummary(**row) for row in rows]


def write_units(output: Location, units: Iterable[UnitSummary]) -> None:
    """Write the summaries of the finished units.

    Raises:
        StorageError: the file cannot be written.
    """
    (output / UNITS).write(encode_parquet(encode_units(units)))


def encode_units(units: Iterable[UnitSummary]) -> pa.Table:
    """Return a table of ``SCHEMA`` with the summaries."""
    rows = [{**asdict(unit), "errors": list(unit.errors.items())} for unit in units]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


class UnitLog:
    """Writes the summaries of units while they are finished, and once more when the context ends.

    Args:
        output: folder of the annotated set.
        done: summaries of the units that were finished before.
        lease: lease on the output; without a recent heartbeat nothing is written.
    """

    def __init__(self, output: Location, done: Iterable[UnitSummary], lease: Lease) -> None:
        self._output = output
        self._lease = lease
        self._units = list(done)
        self._written = time.monotonic()

    def __enter__(self) -> "UnitLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()

    def add(self, unit: UnitSummary) -> None:
        """Add a unit that is finished."""
        self._units.append(unit)
        if time.monotonic() - self._written > WRITE_S:
            self._write()

    def _write(self) -> None:
        if not self._lease.is_fresh:
            return
        try:
            write_units(self._output, self._units)
        except StorageError as problem:  # the summaries are in the units' files too
            log.warning("%s", problem)
        self._written = time.monotonic()
