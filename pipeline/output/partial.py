"""Sub-files with the finished rows of a unit in progress, so that an attempt that repeats the unit continues it.

They lie in ``_partial/<unit>-<attempt>-<number>.parquet`` below the output. The underscore hides them from readers of
the set; the id of the attempt keeps two actors with the same unit apart. Sub-files save work and never decide what is
done: whatever is wrong with one, it is ignored with a warning, and its rows are annotated again.
"""

import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.output.schema import ANSWER_FIELDS, CANDIDATE_FIELDS, ERROR_FIELDS
from pipeline.storage.location import Location, MissingFileError, StorageError, join_lines
from pipeline.storage.parquet import encode_parquet, map_in_threads, read_checked

log = logging.getLogger(__name__)

FOLDER = "_partial"
SUB_FILE = re.compile(r"(?P<unit>[0-9a-f]{20})-(?P<attempt>[0-9a-f]{32})-\d+\.parquet")
# Metadata key of a sub-file for the identity of the run that wrote it.
IDENTITY = b"selfrag.identity"
# Number of a row within its unit, from 0.
NUMBER = pa.field("row", pa.int32(), nullable=False)

# Values of the columns that a run adds to a row, by name.
Outcome = Mapping[str, Any]


def list_sub_files(output: Location) -> list[Location]:
    """List the sub-files of all units, by name."""
    return [file for file in (output / FOLDER).list_files(".parquet") if SUB_FILE.fullmatch(file.name)]


def list_partial_units(output: Location) -> frozenset[str]:
    """Return the ids of the units that have sub-files."""
    return frozenset(file.name.partition("-")[0] for file in list_sub_files(output))


def clear_partial(output: Location) -> None:
    """Delete all sub-files, which units that were repeated or lost may have left."""
    delete_files(list_sub_files(output))
    if output.local:
        with suppress(OSError):  # missing, or not empty
            Path((output / FOLDER).path).rmdir()


def delete_files(files: Sequence[Location]) -> None:
    """Delete files, one after another: rclone's store can hide a file, and keep it, while another is deleted."""
    for file in files:
        file.delete()


@dataclass
class PartialUnit:
    """The sub-files of one unit, as one attempt at it sees them.

    Attributes:
        output: folder of the annotated set.
        unit: id of the unit.
        identity: digest of everything that decides the results; sub-files of other identities are ignored.
        keep_candidates: whether the columns of candidates are kept.
        attempt: id of the attempt, in the names of the sub-files that it writes.
        written: number of sub-files that it has written.
    """

    output: Location
    unit: str
    identity: str
    keep_candidates: bool
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex)
    written: int = 0

    @property
    def _schema(self) -> pa.Schema:
        extra = CANDIDATE_FIELDS if self.keep_candidates else []
        return pa.schema([NUMBER, *ANSWER_FIELDS, *extra, *ERROR_FIELDS], {IDENTITY: self.identity.encode()})

    def write(self, outcomes: Mapping[int, Outcome]) -> None:
        """Write finished rows to a sub-file of their own.

        Args:
            outcomes: values of the columns that a run adds, by number of the row within the unit.

        Raises:
            StorageError: the file cannot be written.
        """
        rows = [{**outcome, NUMBER.name: number} for number, outcome in outcomes.items()]
        content = encode_parquet(pa.Table.from_pylist(rows, self._schema))
        file = self.output / FOLDER / f"{self.unit}-{self.attempt}-{self.written}.parquet"
        self.written += 1
        file.write(content)

    def read(self, rows: int) -> dict[int, Outcome]:
        """Read the finished rows of all attempts, by number; damaged and foreign sub-files are ignored.

        Args:
            rows: number of rows of the unit.
        """
        found: dict[int, Outcome] = {}
        for table in map_in_threads(self._read_file, self._list_files()):
            for outcome in table.to_pylist():
                number = outcome.pop(NUMBER.name)
                if 0 <= number < rows:
                    found.setdefault(number, outcome)
        return found

    def delete(self) -> None:
        """Delete the sub-files of all attempts at the unit."""
        delete_files(self._list_files())

    def _list_files(self) -> list[Location]:
        return [file for file in list_sub_files(self.output) if file.name.startswith(f"{self.unit}-")]

    def _read_file(self, file: Location) -> pa.Table:
        try:
            table = read_checked(file)
            identity = (table.schema.metadata or {}).get(IDENTITY)
            if table.schema.equals(self._schema) and identity == self.identity.encode():
                return table
            problem = "written by a run with other settings"
        except MissingFileError:  # another attempt has finished the unit
            problem = "deleted meanwhile"
        except (ValueError, StorageError) as error:
            problem = join_lines(error)
        log.warning("%s is ignored: %s", file.uri, problem)
        return self._schema.empty_table()
