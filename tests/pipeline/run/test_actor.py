import asyncio
import dataclasses
import time

import pytest

from pipeline.engine.postmortem import Death
from pipeline.engine.vllm import EngineDeadError
from pipeline.output.folder import OutputFolder
from pipeline.output.unit_files import UnitSummary
from pipeline.run.annotation import OneByOne, annotate_table
from pipeline.run.attempts import MAX_CONSECUTIVE_CRASHES, Attempts, CrashLoopError
from tests.support.actors import CONFIG, DEATH, Died, Engine, Folder, LocalHandle, actor, dies, system, table


@pytest.mark.parametrize("engine", [Engine(), Engine(seconds=60), Engine(error=ValueError("no"))])
async def test_rows_are_answered_after_one_warmup_even_if_it_fails(tmp_path, engine):
    made = actor(LocalHandle(Attempts(MAX_CONSECUTIVE_CRASHES, "run")), [])
    made.generator = engine
    execution = CONFIG.execution.model_copy(update={"row_timeout_s": 0.5})
    made.config = CONFIG.model_copy(update={"execution": execution})
    units = [Folder(tmp_path, table(name), name).annotate(made) for name in ("one", "two")]
    summaries = await asyncio.wait_for(asyncio.gather(*units), 5)
    assert [(summary.rows, summary.errors) for summary in summaries if summary] == [(1, {}), (1, {})]
    assert engine.begun == 1


async def test_engine_death_during_warmup_ends_the_process(tmp_path, monkeypatch):
    def gone(status):
        raise Died(status)

    monkeypatch.setattr("pipeline.run.actor.os._exit", gone)
    attempts = Attempts(MAX_CONSECUTIVE_CRASHES, "run")
    made = actor(LocalHandle(attempts), [])
    made.generator.error = EngineDeadError(DEATH)
    folder = Folder(tmp_path, table("one"))
    assert await folder.annotate(made) is None
    assert attempts.count_deaths(folder.unit.id) == 1


async def test_unit_is_read_annotated_and_written(tmp_path):
    folder = Folder(tmp_path, table("one", None, "two"))
    process = actor(LocalHandle(Attempts(MAX_CONSECUTIVE_CRASHES, "run")), [])
    process.id, process.full_at = "first", time.time() - 60
    summary = await folder.annotate(process)
    assert summary is not None
    assert (summary.actor, summary.full_until) == ("first", None)  # no request has waited since the unit began
    assert dataclasses.replace(summary, data_bytes=0) == folder.output.read_unit(folder.unit.id, "same")
    assert (summary.unit, summary.rows, summary.errors) == (folder.unit.id, 3, {"ValueError": 1})
    assert time.time() - 60 < (summary.began or 0) <= (summary.ended or 0) <= time.time()
    assert folder.answers() == ["one", "two"]
    assert [row["error_message"] for row in folder.errors()] == ["the query is empty"]


async def test_row_that_kills_its_process_is_isolated_and_others_are_answered(tmp_path):
    attempts, folder = (
        LocalHandle(Attempts(MAX_CONSECUTIVE_CRASHES, "run")),
        Folder(tmp_path, table("one", "poison", "two")),
    )
    summary, deaths = await folder.annotate_at_last(attempts, [])
    assert summary.errors == {"ProcessDiedError": 1}
    assert folder.answers() == ["one", "two"]
    (row,) = folder.errors()
    assert (row["query"], row["error_type"]) == ("poison", "ProcessDiedError")
    assert row["error_message"] == "2 processes died while decoding only this row"
    assert deaths == 2 + 1 + 2  # beside others, alone, and its own
    assert attempts.inner._units == {}


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("pipeline.run.actor.read_unit", "^11 consecutive attempts crashed without progress"),
        (
            "pipeline.output.folder.OutputFolder.write_unit",
            "^3 processes died while writing the files of unit [0-9a-f]+$",
        ),
    ],
)
async def test_repeated_death_while_reading_or_writing_a_unit_ends_the_run(place, reason, tmp_path, monkeypatch):
    attempts, folder = Attempts(MAX_CONSECUTIVE_CRASHES, "run"), Folder(tmp_path, table("one"))
    monkeypatch.setattr(place, dies)
    with pytest.raises(CrashLoopError, match=reason):
        await folder.annotate_at_last(LocalHandle(attempts), [])


async def test_one_death_while_writing_costs_one_attempt(tmp_path, monkeypatch):
    attempts, folder = Attempts(MAX_CONSECUTIVE_CRASHES, "run"), Folder(tmp_path, table("one"))
    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "write_unit", dies)
        assert await folder.annotate(actor(LocalHandle(attempts), [])) is None
    assert attempts.count_deaths(folder.unit.id) == 1
    summary = await folder.annotate(actor(LocalHandle(attempts), []))
    assert summary is not None
    assert summary.rows == 1
    assert attempts._units == {}


