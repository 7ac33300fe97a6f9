"""A run carried out: actors annotate what is left, the files are counted, the output is finished."""

import contextlib
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Generator
from datetime import UTC, datetime
from typing import Any

from pipeline.cluster import Resources, actor_resources, connect
from pipeline.config.run import RunConfig
from pipeline.output.folder import UnitSummary
from pipeline.report.write import leave_report
from pipeline.retrieval.shard_servers import ServedIndex, start_servers
from pipeline.run.actor import SelfRagActor
from pipeline.run.attempts import MAX_CONSECUTIVE_CRASHES, Attempts
from pipeline.run.plan import RunPlan, check_run, inspect_output, store_selection
from pipeline.run.progress import Progress
from pipeline.run.telemetry import RunTelemetry
from pipeline.storage.lease import Lease
from pipeline.versions import versions

# So many errors end no run early, however small it is.
FEWEST_ERRORS = 100


@dataclasses.dataclass(frozen=True)
class Summary:
    """How an annotated set ended up, over all calls that worked on it.

    Attributes:
        rows: of the query set.
        errors: of them in ``errors/``.
        error_types: those by type.
        retrieved: rows answered with a passage.
        annotated: rows that this call worked on; the others were done before.
        seconds: of this call, engine start included.
    """

    output: str
    rows: int
    errors: int
    error_types: dict[str, int]
    retrieved: int
    prompt_tokens: int
    generated_tokens: int
    annotated: int
    seconds: float
    max_error_rate: float

    @property
    def exit_status(self) -> int:
        """0 all rows answered, 3 some in ``errors/``, 1 more of them than ``max_error_rate`` allows."""
        if not self.errors:
            return 0
        return 3 if self.errors <= self.max_error_rate * self.rows else 1


def annotate_set(config: RunConfig, overwrite: bool = False) -> Summary:
    """Check, annotate what is left to annotate, and finish the output.

    Raises:
        ValueError, StorageError: from the checks, before anything has started.
        RuntimeError: rows are missing at the end; running again continues.
    """
    plan = check_run(config, overwrite)
    return run_plan(plan, None if plan.finished else allot_resources(plan))


def allot_resources(plan: RunPlan) -> Resources:
    """Connect to Ray and find out what each actor gets.

    Raises:
        ValueError: the cluster's nodes do not hold the actors.
    """
    connect(plan.config.execution)
    return actor_resources(plan.config, plan.index["shards"] if plan.index else 0)


def run_plan(plan: RunPlan, resources: Resources | None, actor: type[SelfRagActor] = SelfRagActor) -> Summary:
    """Carry a plan out.

    Args:
        resources: None where nothing is left to do.
        actor: what annotates the units; another one where the engine is a scripted one.
    """
    started, begun = time.monotonic(), datetime.now(UTC)
    record = {"configuration": plan.config.recorded(), **plan.identity(), "tasks": plan.tasks()}
    record |= {"encoder": plan.encoder, "known": plan.known, "versions": versions(), "started": begun.isoformat()}
    if resources is None:
        return summarise_run(plan, verify_units(plan), 0, time.monotonic() - started)
    with Lease(plan.output.location):
        plan = inspect_output(store_selection(plan))  # another run may have been at work until now
        annotated = 0 if plan.finished else annotate_todo(plan, resources, record, actor)
        units = verify_units(plan)
        summary = summarise_run(plan, units, annotated, time.monotonic() - started)
        if not plan.finished:
            files = {unit.unit: unit.record() for unit in units}
            times = {"finished": datetime.now(UTC).isoformat()}
            plan.output.finish({**record, **times, "counts": dataclasses.asdict(summary), "units": files})
            leave_report(plan.output.location)
    return summary


def annotate_todo(
    plan: RunPlan, resources: Resources, record: dict[str, Any], actor: type[SelfRagActor] = SelfRagActor
) -> int:
    """Annotate what is left; how many rows that were.

    Raises:
        RuntimeError: so many rows fail that the run cannot end well; what is done stays.
    """
    if plan.overwrite:
        plan.output.clear()
    plan.output.begin(record)
    allowed = max(plan.config.execution.max_error_rate * plan.queries.rows, FEWEST_ERRORS)
    failed, done = plan.output.error_rows(plan.done), sum(plan.rows[unit] for unit in plan.done)
    rows = sum(unit.rows for unit in plan.todo)
    with (
        RunTelemetry(plan.config.output, rows) as telemetry,
        Progress(rows) as progress,
        contextlib.closing(annotate_units(plan, resources, actor)) as units,
    ):
        for unit in units:
            progress.add(unit)
            telemetry.written(unit.rows)
            if failed + progress.errors > allowed:
                raise RuntimeError(
                    f"{failed + progress.errors} of {done + progress.done} rows failed ({', '.join(unit.errors)}), "
                    "more than execution.max_error_rate allows of all; look into errors/, mend the cause, and say "
                    "--overwrite"
                )
    return progress.done


def annotate_units(plan: RunPlan, resources: Resources, actor: type[SelfRagActor]) -> Generator[UnitSummary]:
    """The job's graph; yields a summary as each unit's files appear."""
    if not plan.todo:
        return
    import ray
    from ray.data import ActorPoolStrategy
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    config = plan.config
    # Ray Data restarts an actor that dies, and repeats its units, without limit; Attempts ends it.
    pool = ActorPoolStrategy(
        size=config.execution.actors,
        max_concurrent_calls_per_actor=config.execution.units_in_flight,
        max_tasks_in_flight_per_actor=2 * config.execution.units_in_flight,
    )
    # Where the driver is, since both end together; soft affinity may place it on a node that dies.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lasting = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    max_crashes = MAX_CONSECUTIVE_CRASHES * config.execution.actors * config.execution.units_in_flight
    attempts = lasting(Attempts).remote(max_crashes, config.output)
    units = [dataclasses.asdict(unit) for unit in plan.todo]
    summaries = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        actor,
        fn_constructor_args=[config, attempts, start_partitions(plan, resources), plan.index and plan.index["digest"]],
        batch_size=1,  # a unit is the one row of its block; with GPUs Ray Data accepts no None
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
        # Units in flight of a run that ends early go on; without it they write nothing.
        ray.kill(attempts)


def start_partitions(plan: RunPlan, resources: Resources) -> list[Any]:
    """Handles of the shard servers of a partitioned index; none in the local topology."""
    config = plan.config
    if not (resources.servers and plan.index and config.index):
        return []
    digest, shards = plan.index["digest"], plan.index["shards"]
    index = ServedIndex(config.index, digest, shards, config.retrieval, config.storage)
    return start_servers(index, resources.servers, config.execution)


def verify_units(plan: RunPlan) -> list[UnitSummary]:
    """What the files of all units hold.

    Raises:
        RuntimeError: they do not hold every row of the query set; units with wrong counts are withdrawn.
    """
    units, rows = plan.output.summaries(unit.id for unit in plan.queries.units), plan.rows
    whole = [unit for unit in units if unit.rows == rows[unit.unit]]
    for unit in units:
        if unit.rows != rows[unit.unit]:
            plan.output.withdraw(unit.unit)
    if len(whole) != len(rows):
        raise RuntimeError(
            f"{plan.config.output}: {sum(unit.rows for unit in whole)} of {plan.queries.rows} rows are there, in "
            f"{len(whole)} of {len(rows)} units; run the same command again to continue"
        )
    return units


def summarise_run(plan: RunPlan, units: list[UnitSummary], annotated: int, seconds: float) -> Summary:
    """Add up what the files hold."""
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
        seconds=round(seconds, 3),
        max_error_rate=plan.config.execution.max_error_rate,
    )
