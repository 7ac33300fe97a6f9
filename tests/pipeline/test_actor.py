import asyncio
import re
import time
from collections.abc import Callable
from types import SimpleNamespace

import pyarrow as pa
import pytest

from pipeline.actor import UNIT_COLUMN, SelfRagActor, annotate_table, annotated_schema
from pipeline.attempts import PATIENCE, Attempts, HopelessError, Turnstile
from pipeline.config import RunConfig
from pipeline.engine import EngineDeadError
from pipeline.postmortem import Death
from pipeline.profiles import Tasks
from pipeline.reader import ReflectionCritic
from pipeline.self_rag import SelfRag
from pipeline.servers import IndexLostError
from pipeline.telemetry import ActorTelemetry
from tests.fakes import ScriptedGenerator, generation, word_tokenizer

CONFIG = RunConfig.model_validate(
    {"queries": "q", "output": "o", "model": {"name": "m"}, "decoding": {"mode": "never"}}
)
DEATH = Death("ended with status 1", out_of_memory=False)


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
    columns = {"id": ids, "query": pa.array(queries, pa.string()), "answer": ids, UNIT_COLUMN: ["u"] * len(ids)}
    return pa.table(columns)


async def test_one_row_out_for_each_row_in_and_in_order():
    found = await annotate_table(system(), table("one", "two", "three"), CONFIG)
    assert found["answer"].to_pylist() == ["one", "two", "three"]
    assert found["input_answer"].to_pylist() == ["0", "1", "2"]
    assert found["error_type"].null_count == 3
    assert found[UNIT_COLUMN].to_pylist() == ["u"] * 3


async def test_bad_rows_do_not_sink_their_neighbours():
    found = await annotate_table(system(), table("one", "poison", None, "two"), CONFIG)
    assert found["answer"].to_pylist() == ["one", None, None, "two"]
    assert found["error_type"].to_pylist() == [None, "KeyError", "ValueError", None]
    assert found["error_message"].to_pylist()[2] == "the query is empty"
    assert found["attempts"].to_pylist() == [None, 1, 1, None]


