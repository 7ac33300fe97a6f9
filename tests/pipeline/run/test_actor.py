import asyncio
import dataclasses
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.run import RunConfig
from pipeline.config.sections import ExecutionConfig, StorageConfig
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.decoding.self_rag import SelfRag
from pipeline.engine.postmortem import Death
from pipeline.engine.vllm import EngineDeadError
from pipeline.output.folder import OutputFolder
from pipeline.output.partial import list_partial_units
from pipeline.output.unit_files import UnitSummary
from pipeline.queries.query_set import inspect_queries
from pipeline.retrieval.shard_servers import IndexLostError
from pipeline.run.actor import SelfRagActor
from pipeline.run.annotation import OneByOne, Together, annotate_table
from pipeline.run.attempts import MAX_CONSECUTIVE_CRASHES, Attempts, CrashLoopError, SharedExclusiveLock
from pipeline.run.nodes import NODE_LOSS_S
from pipeline.run.telemetry import ActorTelemetry
from pipeline.storage.location import locate
from tests.support.fakes import ScriptedGenerator, generation, word_tokenizer

CONFIG = RunConfig.model_validate(
    {"queries": "q", "output": "o", "model": {"name": "m"}, "decoding": {"mode": "never"}}
)
DEATH = Death("exited with status 1", out_of_memory=False)


def system(failure: Callable[[str], Exception] = KeyError) -> SelfRag:
    """Repeats the question; a question about poison raises."""
    tokenizer = word_tokenizer()

    def script(prompt: str):
        if "poison" in prompt:
            raise failure("script")
        return generation(tokenizer, [prompt.split()[2], "</s>"])

    return SelfRag(ScriptedGenerator(tokenizer, script), ReflectionCritic(tokenizer), Tasks(CONFIG.decoding))


def table(*queries: str | None) -> pa.Table:
    ids = [str(n) for n in range(len(queries))]
    return pa.table({"id": ids, "query": pa.array(queries, pa.string()), "answer": ids})


async def test_every_input_row_gives_one_output_row_in_order():
    found = await annotate_table(system(), table("one", "two", "three"), CONFIG)
    assert found["answer"].to_pylist() == ["one", "two", "three"]
    assert found["input_answer"].to_pylist() == ["0", "1", "2"]
    assert found["error_type"].null_count == 3


async def test_bad_rows_do_not_affect_others():
    found = await annotate_table(system(), table("one", "poison", None, "two"), CONFIG)
    assert found["answer"].to_pylist() == ["one", None, None, "two"]
    assert found["error_type"].to_pylist() == [None, "KeyError", "ValueError", None]
    assert found["error_message"].to_pylist()[2] == "the query is empty"
    assert found["attempts"].to_pylist() == [None, 1, 1, None]


