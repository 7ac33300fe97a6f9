"""Check a query set and divide it into units."""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from pipeline.config.sections import Columns
from pipeline.queries.changes import Listing
from pipeline.queries.division import choose_unit_rows, divide_files
from pipeline.queries.ids import check_unique
from pipeline.queries.inspection import Inspected, QueryFile, inspect_file, read_tables
from pipeline.queries.partitions import find_partition, infer_types, parse_partition
from pipeline.queries.schema import GOLD_TYPES
from pipeline.queries.unified_schema import cast_table, unify_schemas
from pipeline.queries.units import Unit
from pipeline.storage.hashes import HashRuns
from pipeline.storage.location import Location
from pipeline.storage.parquet import list_parquet, map_in_threads, open_pages, read_parquet

log = logging.getLogger(__name__)

Found = TypeVar("Found")
Result = TypeVar("Result")

PROGRESS_S = 10.0
# Remote sets of at least this many bytes are read by all machines; smaller ones are read before tasks have started.
SPREAD_BYTES = 256 << 20


class Spread(Protocol):
    """Work on files on all machines of a cluster."""

    def __call__(
        self, work: Callable[[Location], Found], files: Sequence[Location], then: Callable[[Found], Result]
    ) -> list[Result]:
        """Call ``work`` for each file, and in this process ``then`` for its result; results in the order of files."""


@dataclass(frozen=True)
class QuerySet:
    """A checked query set.

    Attributes:
        schema: schema to which every file is cast.
        units: all units, in the order of files and rows.
        files: number of files.
        rows: number of rows.
        digest: digest of all unit ids: the identity of the query set and of its division into units.
        given: whether there is a column of given passages.
        tasks: number of rows by task; rows without a task are not counted.
        listing: the files with their sizes and modification times.
        partitions: columns that are read from the paths of the files.
        inspected: what the inspection has found, also of files without rows.
    """

    schema: pa.Schema
    units: tuple[Unit, ...]
    files: int
    rows: int
    digest: str
    given: bool
    tasks: Mapping[str, int]
    listing: Listing
    partitions: tuple[str, ...] = ()
    inspected: tuple[QueryFile, ...] = ()


def inspect_queries(
    location: Location,
    columns: Columns,
    unit_rows: int | None,
    kept: Mapping[str, QueryFile] | None = None,
    spread: Spread | None = None,
) -> QuerySet:
    """Check a query set and divide it into units.

    Every file is read in full, since its content is its identity: a resumed run must not mix the answers of two sets.
    Driver memory: some kilobytes for each row group, and 8 bytes for each row of 16 files (of 4 large ones), and
    for 4 million rows; the hashes of the ids are on disk, 8 bytes for each row, while they are compared.

    Args:
        location: file or folder.
        columns: names of its columns.
        unit_rows: rows of a unit; None to choose them by the size of the set.
        kept: what an earlier inspection has found, by URI; if no file has changed, none is read. A local file counts as
            unchanged if its size and modification time are the same.
        spread: reads a large set on all machines of a cluster; None if there is only this one.

    Raises:
        ValueError: there are no Parquet files, a file is unreadable, its schema cannot be unified with the others, a
            column is missing or of the wrong type, or contradicts the partition in the path, an id is null or not
            unique, or there are no rows.
        StorageError: the storage cannot be read.
    """
    files = list_parquet(location)
    reused = _reuse(files, location, kept or {})
    found = reused or _inspect_files(files, location, columns, spread)
    filled = [file for file in found if file.rows]
    if not filled:
        raise ValueError(f"{location.uri}: the query set has no rows")
    partitions = _infer_partition_types(filled, columns)
    schema = unify_schemas({file.uri: file.complete_schema(partitions) for file in filled})
    if not reused:
        _check_casts(filled, files, schema, partitions, _choose_spread(files, spread))
    units = tuple(divide_files(filled, unit_rows or choose_unit_rows([file.rows for file in filled])))
    return QuerySet(
        schema=schema,
        units=units,
        files=len(files),
        rows=sum(file.rows for file in filled),
        digest=hashlib.sha256("".join(unit.id for unit in units).encode()).hexdigest(),
        given=_has_passages(schema, columns),
        tasks=_add_tasks(filled),
        listing=Listing.of(location, files),
        partitions=tuple(partitions),
        inspected=tuple(found),
    )


