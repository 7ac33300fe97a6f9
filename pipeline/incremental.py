"""Queries that no earlier run has answered: what a run every night over a growing query set has to do.

The selection is written beside the output before anything is annotated, and stays: the same command goes on with the
same rows, whatever else has been answered meanwhile.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import StorageConfig
from pipeline.output import is_unit_file, parquet_bytes
from pipeline.query_set import QuerySet, query_ids, read_unit
from pipeline.storage import Location

# Rows of the files that a selection is written to.
FILE_ROWS = 65_536


class NothingNewError(Exception):
    """All queries are answered in earlier sets."""


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

    def answered(self) -> pa.ChunkedArray:
        """Ids of all rows that they have answers for, ``errors/`` apart: large_string.

        Raises:
            ValueError: a set has no such column.
            StorageError: storage does not answer.
        """
        own = f"{self.apart_from.path.rstrip('/')}/"
        chunks: list[pa.Array] = []
        for file in self.folder.files(".parquet"):
            if is_unit_file(file, "data") and not file.path.startswith(own):
                chunks += _column(file, self.id_column).chunks
        return pa.chunked_array(chunks, pa.large_string())


def _column(file: Location, name: str) -> pa.ChunkedArray:
    def work() -> pa.ChunkedArray:
        with file.filesystem.open_input_file(file.path) as stream:
            parquet = pq.ParquetFile(stream)
            if name not in parquet.schema_arrow.names:
                raise ValueError(f"{file.uri}: no column {name!r} of ids (columns.id)")
            return parquet.read(columns=[name])[name].cast(pa.large_string())

    return file.attempt(work)


@dataclass(frozen=True)
class Selection:
    """Where new queries are kept: a folder of Parquet files, and a record that comes last."""

    folder: Location

    @classmethod
    def of(cls, output: Location) -> "Selection":
        """That of a run."""
        return cls(output / "_queries")

    @property
    def _record(self) -> Location:
        return self.folder / "selection.json"

    def made(self) -> bool:
        """Whether it is there."""
        return self._record.exists()

    def check(self, queries: QuerySet) -> None:
        """Refuse a selection of other queries.

        Raises:
            ValueError: it is one.
        """
        if json.loads(self._record.read())["queries"] != queries.digest:
            raise ValueError(
                f"{self.folder.uri} was chosen from other queries; choose another output, "
                "or replace it with --overwrite"
            )

    def make(self, queries: QuerySet, earlier: Earlier, storage: StorageConfig) -> None:
        """Choose the queries that have no answer yet.

        Driver memory: the ids of all sets at once, and the rows of a file.

        Raises:
            NothingNewError: there are none.
            ValueError: an earlier set has no column of ids.
            StorageError: storage does not answer.
        """
        for file in self.folder.files():
            file.delete()
        files = 0
        for files, table in enumerate(_files(_new_rows(queries, earlier, storage)), 1):
            (self.folder / f"part-{files:05d}.parquet").write(parquet_bytes(table))
        if not files:
            raise NothingNewError(
                f"all {queries.rows} queries are answered below {earlier.folder.uri}; nothing is left to do"
            )
        self._record.write(json.dumps({"queries": queries.digest}).encode())


def _new_rows(queries: QuerySet, earlier: Earlier, storage: StorageConfig) -> Iterator[pa.Table]:
    ids = query_ids(queries, earlier.id_column, storage)
    new = pc.invert(pc.is_in(ids, value_set=earlier.answered()))
    first = 0
    for unit in queries.units:
        mask = new.slice(first, unit.rows)
        first += unit.rows
        if pc.any(mask).as_py():
            yield read_unit(unit, storage).filter(mask)


def _files(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The rows of many tables in few."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(one.num_rows for one in waiting) >= FILE_ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)
