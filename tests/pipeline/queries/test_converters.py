from typing import Any

import pytest

from pipeline.decoding.profiles import load_built_in_profiles
from pipeline.queries.converters import (
    ColumnMapping,
    Ids,
    check_row,
    find_value,
    load_known_datasets,
)


def query(values: dict[str, Any], **columns: str) -> dict[str, Any]:
    """The columns that a row has."""
    row = ColumnMapping(columns).apply(values)
    return {name: value for name, value in row.items() if value is not None}


def test_columns_are_mapped_renamed_and_passed_through() -> None:
    row = {"question": "Who?", "qid": 7, "year": 1999, "id": "old"}
    assert query(row, query="question", id="qid") == {"id": "7", "query": "Who?"}
    mapping = ColumnMapping({"query": "question", "id": "qid"})
    assert [name for name in row if mapping.passes(name)] == ["year"]


def test_dotted_paths_follow_objects_and_lists() -> None:
    row = {"a": {"b": [{"c": 1}, {"c": 2}, {}]}, "x.y": "exactly"}
    assert find_value(row, "a.b.c") == [1, 2, None]
    assert find_value(row, "x.y") == "exactly"
    assert find_value(row, "a.z.c") is None
    assert find_value(row, "nothing") is None


def test_nested_source_columns_are_kept_and_renamed_ones_are_not() -> None:
    row = {"input": "Claim.", "output": [{"answer": "SUPPORTS"}, {"answer": ""}, {"answer": None}]}
    assert query(row, query="input", answers="output.answer") == {"query": "Claim.", "answers": ["SUPPORTS"]}
    mapping = ColumnMapping({"query": "input", "answers": "output.answer"})
    assert [name for name in row if mapping.passes(name)] == ["output"]
    assert [name for name in [*row, "answer"] if mapping.reads(name)] == ["input", "output"]


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        (
            "answers",
            "['a', 'b'",
            r"column 'answers': expected a list, found \"\['a', 'b'\", which is neither JSON nor a",
        ),
        ("answers", {"text": ["a"]}, "column 'answers': expected text, found an object"),
        ("choices", "A or B", "column 'choices': expected a list, found 'A or B'"),
        ("choices", {"a": 1}, "column 'choices': expected a list, found an object"),
        ("passages", ["text"], "column 'passages': expected a passage with id, title and text, found text"),
        ("query", "a \ud800", "column 'query': not UTF-8"),
        ("query", ["a"], "column 'query': expected text, found a list"),
    ],
)
def test_value_of_the_wrong_type_is_named(column: str, value: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ColumnMapping().apply({"query": "q", column: value})


def test_mapped_column_is_named_with_its_source() -> None:
    with pytest.raises(ValueError, match=r"column 'query' \(from q\.text\): expected text, found an object"):
        ColumnMapping({"query": "q.text"}).apply({"q": {"text": {}}})


def test_short_answers_are_lists_of_alternatives() -> None:
    pairs = [{"short_answers": ["a", "b"]}, {"short_answers": []}, {"short_answers": "c"}]
    row = query({"query": "q", "qa_pairs": pairs}, short_answers="qa_pairs.short_answers")
    assert row["short_answers"] == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    "choices",
    [
        {"label": ["1", "2", "3"], "text": ["a tree", "a stone", "a cloud"]},
        [{"label": 1, "text": "a tree"}, {"label": 2, "text": "a stone"}, {"label": 3, "text": "a cloud"}],
    ],
)
def test_labeled_choices_become_letters_listed_in_the_query(choices: Any) -> None:
    row = query({"query": "What grows?", "choices": choices, "answers": "1"})
    assert row == {
        "query": "What grows?\nA: a tree\nB: a stone\nC: a cloud",
        "choices": ["A", "B", "C"],
        "answers": ["A"],
    }


def test_letter_labels_are_kept() -> None:
    choices = {"label": ["A", "B"], "text": ["x", "y"]}
    assert query({"query": "q", "choices": choices, "answers": "B"})["answers"] == ["B"]


