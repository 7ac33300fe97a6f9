"""Queries that no earlier run has dealt with: what a run every night over a growing query set has to do.

The choice is made once, and kept beside the output before anything is annotated: the same command goes on with the same
rows, whatever is asked or answered meanwhile.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.sections import StorageConfig
from pipeline.output.folder import is_unit_file
from pipeline.queries.query_set import QuerySet, query_ids, read_unit
from pipeline.queries.writer import FILE_ROWS, GROUP_ROWS
from pipeline.storage.location import Location
from pipeline.storage.parquet import encode_parquet, map_in_threads, read_columns

# An error of the row itself: it would fail again.
OWN_FAULT = "ValueError"
# A row that failed in so many sets for other reasons is not tried again.
TRIES = 2


class NothingNewError(Exception):
    """Earlier sets have dealt with all queries."""


@dataclass(frozen=True)
class Earlier:
    """Annotated sets of before.

    Attributes:
        folder: they lie somewhere below it.
        apart_from: the set of this run, which does not count.
        id_column: of the query sets.
    """

    folder: Location
    apart_from: Location
    id_column: str

    def known(self) -> pa.ChunkedArray:
        """Ids that are dealt with: answered, failed by their own fault, or failed twice. large_string.

        Raises:
            ValueError: a set has no such column.
            StorageError: a file cannot be read; names it.
        """
        own = f"{self.apart_from.path.rstrip('/')}/"
        files = [file for file in self.folder.files(".parquet") if not file.path.startswith(own)]
        answered = self._read([file for file in files if is_unit_file(file, "data")], [])
        failed = self._read([file for file in files if is_unit_file(file, "errors")], ["error_type"])
        hopeless = failed.filter(pc.equal(failed["error_type"], OWN_FAULT))["id"]
        counts = pc.value_counts(failed["id"])
        often = counts.filter(pc.greater_equal(counts.field("counts"), TRIES)).field("values")
        return pa.chunked_array([*answered["id"].chunks, *hopeless.chunks, often], pa.large_string())

    def _read(self, files: list[Location], more: list[str]) -> pa.Table:
        schema = pa.schema([("id", pa.large_string()), *((name, pa.string()) for name in more)])
        tables = map_in_threads(lambda file: self._columns(file, [self.id_column, *more]).cast(schema), files)
        return pa.concat_tables([schema.empty_table(), *tables])

    def _columns(self, file: Location, names: list[str]) -> pa.Table:
        table = read_columns(file, names)
        if self.id_column not in table.column_names:
            raise ValueError(f"{file.uri}: no column {self.id_column!r} of ids (columns.id)")
        return table.select(names).rename_columns(["id", *names[1:]]).replace_schema_metadata(None)


@dataclass(frozen=True)
class Selection:
    """The queries of a run that are new.

    Attributes:
        folder: a query set.
        known: queries that were left out.
    """

    folder: Location
    known: int

    @classmethod
    def kept(cls, output: Location, queries: str) -> "Selection | None":
        """That of a run that has begun; None where there is none.

        Args:
            queries: URI of the query set.

        Raises:
            ValueError: it was chosen from another query set.
        """
        folder = output / "_queries"
        if not _record(folder).exists():
            return None
        record = json.loads(_record(folder).read())
        if record["queries"] != queries:
            raise ValueError(
                f"{folder.uri} was chosen from {record['queries']}; choose another output, "
                "or replace it with --overwrite"
            )
        return cls(folder, record["known"])

    @classmethod
    def choose(cls, queries: QuerySet, earlier: Earlier, storage: StorageConfig, scratch: Location) -> "Selection":
        """Choose the queries that are new.

        Driver memory: the ids of all sets at once, and the rows of a file.

        Args:
            scratch: an empty folder for them.

        Raises:
            NothingNewError: there are none.
            ValueError: an earlier set has no column of ids.
            StorageError: storage does not answer.
        """
        new = pc.invert(pc.is_in(query_ids(queries, earlier.id_column, storage), value_set=earlier.known()))
        if not (count := pc.sum(new).as_py()):
            raise NothingNewError(
                f"all {queries.rows} queries are dealt with below {earlier.folder.uri}; nothing is left to do"
            )
        for number, table in enumerate(_files(_rows(queries, new, storage))):
            (scratch / f"part-{number:05d}.parquet").write(encode_parquet(table, GROUP_ROWS))
        return cls(scratch, queries.rows - count)

    def keep(self, output: Location, queries: str) -> "Selection":
        """Put it beside the output, in the place of another one; its record comes last."""
        folder = output / "_queries"
        for file in [_record(folder), *folder.files(".parquet")]:
            if file.exists():
                file.delete()
        for file in self.folder.files(".parquet"):
            (folder / file.name).write(file.read())
        _record(folder).write(json.dumps({"queries": queries, "known": self.known}).encode())
        return Selection(folder, self.known)


def _record(folder: Location) -> Location:
    return folder / "selection.json"


def _rows(queries: QuerySet, new: pa.ChunkedArray, storage: StorageConfig) -> Iterator[pa.Table]:
    first = 0
    for unit in queries.units:
        mask = new.slice(first, unit.rows)
        first += unit.rows
        if pc.any(mask).as_py():
            yield read_unit(unit, storage).filter(mask)


def _files(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows of many tables in few."""
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
