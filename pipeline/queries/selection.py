"""Select the queries that no earlier run has finished, for recurring runs over a growing query set.

The selection is made once and stored in the output folder before any row is annotated, so that the same command resumes
with the same rows, whatever has been added to the query set or annotated in the meantime.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, ValidationError

from pipeline.config.loading import Frozen
from pipeline.config.sections import StorageConfig
from pipeline.output.unit_files import is_unit_file
from pipeline.queries.query_set import QuerySet, read_query_ids
from pipeline.queries.units import read_unit
from pipeline.queries.writer import FILE_ROWS, GROUP_ROWS
from pipeline.storage.location import Location
from pipeline.storage.parquet import encode_parquet, map_in_threads, read_columns

# The error type of invalid rows, which would fail again.
OWN_FAULT = "ValueError"
# Number of sets in which a row must have failed, for any reason, to be left out.
TRIES = 2


class NothingNewError(Exception):
    """Earlier annotated sets have finished all queries."""


@dataclass(frozen=True)
class Earlier:
    """The annotated sets of earlier runs.

    Attributes:
        folder: folder that holds the sets, at any depth.
        apart_from: annotated set of this run, which is not read.
        id_column: column of ids in the query sets.
    """

    folder: Location
    apart_from: Location
    id_column: str

    def read_known_ids(self) -> pa.ChunkedArray:
        """Read the ids that are finished: answered, invalid, or failed in two sets. large_string.

        Raises:
            ValueError: a set has no column of ids.
            StorageError: a file cannot be read; names it.
        """
        own = f"{self.apart_from.path.rstrip('/')}/"
        files = [file for file in self.folder.list_files(".parquet") if not file.path.startswith(own)]
        answered = self._read([file for file in files if is_unit_file(file, "data")], [])
        failed = self._read([file for file in files if is_unit_file(file, "errors")], ["error_type"])
        hopeless = failed.filter(pc.equal(failed["error_type"], OWN_FAULT))["id"]
        counts = pc.value_counts(failed["id"])
        often = counts.filter(pc.greater_equal(counts.field("counts"), TRIES)).field("values")
        return pa.chunked_array([*answered["id"].chunks, *hopeless.chunks, often], pa.large_string())

    def _read(self, files: list[Location], more: list[str]) -> pa.Table:
        schema = pa.schema([("id", pa.large_string()), *((name, pa.string()) for name in more)])
        tables = map_in_threads(lambda file: self._read_columns(file, [self.id_column, *more]).cast(schema), files)
        return pa.concat_tables([schema.empty_table(), *tables])

    def _read_columns(self, file: Location, names: list[str]) -> pa.Table:
        table = read_columns(file, names)
        if self.id_column not in table.column_names:
            raise ValueError(f"{file.uri}: no id column {self.id_column!r} (columns.id)")
        return table.select(names).rename_columns(["id", *names[1:]]).replace_schema_metadata(None)


class SelectionRecord(Frozen):
    """The content of ``selection.json``: URI of the query set, and the number of queries that were left out."""

    queries: str
    known: Annotated[int, Field(ge=0)]

    @classmethod
    def read(cls, file: Location) -> "SelectionRecord":
        """Read the file.

        Raises:
            ValueError: it is damaged; names it.
        """
        try:
            return cls.model_validate_json(file.read())
        except ValidationError as error:
            raise ValueError(
                f"{file.uri}: {error.errors()[0]['msg'].lower()}; choose another output, or replace it with --overwrite"
            ) from None


@dataclass(frozen=True)
class Selection:
    """The new queries of a run.

    Attributes:
        folder: query set of the new queries.
        known: number of queries that were left out.
    """

    folder: Location
    known: int

    @classmethod
    def load(cls, output: Location, queries: str) -> "Selection | None":
        """Return the selection that is stored in an output, or None.

        Args:
            output: output folder of the run.
            queries: URI of the query set.

        Raises:
            ValueError: the stored selection was made from another query set.
        """
        folder = output / "_queries"
        if not _locate_record(folder).exists():
            return None
        record = SelectionRecord.read(_locate_record(folder))
        if record.queries != queries:
            raise ValueError(
                f"{folder.uri} was selected from {record.queries}; choose another output, "
                "or replace it with --overwrite"
            )
        return cls(folder, record.known)

    @classmethod
    def choose(cls, queries: QuerySet, earlier: Earlier, storage: StorageConfig, scratch: Location) -> "Selection":
        """Select the new queries and write them to a folder.

        Driver memory: the ids of all sets at once, and the rows of a file.

        Args:
            queries: query set to select from.
            earlier: earlier annotated sets.
            storage: access to object storage.
            scratch: empty folder for the selected queries.

        Raises:
            NothingNewError: there are no new queries.
            ValueError: an earlier set has no column of ids.
            StorageError: the storage cannot be read.
        """
        ids = read_query_ids(queries, earlier.id_column, storage)
        new = pc.invert(pc.is_in(ids, value_set=earlier.read_known_ids()))
        if not (count := pc.sum(new).as_py()):
            raise NothingNewError(
                f"all {queries.rows} queries are already answered or failed below {earlier.folder.uri}; "
                "nothing is left to do"
            )
        for number, table in enumerate(_merge_tables(_read_selected(queries, new, storage))):
            (scratch / f"part-{number:05d}.parquet").write(encode_parquet(table, GROUP_ROWS))
        return cls(scratch, queries.rows - count)

    def keep(self, output: Location, queries: str) -> "Selection":
        """Store the selection in the output folder, replacing another one; the record is written last."""
        folder = output / "_queries"
        for file in [_locate_record(folder), *folder.list_files(".parquet")]:
            if file.exists():
                file.delete()
        for file in self.folder.list_files(".parquet"):
            (folder / file.name).write(file.read())
        record = SelectionRecord(queries=queries, known=self.known)
        _locate_record(folder).write(record.model_dump_json().encode())
        return Selection(folder, self.known)


def _locate_record(folder: Location) -> Location:
    return folder / "selection.json"


def _read_selected(queries: QuerySet, new: pa.ChunkedArray, storage: StorageConfig) -> Iterator[pa.Table]:
    first = 0
    for unit in queries.units:
        mask = new.slice(first, unit.rows)
        first += unit.rows
        if pc.any(mask).as_py():
            yield read_unit(unit, queries.schema, storage).filter(mask)


def _merge_tables(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Concatenate small tables into tables of at least ``FILE_ROWS`` rows; the last one may be smaller."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        waiting.append(table)
        rows += table.num_rows
        if rows >= FILE_ROWS:
            yield pa.concat_tables(waiting)
            waiting, rows = [], 0
    if waiting:
        yield pa.concat_tables(waiting)
