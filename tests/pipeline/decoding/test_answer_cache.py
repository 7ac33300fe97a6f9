import asyncio
import dataclasses

import pytest

from pipeline.decoding.answer_cache import AnsweredOnce
from pipeline.decoding.types import Answer, Finish, Passage, Query, Usage


class Asked:
    """Answers with the query's text, after others had their turn; remembers who asked."""

    def __init__(self, failing=()):
        self.queries, self.failing, self.now, self.most = [], list(failing), 0, 0

    async def answer(self, query):
        self.queries.append(query)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.01)
        self.now -= 1
        if query.id in self.failing:
            raise ValueError("no")
        return Answer(query.query, "", False, None, Finish.STOP, (), Usage(generated_tokens=7), ())


async def test_equal_queries_are_answered_and_counted_once():
    asked = Asked()
    once = AnsweredOnce(asked)
    answers = await asyncio.gather(*(once.answer(Query(str(n), "same")) for n in range(4)))
    answers.append(await once.answer(Query("later", "same")))
    assert [answer.answer for answer in answers] == ["same"] * 5
    assert [answer.usage.generated_tokens for answer in answers] == [7, 0, 0, 0, 0]
    assert answers[1].usage.seconds >= 0.01 > answers[4].usage.seconds
    assert len(asked.queries) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"query": "other"},
        {"input": "x"},
        {"task": "t"},
        {"choices": ("a",)},
        {"passages": ()},
        {"passages": (Passage("1", "", "x"),)},
        {"instruction": "do"},
    ],
)
async def test_queries_differing_in_more_than_ids_are_answered_separately(change):
    asked = Asked()
    once = AnsweredOnce(asked)
    query = Query("a", "same")
    await asyncio.gather(once.answer(query), once.answer(dataclasses.replace(query, id="b", **change)))
    assert len(asked.queries) == 2


async def test_after_a_failure_waiting_queries_are_answered_separately():
    asked = Asked(failing=["a"])
    once = AnsweredOnce(asked)
    first, second, third = await asyncio.gather(
        *(once.answer(Query(name, "same")) for name in "abc"), return_exceptions=True
    )
    assert isinstance(first, ValueError)
    assert isinstance(second, Answer)
    assert isinstance(third, Answer)
    assert (second.answer, third.answer) == ("same", "same")
    assert [query.id for query in asked.queries] == ["a", "b", "c"]
    assert asked.most == 2  # of those under way at once
    assert not once.known
    await once.answer(Query("d", "same"))
    assert len(once.known) == 1


async def test_canceled_query_does_not_affect_waiting_ones():
    asked = Asked()
    once = AnsweredOnce(asked)
    first, second, third = (asyncio.ensure_future(once.answer(Query(name, "same"))) for name in "abc")
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).usage.generated_tokens == 7
    fourth, fifth = (asyncio.ensure_future(once.answer(Query(name, "more"))) for name in "de")
    await asyncio.sleep(0)
    fifth.cancel()
    assert (await fourth).usage.generated_tokens == (await third).usage.generated_tokens == 7
    assert (await once.answer(Query("f", "more"))).answer == "more"


async def test_least_recently_used_answers_are_evicted_first():
    asked = Asked()
    once = AnsweredOnce(asked, most=2)
    for text in ("one", "two", "one", "three", "one", "two"):
        await once.answer(Query(text, text))
    assert [query.query for query in asked.queries] == ["one", "two", "three", "two"]
    assert len(once.known) == 2
