import asyncio
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipeline.config.run import RunConfig
from pipeline.config.sections import SampleConfig, StorageConfig
from pipeline.engine.postmortem import Death
from pipeline.engine.vllm import EngineDeadError
from pipeline.output.unit_files import UNKNOWN, Work
from pipeline.storage.location import locate
from pipeline.tuning.trial_actor import TrialEndedError, make_trial_actor
from pipeline.tuning.trials import Trials
from tests.faults.campaign import model_folder
from tests.faults.harness import write_queries
from tests.faults.scripted import ScriptedActor

STARTS = functools.partial(asyncio.sleep, 0.05)
UNIT: Any = SimpleNamespace(rows=7)


class FakeActor:
    """Starts at once; a unit takes as long as its work."""

    def __init__(self, work: Callable[[], Any], start: Callable[[], Any]) -> None:
        self.work, self.start = work, start

    @property
    def _warm(self) -> asyncio.Future[None]:
        return asyncio.ensure_future(self.start())

    async def _annotate(self, *_: Any) -> tuple[Any, Work]:
        return await self.work(), UNKNOWN


@pytest.fixture
def annotate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("pipeline.tuning.trial_actor.SelfRagActor", FakeActor)

    async def annotate(limit_s: float | None, work: Callable[[], Any], start: Callable[[], Any] = STARTS) -> Any:
        actor: Any = make_trial_actor(limit_s)
        table, _ = await actor(work, start)._annotate(UNIT, None, None)
        return table

    return annotate


async def raise_error(error: Exception) -> None:
    raise error


async def test_unit_within_the_limit_is_annotated(annotate: Any) -> None:
    assert await annotate(0.04, functools.partial(asyncio.sleep, 0, "rows")) == "rows"  # without the engine's start
    assert await annotate(None, functools.partial(asyncio.sleep, 0, "rows")) == "rows"


async def test_unit_over_the_limit_ends_the_trial(annotate: Any) -> None:
    with pytest.raises(TrialEndedError, match="^plainly slower: 7 rows were not done after 0 s$"):
        await annotate(0.01, functools.partial(asyncio.sleep, 5))


async def test_dead_engine_ends_the_trial(annotate: Any) -> None:
    error = EngineDeadError(Death("no memory", out_of_memory=True))
    with pytest.raises(TrialEndedError, match="^the engine died: no memory$"):
        await annotate(5, functools.partial(raise_error, error))
    with pytest.raises(TrialEndedError, match="^the engine died: no memory$"):
        await annotate(5, STARTS, start=functools.partial(raise_error, error))


async def test_other_timeouts_are_not_the_limits(annotate: Any) -> None:
    with pytest.raises(TimeoutError, match="a store"):
        await annotate(5, functools.partial(raise_error, TimeoutError("a store")))


@pytest.fixture
def small_ray() -> Iterator[None]:
    ray.shutdown()  # other tests may have left one
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("small_ray")
def test_trials_end_in_ray_and_leave_their_cpus_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tuning.trial_actor.SelfRagActor", ScriptedActor)
    monkeypatch.setattr("pipeline.run.plan.load_critic", lambda _config: None)
    monkeypatch.setattr("pipeline.run.plan.identify_model", lambda *_: {"digest": "one"})  # its folder holds counters
    write_queries(tmp_path / "queries", 24, {5: "WAITS", 9: "STALLS"})
    model, waits = model_folder(tmp_path), tmp_path / "waits"
    (model / "stalls").write_text("0")
    config = RunConfig.model_validate(
        {
            "queries": str(tmp_path / "queries"),
            "output": str(tmp_path / "out"),
            "model": {"name": str(model)},
            "execution": {"cpus_per_actor": 2, "gpus_per_actor": 0, "engine_stall_s": 2},
        }
    )
    place = locate(str(tmp_path / "trials"), StorageConfig())
    trials = Trials.prepare(config, place, SampleConfig(rows=24), overwrite=False)
    trials.begin()
    first = trials.measure({}, None)
    waits.touch()
    slow = trials.measure({"max_num_seqs": 64}, 3.0)
    waits.unlink()
    (model / "stalls").write_text("1")
    dead = trials.measure({"max_num_seqs": 256}, 60.0)
    again = trials.measure({}, 60.0)
    assert (slow.stopped_after, slow.problem) == (3.0, "plainly slower: 8 rows were not done after 3 s")
    assert dead.stopped_after is None
    assert dead.problem.startswith("the engine died: ")
    assert min(first.rate or 0, again.rate or 0) > 0
    assert (again.number, again.changed) == (4, 0.0)
