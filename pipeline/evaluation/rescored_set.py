"""Rescores an annotated set as a distributed job: a set in, another one out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from pipeline.cluster import connect
from pipeline.config.loading import assign, flatten
from pipeline.config.sections import ExecutionConfig, StorageConfig
from pipeline.evaluation.rescoring import Rescoring, rescore_table
from pipeline.nodes.access import Packed
from pipeline.nodes.check import check_nodes
from pipeline.nodes.places import Source
from pipeline.output.compacted import PlacedUnit, check_listed_files, locate_units
from pipeline.output.folder import OutputFolder, hash_identity
from pipeline.output.inventory import complete_output
from pipeline.output.unit_files import UnitSummary
from pipeline.storage.lease import Lease
from pipeline.storage.location import check_apart, check_writable, locate

# Blocks of units, one Ray task each; the units of a block are rescored one after another. More blocks would cost the
# driver time and memory; these are enough to keep hundreds of CPUs busy, and a task that is lost repeats few units.
MOST_BLOCKS = 1_000


@dataclass(frozen=True)
class RescorePlan:
    """A checked rescoring.

    Attributes:
        run: folder of the annotated set.
        output: folder of the rescored set.
        rescoring: settings by task.
        manifest: manifest of the run, with the changed settings.
        units: where the rows of the run's units lie.
        storage: access to object storage.
        overwrite: whether a set in the output is replaced.
    """

    run: OutputFolder
    output: OutputFolder
    rescoring: Rescoring
    manifest: dict[str, Any]
    units: Mapping[str, PlacedUnit]
    storage: StorageConfig
    overwrite: bool


def check_rescoring(
    run: str, output: str, changes: Mapping[str, Any], storage: StorageConfig, overwrite: bool
) -> RescorePlan:
    """Check a rescoring and plan it.

    Args:
        run: URI of a finished annotated set.
        output: URI of the folder for the rescored set.
        changes: settings of the section ``decoding``, nested as in the configuration.
        overwrite: whether a set in the output is replaced.

    Raises:
        ValueError: there is no finished run, it has lost a file, a setting cannot be changed, the run did not keep the
            data that this needs, the output contains other files, or it contains another set and ``overwrite`` is
            false.
    """
    source, target = OutputFolder(locate(run, storage)), OutputFolder(locate(output, storage))
    manifest = source.read_manifest()
    if manifest is None or not source.is_finished():
        raise ValueError(f"{run}: not a finished annotated set")
    manifest.pop("compacted", None)  # the rescored set has a file for each unit
    check_listed_files(source)
    units = locate_units(source)
    check_apart(source.location, target.location)
    check_writable(target.location)
    rescoring = Rescoring.of(manifest, changes)
    tasks = {
        name: {**task, "decoding": rescoring.tasks[name][0].model_dump(mode="json")}
        for name, task in manifest["tasks"].items()
    }
    changed = {f"decoding.{key}": value for key, value in flatten(dict(changes)).items()}
    for key, value in changed.items():
        assign(manifest["configuration"], key, value)
    # The source is part of the identity, so that an annotation run does not resume a rescored set.
    settings = {**manifest["settings"], **changed, "rescored": source.location.uri}
    manifest = {**manifest, "settings": settings, "tasks": tasks}
    plan = RescorePlan(source, target, rescoring, manifest, units, storage, overwrite)
    _check_output(plan)
    return plan


def _check_output(plan: RescorePlan) -> None:
    """Check that the output is free, or holds an unfinished rescoring with the same settings.

    Raises:
        ValueError: it is not.
    """
    digest = hash_identity(plan.manifest)
    plan.output.check_free(plan.overwrite, lambda found: hash_identity(found) == digest)


@dataclass(frozen=True)
class Rescored:
    """The outcome of a rescoring: number of rows, of rows in ``errors/``, and of answers that changed."""

    rows: int
    errors: int
    changed: int


def rescore_set(plan: RescorePlan) -> Rescored:
    """Rescore every row and write the rescored set.

    Raises:
        OutputInUseError: another run is using the output.
        NodeAccessError: a machine cannot read the run or write to the output.
        RuntimeError: rows are missing at the end, and the same command continues the rescoring.
    """
    connect(ExecutionConfig())
    with Lease(plan.output.location) as lease:
        _check_output(plan)  # another run may have held the lease until now
        with check_nodes(_list_sources(plan), plan.output.location.uri, plan.storage) as access:
            if plan.overwrite:
                plan.output.clear()
            plan.output.begin(plan.manifest)
            rescored, changed = _rescore_units(Packed.pack(plan, access), list(plan.units))
        rows = {unit: found.summary.rows for unit, found in plan.units.items()}
        units = complete_output(plan.output, rows, hash_identity(plan.manifest), rescored)
        lease.renew()
        counts = {**plan.manifest["counts"], "output": plan.output.location.uri}
        counts["retrieved"] = sum(unit.retrieved for unit in units)
        times = {"finished": datetime.now(UTC).isoformat()}
        plan.output.finish({**plan.manifest, **times, "counts": counts}, units)
    return Rescored(sum(unit.rows for unit in units), sum(unit.failed for unit in units), changed)


def _list_sources(plan: RescorePlan) -> list[Source]:
    stamps = {file.uri: file.stamp for file in plan.run.list_unit_files("data").values()}
    return [Source("--annotations", {uri: stamp.size for uri, stamp in stamps.items() if stamp})]


def _rescore_units(plan: Packed[RescorePlan], units: Sequence[str]) -> tuple[dict[str, UnitSummary], int]:
    """Rescore units in Ray tasks; returns their summaries, and the number of answers that changed."""
    import ray

    rows = [{"unit": unit} for unit in units]
    rescored = ray.data.from_items(rows, override_num_blocks=min(len(rows), MOST_BLOCKS)).map_batches(
        _rescore_batch, fn_args=[plan], batch_size=None, batch_format="pyarrow"
    )
    outcomes = list(rescored.iter_rows())
    summaries = [UnitSummary(**json.loads(row["summary"])) for row in outcomes]
    return {unit.unit: unit for unit in summaries}, sum(row["changed"] for row in outcomes)


def _rescore_batch(batch: pa.Table, packed: Packed[RescorePlan]) -> pa.Table:
    plan = packed.unpack()
    outcomes = [rescore_unit(unit, plan) for unit in batch["unit"].to_pylist()]
    summaries = [json.dumps(asdict(summary)) for summary, _ in outcomes]
    return pa.table({"summary": summaries, "changed": [changed for _, changed in outcomes]})


def rescore_unit(unit: str, plan: RescorePlan) -> tuple[UnitSummary, int]:
    """Rescore and write one unit; returns its summary, and the number of answers that changed.

    Raises:
        ValueError: a file of the run is damaged, or does not hold the rows that the run has counted.
    """
    found = plan.units[unit]
    try:
        before, errors = found.read_answers(), found.read_failures()
    except ValueError as problem:
        raise ValueError(f"{problem}; selfrag verify names the way to repair the set") from None
    after = rescore_table(before, plan.rescoring)
    changed = sum(a != b for a, b in zip(before["answer"], after["answer"], strict=True))
    return plan.output.write_unit(unit, after, errors, hash_identity(plan.manifest), found.summary.work), changed
