"""Annotate a query set: queries → answers with their evidence and critique.

``python -m jobs.annotate --queries URI --index URI --output URI --model NAME``

Work units flow through Ray Data to the actors, which take each from its file to its files: a unit in, a summary out.
"""

import contextlib
import dataclasses
import json
import logging
import sys
from datetime import datetime
from typing import Annotated, Any

import typer

from jobs.rescore import rescore
from pipeline.config.run import RunConfig, load_config
from pipeline.queries.selection import NothingNewError
from pipeline.run.driver import Summary, allot, execute
from pipeline.run.notices import fail, failures_told
from pipeline.run.plan import check
from pipeline.storage.lease import Claim, OutputTakenError
from pipeline.storage.location import locate

log = logging.getLogger(__name__)


def annotate(
    config: Annotated[str | None, typer.Option(help="YAML file of the run; flags override it.")] = None,
    queries: Annotated[str | None, typer.Option(help="Query set: a Parquet file or a folder of them.")] = None,
    index: Annotated[str | None, typer.Option(help="Index folder made by jobs.build_index.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for the annotated set.")] = None,
    model: Annotated[str | None, typer.Option(help="Model: hub name, folder, or 'demo'.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any configuration key, such as decoding.threshold=0.3.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan only.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite/--resume", help="Replace an existing output instead of continuing it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a machine-readable summary on stdout.")] = False,
    day: Annotated[
        datetime | None,
        typer.Option("--date", formats=["%Y-%m-%d"], help="What {date} in URIs stands for; today (UTC) by default."),
    ] = None,
    rescored: Annotated[
        str | None,
        typer.Option("--rescore", help="Choose the answers of this annotated set again (with --output and --set)."),
    ] = None,
) -> None:
    """Annotate a query set with answers, evidence and critique.

    Exit status: 0 all rows answered, 3 some rows in errors/, 1 failed, 2 bad usage.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if rescored is not None:
        if queries or index or model:
            raise typer.BadParameter("--rescore reads a run: --queries, --index and --model do not go with it")
        rescore(rescored, output, config, settings or [], dry_run, overwrite, as_json)
    flags = {"queries": queries, "index": index, "output": output, "model.name": model}
    try:
        run_config = load_config(config, settings or [], flags, day and day.date())
    except ValueError as error:
        fail(error, 2)
    with contextlib.nullcontext() if dry_run else failures_told(run_config):
        raise typer.Exit(annotated(run_config, overwrite, dry_run, as_json))


def annotated(config: RunConfig, overwrite: bool, dry_run: bool, as_json: bool) -> int:
    """Do what the command line asks; the exit status."""
    try:
        with contextlib.nullcontext() if dry_run else locked(config):
            return _annotated(config, overwrite, dry_run, as_json)
    except (ValueError, OSError) as error:
        fail(error, 2)


def locked(config: RunConfig) -> contextlib.AbstractContextManager[Any]:
    """The claim on ``execution.lock``; that on the output comes later, and is enough where both are one folder."""
    uri = config.execution.lock or config.skip_annotated
    lock, output = locate(uri or config.output, config.storage), locate(config.output, config.storage)
    return contextlib.nullcontext() if lock.path.rstrip("/") == output.path.rstrip("/") else Claim(lock)


def _annotated(config: RunConfig, overwrite: bool, dry_run: bool, as_json: bool) -> int:
    try:
        plan = check(config, overwrite)
        resources = None if plan.finished else allot(plan)
    except NothingNewError as news:
        typer.echo(str(news), err=True)
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        fail(error, 2)
    for line in [*plan.lines(), *(resources.lines() if resources else [])]:
        typer.echo(line, err=True)
    if dry_run:
        typer.echo("nothing was written and no engine started (--dry-run)", err=True)
        return 0
    try:
        summary = execute(plan, resources)
    except OutputTakenError:
        raise
    except Exception as error:
        log.exception("the run failed; the same command continues it")
        fail(error, 1)
    _report(summary, as_json)
    if summary.exit_status == 1:
        fail(f"{summary.errors} of {summary.rows} rows failed, more than execution.max_error_rate allows", 1)
    return summary.exit_status


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
