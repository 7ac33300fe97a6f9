"""Read the ids of the query set that an annotated set was made from, unit by unit."""

import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Any

import pyarrow as pa

from pipeline.config.sections import Columns, StorageConfig
from pipeline.output.folder import OutputFolder
from pipeline.queries.ids import read_file_ids
from pipeline.queries.query_set import QuerySet, inspect_queries
from pipeline.queries.selection import Selection
from pipeline.storage.location import locate

# Files whose ids are kept: units are read in parallel, and nearly in the order of the files.
KEPT_FILES = 4


class PlannedIds(Mapping[str, pa.ChunkedArray]):
    """The ids of each unit of a query set, in the set's order: large_string. Thread-safe.

    Memory: the ids of ``KEPT_FILES`` files. It raises what :func:`pipeline.queries.ids.read_file_ids` raises.
    """

    def __init__(self, queries: QuerySet, column: str, storage: StorageConfig) -> None:
        versions = {file.uri: file.version for file in queries.inspected}
        begins = accumulate((unit.rows for unit in queries.units), initial=0)
        self._units = {unit.id: (begin, unit.rows) for unit, begin in zip(queries.units, begins, strict=False)}
        self._files = list(versions)
        self._starts = list(accumulate((file.rows for file in queries.inspected), initial=0))
        self._reading = threading.Lock()
        self._read = lru_cache(KEPT_FILES)(lambda uri: read_file_ids(locate(uri, storage), versions[uri], column))

    def __len__(self) -> int:
        return len(self._units)

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __getitem__(self, unit: str) -> pa.ChunkedArray:
        first, rows = self._units[unit]
        chunks: list[pa.Array] = []
        number = bisect_right(self._starts, first) - 1
        while (start := self._starts[number]) < first + rows:
            with self._reading:
                ids = self._read(self._files[number])
            chunks += ids[max(first - start, 0) : first + rows - start].chunks
            number += 1
        return pa.chunked_array(chunks, pa.large_string())


def read_planned_ids(folder: OutputFolder, storage: StorageConfig) -> PlannedIds:
    """Read the query set of an annotated set in full, and return the ids of each unit.

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
    return PlannedIds(found, columns.id, storage)
