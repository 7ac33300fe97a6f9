import dataclasses

import pyarrow as pa
import pytest

from pipeline.config.sections import Columns
from pipeline.decoding.types import (
    Answer,
    Boundary,
    Candidate,
    Critique,
    Finish,
    Passage,
    Query,
    RetrievedPassage,
    Segment,
    Usage,
)
from pipeline.output.schema import (
    ANSWER_FIELDS,
    USAGE,
    build_data_schema,
    build_error_schema,
    get_output_name,
    rename_reserved_columns,
    to_answer_row,
)
from pipeline.queries.schema import check_query_schema, to_query

PASSAGE = Passage("p1", "Title", "Text")
CRITIQUE = Critique(0.5, 0.75, None, 0.25, 1.375)


def segment(passage: Passage | None, rank: int = 1) -> Segment:
    evidence = RetrievedPassage(passage, 0.9, rank, 2.5 * rank) if passage else None
    return Segment("text", "[Relevant]text", evidence, CRITIQUE)


def answer(*segments: Segment, candidates: tuple[Candidate, ...] = ()) -> Answer:
    return Answer("text", "[Retrieval][Relevant]text", True, 0.8, Finish.STOP, segments, Usage(seconds=1.5), candidates)


def test_row_becomes_query():
    row = {
        "id": "q",
        "query": "Who?",
        "input": None,
        "choices": ["A"],
        "passages": [{"id": "p1", "title": "Title", "text": "Text"}, {"id": "p2", "text": None}],
    }
    assert to_query(row, Columns()) == Query("q", "Who?", choices=("A",), passages=(PASSAGE, Passage("p2", "", "")))


@pytest.mark.parametrize("given", [None, []])
def test_rows_without_passages_use_the_index(given):
    assert to_query({"id": "q", "query": "Who?", "passages": given}, Columns()).passages is None


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([{"id": "p", "text": "a"}, {"id": "p", "text": "b"}], "two given passages have the id 'p'"),
        ([{"id": None, "text": "a"}], "given passage 0 is null or has no id"),
        ([{"id": "p", "text": "a"}, None], "given passage 1 is null or has no id"),
    ],
)
def test_given_passages_without_unique_ids_are_an_error(given, problem):
    with pytest.raises(ValueError, match=problem):
        to_query({"id": "q", "query": "Who?", "passages": given}, Columns())


@pytest.mark.parametrize(
    ("column", "kind", "expected"),
    [("short_answers", pa.list_(pa.string()), "list<list<string>>"), ("gold_passage_id", pa.int64(), "string")],
)
def test_gold_of_the_wrong_type_is_refused(column, kind, expected):
    schema = pa.schema([("id", pa.string()), ("query", pa.string()), (column, kind)])
    with pytest.raises(ValueError, match=f"q.parquet: column '{column}' is .*, expected {expected}"):
        check_query_schema(schema, Columns(), "q.parquet")


def test_columns_can_be_mapped():
    row = {"qid": "q", "question": "Who?"}
    assert to_query(row, Columns(id="qid", query="question")) == Query("q", "Who?")


def test_null_query_becomes_an_empty_query():
    assert to_query({"id": "q", "query": None}, Columns()).query == ""


def test_citations_are_numbered_by_first_use():
    other = Passage("p2", "", "Other")
    row = to_answer_row(answer(segment(other), segment(None), segment(PASSAGE, 2), segment(other)))
    assert [s["citation"] for s in row["segments"]] == [1, None, 2, 1]
    assert [p["id"] for p in row["passages"]] == ["p2", "p1"]
    text = {"id": "p1", "title": "Title", "text": "Text"}
    assert row["passages"][1] == {**text, "metadata": None, "retrieval_score": 0.9, "rerank_score": 5.0, "rank": 2}


def test_passages_read_together_are_listed_and_cited():
    other = RetrievedPassage(Passage("p2", "", "Other"), 0.8, 2, 1.5)
    third = RetrievedPassage(Passage("p3", "", "Third"), 0.7, 3, 0.5)
    first = RetrievedPassage(PASSAGE, 0.9, 1, 2.5, (other, third))
    read = Segment("text", "[Relevant]text", first, CRITIQUE)
    row = to_answer_row(answer(read, segment(Passage("p3", "", "Third")), candidates=(Candidate(read, None, None),)))
    schema = build_data_schema(pa.schema([]), keep_candidates=True)
    (back,) = pa.Table.from_pylist([row], schema=schema).to_pylist()
    assert [(s["passage_id"], s["citation"], s["further_citations"]) for s in back["segments"]] == [
        ("p1", 1, [2, 3]),
        ("p3", 3, []),
    ]
    assert [p["id"] for p in back["passages"]] == [p["id"] for p in back["evidence"]] == ["p1", "p2", "p3"]
    (candidate,) = back["candidates"]
    assert (candidate["passage_id"], candidate["rank"], candidate["rerank_score"]) == ("p1", 1, 2.5)
    assert candidate["beside"] == [
        {"passage_id": "p2", "retrieval_score": 0.8, "rerank_score": 1.5, "rank": 2},
        {"passage_id": "p3", "retrieval_score": 0.7, "rerank_score": 0.5, "rank": 3},
    ]


