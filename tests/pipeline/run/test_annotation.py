import asyncio
import re
from typing import Any

import pyarrow as pa
import pytest

from pipeline.decoding.self_rag import SelfRag
from pipeline.engine.vllm import EngineDeadError
from pipeline.retrieval.shard_servers import IndexLostError
from pipeline.run.annotation import OneByOne, Together, annotate_table
from pipeline.run.attempts import MAX_CONSECUTIVE_CRASHES, Attempts
from tests.support.actors import CONFIG, DEATH, Engine, LocalHandle, actor, system, table


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
