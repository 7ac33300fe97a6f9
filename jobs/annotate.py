"""Annotate a query set: queries → answers with their evidence and critique.

``python -m jobs.annotate --queries URI --index URI --output URI --model NAME``

Work units flow through Ray Data: read the unit → SelfRagActor → write the unit → one summary row.
"""

import dataclasses
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

import pyarrow as pa
import typer

from jobs.cluster import actor_resources, connect
from jobs.progress import Progress
from pipeline.actor import UNIT_COLUMN, SelfRagActor
from pipeline.config import RunConfig, load_config
from pipeline.output import OutputFolder, UnitSummary
from pipeline.plan import Plan, check
from pipeline.provenance import versions
from pipeline.query_set import Unit, read_unit

log = logging.getLogger(__name__)

# A unit is run again this often when its actor dies under it.
UNIT_RETRIES = 3


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        rows: of the query set.
        errors: of them in ``errors/``.
        annotated: rows that this call worked on; the others were done before.
        retrieved: rows that this call answered with a passage.
        error_types: rows of this call that failed, by type.
        seconds: of this call, engine start included.
    """

    output: str
    rows: int
    errors: int
    annotated: int
    retrieved: int
    error_types: dict[str, int]
    seconds: float
    max_error_rate: float

    @property
    def exit_status(self) -> int:
        """0 all rows answered, 3 some in ``errors/``, 1 more of them than ``max_error_rate`` allows."""
        if not self.errors:
            return 0
        return 3 if self.errors <= self.max_error_rate * self.rows else 1


def run(config: RunConfig, overwrite: bool = False) -> Summary:
    """Check, annotate what is left to annotate, and finish the output.

    Raises:
        ValueError, StorageError: from the checks, before anything has started.
        RuntimeError: rows are missing at the end; running again continues.
    """
    return execute(check(config, overwrite), overwrite)


def execute(plan: Plan, overwrite: bool = False) -> Summary:
    """Carry a plan out."""
    started, begun = time.monotonic(), datetime.now(UTC)
    units: list[UnitSummary] = []
    if not plan.finished:
        connect(plan.config.execution)
        if overwrite:
            plan.output.clear()
        plan.output.begin({**plan.identity(), "versions": versions(), "started": begun.isoformat()})
        with Progress(sum(unit.rows for unit in plan.todo)) as progress:
            for unit in annotate_units(plan):
                units.append(unit)
                progress.add(unit)
    return _finish(plan, units, begun, time.monotonic() - started)


def annotate_units(plan: Plan) -> Iterator[UnitSummary]:
    """The job's graph; yields a summary as each unit's files appear."""
    if not plan.todo:
        return
    import ray
    from ray.data import ActorPoolStrategy

    config = plan.config
    cpus, gpus = actor_resources(config)
    pool = ActorPoolStrategy(
        size=config.execution.actors,
        max_concurrent_calls_per_actor=config.execution.units_in_flight,
        max_tasks_in_flight_per_actor=2 * config.execution.units_in_flight,
    )
    units = [{"unit": dataclasses.asdict(unit)} for unit in plan.todo]
    written = [plan.output, plan.queries.schema, config.decoding.keep_candidates]
    summaries = (
        ray.data.from_items(units, override_num_blocks=len(units))
        .map_batches(_read, fn_args=[config], batch_size=None, batch_format="pyarrow", num_cpus=0)
        .map_batches(
            SelfRagActor,
            fn_constructor_args=[config],
            batch_size=None,
            batch_format="pyarrow",
            compute=pool,
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=UNIT_RETRIES,
        )
        .map_batches(_write, fn_args=written, batch_size=None, batch_format="pyarrow", num_cpus=0)
    )
    for batch in summaries.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch["summary"].to_pylist():
            yield UnitSummary(**json.loads(row))


def _read(batch: pa.Table, config: RunConfig) -> pa.Table:
    (unit,) = batch["unit"].to_pylist()
    rows = read_unit(Unit(**unit), config.storage)
    return rows.append_column(UNIT_COLUMN, pa.array([unit["id"]] * rows.num_rows, pa.string()))


def _write(batch: pa.Table, output: OutputFolder, inputs: pa.Schema, keep_candidates: bool) -> pa.Table:
    (unit,) = set(batch[UNIT_COLUMN].to_pylist())
    summary = output.write_unit(unit, batch, inputs, keep_candidates)
    return pa.table({"summary": [json.dumps(dataclasses.asdict(summary))]})


def _finish(plan: Plan, units: list[UnitSummary], begun: datetime, seconds: float) -> Summary:
    data, errors = plan.output.count()
    written, expected = sum(data.values()) + sum(errors.values()), plan.queries.rows
    if written != expected or len(data) != len(plan.queries.units):
        raise RuntimeError(
            f"{plan.config.output}: {written} of {expected} rows are there, in {len(data)} of "
            f"{len(plan.queries.units)} files; run the same command again to continue"
        )
    summary = Summary(
        output=plan.config.output,
        rows=expected,
        errors=sum(errors.values()),
        annotated=sum(unit.rows for unit in units),
        retrieved=sum(unit.retrieved for unit in units),
        error_types=dict(sum((Counter(unit.errors) for unit in units), Counter())),
        seconds=round(seconds, 3),
        max_error_rate=plan.config.execution.max_error_rate,
    )
    if not plan.finished:
        counts = {
            **dataclasses.asdict(summary),
            "prompt_tokens": sum(unit.prompt_tokens for unit in units),
            "generated_tokens": sum(unit.generated_tokens for unit in units),
        }
        times = {"started": begun.isoformat(), "finished": datetime.now(UTC).isoformat()}
        record = {**plan.identity(), "versions": versions(), **times, "counts": counts, "files": {**data, **errors}}
        plan.output.finish(record)
    return summary


def annotate(
    config: Annotated[str | None, typer.Option(help="YAML file of the run; flags override it.")] = None,
    queries: Annotated[str | None, typer.Option(help="Query set: a Parquet file or a folder of them.")] = None,
    index: Annotated[str | None, typer.Option(help="Index folder made by jobs.build_index.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for the annotated set.")] = None,
    model: Annotated[str | None, typer.Option(help="Model: hub name, folder, or 'demo'.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any configuration key, such as decoding.threshold=0.3.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite/--resume", help="Replace an existing output instead of continuing it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a machine-readable summary on stdout.")] = False,
) -> None:
    """Annotate a query set with answers, evidence and critique.

    Exit status: 0 all rows answered, 3 some rows in errors/, 1 failed, 2 bad usage.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    flags = {"queries": queries, "index": index, "output": output, "model.name": model}
    try:
        plan = check(load_config(config, settings or [], flags), overwrite)
        if dry_run:
            connect(plan.config.execution)
            cpus, gpus = actor_resources(plan.config)
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    for line in plan.lines():
        typer.echo(line, err=True)
    if dry_run:
        typer.echo(f"actors   {cpus:g} CPUs and {gpus:g} GPUs each; nothing was started (--dry-run)", err=True)
        return
    try:
        summary = execute(plan, overwrite)
    except Exception as error:
        log.exception("the run failed; the same command continues it")
        # Ray puts a worker's whole traceback into the message; its last line is the error itself.
        typer.echo(f"error: {(str(error).strip() or repr(error)).splitlines()[-1].strip()}", err=True)
        raise typer.Exit(1) from None
    _report(summary, as_json)
    raise typer.Exit(summary.exit_status)


def _report(summary: Summary, as_json: bool) -> None:
    if not summary.annotated:
        typer.echo(f"{summary.output} is finished; nothing was left to do", err=True)
    answered = summary.rows - summary.errors
    typer.echo(
        f"{answered} of {summary.rows} rows answered, {summary.errors} in errors/; "
        f"{summary.annotated} in this run in {summary.seconds:.1f} s; annotated set: {summary.output}",
        err=True,
    )
    if as_json:
        record: dict[str, Any] = {**dataclasses.asdict(summary), "exit_status": summary.exit_status}
        typer.echo(json.dumps(record))


def main() -> None:
    """Run the command."""
    typer.run(annotate)


if __name__ == "__main__":
    main()
