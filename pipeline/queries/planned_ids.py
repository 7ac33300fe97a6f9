"""Read the ids of the query set that an annotated set was made from, unit by unit."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from pipeline.config.sections import Columns, SampleConfig, StorageConfig
from pipeline.output.compacted import Members, read_members
from pipeline.output.folder import COMPACTED, OutputFolder
from pipeline.queries.query_set import QuerySet, inspect_queries
from pipeline.queries.selection import Selection
from pipeline.queries.units import read_unit_ids
from pipeline.storage.location import locate


class QueryIds(Mapping[str, pa.ChunkedArray]):
    """The ids of each unit of a query set, or of each file of a compacted set: large_string.

    They are in the order of the query set, and read when they are looked up.

    Looking up raises what :func:`pipeline.queries.units.read_unit_ids` raises.
    """

    def __init__(self, queries: QuerySet, members: Members, column: str, storage: StorageConfig) -> None:
        units = {unit.id: unit for unit in queries.units}
        if strange := [member.unit for file in members.values() for member in file if member.unit not in units]:
            raise ValueError(f"the query set has no unit {strange[0]}, which {COMPACTED} lists")
        self._units = {file: [units[member.unit] for member in members[file]] for file in members} or {
            unit: [units[unit]] for unit in units
        }
        self._column, self._storage = column, storage

    def __len__(self) -> int:
        return len(self._units)

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __getitem__(self, unit: str) -> pa.ChunkedArray:
        found = (read_unit_ids(part, self._column, self._storage) for part in self._units[unit])
        return pa.chunked_array([chunk for ids in found for chunk in ids.chunks], pa.large_string())


def read_planned_ids(folder: OutputFolder, storage: StorageConfig) -> QueryIds:
    """Read the query set of an annotated set in full, and return the ids of each unit.

    Raises:
        KeyError: the manifest lacks a setting.
        ValueError: there is no manifest, the query set cannot be read, or it is not the one of the run any more.
        StorageError: the storage cannot be read.
    """
    manifest = folder.read_manifest() or {}
    configuration: Mapping[str, Any] = manifest.get("configuration", {})
    columns = Columns.model_validate(configuration.get("columns", {}))
    queries = str(configuration.get("queries", ""))
    sample = SampleConfig.model_validate(configuration.get("sample", {}))
    selects = configuration.get("skip_annotated") or sample.rows
    selection = Selection.load(folder.location, queries, sample) if selects else None
    if sample.rows and selection is None:
        raise ValueError(
            f"{folder.location.uri}: its sample of the queries is not there; verify the set it was made from"
        )
    source = selection.folder if selection else locate(queries, storage)
    found = inspect_queries(source, columns, configuration["execution"]["unit_rows"])
    if found.digest != manifest["queries"]["digest"]:
        raise ValueError(f"{source.uri}: is not the query set of the run any more")
    members = read_members(folder.location)
    if manifest.get("compacted") and not members:
        raise ValueError(f"{(folder.location / COMPACTED).uri}: is missing")
    return QueryIds(found, members, columns.id, storage)
