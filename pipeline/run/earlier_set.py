"""The annotated set that a run carries answers over from."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.config.run import RunConfig
from pipeline.config.sections import StorageConfig
from pipeline.nodes.places import Source
from pipeline.output.compacted import PlacedUnit, locate_units, read_run_units
from pipeline.output.folder import COMPACTED, OutputFolder, hash_identity
from pipeline.output.schema import ANSWER_FIELDS, CANDIDATE_FIELDS, get_output_name
from pipeline.storage.location import check_apart, locate
from pipeline.storage.parquet import read_checked

log = logging.getLogger(__name__)


def identify_earlier(config: RunConfig, identity: Mapping[str, Any], rows: Mapping[str, int]) -> dict[str, Any]:
    """Check the set that answers are carried over from, and return its identity, for the manifest.

    Args:
        config: configuration of the run, with ``stale``.
        identity: identity of the run.
        rows: number of rows of the run's units, by unit.

    Returns:
        The digests of the set's run and index.

    Raises:
        ValueError: it is not finished, its answers come from another model or other settings, or from other queries.
        StorageError: it cannot be read.
    """
    stale = str(config.stale)
    if identity["index"] is None:
        raise ValueError(
            f"--stale {stale}: no answer of this run depends on an index (--index, decoding.mode); leave it out"
        )
    if config.sample.rows is not None:
        raise ValueError(f"--stale {stale}: all queries are compared with it; leave out --sample")
    if config.skip_annotated is not None:
        raise ValueError(f"--stale {stale}: all queries are compared with it; leave out skip_annotated")
    output = OutputFolder(locate(stale, config.storage))
    check_apart(output.location, locate(config.output, config.storage))
    manifest = output.read_manifest()
    if manifest is None or not output.is_finished():
        raise ValueError(f"--stale {stale}: not a finished annotated set")
    if differing := _compare(manifest, identity):
        raise ValueError(f"--stale {stale}: this run differs in {', '.join(differing)}; annotate without --stale")
    _check_units(output, rows)
    return {"run": hash_identity(manifest), "index": (manifest["index"] or {}).get("digest")}


def _compare(manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """List what changes answers to the same passages; what changes searches shows in what they find."""
    before, now = manifest["settings"], identity["settings"]
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    differing = [key for key in keys if not key.startswith("retrieval.")]
    return differing if manifest["model"] == identity["model"] else [*differing, "model"]


def _check_units(output: OutputFolder, rows: Mapping[str, int]) -> None:
    known = read_run_units(output.location)
    if known.keys().isdisjoint(rows):
        raise ValueError(
            f"--stale {output.location.uri}: it answers other queries, or in units of another size "
            "(execution.unit_rows); annotate without --stale"
        )
    if missing := [count for unit, count in rows.items() if unit not in known]:
        log.warning("%s lacks %d of the units, with %d rows", output.location.uri, len(missing), sum(missing))


def list_earlier_files(stale: str, storage: StorageConfig) -> Source:
    """List the data files of the earlier set, which every machine must read."""
    stamps = {file.uri: file.stamp for file in OutputFolder(locate(stale, storage)).list_unit_files("data").values()}
    return Source("--stale", {uri: stamp.size for uri, stamp in stamps.items() if stamp})


@dataclass(frozen=True)
class EarlierSet:
    """The answers of an earlier set.

    Attributes:
        output: its folder.
        run: digest of its identity.
        id_column: name of the column of the ids.
    """

    output: OutputFolder
    run: str
    id_column: str

    @cached_property
    def _compacted(self) -> dict[str, PlacedUnit]:
        return locate_units(self.output) if (self.output.location / COMPACTED).exists() else {}

    def read_outcomes(self, unit: str, ids: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Read the answers to the rows of a unit, given their ids; those without one are left out.

        Returns:
            Values of the columns that a run adds, by number of the row within the unit.

        Raises:
            StorageError: the storage cannot be read.
        """
        found = self._compacted.get(unit)
        try:
            if self.output.check_unit(found.file if found else unit, self.run) is None:
                return {}
            table = found.read_answers() if found else read_checked(self.output.locate_unit_file("data", unit))
        except ValueError as problem:
            log.warning("%s: unit %s is answered again: %s", self.output.location.uri, unit, problem)
            return {}
        added = [field.name for field in (*ANSWER_FIELDS, *CANDIDATE_FIELDS) if field.name in table.schema.names]
        names = table[get_output_name(self.id_column)].to_pylist()
        outcomes = dict(zip(names, table.select(added).to_pylist(), strict=True))
        return {number: outcomes[name] for number, name in enumerate(ids) if name in outcomes}
