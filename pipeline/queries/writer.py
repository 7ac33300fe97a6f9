"""Write rows as a query set: spool them locally, unify their schema, check the whole set, then publish it."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import feather, fs

from pipeline.config.sections import Columns, ExecutionConfig
from pipeline.queries.query_set import QuerySet, inspect_queries
from pipeline.queries.schema import QUERY_FIELDS
from pipeline.queries.unified_schema import DROP, cast_table, replace_views, unify_optional_columns
from pipeline.storage.location import Location, join_lines
from pipeline.storage.parquet import WRITING

log = logging.getLogger(__name__)

# Rows of a file, and of a row group; a reader holds whole row groups in memory.
FILE_ROWS = 1 << 14
GROUP_ROWS = 1 << 11
# In the folder while its files are replaced. It is not valid Parquet, so a partial set is rejected by every reader.
UNFINISHED = "import-unfinished.parquet"
OWN_FILE = re.compile(rf"queries-\d{{5}}\.parquet|{re.escape(UNFINISHED)}")


@dataclass
class Spool:
    """Local files of the imported rows, one for each batch.

    Attributes:
        folder: local folder of the files.
        places: place of the first row of each file, for messages.
        schemas: schema of each file.
        filled: columns of the query set that are not null in some row.
        rows: number of rows.
    """

    folder: Path
    places: list[str] = field(default_factory=list)
    schemas: list[pa.Schema] = field(default_factory=list)
    filled: set[str] = field(default_factory=set)
    rows: int = 0

    def write(self, place: str, rows: Sequence[Mapping[str, Any]], passed: pa.Table) -> None:
        """Write a batch.

        Args:
            place: place of the batch in the source, for messages.
            rows: the columns of the query set.
            passed: the other columns, with as many rows.
        """
        table = pa.Table.from_pylist(list(rows), schema=QUERY_FIELDS)
        self.filled |= {name for name in QUERY_FIELDS.names if table[name].null_count < len(table)}
        for name in passed.column_names:
            table = table.append_column(passed.schema.field(name), passed[name])
        feather.write_feather(table, self._locate_file(len(self.schemas)))
        self.places.append(place)
        self.rows += len(table)
        if self.rows // FILE_ROWS > (self.rows - len(table)) // FILE_ROWS:
            log.info("%d rows read", self.rows)
        self.schemas.append(replace_views(table.schema))

    def read_tables(self) -> Iterator[pa.Table]:
        """Read tables of ``FILE_ROWS`` rows, the last one of fewer; leaves out empty columns of the query set.

        Raises:
            ValueError: the types of a column cannot be unified; names the column.
        """
        named = unify_optional_columns(dict(zip(self.places, self.schemas, strict=True)))
        schema = pa.schema(
            [column for column in named if column.name not in QUERY_FIELDS.names or column.name in self.filled]
        )
        waiting = schema.empty_table()
        for number, place in enumerate(self.places):
            table = feather.read_table(self._locate_file(number))
            whole = cast_table(_fill_columns(table, schema), schema, place, DROP)
            waiting = pa.concat_tables([waiting, whole])
            while len(waiting) >= FILE_ROWS:
                yield waiting.slice(0, FILE_ROWS)
                waiting = waiting.slice(FILE_ROWS)
        if len(waiting):
            yield waiting

    def _locate_file(self, number: int) -> Path:
        return self.folder / f"{number:05}.arrow"


def _fill_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Append the columns of a schema that a table lacks, filled with nulls."""
    for name in schema.names:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table)))
    return table


def write_query_set(spool: Spool, folder: Path, output: Location) -> QuerySet:
    """Write the query set to a local folder and check it as ``jobs.annotate`` does.

    Args:
        spool: rows to write.
        folder: local folder for the set.
        output: folder to which the set will be published, for messages.

    Raises:
        ValueError: Parquet cannot hold a column, or the rows are not a valid query set.
    """
    for number, table in enumerate(spool.read_tables()):
        try:
            pq.write_table(table, folder / f"queries-{number:05}.parquet", row_group_size=GROUP_ROWS, **WRITING)
        except pa.ArrowException as error:
            raise ValueError(f"Parquet cannot store a column ({join_lines(error)}); leave it out with --drop") from None
    here = Location(output.uri, fs.LocalFileSystem(), str(folder))
    return inspect_queries(here, Columns(), ExecutionConfig().unit_rows)


def check_free(output: Location, overwrite: bool) -> None:
    """Check that an output can be written.

    Raises:
        ValueError: the output is a file, holds files that no import has written, or holds a query set and ``overwrite``
            is not set.
    """
    if output.get_type() == fs.FileType.File:
        raise ValueError(f"--output {output.uri} is a file; name a folder")
    names = [_get_relative_name(file, output) for file in output.list_files()]
    foreign = [name for name in names if not OWN_FILE.fullmatch(name)]
    if foreign:
        raise ValueError(
            f"--output {output.uri} contains files that are not part of a query set ({foreign[0]}); choose another"
        )
    if names and not overwrite:
        raise ValueError(f"--output {output.uri} holds a query set; choose another, or replace it with --overwrite")


def _get_relative_name(file: Location, folder: Location) -> str:
    return file.path[len(folder.path.rstrip("/")) + 1 :]


def publish_query_set(folder: Path, output: Location) -> None:
    """Replace the files in the output by those of the set, one by one.

    Raises:
        StorageError: a file cannot be written or deleted; a half-replaced folder is rejected as a query set.
    """
    old, mark = output.list_files(), output / UNFINISHED
    mark.write(b"This query set is being written, or its import was killed: run it again with --overwrite.\n")
    for file in old:
        if _get_relative_name(file, output) != UNFINISHED:
            file.delete()
    for path in sorted(folder.iterdir()):
        (output / path.name).write(path.read_bytes())
    mark.delete()