def test_plain_choices_are_kept_and_may_be_json() -> None:
    assert query({"query": "q", "choices": ["true", False]})["choices"] == ["true", "false"]
    assert query({"query": "q", "choices": '["yes", "no"]'}) == {"query": "q", "choices": ["yes", "no"]}


@pytest.mark.parametrize(
    "choices",
    [[{"label": "A", "text": "x"}, "y"], {"label": ["A", "A"], "text": ["x", "y"]}],
)
def test_ambiguous_choice_labels_are_refused(choices: Any) -> None:
    with pytest.raises(ValueError, match="column 'choices'"):
        ColumnMapping().apply({"query": "q", "choices": choices})


def test_given_passages_keep_only_passage_fields() -> None:
    found = [{"id": 4, "title": None, "text": "t", "score": 0.5}]
    assert query({"query": "q", "ctxs": found}, passages="ctxs")["passages"] == [
        {"id": "4", "title": None, "text": "t"}
    ]


def test_constant_task_overrides_the_task_of_the_row() -> None:
    assert ColumnMapping(task="nq").apply({"query": "q", "task": "qa"})["task"] == "nq"
    assert ColumnMapping().apply({"query": "q", "task": "qa"})["task"] == "qa"


def test_dropped_columns_are_read_only_where_they_are_mapped() -> None:
    dropped = ColumnMapping({"answers": "answer.value"}, drop=frozenset({"answer", "id"}))
    row = dropped.apply({"query": "q", "id": 1, "answer": {"value": "a"}})
    assert {name: value for name, value in row.items() if value is not None} == {"query": "q", "answers": ["a"]}
    assert [name for name in ("query", "id", "answer", "n") if dropped.reads(name)] == ["query", "answer"]
    assert [name for name in ("query", "id", "answer", "n") if dropped.passes(name)] == ["n"]


def test_unknown_target_column_is_refused() -> None:
    with pytest.raises(ValueError, match="--column question=…: a query set has the columns id, query"):
        ColumnMapping({"question": "query"})


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"query": " "}, "the query is empty"),
        ({}, "the query is empty"),
        ({"query": "q", "choices": ["a", None]}, "a choice is null"),
    ],
)
def test_rows_that_would_become_error_rows_are_refused(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_row(ColumnMapping().apply({"id": "1", **row}))


def ids(*rows: dict[str, Any]) -> list[str]:
    given, found = Ids(), [ColumnMapping().apply(row) for row in rows]
    for row in found:
        given.assign(row)
    return [row["id"] for row in found]


def test_generated_ids_depend_only_on_the_question() -> None:
    one, two = ids({"query": "a", "answers": "x"}, {"query": "b"})
    assert ids({"query": "c"}, {"query": "b", "answers": "y"}, {"query": "a", "year": 3})[1:] == [two, one]
    assert len({one, two, *ids({"query": "a", "input": "i"}), *ids({"query": "a", "choices": ["x"]})}) == 4
    assert one == "5d449b432f360e0944c6"  # ids of sets that exist must not change


def test_repeated_questions_get_numbered_ids() -> None:
    first, second, third = ids({"query": "a"}, {"query": "a"}, {"query": "a"})
    assert (second, third) == (f"{first}-2", f"{first}-3")


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"id": 1}, {"id": "1"}], "id '1' is not unique"),
        ([{"id": 1}, {}], "has no id, but the first row has one"),
        ([{}, {"id": 1}], r"has an id \('1'\), but the first row has none"),
    ],
)
def test_ids_must_be_complete_and_unique_or_absent(rows: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ids(*rows)


def test_known_datasets_have_a_profile_and_valid_columns() -> None:
    for name, known in load_known_datasets().items():
        assert known.task == name
        assert known.task in load_built_in_profiles()
        assert ColumnMapping(known.columns).columns["query"]