def _reuse(files: Sequence[Location], source: Location, kept: Mapping[str, QueryFile]) -> list[QueryFile]:
    """Return what is kept of the files; nothing if one is missing, has changed, or is in another partition now."""
    if kept.keys() != {file.uri for file in files}:
        return []

    def is_unchanged(file: Location) -> bool:
        found = kept[file.uri]
        return found.partition == find_partition(file, source) and found.version == file.get_version()

    return [kept[file.uri] for file in files] if all(map_in_threads(is_unchanged, files)) else []


def _inspect_files(
    files: Sequence[Location], source: Location, columns: Columns, spread: Spread | None
) -> list[QueryFile]:
    """Inspect all files, and check that their ids are unique."""
    read, noted = 0, time.monotonic()
    with HashRuns() as hashes:

        def collect(inspected: Inspected) -> QueryFile:
            nonlocal read, noted
            hashes.add(inspected.hashes[None])
            read += 1
            if time.monotonic() - noted > PROGRESS_S:
                noted = time.monotonic()
                log.info("%d of %d query files read", read, len(files))
            return inspected.file

        inspect = partial(inspect_file, source=source, columns=columns)
        found = _choose_spread(files, spread)(inspect, files, collect)
        check_unique(hashes, files, columns.id)
    return found


def _choose_spread(files: Sequence[Location], spread: Spread | None) -> Spread:
    """Return what works on the files: all machines on a large remote set, the threads of this process on others."""
    size = sum(file.stamp.size for file in files if file.stamp)
    return spread if spread and not files[0].local and size >= SPREAD_BYTES else _work_in_threads


def _work_in_threads(
    work: Callable[[Location], Found], files: Sequence[Location], then: Callable[[Found], Result]
) -> list[Result]:
    return map_in_threads(lambda file: then(work(file)), files)


def _infer_partition_types(files: Sequence[QueryFile], columns: Columns) -> dict[str, pa.DataType]:
    texts = [*vars(columns).values(), *GOLD_TYPES]
    own = {field.name: field.type for file in files for field in file.schema if not pa.types.is_null(field.type)}
    return infer_types((parse_partition(file.partition) for file in files), texts, own)


def _check_casts(
    found: Sequence[QueryFile],
    files: Sequence[Location],
    schema: pa.Schema,
    types: Mapping[str, pa.DataType],
    spread: Spread,
) -> None:
    """Check that every value of the files whose schemas differ from the unified one fits into it."""
    partitions = {file.uri: file.partition for file in found if _differs(file.complete_schema(types), schema)}
    check = partial(_check_cast, schema=schema, partitions=partitions)
    spread(check, [file for file in files if file.uri in partitions], lambda _: None)


def _check_cast(file: Location, schema: pa.Schema, partitions: Mapping[str, str]) -> None:
    def cast(stream: Any) -> None:
        for table in read_tables(open_pages(stream), file, partitions[file.uri]):
            cast_table(table, schema, file.uri)

    read_parquet(file, cast)


def _add_tasks(files: Iterable[QueryFile]) -> dict[str, int]:
    tasks: Counter[str] = sum((Counter(file.tasks) for file in files), Counter())
    return dict(sorted(tasks.items()))


def _differs(schema: pa.Schema, unified: pa.Schema) -> bool:
    return any(field.type != unified.field(field.name).type for field in schema)


def _has_passages(schema: pa.Schema, columns: Columns) -> bool:
    return columns.passages in schema.names and not pa.types.is_null(schema.field(columns.passages).type)
