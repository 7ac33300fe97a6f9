import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.queries.values import to_choices, to_passages, to_text, to_text_sets, to_texts

NAN = math.nan


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        ("Paris", ["Paris"]),
        (["Paris", "", None, "paris", "Paris"], ["Paris", "paris"]),
        ([["a"], ["b", "a"]], ["a", "b"]),
        ((3), ["3"]),
        (2.5, ["2.5"]),
        (True, ["true"]),
        (" ", None),
        (NAN, None),
        ([NAN, "Paris", None], ["Paris"]),
        ('["politician", "leader"]', ["politician", "leader"]),
        ("[]", None),
        ("[1]", ["1"]),
        ("[1969, 1970]", ["1969", "1970"]),
        ("[1969, NaN]", ["1969"]),
        ('["a", ["b", null]]', ["a", "b"]),
        ("['Paris', 'Lutetia']", ["Paris", "Lutetia"]),
        ("['Paris', None]", ["Paris"]),
        ("('x', 'y')", ["x", "y"]),
        ("('x',)", ["x"]),
        (" ['it\\'s', \"O'Neill\"]\n", ["it's", "O'Neill"]),
        ("[nan, 'a']", ["a"]),
        ("['nan', NaT]", ["nan"]),
        ("[sic]", ["[sic]"]),
        ("[...]", ["[...]"]),
        ("[1+2j]", ["[1+2j]"]),
        ("[Paris, Lutetia]", ["[Paris, Lutetia]"]),
        ("(1, 2)", ["(1, 2)"]),  # a point rather than two answers
        ("('tis the season)", ["('tis the season)"]),
        ("(hat)", ["(hat)"]),
    ],
)
def test_answers_become_a_list_of_texts(value: Any, answers: list[str] | None) -> None:
    assert to_texts(value) == answers


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("['a', 'b'", "neither JSON nor a Python list"),
        ("['a', b'x']", "neither JSON nor a Python list"),
        ("['a', ...]", "neither JSON nor a Python list"),
        ("['a', open('x')]", "neither JSON nor a Python list"),
        ("['Paris' 'Lutetia']", "no commas between its texts"),
        ("['Paris'\n 'Lutetia']", "no commas between its texts"),
        ("[{'a': 1}]", "expected text, found an object"),
    ],
)
def test_lists_that_cannot_be_read_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        to_texts(text)


@given(st.lists(st.text(min_size=1).filter(lambda text: text.strip()), min_size=1, unique=True))
def test_lists_written_by_json_and_python_are_read_alike(texts: list[str]) -> None:
    assert to_texts(json.dumps(texts)) == texts
    assert to_texts(repr(texts)) == texts
    assert to_texts(repr(tuple(texts))) == texts


def test_numbers_and_booleans_become_their_json_form_and_missing_values_none() -> None:
    assert [to_text(value) for value in (12, 1.5, False)] == ["12", "1.5", "false"]
    assert [to_text(value) for value in (None, NAN, "", " ")] == [None] * 4


def test_missing_values_are_left_out_of_choices_and_sets() -> None:
    assert to_text_sets([["a", NAN], [NAN], "b"]) == [["a"], ["b"]]
    assert to_choices("('yes', 'no')") == ["yes", "no"]
    for missing in (None, NAN, "", "  "):
        assert to_choices(missing) is to_text_sets(missing) is to_passages(missing) is None


def test_passages_of_pandas_are_read_with_their_missing_values() -> None:
    (passage,) = to_passages("[{'id': nan, 'title': None, 'text': 't'}]") or []
    assert (passage["title"], passage["text"], len(passage["id"])) == (None, "t", 20)


def test_passages_without_ids_get_digests_of_their_content() -> None:
    first, second, third = to_passages([{"text": "a"}, {"title": "t", "text": "a"}, {"id": NAN, "text": "a"}]) or []
    assert len(first["id"]) == 20
    assert second["id"] != first["id"]
    assert third["id"] == f"{first['id']}-2"
    assert to_passages([{"text": "a"}]) == [first]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([7, "7", "7-2", 7], ["7", "7-2", "7-2-2", "7-3"]),
        (["a", "a"], ["a", "a-2"]),
        (["a", "a", "a"], ["a", "a-2", "a-3"]),
        (["a-2", "a", "a"], ["a-2", "a", "a-3"]),
        (["a", "A"], ["a", "A"]),
        ([1, 1.0], ["1", "1.0"]),
        ([True, "true"], ["true", "true-2"]),
        (["é", "e\u0301"], ["é", "e\u0301"]),
        ([0, "0"], ["0", "0-2"]),
        (["a", " a"], ["a", " a"]),
    ],
)
def test_passages_with_equal_ids_are_numbered(ids: list[Any], expected: list[str]) -> None:
    given = [{"id": name, "text": str(number)} for number, name in enumerate(ids)]
    assert [passage["id"] for passage in to_passages(given) or []] == expected


@pytest.mark.parametrize("missing", [None, "", "  ", float("nan"), "\t\n"])
def test_passage_with_a_missing_id_gets_one(missing: Any) -> None:
    (passage,) = to_passages([{"id": missing, "text": "a"}]) or []
    (other,) = to_passages([{"text": "a"}]) or []
    assert passage == other
    assert len(passage["id"]) == 20
