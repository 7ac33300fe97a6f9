"""Keep what the inspection of a query set has found beside the output, so that resuming reads no query file."""

import json
import logging
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.config.sections import Columns
from pipeline.output.folder import INSPECTION
from pipeline.queries.inspection import QueryFile
from pipeline.storage.location import Location, MissingFileError, StorageError, join_lines
from pipeline.storage.parquet import encode_parquet, read_checked

log = logging.getLogger(__name__)

# Metadata key for the names of the columns that were inspected.
COLUMNS = b"selfrag.columns"
SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string()),
        pa.field("version", pa.string()),
        pa.field("digest", pa.string()),
        pa.field("partition", pa.string()),
        pa.field("schema", pa.binary()),
        pa.field("groups", pa.list_(pa.int64())),
        pa.field("tasks", pa.map_(pa.string(), pa.int64())),
    ]
)


def keep_inspection(output: Location, columns: Columns, files: Sequence[QueryFile]) -> None:
    """Write what an inspection has found; errors become a warning, since a run is complete without it."""
    rows = [_to_row(file) for file in files]
    schema = SCHEMA.with_metadata({COLUMNS: columns.model_dump_json().encode()})
    try:
        (output / INSPECTION).write(encode_parquet(pa.Table.from_pylist(rows, schema=schema)))
    except StorageError as error:
        log.warning("a run that resumes will read all queries again: %s", error)


def read_inspection(output: Location, columns: Columns) -> dict[str, QueryFile]:
    """Read what an inspection of the same columns has found, by URI; empty if there is none that can be read."""
    file = output / INSPECTION
    try:
        table = read_checked(file)
        if json.loads((table.schema.metadata or {})[COLUMNS]) != columns.model_dump(mode="json"):
            return {}
        if any(column.null_count for column in table.columns):
            raise ValueError("it has nulls")  # noqa: TRY301  for the same warning
        return {row["uri"]: _from_row(row) for row in table.cast(SCHEMA).to_pylist()}
    except MissingFileError:
        return {}
    except (ValueError, KeyError, StorageError) as error:
        log.warning("%s is ignored, and the queries are read again: %s", file.uri, join_lines(error))
        return {}


def _to_row(file: QueryFile) -> dict[str, Any]:
    return {**vars(file), "schema": file.schema.serialize().to_pybytes(), "tasks": list(file.tasks.items())}


def _from_row(row: dict[str, Any]) -> QueryFile:
    schema = pa.ipc.read_schema(pa.py_buffer(row["schema"]))
    return QueryFile(**{**row, "schema": schema, "groups": tuple(row["groups"]), "tasks": dict(row["tasks"])})