def test_candidates_form_a_tree_and_passages_are_stored_once():
    other = Passage("p2", "", "Other")
    first = Candidate(segment(PASSAGE), None, Boundary(0.25, keep=True))
    second, third = (Candidate(s, 0, None, Finish.LENGTH) for s in (segment(other, 2), segment(PASSAGE)))
    row = to_answer_row(answer(candidates=(first, second, third)))
    schema = build_data_schema(pa.schema([]), keep_candidates=True)
    (back,) = pa.Table.from_pylist([row], schema=schema).to_pylist()
    assert [c["parent"] for c in back["candidates"]] == [None, 0, 0]
    assert [c["finish_reason"] for c in back["candidates"]] == [None, "length", "length"]
    assert back["finish_reason"] == "stop"
    assert back["candidates"][0]["next_retrieve_probability"] == 0.25
    assert [c["next_keeps_evidence"] for c in back["candidates"]] == [True, None, None]
    assert [c["rerank_score"] for c in back["candidates"]] == [2.5, 5.0, 2.5]
    assert [p["id"] for p in back["evidence"]] == ["p1", "p2"]


def test_usage_has_a_column_for_each_field():
    assert [field.name for field in USAGE] == [field.name for field in dataclasses.fields(Usage)]


def test_missing_critique_is_null_in_arrow():
    candidate = Candidate(segment(None), parent=None, boundary=None, finish=Finish.STOP)
    row = to_answer_row(answer(segment(PASSAGE), candidates=(candidate,)))
    schema = build_data_schema(pa.schema([]), keep_candidates=True)
    (back,) = pa.Table.from_pylist([row], schema=schema).to_pylist()
    assert back["segments"][0] == {
        "text": "text",
        "passage_id": "p1",
        "citation": 1,
        "further_citations": [],
        "is_rel": 0.75,
        "is_sup": None,
        "is_use": 0.25,
        "sequence_probability": 0.5,
        "score": 1.375,
    }
    assert back["candidates"][0]["passage_id"] is None
    assert (back["candidates"][0]["rank"], back["candidates"][0]["beside"]) == (None, [])
    assert back["usage"]["seconds"] == 1.5


def test_batch_of_nulls_has_the_same_schema():
    schema = build_data_schema(pa.schema([]), keep_candidates=False)
    table = pa.Table.from_pylist([{}, {}], schema=schema)
    assert table.schema == schema
    assert [field.name for field in schema] == [field.name for field in ANSWER_FIELDS]


def test_colliding_input_columns_are_renamed():
    inputs = pa.schema([("id", pa.string()), ("answer", pa.string()), ("passages", pa.int32())])
    assert rename_reserved_columns(inputs).names == ["id", "input_answer", "input_passages"]
    assert build_error_schema(inputs).names[:3] == ["id", "input_answer", "input_passages"]


def test_input_columns_that_differ_from_output_columns_only_in_case_are_renamed():
    inputs = pa.schema([("ID", pa.string()), ("Answer", pa.string()), ("PASSAGES", pa.int32()), ("Answers", pa.null())])
    assert rename_reserved_columns(inputs).names == ["ID", "input_Answer", "input_PASSAGES", "Answers"]


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("answer", "input_answer"),
        ("ANSWER", "input_ANSWER"),
        ("Raw_Output", "input_Raw_Output"),
        ("Finish_reason", "input_Finish_reason"),
        ("SEGMENTS", "input_SEGMENTS"),
        ("Usage", "input_Usage"),
        ("Retrieve_Probability", "input_Retrieve_Probability"),
        ("Candidates", "input_Candidates"),
        ("Evidence", "input_Evidence"),
        ("ERROR_type", "input_ERROR_type"),
        ("Attempts", "input_Attempts"),
        ("answers", "answers"),
        ("Answer_", "Answer_"),
        (" answer", " answer"),
        ("input_answer", "input_answer"),
        ("Query", "Query"),
        ("réponse", "réponse"),
    ],
)
def test_reserved_names_are_known_in_any_case(name, output):
    assert get_output_name(name) == output


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_all_string_types_are_accepted(kind):
    check_query_schema(pa.schema([("id", kind), ("query", kind)]), Columns(), "file")


def test_optional_column_of_nulls_is_accepted():
    schema = pa.schema([("id", pa.string()), ("query", pa.string()), ("choices", pa.null())])
    check_query_schema(schema, Columns(), "file")
