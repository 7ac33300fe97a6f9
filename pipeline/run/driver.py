"""Carries out a planned run: annotates the remaining units in actors, verifies the files and finishes the output."""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from datetime import UTC, datetime
from typing import Any

from pipeline.cluster import Resources, allocate_resources, connect
from pipeline.config.run import RunConfig
from pipeline.nodes.check import check_nodes
from pipeline.output.inventory import complete_output
from pipeline.output.unit_files import UnitSummary
from pipeline.output.unit_log import UnitLog
from pipeline.queries.kept_inspection import keep_inspection
from pipeline.report.write import leave_report
from pipeline.run.actor import SelfRagActor
from pipeline.run.closing import Budget
from pipeline.run.plan import RunPlan, check_run, inspect_output, store_selection
from pipeline.run.progress import Progress
from pipeline.run.sources import list_sources
from pipeline.run.telemetry import RunTelemetry
from pipeline.run.unit_jobs import Deferring, annotate_units, ignore_request
from pipeline.storage.lease import Lease
from pipeline.storage.location import locate
from pipeline.versions import read_versions

# A run is not stopped early with this many errors or fewer, however small it is.
FEWEST_ERRORS = 100

# Yields the summaries of a plan's remaining units, as they end.
AnnotateUnits = Callable[[RunPlan], Generator[UnitSummary]]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The outcome of a run; counts cover the whole annotated set, earlier calls included.

    Attributes:
        output: URI of the output.
        rows: rows of the query set.
        errors: rows in ``errors/``.
        error_types: rows in ``errors/`` by error type.
        retrieved: rows answered with a passage.
        prompt_tokens, generated_tokens: tokens of the answered rows.
        annotated: rows that this call annotated; the others were done before.
        carried: rows carried over from an earlier set.
        seconds: duration from the checked plan to the verified files, engine start included.
        max_error_rate: ``execution.max_error_rate``.
        left: rows that are not annotated yet, since the budget of this call is spent.
        budget: the setting that ended this call early; empty if none did.
    """

    output: str
    rows: int
    errors: int
    error_types: dict[str, int]
    retrieved: int
    prompt_tokens: int
    generated_tokens: int
    annotated: int
    carried: int
    seconds: float
    max_error_rate: float
    left: int = 0
    budget: str = ""

    @property
    def exit_status(self) -> int:
        """1 if the share of rows in ``errors/`` exceeds ``max_error_rate``, 3 if any are there or left, otherwise 0."""
        if self.errors > self.max_error_rate * self.rows:
            return 1
        return 3 if self.errors or self.left else 0


def annotate_set(config: RunConfig, overwrite: bool = False) -> Summary:
    """Check a run, annotate the remaining units and finish the output.

    Raises:
        NothingNewError: earlier sets cover all queries.
        ValueError, StorageError: the checks failed; nothing has started.
        RuntimeError: too many rows failed; or rows are missing at the end, and the same command continues the run.
    """
    plan = check_run(config, overwrite)
    return run_plan(plan, None if plan.finished else allot_resources(plan))


def allot_resources(plan: RunPlan) -> Resources:
    """Connect to Ray and compute the resources of each actor.

    Raises:
        ValueError: the settings contradict each other, or the actors do not fit on the cluster's nodes.
    """
    connect(plan.config.execution)
    return allocate_resources(plan.config, plan.index["shards"] if plan.index else 0)


def run_plan(
    plan: RunPlan,
    resources: Resources | None,
    actor: type[SelfRagActor] = SelfRagActor,
    deferring: Deferring = ignore_request,
    on_begin: Callable[[RunPlan], None] = lambda _plan: None,
) -> Summary:
    """Carry out a plan, or as much of it as the budget allows.

    Args:
        resources: resources of each actor; None if the plan is finished, so that only the files are verified.
        actor: class of the actors; tests and benchmarks pass a subclass with a scripted engine.
        deferring: defers SIGTERM, so that units in flight can end.
        on_begin: called with the plan before the first unit, once nothing more can refuse the run.

    Raises:
        RuntimeError: too many rows failed, or rows are missing at the end; or the budget was spent before any unit
            ended.
    """
    started, begun = time.monotonic(), datetime.now(UTC)
    if resources is None:
        return summarize_run(plan, plan.inventory.whole, 0, time.monotonic() - started)
    with Lease(plan.output.location) as lease:
        plan = inspect_output(store_selection(plan))  # another run may have held the lease until now
        if plan.finished:
            return summarize_run(plan, plan.inventory.whole, 0, time.monotonic() - started)
        record = {**record_plan(plan), "started": begun.isoformat()}

        def annotate(checked: RunPlan) -> Generator[UnitSummary]:
            on_begin(checked)
            return annotate_units(checked, resources, lease, actor, deferring)

        done = annotate_checked(plan, resources, record, lease, annotate)
        if (budget := Budget.of(plan.config.execution)) and len(done) < len(plan.todo):
            return summarize_part(plan, done, budget, time.monotonic() - started)
        units = complete_output(plan.output, plan.rows, plan.digest, plan.done | done)
        plan.queries.listing.check_unchanged()
        annotated = sum(unit.rows for unit in done.values())
        summary = summarize_run(plan, units, annotated, time.monotonic() - started)
        times = {"finished": datetime.now(UTC).isoformat()}
        lease.renew()
        plan.output.finish({**record, **times, "counts": dataclasses.asdict(summary)}, units)
        stale = plan.config.stale
        leave_report(plan.output.location, locate(stale, plan.config.storage) if stale else None)
    return summary


def record_plan(plan: RunPlan) -> dict[str, Any]:
    """Return what the manifest says of a run before it begins."""
    record = {"configuration": plan.config.to_record(), **plan.compute_identity(), "tasks": plan.describe_tasks()}
    return {
        **record,
        "encoder": plan.encoder,
        "known": plan.known,
        "population": plan.population,
        "versions": read_versions(),
    }


def annotate_checked(
    plan: RunPlan, resources: Resources, record: dict[str, Any], lease: Lease, annotate: AnnotateUnits
) -> dict[str, UnitSummary]:
    """Annotate the remaining units once every machine can reach the files of the run; return their summaries, by unit.

    Raises:
        NodeAccessError: a machine cannot.
        RuntimeError: more rows failed than allowed.
    """
    place, storage = plan.config.output, plan.config.storage
    with check_nodes(list_sources(plan), place, storage, resources.cpus, resources.gpus) as access:
        return annotate_todo(dataclasses.replace(plan, access=access), record, lease, annotate)


def annotate_todo(
    plan: RunPlan, record: dict[str, Any], lease: Lease, annotate: AnnotateUnits
) -> dict[str, UnitSummary]:
    """Annotate the remaining units and return their summaries, by unit.

    Raises:
        RuntimeError: more rows failed than ``execution.max_error_rate`` allows of the whole set; finished units stay.
    """
    if plan.overwrite:
        plan.output.clear()
    plan.output.begin(record)
    keep_inspection(plan.output.location, plan.config.columns, plan.queries.inspected)
    allowed = max(plan.config.execution.max_error_rate * plan.queries.rows, FEWEST_ERRORS)
    earlier, done = plan.inventory.whole, dict[str, UnitSummary]()
    failed, answered = sum(unit.failed for unit in earlier), sum(unit.rows for unit in earlier)
    rows = sum(unit.rows for unit in plan.todo)
    with (
        UnitLog(plan.output.location, earlier, lease) as units_log,
        RunTelemetry(plan.config.output, rows) as telemetry,
        Progress(rows) as progress,
        contextlib.closing(annotate(plan)) as units,
    ):
        for unit in units:
            done[unit.unit] = unit
            units_log.add(unit)
            progress.add(unit)
            telemetry.add_written(unit.rows)
            if failed + progress.errors > allowed:
                raise RuntimeError(
                    f"{failed + progress.errors} of {answered + progress.done} rows failed ({', '.join(unit.errors)}), "
                    "more than execution.max_error_rate allows for the whole set; inspect errors/, fix the cause, "
                    "and pass --overwrite"
                )
    return done


def summarize_part(plan: RunPlan, done: dict[str, UnitSummary], budget: Budget, seconds: float) -> Summary:
    """Add up what a call has done when its budget is spent.

    Raises:
        RuntimeError: it has done nothing, so that the same command would do nothing again.
    """
    if not done:
        raise RuntimeError(
            f"{budget.setting} was spent before any unit ended: starting the actors takes its time, and so does a unit "
            f"of {max(unit.rows for unit in plan.todo)} rows; allow more"
        )
    left = sum(unit.rows for unit in plan.todo if unit.id not in done)
    annotated = sum(unit.rows for unit in done.values())
    summary = summarize_run(plan, [*plan.inventory.whole, *done.values()], annotated, seconds)
    return dataclasses.replace(summary, left=left, budget=budget.setting)


def summarize_run(plan: RunPlan, units: Sequence[UnitSummary], annotated: int, seconds: float) -> Summary:
    """Add up the summaries of all units."""
    error_types: Counter[str] = sum((Counter(unit.errors) for unit in units), Counter())
    return Summary(
        output=plan.config.output,
        rows=plan.queries.rows,
        errors=error_types.total(),
        error_types=dict(error_types),
        retrieved=sum(unit.retrieved for unit in units),
        prompt_tokens=sum(unit.prompt_tokens for unit in units),
        generated_tokens=sum(unit.generated_tokens for unit in units),
        annotated=annotated,
        carried=sum(unit.carried for unit in units),
        seconds=round(seconds, 3),
        max_error_rate=plan.config.execution.max_error_rate,
    )