async def test_actor_that_outlives_its_run_writes_nothing(tmp_path, monkeypatch):
    attempts, folder = Attempts(MAX_CONSECUTIVE_CRASHES, "run"), Folder(tmp_path, table("one", "two"))

    def gone(_unit):
        raise ConnectionError("the run is over")

    monkeypatch.setattr(attempts, "begin_writing", gone)
    with pytest.raises(ConnectionError):
        await folder.annotate(actor(LocalHandle(attempts), []))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("death", "expected"),
    [
        (
            Death("torch.OutOfMemoryError: CUDA out of memory.", out_of_memory=True),
            ("OutOfMemoryError", "the engine ran out of memory 2 times while decoding only this row (torch.Out"),
        ),
        (
            Death("RuntimeError: device-side assert", out_of_memory=False),
            (
                "ProcessDiedError",
                "2 processes died while decoding only this row; last engine failure: RuntimeErr",
            ),
        ),
    ],
)
async def test_out_of_memory_is_distinguished_from_a_row_that_kills_the_engine(death, expected):
    attempts, unit = LocalHandle(Attempts(MAX_CONSECUTIVE_CRASHES, "run")), table("poison")
    dying = system(lambda _: EngineDeadError(death))
    for _ in range(2):
        with pytest.raises(EngineDeadError):
            await annotate_table(dying, unit, CONFIG, OneByOne(attempts, "u"))
    (row,) = (await annotate_table(dying, unit, CONFIG, OneByOne(attempts, "u"))).to_pylist()
    assert (row["error_type"], row["attempts"]) == (expected[0], 2)
    assert row["error_message"].startswith(expected[1])


@pytest.mark.parametrize("poisoned", [1, 2, 4, 6])
async def test_each_row_that_kills_its_process_costs_two_processes(poisoned, tmp_path):
    attempts = LocalHandle(Attempts(MAX_CONSECUTIVE_CRASHES, "run"))
    folder = Folder(tmp_path, table(*[f"poison {n}" if n % 2 else f"good {n}" for n in range(2 * poisoned)]))
    summary, deaths = await folder.annotate_at_last(attempts, [])
    assert deaths == 2 + 1 + 2 * poisoned
    assert (summary.rows, summary.errors) == (2 * poisoned, {"ProcessDiedError": poisoned})
    assert folder.answers() == ["good"] * poisoned
    assert [row["query"] for row in folder.errors()] == [f"poison {n}" for n in range(1, 2 * poisoned, 2)]


async def test_run_whose_processes_all_die_ends(tmp_path):
    attempts, folder = LocalHandle(Attempts(MAX_CONSECUTIVE_CRASHES, "run")), Folder(tmp_path, table(*["poison"] * 40))
    with pytest.raises(CrashLoopError, match="^11 consecutive attempts crashed without progress"):
        await folder.annotate_at_last(attempts, [])


async def test_waiting_unit_is_not_counted_as_an_attempt(tmp_path):
    attempts, folder = Attempts(MAX_CONSECUTIVE_CRASHES, "run"), Folder(tmp_path, table("one"))
    process = actor(LocalHandle(attempts), [])
    async with process.lock.hold_exclusive():
        waiting = asyncio.create_task(folder.annotate(process))
        await asyncio.sleep(0.01)
        assert attempts.count_deaths(folder.unit.id) == 0
    summary = await waiting
    assert summary is not None
    assert summary.rows == 1


async def test_concurrent_units_are_not_blamed_for_a_death(tmp_path):
    attempts = LocalHandle(Attempts(MAX_CONSECUTIVE_CRASHES, "run"))
    seen: list[str] = []
    whole = Folder(tmp_path, table("one", "two"), "whole")
    ill = Folder(tmp_path, table("poison", "three"), "ill")
    done: dict[str, UnitSummary] = {}
    for _ in range(12):
        process = actor(attempts, seen)
        todo = [folder for folder in (whole, ill) if folder.unit.id not in done]
        ended = await asyncio.gather(*(folder.annotate(process) for folder in todo))
        if None not in ended or len(todo) == 1:
            done |= {found.unit: found for found in ended if found is not None}
        if len(done) == 2:
            break
    assert done[whole.unit.id].errors == {}
    assert done[ill.unit.id].errors == {"ProcessDiedError": 1}
    assert sorted(whole.answers()) == ["one", "three", "two"]
    assert [row["query"] for row in ill.errors()] == ["poison"]