P1 = {"id": "p1", "title": "t", "text": "x"}
BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "null query": ({"query": None}, "the query is empty"),
    "blank query": ({"query": " \n\u00a0\t "}, "the query is empty"),
    "query longer than the model": ({"query": "word " * 200_000}, "the query has 20000. tokens, but the model accepts"),
    "query not UTF-8": ({"query": b"caf\xe9"}, "column 'query' is not UTF-8: .* can't decode byte 0xe9"),
    "lone surrogate": ({"query": b"\xed\xa0\x80"}, "column 'query' is not UTF-8"),
    "null choice": ({"choices": ["A", None]}, "a choice is null"),
    "null passage": ({"passages": [P1, None]}, "given passage 1 is null or has no id"),
    "passage without id": ({"passages": [{**P1, "id": None}]}, "given passage 0 is null or has no id"),
    "passage twice": ({"passages": [P1, P1]}, "two given passages have the id 'p1'"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
async def test_each_kind_of_bad_row_is_an_error_with_its_reason(name):
    change, reason = BAD_ROWS[name]
    good: dict[str, Any] = {"query": "one", "choices": None, "passages": None}
    made = [good, {**good, **change}, {**good, "query": "two"}]
    queries = [value.encode() if isinstance(value, str) else value for value in (row["query"] for row in made)]
    given = pa.list_(pa.struct([("id", pa.string()), ("title", pa.string()), ("text", pa.string())]))
    columns = {
        "id": ["a", "b", "c"],
        "query": pa.array(queries, pa.binary()).view(pa.string()),
        "choices": pa.array([row["choices"] for row in made], pa.list_(pa.string())),
        "passages": pa.array([row["passages"] for row in made], given),
    }
    found = await annotate_table(system(), pa.table(columns), CONFIG)
    assert found["answer"].to_pylist() == ["one", None, "two"]
    assert found["error_type"].to_pylist() == [None, "ValueError", None]
    assert re.search(reason, found["error_message"].to_pylist()[1])
    assert found["query"].combine_chunks().equals(columns["query"])  # as it came, whatever it is


async def test_slow_row_times_out_without_delaying_others():
    patient = system()
    answer = patient.answer

    async def slow(query):
        if "slow" in query.query:
            await asyncio.sleep(60)
        return await answer(query)

    object.__setattr__(patient, "answer", slow)
    execution = CONFIG.execution.model_copy(update={"row_timeout_s": 0.05})
    limited = CONFIG.model_copy(update={"execution": execution})
    found = await asyncio.wait_for(annotate_table(patient, table("one", "slow", "two"), limited), 5)
    assert found["answer"].to_pylist() == ["one", None, "two"]
    assert found["error_type"].to_pylist() == [None, "TimeoutError", None]
    assert found["error_message"].to_pylist()[1] == "no answer within execution.row_timeout_s = 0.05 s"


@pytest.mark.parametrize(("rows", "most"), [(1, 1), (3, 3), (4, 4), (9, 4), (40, 4)])
async def test_only_some_rows_of_a_large_unit_are_decoded_at_once(rows, most, monkeypatch):
    monkeypatch.setattr("pipeline.run.annotation.ROWS_AT_ONCE", 4)
    counted, inside, seen = system(), 0, 0
    answer = counted.answer

    async def count(query):
        nonlocal inside, seen
        inside += 1
        seen = max(seen, inside)
        await asyncio.sleep(0.001)
        inside -= 1
        return await answer(query)

    object.__setattr__(counted, "answer", count)
    found = await annotate_table(counted, table(*[f"query{n}" for n in range(rows)]), CONFIG)
    assert found["answer"].to_pylist() == [f"query{n}" for n in range(rows)]
    assert seen == most


class LocalHandle:
    """Calls methods of an object as a Ray handle does."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str):
        async def call(*arguments):
            return getattr(self.inner, name)(*arguments)

        return SimpleNamespace(remote=call)


HERE = StorageConfig()


class Folder:
    """A query set of one unit, and the output of its run.

    Args:
        name: of the query set's file; sets of one folder have one output.
    """

    def __init__(self, folder: Path, queries: pa.Table, name: str = "queries") -> None:
        folder.mkdir(exist_ok=True)
        file = folder / f"{name}.parquet"
        pq.write_table(queries, file)
        self.output = OutputFolder(locate(str(folder / "out"), HERE))
        found = inspect_queries(locate(str(file), HERE), CONFIG.columns, ExecutionConfig().unit_rows)
        (self.unit,), self.schema = found.units, found.schema

    async def annotate(self, actor: SelfRagActor) -> UnitSummary | None:
        """What the unit comes to; None where the actor's process died of it."""
        actor.output, actor.schema = self.output, self.schema
        try:
            found = await actor(pa.Table.from_pylist([dataclasses.asdict(self.unit)]))
        except Died:
            return None
        (summary,) = found["summary"].to_pylist()
        return UnitSummary(**json.loads(summary))

    async def annotate_at_last(self, *arguments: Any) -> tuple[UnitSummary, int]:
        """What the unit comes to in the last of several processes, and how many died of it before."""
        deaths = 0
        while (found := await self.annotate(actor(*arguments))) is None:
            deaths += 1
        return found, deaths

    def answers(self) -> list[str]:
        return pq.read_table(Path(self.output.location.path) / "data")["answer"].to_pylist()

    def errors(self) -> list[dict[str, Any]]:
        return pq.read_table(Path(self.output.location.path) / "errors").to_pylist()


class Died(BaseException):
    """The process is gone, with everything in it."""


@dataclass
class Engine:
    """Counts how often it was warmed, which takes some seconds and may fail."""

    seconds: float = 0.02
    error: Exception | None = None
    begun: int = 0
    warmed: int = 0

    async def warm(self) -> None:
        self.begun += 1
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        self.warmed += 1

    def shutdown(self) -> None: ...

    def abandon(self) -> None: ...


def actor(attempts: LocalHandle, seen: list[str], deadly: str = "poison") -> SelfRagActor:
    """A new process: its engine dies of some query, and so does the process."""
    made = SelfRagActor.__new__(SelfRagActor)
    made.config, made.attempts, made.lock, made.run = CONFIG, attempts, SharedExclusiveLock(), "same"
    made.telemetry = ActorTelemetry("run")
    made.system, made.generator = system(), Engine()
    answer = made.system.answer

    async def mortal(query):
        assert made.generator.warmed or made.generator.error or made.generator.seconds > 1
        seen.append(query.query)
        if deadly in query.query:
            raise Died
        return await answer(query)

    object.__setattr__(made.system, "answer", mortal)
    return made


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
    summary = await folder.annotate(actor(LocalHandle(Attempts(MAX_CONSECUTIVE_CRASHES, "run")), []))
    assert summary is not None
    assert dataclasses.replace(summary, data_bytes=0) == folder.output.read_unit(folder.unit.id, "")
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


def dies(*_: Any) -> None:
    raise Died


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


async def test_lost_index_is_not_a_row_error():
    with pytest.raises(IndexLostError):
        await annotate_table(system(IndexLostError), table("one", "poison"), CONFIG)


async def test_dead_engine_is_not_a_row_error():
    with pytest.raises(EngineDeadError):
        await annotate_table(system(lambda _: EngineDeadError(DEATH)), table("one", "poison"), CONFIG)


async def answer_for_ever(query: Any) -> Any:
    await asyncio.sleep(3600)


def hanging(*stuck: str) -> SelfRag:
    """A system that never answers some queries."""
    made = system()
    answer = made.answer

    async def hang(query):
        return await (answer_for_ever(query) if query.query in stuck else answer(query))

    object.__setattr__(made, "answer", hang)
    return made


IMPATIENT = CONFIG.model_copy(update={"execution": CONFIG.execution.model_copy(update={"row_timeout_s": 0.05})})


@pytest.mark.parametrize(
    ("queries", "stuck", "blamed"),
    [
        (["one", "two"], ["one", "two"], "engine"),
        (["one", "two", "three"], ["one", "two", "three"], "engine"),
        (["one", "two", None], ["one", "two"], "engine"),  # the null query never reached the engine
        (["one", "two", "three"], ["one", "two"], "rows"),
        (["one", "two"], ["two"], "rows"),
        (["one"], ["one"], "rows"),
        (["one", None], ["one"], "rows"),
        (["one", "poison"], ["one"], "rows"),
        ([None, None], [], "nothing"),
        (["one", "two"], [], "nothing"),
    ],
)
async def test_engine_is_blamed_if_all_rows_of_a_unit_time_out(queries, stuck, blamed):
    asked = []

    async def ask() -> None:
        asked.append(True)

    work = annotate_table(hanging(*stuck), table(*queries), IMPATIENT, Together(ask))
    if blamed == "engine":
        with pytest.raises(EngineDeadError, match=f"^none of the {len(stuck)} rows of a unit was answered"):
            await work
    else:
        kinds = (await work)["error_type"].to_pylist()
        assert [query for query, kind in zip(queries, kinds, strict=True) if kind == "TimeoutError"] == stuck
    assert len(asked) == (blamed == "rows")


@pytest.mark.parametrize("queries", [["one"], ["one", "two", "three"]])
@pytest.mark.parametrize("alone", [True, False])
async def test_row_that_times_out_is_not_blamed_if_the_engine_does_not_answer(queries, alone, tmp_path):
    attempts = Attempts(MAX_CONSECUTIVE_CRASHES, "run")
    made = actor(LocalHandle(attempts), [])
    made.config, made.generator = IMPATIENT, Engine(seconds=60)
    for _ in range(3 if alone else 0):
        attempts.begin("u")
    way = made._choose_way("u", attempts.count_deaths("u"))
    assert isinstance(way, OneByOne) == alone
    with pytest.raises(EngineDeadError, match="^not even a request for one token was answered within 0.05 s$"):
        await annotate_table(hanging("one"), table(*queries), IMPATIENT, way)
    assert [death.reason[:8] for death in attempts.list_engine_deaths("u", 0)] == (["not even"] if alone else [])


@pytest.mark.parametrize("engine", [Engine(), Engine(error=ValueError("no"))])
async def test_rows_that_hang_alone_in_an_engine_that_answers_time_out(engine):
    made = actor(LocalHandle(Attempts(MAX_CONSECUTIVE_CRASHES, "run")), [])
    made.config, made.generator = IMPATIENT, engine
    way = made._choose_way("u", 3)
    found = await annotate_table(hanging("one", "two"), table("one", "two"), IMPATIENT, way)
    assert found["error_type"].to_pylist() == ["TimeoutError"] * 2


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
    summary = await folder.annotate(actor(LocalHandle(attempts), seen, deadly="nothing"))
    assert summary is not None
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
