"""Read the ids of the query set that an annotated set was made from, unit by unit."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.config.sections import Columns, StorageConfig
from pipeline.output.folder import OutputFolder
from pipeline.queries.query_set import inspect_queries, read_query_ids
from pipeline.queries.selection import Selection
from pipeline.storage.location import locate


def read_planned_ids(folder: OutputFolder, storage: StorageConfig) -> Mapping[str, pa.ChunkedArray]:
    """Read the query set of an annotated set in full, and return the ids of each unit: large_string.

    Raises:
        ValueError: there is no manifest, the query set cannot be read, or it is not the one of the run any more.
        StorageError: the storage cannot be read.
    """
    manifest = folder.read_manifest() or {}
    configuration: Mapping[str, Any] = manifest.get("configuration", {})
    columns = Columns.model_validate(configuration.get("columns", {}))
    queries = str(configuration.get("queries", ""))
    selection = Selection.load(folder.location, queries) if configuration.get("skip_annotated") else None
    source = selection.folder if selection else locate(queries, storage)
    found = inspect_queries(source, columns, configuration["execution"]["unit_rows"])
    if found.digest != manifest["queries"]["digest"]:
        raise ValueError(f"{source.uri}: is not the query set of the run any more")
    ids, units, first = read_query_ids(found, columns.id, storage), {}, 0
    for unit in found.units:
        units[unit.id] = ids.slice(first, unit.rows)
        first += unit.rows
    return units