P1 = {"id": "p1", "title": "t", "text": "x"}
BAD_ROWS = {
    "null query": ({"query": None}, "the query is empty"),
    "blank query": ({"query": " \n\u00a0\t "}, "the query is empty"),
    "query longer than the model": ({"query": "word " * 200_000}, "the query has 20000. tokens and the model takes"),
    "query not UTF-8": ({"query": b"caf\xe9"}, "its text is not UTF-8: .* can't decode byte 0xe9"),
    "lone surrogate": ({"query": b"\xed\xa0\x80"}, "its text is not UTF-8"),
    "null choice": ({"choices": ["A", None]}, "a choice is null"),
    "null passage": ({"passages": [P1, None]}, "given passage 1 is null or has no id"),
    "passage without id": ({"passages": [{**P1, "id": None}]}, "given passage 0 is null or has no id"),
    "passage twice": ({"passages": [P1, P1]}, "two given passages have the id 'p1'"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
async def test_a_bad_row_is_an_error_with_its_reason_and_its_neighbours_are_answered(name):
    change, reason = BAD_ROWS[name]
    good = {"query": "one", "choices": None, "passages": None}
    made = [good, {**good, **change}, {**good, "query": "two"}]
    queries = [value.encode() if isinstance(value, str) else value for value in (row["query"] for row in made)]
    given = pa.list_(pa.struct([("id", pa.string()), ("title", pa.string()), ("text", pa.string())]))
    columns = {
        "id": ["a", "b", "c"],
        "query": pa.array(queries, pa.binary()).view(pa.string()),
        "choices": pa.array([row["choices"] for row in made], pa.list_(pa.string())),
        "passages": pa.array([row["passages"] for row in made], given),
        UNIT_COLUMN: ["u"] * 3,
    }
    found = await annotate_table(system(), pa.table(columns), CONFIG)
    assert found["answer"].to_pylist() == ["one", None, "two"]
    assert found["error_type"].to_pylist() == [None, "ValueError", None]
    assert re.search(reason, found["error_message"].to_pylist()[1])
    assert found["query"].combine_chunks().equals(columns["query"])  # as it came, whatever it is


async def test_a_row_that_takes_too_long_is_an_error_and_holds_nobody_up():
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


class LocalHandle:
    """Calls methods of an object as a Ray handle does."""

    def __init__(self, inner: object) -> None:
        self.inner = inner

    def __getattr__(self, name: str):
        async def call(*arguments):
            return getattr(self.inner, name)(*arguments)

        return SimpleNamespace(remote=call)


async def dies_of_poison(actor: SelfRagActor, unit: pa.Table) -> pa.Table | None:
    """What a unit comes to; None where the actor's process died of it."""
    try:
        return await actor(unit)
    except Died:
        return None


class Died(BaseException):
    """The process is gone, with everything in it."""


def actor(attempts: LocalHandle, seen: list[str], deadly: str = "poison") -> SelfRagActor:
    """A new process: its engine dies of some query, and so does the process."""
    made = SelfRagActor.__new__(SelfRagActor)
    made.config, made.attempts, made.turnstile = CONFIG, attempts, Turnstile()
    made.telemetry = ActorTelemetry("run")
    made.system = system()
    answer = made.system.answer

    async def mortal(query):
        seen.append(query.query)
        if deadly in query.query:
            raise Died
        return await answer(query)

    object.__setattr__(made.system, "answer", mortal)
    return made


async def test_a_row_that_kills_its_process_is_set_aside_and_its_neighbours_finish():
    attempts, unit, seen, deaths = LocalHandle(Attempts(PATIENCE, "run")), table("one", "poison", "two"), [], 0
    while (found := await dies_of_poison(actor(attempts, seen), unit)) is None:
        deaths += 1
    assert found["answer"].to_pylist() == ["one", None, "two"]
    assert found["error_type"].to_pylist() == [None, "ProcessDiedError", None]
    assert found["error_message"].to_pylist()[1] == "2 processes died while this row alone was decoded"
    assert deaths == 2 + 1 + 2  # beside others, alone, and its own
    unit, began, ended = found[UNIT_COLUMN][0].as_py().split("/")
    assert unit == "u"
    assert time.time() - 60 < float(began) <= float(ended) <= time.time()
    assert attempts.inner._begun == {}


@pytest.mark.parametrize(
    ("death", "expected"),
    [
        (
            Death("torch.OutOfMemoryError: CUDA out of memory.", out_of_memory=True),
            ("OutOfMemoryError", "the engine ran out of memory 2 times while this row alone was decoded (torch.Out"),
        ),
        (
            Death("RuntimeError: device-side assert", out_of_memory=False),
            (
                "ProcessDiedError",
                "2 processes died while this row alone was decoded; the last engine: RuntimeErr",
            ),
        ),
    ],
)
async def test_an_engine_without_memory_is_told_apart_from_one_that_a_row_kills(death, expected):
    attempts, unit = LocalHandle(Attempts(PATIENCE, "run")), table("poison")
    dying = system(lambda _: EngineDeadError(death))
    for _ in range(2):
        with pytest.raises(EngineDeadError):
            await annotate_table(dying, unit, CONFIG, attempts)
    (row,) = (await annotate_table(dying, unit, CONFIG, attempts)).to_pylist()
    assert (row["error_type"], row["attempts"]) == (expected[0], 2)
    assert row["error_message"].startswith(expected[1])


@pytest.mark.parametrize("poisoned", [1, 2, 4, 6])
async def test_each_row_that_kills_its_process_costs_two_more(poisoned):
    attempts = LocalHandle(Attempts(PATIENCE, "run"))
    unit = table(*[f"poison {n}" if n % 2 else f"good {n}" for n in range(2 * poisoned)])
    deaths = 0
    while (found := await dies_of_poison(actor(attempts, []), unit)) is None:
        deaths += 1
    assert deaths == 2 + 1 + 2 * poisoned
    assert found["error_type"].to_pylist() == [None, "ProcessDiedError"] * poisoned


async def test_a_run_whose_every_process_dies_ends():
    attempts, unit = LocalHandle(Attempts(PATIENCE, "run")), table(*["poison"] * 40)

    async def again_and_again():
        while await dies_of_poison(actor(attempts, []), unit) is None:
            pass

    with pytest.raises(HopelessError, match="^11 attempts ended with their process, with nothing done"):
        await again_and_again()


async def test_a_unit_that_waits_is_not_counted():
    attempts, process = Attempts(PATIENCE, "run"), None
    process = actor(LocalHandle(attempts), [])
    async with process.turnstile.alone():
        waiting = asyncio.create_task(process(table("one")))
        await asyncio.sleep(0.01)
        assert attempts.deaths("u") == 0
    await waiting


async def test_innocent_units_are_not_blamed_for_a_death_beside_them():
    attempts, seen = LocalHandle(Attempts(PATIENCE, "run")), []
    units = {"u": table("one", "two"), "p": table("poison", "three")}
    units["p"] = units["p"].set_column(3, UNIT_COLUMN, pa.array(["p", "p"]))
    done: dict[str, pa.Table] = {}
    for _ in range(12):
        process = actor(attempts, seen)
        todo = [name for name in units if name not in done]
        ended = await asyncio.gather(*(dies_of_poison(process, units[name]) for name in todo))
        if None not in ended or len(todo) == 1:
            done |= {name: found for name, found in zip(todo, ended, strict=True) if found is not None}
        if len(done) == len(units):
            break
    assert done["u"]["error_type"].to_pylist() == [None, None]
    assert done["p"]["error_type"].to_pylist() == ["ProcessDiedError", None]


async def test_a_lost_index_is_no_rows_fault():
    with pytest.raises(IndexLostError):
        await annotate_table(system(IndexLostError), table("one", "poison"), CONFIG)


async def test_dead_engine_is_no_rows_fault():
    with pytest.raises(EngineDeadError):
        await annotate_table(system(lambda _: EngineDeadError(DEATH)), table("one", "poison"), CONFIG)


async def test_schema_does_not_depend_on_the_batch():
    good = await annotate_table(system(), table("one"), CONFIG)
    bad = await annotate_table(system(), table("poison"), CONFIG)
    inputs = table("x").drop_columns([UNIT_COLUMN]).schema
    assert good.schema == bad.schema == annotated_schema(inputs, keep_candidates=False)
