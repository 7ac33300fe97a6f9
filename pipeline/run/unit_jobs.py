"""Annotates units in Ray Data jobs, and ends them early if the run does."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Generator, Sequence
from typing import Any

from pipeline.cluster import Resources
from pipeline.output.unit_files import UnitSummary
from pipeline.queries.units import Unit
from pipeline.retrieval.retriever import SearchDigests
from pipeline.retrieval.shard_servers import ServedIndex, start_servers
from pipeline.run.actor import SelfRagActor
from pipeline.run.attempts import MAX_CONSECUTIVE_CRASHES, Attempts
from pipeline.run.closing import KEEPING_S, Budget, Closing
from pipeline.run.plan import RunPlan
from pipeline.storage.lease import Lease

log = logging.getLogger(__name__)

# Runs a body during which SIGTERM calls a function, in a thread, that returns how many more seconds it may take.
Deferring = Callable[[Callable[[], float]], contextlib.AbstractContextManager[None]]


def ignore_request(_request: Callable[[], float]) -> contextlib.AbstractContextManager[None]:
    """Leave SIGTERM as it is; see ``Deferring``."""
    return contextlib.nullcontext()


def annotate_units(
    plan: RunPlan, resources: Resources, lease: Lease, actor: type[SelfRagActor], deferring: Deferring
) -> Generator[UnitSummary]:
    """Annotate the remaining units in Ray Data jobs; yields the summary of each unit once its files are written.

    Units that nodes have given back, since they are being drained, are done in a further job.

    Raises:
        RuntimeError: units are left for no known reason.
    """
    import ray

    if not (todo := {unit.id: unit for unit in plan.todo}):
        return
    attempts = start_attempts(plan)
    lease.on_renewal = attempts.renew_permit.remote
    try:
        servers = start_partitions(plan, resources)
        with deferring(lambda: recall_units(attempts, lease, plan.config.execution.grace_s)):
            while todo:
                for summary in run_job(plan, list(todo.values()), resources, actor, attempts, servers):
                    del todo[summary.unit]
                    yield summary
                if todo and not may_continue(attempts, list(todo.values())):
                    return
    finally:
        # When a run ends early, its units in flight continue; without Attempts they cannot write files.
        lease.on_renewal = None
        ray.kill(attempts)


def may_continue(attempts: Any, left: Sequence[Unit]) -> bool:
    """Whether a further job may do the units that are left; not if the run ends early.

    Raises:
        RuntimeError: no unit was given back, so that a further job would leave them, too.
    """
    import ray

    if not ray.get(attempts.may_continue.remote(min(unit.rows for unit in left))):
        return False
    if not (given_back := ray.get(attempts.take_given_back.remote())):
        raise RuntimeError(f"{len(left)} units have not ended; rerun the same command to continue")
    log.warning("nodes that are being drained gave back %d unit(s); %d begin again", given_back, len(left))
    return True


def recall_units(attempts: Any, lease: Lease, seconds: float) -> float:
    """Have the units in flight end within some seconds or be given back; return how long that takes at most."""
    import ray

    if not lease.is_fresh:  # another run may have taken over, and the units cannot be written
        return 0.0
    in_flight = ray.get(attempts.recall.remote(seconds))
    log.warning("SIGTERM: %d unit(s) in flight have %g s to end; finished rows are kept", in_flight, seconds)
    return seconds + KEEPING_S if in_flight else 0.0


def run_job(
    plan: RunPlan,
    units: Sequence[Unit],
    resources: Resources,
    actor: type[SelfRagActor],
    attempts: Any,
    servers: Sequence[Any],
) -> Generator[UnitSummary]:
    """Run a Ray Data job over units; yields the summaries of those that are not given back."""
    import ray
    from ray.data import ActorPoolStrategy

    config, access = plan.config, plan.access
    if access is not None:
        config = config.model_copy(update={"storage": access.storage})
    # Ray Data restarts dead actors and retries their units, and sets no limit; Attempts does. A unit that waits in the
    # queue of a busy actor stays there while others have nothing left to do, so none waits.
    pool = ActorPoolStrategy(
        size=min(config.execution.actors, len(units)),
        max_concurrent_calls_per_actor=config.execution.units_in_flight,
        max_tasks_in_flight_per_actor=config.execution.units_in_flight,
    )
    records = [dataclasses.asdict(unit) for unit in units]
    summaries = ray.data.from_items(records, override_num_blocks=len(records)).map_batches(
        actor,
        fn_constructor_args=[
            config,
            plan.queries.schema,
            attempts,
            servers,
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
    for batch in summaries.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch["summary"].to_pylist():
            if (summary := json.loads(row)) is not None:
                yield UnitSummary(**summary)


def start_attempts(plan: RunPlan) -> Any:
    """Start the actor that counts attempts, and return its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's node, since both end together; soft affinity might place it on a node that dies.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lasting = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    execution = plan.config.execution
    max_crashes = MAX_CONSECUTIVE_CRASHES * execution.actors * execution.units_in_flight
    closing = Closing.of(Budget.of(execution), plan.inventory.whole)
    return lasting(Attempts).remote(max_crashes, plan.config.output, closing=closing)


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
