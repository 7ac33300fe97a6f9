"""Rows → a query set: spooled on this machine, brought to one schema, checked whole, and only then published."""

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
from pipeline.storage.location import Location, one_line

log = logging.getLogger(__name__)

# Rows of a file, and of a row group, which a reader of the set has in memory as a whole.
FILE_ROWS = 1 << 14
GROUP_ROWS = 1 << 11
# Stands in the folder while files come and go, and is no Parquet: half of a set cannot be taken for a whole one.
UNFINISHED = "import-unfinished.parquet"
OWN_FILE = re.compile(rf"queries-\d{{5}}\.parquet|{re.escape(UNFINISHED)}")
# What pyarrow raises where values do not fit a type, or each other.
UNFIT = (pa.ArrowException, TypeError, ValueError, OverflowError)

PlacedRow = tuple[str, Mapping[str, Any]]


@dataclass
class Spool:
    """Rows on their way, in files of ``FILE_ROWS``, each with the types that its values have.

    Attributes:
        types: of columns whose types are declared.
        schemas: of the files so far.
        filled: columns of the query set that some row has.
    """

    folder: Path
    types: Mapping[str, pa.DataType]
    schemas: list[pa.Schema] = field(default_factory=list)
    filled: set[str] = field(default_factory=set)

    def write(self, rows: Iterable[PlacedRow]) -> None:
        """Take all rows up.

        Raises:
            ValueError: a column does not fit one type; names it and the row.
        """
        rows, written = iter(rows), 0
        while batch := list(islice(rows, FILE_ROWS)):
            table = _table(batch, {**self.types, **{column.name: column.type for column in QUERY_FIELDS}})
            feather.write_feather(table, self._file(len(self.schemas)))
            self.schemas.append(table.schema)
            self.filled |= {c for c in QUERY_FIELDS.names if table[c].null_count < len(table)}
            written += len(batch)
            log.info("%d rows read", written)

    def tables(self) -> Iterator[pa.Table]:
        """The files in one schema; a column of the query set that no row fills is left out.

        Raises:
            ValueError: a column has values of types that do not go together; names it.
        """
        names = dict.fromkeys(name for schema in self.schemas for name in schema.names)
        kept = [name for name in names if name not in QUERY_FIELDS.names or name in self.filled]
        schema = pa.schema([_common(name, self.schemas) for name in kept])
        for number in range(len(self.schemas)):
            table = feather.read_table(self._file(number))
            whole = pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
            yield whole.select(schema.names).cast(schema)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05}.arrow"


def _table(rows: Sequence[PlacedRow], types: Mapping[str, pa.DataType]) -> pa.Table:
    names = dict.fromkeys(name for _, row in rows for name in row)
    return pa.table({name: _array(name, rows, types.get(name)) for name in names})


def _array(name: str, rows: Sequence[PlacedRow], kind: pa.DataType | None) -> pa.Array:
    values = [row.get(name) for _, row in rows]
    try:
        return pa.array(values, kind)
    except UNFIT as error:
        first = bisect.bisect_left(range(len(values)), True, key=lambda n: not _fit(values[: n + 1], kind))
        raise ValueError(
            f"{rows[first][0]}: column {name!r} does not fit the rows before it ({one_line(error)}); "
            f"leave it out with --drop {name}"
        ) from None


def _fit(values: Sequence[Any], kind: pa.DataType | None) -> bool:
    try:
        pa.array(values, kind)
    except UNFIT:
        return False
    return True


def _common(name: str, schemas: Sequence[pa.Schema]) -> pa.Field:
    fields = [schema.field(name) for schema in schemas if name in schema.names]
    try:
        merged = pa.unify_schemas([pa.schema([column]) for column in fields], promote_options="permissive")
    except pa.ArrowException:
        kinds = " and ".join(sorted({str(column.type) for column in fields}))
        raise ValueError(f"column {name!r} holds {kinds}; leave it out with --drop {name}") from None
    return merged.field(name)


def write_query_set(spool: Spool, folder: Path, output: Location) -> QuerySet:
    """Write the set to a local folder and check it as ``jobs.annotate`` will.

    Args:
        output: where it will lie, for messages.

    Raises:
        ValueError: it is no query set.
    """
    for number, table in enumerate(spool.tables()):
        try:
            pq.write_table(
                table, folder / f"queries-{number:05}.parquet", row_group_size=GROUP_ROWS, compression="zstd"
            )
        except pa.ArrowException as error:
            raise ValueError(f"Parquet cannot hold a column ({one_line(error)}); leave it out with --drop") from None
    here = Location(output.uri, fs.LocalFileSystem(), str(folder))
    return inspect_queries(here, Columns(), ExecutionConfig().unit_rows)


def check_free(output: Location, overwrite: bool) -> None:
    """Refuse an output where something lies.

    Raises:
        ValueError: it holds other files than an import's, or those, and they shall not be replaced.
    """
    if output.kind() == fs.FileType.File:
        raise ValueError(f"--output {output.uri} is a file; name a folder")
    names = [_name(file, output) for file in output.files()]
    foreign = [name for name in names if not OWN_FILE.fullmatch(name)]
    if foreign:
        raise ValueError(f"--output {output.uri} holds files of something else ({foreign[0]}); choose another")
    if names and not overwrite:
        raise ValueError(f"--output {output.uri} holds a query set; choose another, or replace it with --overwrite")


def _name(file: Location, folder: Location) -> str:
    return file.path[len(folder.path.rstrip("/")) + 1 :]


def publish_query_set(folder: Path, output: Location) -> None:
    """Put the set in its place, whole files one by one, and make what lay there go.

    Raises:
        StorageError: the storage does not take it; the folder cannot be read as a query set then.
    """
    old, mark = output.files(), output / UNFINISHED
    mark.write(b"This query set is being written, or its import was killed: run it again with --overwrite.\n")
    for file in old:
        if _name(file, output) != UNFINISHED:
            file.delete()
    for path in sorted(folder.iterdir()):
        (output / path.name).write(path.read_bytes())
    mark.delete()
