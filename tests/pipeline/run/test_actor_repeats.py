import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.nodes.loss import NODE_LOSS_S
from pipeline.output.folder import OutputFolder
from pipeline.output.partial import list_partial_units
from pipeline.run.actor import SelfRagActor
from pipeline.run.annotation import OneByOne, annotate_table
from pipeline.run.attempts import MAX_CONSECUTIVE_CRASHES, Attempts, CrashLoopError
from tests.support.actors import CONFIG, Died, Folder, LocalHandle, actor, dies, system, table


@pytest.fixture
def spot_node(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    """Actors run on a node that is lost whenever one of them ends."""
    for room in ("actor", "annotation"):
        monkeypatch.setattr(f"pipeline.run.{room}.get_node", lambda: "spot")
    return Attempts(MAX_CONSECUTIVE_CRASHES, "run", lambda: frozenset({"spot"}))


def preempt_after(made: SelfRagActor, rows: int) -> None:
    """The process ends when it begins another row."""
    answer, left = made.system.answer, rows

    async def mortal(query):
        nonlocal left
        left -= 1
        if left < 0:
            raise Died
        return await answer(query)

    object.__setattr__(made.system, "answer", mortal)


async def test_row_by_row_unit_ends_though_no_process_lives_for_more_than_one_row(tmp_path, spot_node):
    folder, seen = Folder(tmp_path, table(*[f"query{n}" for n in range(15)])), list[str]()
    for _ in range(3):
        spot_node.begin(folder.unit.id)  # processes that died on a node that lives
    processes, summary = 0, None
    while summary is None:
        process = actor(LocalHandle(spot_node), seen)
        preempt_after(process, 1)
        summary = await folder.annotate(process)
        processes += 1
    assert processes == 15
    assert seen == [f"query{n}" for n in range(15)]
    assert (summary.rows, summary.errors) == (15, {})
    assert folder.answers() == seen
    assert list_partial_units(folder.output.location) == frozenset()


@pytest.fixture
def keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every finished row is due for a sub-file."""
    monkeypatch.setattr("pipeline.run.actor.KEEP_S", 0)


@pytest.mark.usefixtures("keep_all")
@pytest.mark.parametrize("same_run", [True, False])
async def test_finished_rows_of_a_unit_are_kept_when_it_is_repeated(tmp_path, same_run):
    folder, seen = Folder(tmp_path, table("one", None, "poison", "two", "three")), list[str]()
    attempts = Attempts(MAX_CONSECUTIVE_CRASHES, "run")
    process = actor(LocalHandle(attempts), [])
    answer = process.system.answer

    async def die_late(query):
        await asyncio.sleep(0.5 if query.query == "poison" else 0)
        return await answer(query)

    object.__setattr__(process.system, "answer", die_late)
    assert await folder.annotate(process) is None
    kept = list_partial_units(folder.output.location)
    assert kept == {folder.unit.id}
    attempts = attempts if same_run else Attempts(MAX_CONSECUTIVE_CRASHES, "run")
    process = actor(LocalHandle(attempts), seen, deadly="nothing")
    process.id = "second"
    summary = await folder.annotate(process)
    assert summary is not None
    assert summary.actor == ""  # its time is not that of all its rows
    assert "one" not in seen
    assert "poison" in seen
    assert (summary.rows, summary.errors) == (5, {"KeyError": 1, "ValueError": 1})
    assert folder.answers() == ["one", "two", "three"]
    assert list_partial_units(folder.output.location) == frozenset()


@pytest.mark.usefixtures("keep_all")
async def test_rows_kept_by_a_run_with_other_settings_are_annotated_again(tmp_path):
    folder, seen = Folder(tmp_path, table("one", "poison")), list[str]()
    for identity, deadly in (("before", "poison"), ("after", "nothing")):
        process = actor(LocalHandle(Attempts(MAX_CONSECUTIVE_CRASHES, "run")), seen, deadly)
        process.run = identity
        await folder.annotate(process)
    assert seen == ["one", "poison"] * 2
    assert folder.answers() == ["one"]


@pytest.mark.usefixtures("keep_all")
async def test_repeated_unit_is_written_as_if_it_had_never_been_interrupted(tmp_path):
    queries = table(*[f"query{n}" for n in range(8)], None)
    calm, torn = Folder(tmp_path / "calm", queries), Folder(tmp_path / "torn", queries)
    await calm.annotate(actor(LocalHandle(Attempts(MAX_CONSECUTIVE_CRASHES, "run")), []))
    attempts, summary = LocalHandle(Attempts(MAX_CONSECUTIVE_CRASHES, "run")), None
    while summary is None:
        process = actor(attempts, [])
        preempt_after(process, 3)
        summary = await torn.annotate(process)
    for name in ("data", "errors"):
        tables = [pq.read_table(Path(folder.output.location.path) / name) for folder in (calm, torn)]
        assert tables[0].schema == tables[1].schema
        timeless = [drop_seconds(found) for found in tables]
        assert timeless[0] == timeless[1]


def drop_seconds(found: pa.Table) -> list[dict[str, Any]]:
    rows = found.to_pylist()
    for row in rows:
        row["usage"] = {name: value for name, value in (row.get("usage") or {}).items() if "seconds" not in name}
    return rows


@pytest.mark.usefixtures("keep_all")
async def test_row_that_killed_its_processes_is_tried_again_by_the_next_run(tmp_path, monkeypatch):
    """Its processes may have died for a reason that was removed in between."""
    folder, seen = Folder(tmp_path, table("one", "poison", "two")), list[str]()
    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "write_unit", dies)
        with pytest.raises(CrashLoopError):
            await folder.annotate_at_last(LocalHandle(Attempts(MAX_CONSECUTIVE_CRASHES, "run")), [])
    await folder.annotate(actor(LocalHandle(Attempts(MAX_CONSECUTIVE_CRASHES, "run")), seen, deadly="nothing"))
    assert seen == ["poison"]
    assert [row["error_type"] for row in folder.errors()] == ["KeyError"]


async def test_row_is_blamed_only_once_the_loss_of_its_nodes_would_be_known(tmp_path, monkeypatch):
    lost: set[str] = set()
    attempts = Attempts(MAX_CONSECUTIVE_CRASHES, "run", lambda: frozenset(lost))
    for _ in range(2):
        attempts.begin("u", 0, "spot")

    async def notice(seconds: float) -> None:
        assert seconds == NODE_LOSS_S
        lost.add("spot")

    way = OneByOne(LocalHandle(attempts), "u")
    monkeypatch.setattr("pipeline.run.annotation.asyncio", SimpleNamespace(sleep=notice, timeout=asyncio.timeout))
    found = await annotate_table(system(), table("one"), CONFIG, way)
    assert found["answer"].to_pylist() == ["one"]
