"""Write rows as a query set: spool them locally, unify their schema, check the whole set, then publish it."""

import bisect
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import feather, fs

from pipeline.config.sections import Columns, ExecutionConfig
from pipeline.queries.query_set import QuerySet, inspect_queries
from pipeline.queries.schema import QUERY_FIELDS
from pipeline.storage.location import Location, join_lines

log = logging.getLogger(__name__)

# Rows of a file, and of a row group; a reader holds whole row groups in memory.
FILE_ROWS = 1 << 14
GROUP_ROWS = 1 << 11
# In the folder while its files are replaced. It is not valid Parquet, so a partial set is rejected by every reader.
UNFINISHED = "import-unfinished.parquet"
OWN_FILE = re.compile(rf"queries-\d{{5}}\.parquet|{re.escape(UNFINISHED)}")
# Errors that pyarrow raises for values that do not fit a type, or each other.
UNFIT = (pa.ArrowException, TypeError, ValueError, OverflowError)

PlacedRow = tuple[str, Mapping[str, Any]]


@dataclass
class Spool:
    """Local files of up to ``FILE_ROWS`` rows each; undeclared types are inferred for each file.

    Attributes:
        folder: local folder of the files.
        types: declared types by column.
        schemas: schemas of the files so far.
        filled: columns of the query set that are not null in some row.
    """

    folder: Path
    types: Mapping[str, pa.DataType]
    schemas: list[pa.Schema] = field(default_factory=list)
    filled: set[str] = field(default_factory=set)

    def write(self, rows: Iterable[PlacedRow]) -> None:
        """Write all rows to files.

        Raises:
            ValueError: the values of a column do not fit one type; names the column and the row.
        """
        rows, written = iter(rows), 0
        while batch := list(islice(rows, FILE_ROWS)):
            table = _build_table(batch, {**self.types, **{column.name: column.type for column in QUERY_FIELDS}})
            feather.write_feather(table, self._locate_file(len(self.schemas)))
            self.schemas.append(table.schema)
            self.filled |= {c for c in QUERY_FIELDS.names if table[c].null_count < len(table)}
            written += len(batch)
            log.info("%d rows read", written)

    def read_tables(self) -> Iterator[pa.Table]:
        """Read the files, cast to a common schema; columns of the query set without any value are left out.

        Raises:
            ValueError: the types of a column cannot be unified; names the column.
        """
        names = dict.fromkeys(name for schema in self.schemas for name in schema.names)
        kept = [name for name in names if name not in QUERY_FIELDS.names or name in self.filled]
        schema = pa.schema([_unify_field(name, self.schemas) for name in kept])
        for number in range(len(self.schemas)):
            table = feather.read_table(self._locate_file(number))
            whole = pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
            yield whole.select(schema.names).cast(schema)

    def _locate_file(self, number: int) -> Path:
        return self.folder / f"{number:05}.arrow"


def _build_table(rows: Sequence[PlacedRow], types: Mapping[str, pa.DataType]) -> pa.Table:
    names = dict.fromkeys(name for _, row in rows for name in row)
    return pa.table({name: _build_array(name, rows, types.get(name)) for name in names})


def _build_array(name: str, rows: Sequence[PlacedRow], kind: pa.DataType | None) -> pa.Array:
    values = [row.get(name) for _, row in rows]
    try:
        return pa.array(values, kind)
    except UNFIT as error:
        first = bisect.bisect_left(range(len(values)), True, key=lambda n: not _can_convert(values[: n + 1], kind))
        raise ValueError(
            f"{rows[first][0]}: column {name!r} does not match its declared or inferred type ({join_lines(error)}); "
            f"leave it out with --drop {name}"
        ) from None


def _can_convert(values: Sequence[Any], kind: pa.DataType | None) -> bool:
    try:
        pa.array(values, kind)
    except UNFIT:
        return False
    return True


def _unify_field(name: str, schemas: Sequence[pa.Schema]) -> pa.Field:
    fields = [schema.field(name) for schema in schemas if name in schema.names]
    try:
        merged = pa.unify_schemas([pa.schema([column]) for column in fields], promote_options="permissive")
    except pa.ArrowException:
        kinds = " and ".join(sorted({str(column.type) for column in fields}))
        raise ValueError(f"column {name!r} has the types {kinds}; leave it out with --drop {name}") from None
    return merged.field(name)


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
            pq.write_table(
                table, folder / f"queries-{number:05}.parquet", row_group_size=GROUP_ROWS, compression="zstd"
            )
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
