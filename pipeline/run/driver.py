"""Carries out a planned run: annotates the remaining units in actors, verifies the files and finishes the output."""

import contextlib
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Generator, Sequence
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
from pipeline.retrieval.retriever import SearchDigests
from pipeline.retrieval.shard_servers import ServedIndex, start_servers
from pipeline.run.actor import SelfRagActor
from pipeline.run.attempts import MAX_CONSECUTIVE_CRASHES, Attempts
from pipeline.run.plan import RunPlan, check_run, inspect_output, store_selection
from pipeline.run.progress import Progress
from pipeline.run.sources import list_sources
from pipeline.run.telemetry import RunTelemetry
from pipeline.storage.lease import Lease
from pipeline.storage.location import locate
from pipeline.versions import read_versions

# A run is not stopped early with this many errors or fewer, however small it is.
FEWEST_ERRORS = 100


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

    @property
    def exit_status(self) -> int:
        """0 if all rows are answered, 3 if some are in ``errors/``, 1 if their share exceeds ``max_error_rate``."""
        if not self.errors:
            return 0
        return 3 if self.errors <= self.max_error_rate * self.rows else 1


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


def run_plan(plan: RunPlan, resources: Resources | None, actor: type[SelfRagActor] = SelfRagActor) -> Summary:
    """Carry out a plan.

    Args:
        resources: resources of each actor; None if the plan is finished, so that only the files are verified.
        actor: class of the actors; tests and benchmarks pass a subclass with a scripted engine.

    Raises:
        RuntimeError: too many rows failed, or rows are missing at the end.
    """
    started, begun = time.monotonic(), datetime.now(UTC)
    if resources is None:
        return summarize_run(plan, plan.inventory.whole, 0, time.monotonic() - started)
    with Lease(plan.output.location) as lease:
        plan = inspect_output(store_selection(plan))  # another run may have held the lease until now
        if plan.finished:
            return summarize_run(plan, plan.inventory.whole, 0, time.monotonic() - started)
        record = {**record_plan(plan), "started": begun.isoformat()}
        done = annotate_checked(plan, resources, record, lease, actor)
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
    plan: RunPlan, resources: Resources, record: dict[str, Any], lease: Lease, actor: type[SelfRagActor]
) -> dict[str, UnitSummary]:
    """Annotate the remaining units once every machine can reach the files of the run; return their summaries, by unit.

    Raises:
        NodeAccessError: a machine cannot.
        RuntimeError: more rows failed than allowed.
    """
    place, storage = plan.config.output, plan.config.storage
    with check_nodes(list_sources(plan), place, storage, resources.cpus, resources.gpus) as access:
        return annotate_todo(dataclasses.replace(plan, access=access), resources, record, lease, actor)


def annotate_todo(
    plan: RunPlan,
    resources: Resources,
    record: dict[str, Any],
    lease: Lease,
    actor: type[SelfRagActor] = SelfRagActor,
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
        contextlib.closing(annotate_units(plan, resources, lease, actor)) as units,
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


def annotate_units(
    plan: RunPlan, resources: Resources, lease: Lease, actor: type[SelfRagActor]
) -> Generator[UnitSummary]:
    """Run the Ray Data job; yields the summary of each unit once its files are written."""
    if not plan.todo:
        return
    import ray
    from ray.data import ActorPoolStrategy

    config, access = plan.config, plan.access
    if access is not None:
        config = config.model_copy(update={"storage": access.storage})
    # Ray Data restarts dead actors and retries their units, and sets no limit; Attempts does. A unit that waits in the
    # queue of a busy actor stays there while others have nothing left to do, so none waits.
    pool = ActorPoolStrategy(
        size=config.execution.actors,
        max_concurrent_calls_per_actor=config.execution.units_in_flight,
        max_tasks_in_flight_per_actor=config.execution.units_in_flight,
    )
    attempts = start_attempts(config)
    lease.on_renewal = attempts.renew_permit.remote
    units = [dataclasses.asdict(unit) for unit in plan.todo]
    summaries = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        actor,
        fn_constructor_args=[
            config,
            plan.queries.schema,
            attempts,
            start_partitions(plan, resources),
            SearchDigests(*((used or {}).get("digest") for used in (plan.index, plan.reranker))),
            plan.digest,
            access,
            plan.stale and plan.stale["run"],
        ],
        batch_size=1,  # one unit, the only row of its block; Ray Data refuses None with GPUs
        batch_format="pyarrow",
        compute=pool,
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
    )
    try:
        for batch in summaries.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in batch["summary"].to_pylist():
                yield UnitSummary(**json.loads(row))
    finally:
        # When a run ends early, its units in flight continue; without Attempts they cannot write files.
        lease.on_renewal = None
        ray.kill(attempts)


def start_attempts(config: RunConfig) -> Any:
    """Start the actor that counts attempts, and return its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's node, since both end together; soft affinity might place it on a node that dies.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lasting = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    max_crashes = MAX_CONSECUTIVE_CRASHES * config.execution.actors * config.execution.units_in_flight
    return lasting(Attempts).remote(max_crashes, config.output)


def start_partitions(plan: RunPlan, resources: Resources) -> list[Any]:
    """Start the shard servers of a partitioned index and return their handles; empty in the local topology."""
    config = plan.config
    if not (resources.servers and plan.index and config.index):
        return []
    digest, shards = plan.index["digest"], plan.index["shards"]
    access = plan.access and plan.access.narrow("--index")
    storage = access.storage if access else config.storage
    index = ServedIndex(config.index, digest, shards, config.retrieval, storage, access)
    return start_servers(index, resources.servers, config.execution)


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
