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

from pipeline.config import Columns, StorageConfig
from pipeline.output import OutputFolder, is_unit_file, parquet_bytes
from pipeline.query_set import QuerySet, query_ids, read_unit
from pipeline.storage import Location

# Rows of the files that a selection is written to.
FILE_ROWS = 65_536


class NothingNewError(Exception):
    """All queries are answered in earlier sets."""


@dataclass(frozen=True)
class Selection:
    """The queries of a run that were not answered before.

    Attributes:
        location: a query set, in a folder that only its own run reads.
        known: queries that were left out.
    """

    location: Location
    known: int


def select_new(
    queries: QuerySet, columns: Columns, storage: StorageConfig, earlier: Location, output: OutputFolder, anew: bool
) -> Selection:
    """Leave out the queries whose ids are answered in an annotated set below a folder, the output's own set apart.

    Rows that ended in ``errors/`` are tried again. Driver memory: all ids of the earlier sets at once, and a file's
    rows.

    Args:
        anew: select again, although it was done before for this output.

    Raises:
        ValueError: the output has a selection of other queries; or an earlier set has no column of ids.
        NothingNewError: nothing is left.
        StorageError: storage does not answer.
    """
    folder = output.location / "_queries"
    record = folder / "selection.json"
    if record.exists() and not anew:
        found = json.loads(record.read())
        if found["queries"] != queries.digest:
            raise ValueError(
                f"--output {output.location.uri} holds a run that differs in queries; choose another output, or "
                "replace it with --overwrite"
            )
    else:
        new = _write(queries, columns, storage, earlier, output, folder)
        if not new:
            raise NothingNewError(f"all {queries.rows} queries are answered below {earlier.uri}; nothing is left to do")
        found = {"queries": queries.digest, "new": new}
        record.write(json.dumps(found).encode())
    return Selection(folder, queries.rows - found["new"])


def answered_ids(earlier: Location, apart_from: Location, column: str) -> pa.ChunkedArray:
    """Ids of all rows that annotated sets below a folder have answers for: large_string.

    Raises:
        ValueError: a set has no such column.
        StorageError: storage does not answer.
    """
    own = f"{apart_from.path.rstrip('/')}/"
    chunks: list[pa.Array] = []
    for file in earlier.files(".parquet"):
        if is_unit_file(file, "data") and not file.path.startswith(own):
            chunks += _ids(file, column).chunks
    return pa.chunked_array(chunks, pa.large_string())


def _ids(file: Location, column: str) -> pa.ChunkedArray:
    def work() -> pa.ChunkedArray:
        with file.filesystem.open_input_file(file.path) as stream:
            parquet = pq.ParquetFile(stream)
            if column not in parquet.schema_arrow.names:
                raise ValueError(f"{file.uri}: no column {column!r} of ids (columns.id)")
            return parquet.read(columns=[column])[column].cast(pa.large_string())

    return file.attempt(work)


def _write(
    queries: QuerySet,
    columns: Columns,
    storage: StorageConfig,
    earlier: Location,
    output: OutputFolder,
    folder: Location,
) -> int:
    for file in folder.files():
        file.delete()
    known = answered_ids(earlier, output.location, columns.id)
    new = 0
    for number, table in enumerate(_files(_new_rows(queries, columns.id, storage, known))):
        (folder / f"part-{number:05d}.parquet").write(parquet_bytes(table))
        new += table.num_rows
    return new


def _new_rows(queries: QuerySet, column: str, storage: StorageConfig, known: pa.ChunkedArray) -> Iterator[pa.Table]:
    new = pc.invert(pc.is_in(query_ids(queries, column, storage), value_set=known))
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
