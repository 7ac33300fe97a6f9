"""Write an annotated set anew with other weights, threshold or constraints, without a model.

``python -m jobs.annotate --rescore RUN --output URI --set decoding.weights.relevance=2``
"""

import asyncio
import dataclasses
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from pipeline.cluster import connect
from pipeline.config.loading import assign, flatten
from pipeline.config.run import ExecutionConfig, StorageConfig, load_sections, load_storage
from pipeline.evaluation.rescoring import Rescoring
from pipeline.output.folder import OutputFolder
from pipeline.output.schema import answer_row
from pipeline.run.notices import fail
from pipeline.storage.location import check_apart, locate
from pipeline.storage.parquet import encode_parquet

log = logging.getLogger(__name__)

# What choosing again writes anew; usage stays what the run cost.
REWRITTEN = ("answer", "raw_output", "retrieved", "segments", "passages", "candidates")


@dataclass(frozen=True)
class RescorePlan:
    """A checked rescoring.

    Attributes:
        manifest: the run's, with the changed settings.
    """

    run: OutputFolder
    output: OutputFolder
    rescoring: Rescoring
    manifest: dict[str, Any]


def check(run: str, output: str, changes: Mapping[str, Any], storage: StorageConfig, overwrite: bool) -> RescorePlan:
    """Check a rescoring.

    Args:
        run: URI of a finished annotated set.
        changes: settings of the section ``decoding``.

    Raises:
        ValueError: there is no finished run, it did not keep what is needed, or the output is taken.
    """
    source, target = OutputFolder(locate(run, storage)), OutputFolder(locate(output, storage))
    manifest = source.manifest()
    if manifest is None or not source.finished():
        raise ValueError(f"--rescore {run}: no finished annotated set there")
    check_apart(source.location, target.location)
    if (target.foreign() or target.manifest()) and not overwrite:
        raise ValueError(f"--output {output} is taken; choose another, or replace it with --overwrite")
    rescoring = Rescoring.of(manifest, changes)
    tasks = {
        name: {**task, "decoding": rescoring.tasks[name][0].model_dump(mode="json")}
        for name, task in manifest["tasks"].items()
    }
    changed = {f"decoding.{key}": value for key, value in flatten(dict(changes)).items()}
    for key, value in changed.items():
        assign(manifest["configuration"], key, value)
    # What it was made from is part of what it is: a run of the model must not continue it.
    settings = {**manifest["settings"], **changed, "rescored": source.location.uri}
    return RescorePlan(source, target, rescoring, {**manifest, "settings": settings, "tasks": tasks})


@dataclass(frozen=True)
class Rescored:
    """The outcome: rows, those of them in ``errors/``, and answers that changed."""

    rows: int
    errors: int
    changed: int


def execute(plan: RescorePlan) -> Rescored:
    """Choose every row again."""
    import ray

    connect(ExecutionConfig())
    plan.output.clear()
    plan.output.begin(plan.manifest)
    units = list(plan.manifest["units"])
    for unit, held in plan.manifest["units"].items():
        if held["errors"]:
            name = f"errors/part-{unit}.parquet"
            (plan.output.location / name).write((plan.run.location / name).read())
    rescored = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units)).map_batches(
        _rescore_units, fn_args=[plan], batch_size=None, batch_format="pyarrow"
    )
    changed = sum(int(row["changed"]) for row in rescored.iter_rows())
    retrieved = sum(unit.retrieved for unit in plan.output.summaries(units))
    counts = {**plan.manifest["counts"], "output": plan.output.location.uri, "retrieved": retrieved}
    plan.output.finish({**plan.manifest, "counts": counts})
    return Rescored(counts["rows"], counts["errors"], changed)


def rescore(
    run_uri: str,
    output: str | None,
    config: str | None,
    settings: list[str],
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
) -> NoReturn:
    """Write an annotated set anew with changed settings, without an engine."""
    if output is None:
        raise typer.BadParameter("--rescore needs --output, the folder for the new annotated set")
    try:
        changes = load_sections(None, [s for s in settings if not s.startswith("storage.")], ["decoding"])["decoding"]
        storage = load_storage(config, [s for s in settings if s.startswith("storage.")])
        plan = check(run_uri, output, changes, storage, overwrite)
    except (ValueError, OSError) as error:
        fail(error, 2)
    if dry_run:
        typer.echo(
            f"to do    {len(plan.manifest['units'])} units of {run_uri}; nothing was written (--dry-run)", err=True
        )
        raise typer.Exit(0)
    try:
        done = execute(plan)
    except Exception as error:
        log.exception("the rescoring failed; say --overwrite to begin it again")
        fail(error, 1)
    typer.echo(f"{done.changed} of {done.rows} answers changed; annotated set: {output}", err=True)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done)))
    raise typer.Exit(3 if done.errors else 0)


def _rescore_units(batch: pa.Table, plan: RescorePlan) -> pa.Table:
    changed = 0
    for unit in batch["unit"].to_pylist():
        name = f"data/part-{unit}.parquet"
        before = pq.read_table(io.BytesIO((plan.run.location / name).read()))
        after = rescored_table(before, plan.rescoring)
        changed += sum(a != b for a, b in zip(before["answer"], after["answer"], strict=True))
        (plan.output.location / name).write(encode_parquet(after))
    return pa.table({"changed": [changed]})


def rescored_table(table: pa.Table, rescoring: Rescoring) -> pa.Table:
    """The rows with their answers chosen again; same columns, same order."""

    async def choose() -> list[dict[str, Any]]:
        return [answer_row(await rescoring.answer(row)) for row in table.to_pylist()]

    rows = asyncio.run(choose())
    for name in REWRITTEN:
        column = table.schema.get_field_index(name)
        field = table.schema.field(column)
        table = table.set_column(column, field, pa.array([row[name] for row in rows], field.type))
    return table
