"""Annotate a query set: queries → answers with their evidence and critique.

``python -m jobs.annotate --queries URI --index URI --output URI --model NAME``

Ray Data passes work units to the actors. An actor reads the rows of a unit, annotates them, writes the output files
and returns a summary.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Annotated, Any

import typer

from jobs.common import FailedError, checking, fail, hint_at_new_form, require, start_logging, working
from jobs.rescore import rescore
from jobs.shell import deferring, name_command, run
from pipeline.cluster import Resources
from pipeline.config.run import RunConfig, load_config
from pipeline.nodes.access import NodeAccessError
from pipeline.output.schema import build_data_schema
from pipeline.publishing.publish import Publishing, check_publishing, publish_set
from pipeline.publishing.published_set import describe_error
from pipeline.queries.selection import NothingNewError
from pipeline.run.driver import Summary, allot_resources, run_plan
from pipeline.run.dry_run import check_prompts
from pipeline.run.forecast import Forecast, forecast_alike, forecast_run
from pipeline.run.notices import notify_failure
from pipeline.run.plan import RunPlan, check_run
from pipeline.storage.lease import Lease, OutputInUseError
from pipeline.storage.location import StorageError, locate
from pipeline.tracking.track import open_trackers, tracking
from pipeline.tracking.tracked_run import Tracker

log = logging.getLogger(__name__)

ConfigFile = Annotated[str | None, typer.Option(help="YAML file of the run; flags override it.")]
Queries = Annotated[str | None, typer.Option(help="Query set: a Parquet file or a folder of them.")]
Index = Annotated[str | None, typer.Option(help="Index folder made by jobs.build_index.")]
Output = Annotated[str | None, typer.Option(help="Folder for the annotated set.")]
Stale = Annotated[
    str | None, typer.Option(help="Annotated set of these queries: answer again only what the index would now change.")
]
Model = Annotated[str | None, typer.Option(help="Model: hub name, folder, or 'demo'.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any configuration key, such as decoding.threshold=0.3.")
]
Sample = Annotated[
    int | None, typer.Option(help="Annotate only a sample of this many rows, and forecast what all of them take.")
]
Seed = Annotated[int | None, typer.Option(help="Random seed of the sample; 0 by default.")]
Price = Annotated[
    float | None,
    typer.Option(help="Hourly price of one actor's machine, in any currency; forecasts then name the cost."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only check everything and print the plan, with a forecast if there is a comparable earlier set.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite/--resume", help="Replace an existing output, or resume it (the default).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print a machine-readable summary on stdout.")]
Day = Annotated[
    datetime | None,
    typer.Option("--date", formats=["%Y-%m-%d"], help="Date that replaces {date} in URIs; today (UTC) by default."),
]


def annotate(
    config: ConfigFile = None,
    queries: Queries = None,
    index: Index = None,
    output: Output = None,
    stale: Stale = None,
    model: Model = None,
    settings: Settings = None,
    sample: Sample = None,
    seed: Seed = None,
    price_per_hour: Price = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    day: Day = None,
    old_rescore: Annotated[str | None, typer.Option("--rescore", hidden=True)] = None,
) -> None:
    """Annotate a query set with answers, evidence and critique.

    Exit status: 0 all rows answered, 3 some rows in errors/ or left by the budget, 1 failed, 2 bad usage.
    """
    if old_rescore is not None:
        with checking():
            if queries or index or model:
                raise ValueError("--rescore cannot be combined with --queries, --index or --model")
            output = require(output or "", "--output")
        hint_at_new_form("annotate --rescore RUN", "rescore --annotations RUN")
        rescore(old_rescore, output, config, settings, dry_run, overwrite, as_json)
        return
    start_logging(logging.INFO, timestamps=True)
    flags: dict[str, Any] = {"queries": queries, "index": index, "output": output, "stale": stale, "model.name": model}
    flags |= {"sample.rows": sample, "sample.seed": seed, "execution.price_per_hour": price_per_hour}
    with checking():
        run_config = load_config(config, settings or [], flags, day and day.date())
        if seed is not None and run_config.sample.rows is None:
            raise ValueError("--seed requires --sample")
    if dry_run:
        with checking():
            open_trackers(run_config.tracking)
        if planned := plan_run(run_config, overwrite):
            with checking():
                check_prompts(planned[0])
                forecast = forecast_alike(planned[0])
            print_forecast(forecast)
            if as_json:
                typer.echo(json.dumps({"forecast": forecast and dataclasses.asdict(forecast)}))
            typer.echo("nothing was written and no engine started (--dry-run)", err=True)
        return
    with notifying(run_config), checking(), locking(run_config):
        raise typer.Exit(annotate_queries(run_config, overwrite, as_json))


@contextlib.contextmanager
def notifying(config: RunConfig) -> Iterator[None]:
    """Send the notifications of ``on_failure`` if the body fails; rows in ``errors/`` (status 3) are not a failure."""
    try:
        yield
    except FailedError as end:
        notify_failure(config, end.exit_code, end.message)
        raise


def locking(config: RunConfig) -> contextlib.AbstractContextManager[Any]:
    """Return a lease on ``execution.lock``, by default on ``skip_annotated``.

    Return a null context if neither is set or the folder is the output: the run takes a lease on the output later.
    """
    uri = config.execution.lock or config.skip_annotated
    lock, output = locate(uri or config.output, config.storage), locate(config.output, config.storage)
    return contextlib.nullcontext() if lock.path.rstrip("/") == output.path.rstrip("/") else Lease(lock)


def plan_run(config: RunConfig, overwrite: bool) -> tuple[RunPlan, Resources | None] | None:
    """Check the run and print its plan; return None if there is nothing new to annotate."""
    with checking(RuntimeError):
        try:
            plan = check_run(config, overwrite)
        except NothingNewError as news:
            typer.echo(str(news), err=True)
            return None
        if config.sample.rows is None:
            schema = build_data_schema(plan.queries.schema, config.decoding.keep_candidates)
            check_publishing(plan.output.location, schema, config.publish, config.storage)
        resources = None if plan.finished else allot_resources(plan)
    for line in [*plan.describe(), *(resources.describe() if resources else [])]:
        typer.echo(line, err=True)
    return plan, resources


def annotate_queries(config: RunConfig, overwrite: bool, as_json: bool) -> int:
    """Plan and execute the run, print its summary and return the exit status."""
    trackers = open_trackers(config.tracking)
    planned = plan_run(config, overwrite)
    if planned is None:
        return 0
    hint = "the run failed; rerun the same command to continue"
    with working(hint, bad_input=(OutputInUseError, NodeAccessError), resumable=True, overwrite=overwrite):
        summary = run_tracked(*planned, trackers)
    if summary.left:
        left = f"{summary.budget} is spent: {summary.left} rows are left"
        typer.echo(f"{left}; {name_command(overwrite)} continues with them", err=True)
    publishing = publish_finished(config, summary)
    print_summary(summary, None if summary.left else forecast_sample(planned[0]), publishing, as_json)
    if summary.exit_status == 1:
        fail(f"{summary.errors} of {summary.rows} rows failed, more than execution.max_error_rate allows", 1)
    if publishing.problem:
        fail(f"the annotated set is complete, but not published: {publishing.problem}", 1)
    return summary.exit_status


def run_tracked(plan: RunPlan, resources: Resources | None, trackers: Sequence[Tracker]) -> Summary:
    """Carry out a plan and have it recorded, once it begins."""
    with tracking(trackers) as tracked:
        summary = run_plan(plan, resources, deferring=deferring, on_begin=tracked.begin)
        tracked.note(summary)
    return summary


def publish_finished(config: RunConfig, summary: Summary) -> Publishing:
    """Register a finished set in the tables of ``publish``; samples, parts and sets with too many errors are not."""
    if summary.left or summary.exit_status == 1 or config.sample.rows is not None:
        return Publishing()
    try:
        return Publishing(publish_set(locate(config.output, config.storage), config.publish, config.storage))
    except Exception as error:  # noqa: BLE001  the run is finished, and says so
        tables = {"--delta": config.publish.delta, "--iceberg": config.publish.iceberg}
        options = " ".join(f"{option} {table}" for option, table in tables.items() if table)
        command = f"selfrag publish --annotations {config.output} {options}"
        return Publishing(problem=f"{describe_error(error)}; to publish it, run: {command}")


def forecast_sample(plan: RunPlan) -> Forecast | None:
    """Forecast the whole run from its finished sample; None, with a warning, if the sample cannot be read."""
    if plan.population is None:
        return None
    try:
        return forecast_run(plan.output, plan.population, plan.config.execution)
    except (ValueError, StorageError) as problem:
        log.warning("there is no forecast: %s", problem)
        return None


def print_forecast(forecast: Forecast | None) -> None:
    """Print the lines of a forecast on stderr."""
    for line in forecast.describe() if forecast else ():
        typer.echo(line, err=True)


def print_summary(summary: Summary, forecast: Forecast | None, publishing: Publishing, as_json: bool) -> None:
    """Print the summary of the run: its lines on stderr and, if ``as_json`` is set, JSON on stdout."""
    if not summary.annotated:
        typer.echo(f"{summary.output} is already complete; nothing to do", err=True)
    answered = summary.rows - summary.errors - summary.left
    carried = f"{summary.carried} carried over; " if summary.carried else ""
    typer.echo(
        f"{answered} of {summary.rows} rows answered, {summary.errors} in errors/; {carried}"
        f"{summary.annotated} in this run in {summary.seconds:.1f} s; annotated set: {summary.output}",
        err=True,
    )
    print_forecast(forecast)
    for one in publishing.published:
        typer.echo(one.describe(), err=True)
    if as_json:
        record: dict[str, Any] = {**dataclasses.asdict(summary), "exit_status": summary.exit_status}
        record |= {"published": [dataclasses.asdict(one) for one in publishing.published]}
        if publishing.problem:
            record |= {"exit_status": 1, "publish_error": publishing.problem}
        record["forecast"] = forecast and dataclasses.asdict(forecast)
        typer.echo(json.dumps(record))


def main() -> None:
    """Run the command."""
    run(annotate)


if __name__ == "__main__":
    main()
