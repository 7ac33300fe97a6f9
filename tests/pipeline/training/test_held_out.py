from pipeline.config.sections import Columns
from pipeline.queries.schema import check_query_schema, to_query
from pipeline.training.data import Claim, Instruction, ReadingTriple, TeachingData
from pipeline.training.held_out import build_held_out_queries
from pipeline.training.rows import Negatives

READINGS = tuple(ReadingTriple(f"Who is {n}?", "People", f"Person {n} is name{n} here.", f"name{n}") for n in range(4))
DATA = TeachingData(
    READINGS,
    (Instruction("Say hi", "hi"),),
    (),
    (Claim("Fish swim.", ("SUPPORTS", "REFUTES"), "SUPPORTS", "Fish", "Fish swim well."),),
)
EVERYWHERE = [("Title", f"unrelated text {n}") for n in range(20)]
NEGATIVES = Negatives({"Who is 0?": [("People", "a hard one"), ("People", "it is name0 again")]}, EVERYWHERE)


def rows(limit: int = 10) -> dict[str, dict]:
    return {row["id"]: row for row in build_held_out_queries(DATA, NEGATIVES, limit).to_pylist()}


def test_held_out_rows_are_a_query_set_with_given_passages() -> None:
    table = build_held_out_queries(DATA, NEGATIVES, 10)
    check_query_schema(table.schema, Columns(), "held out")
    queries = [to_query(row, Columns()) for row in table.to_pylist()]
    assert all(query.passages is not None and len(query.passages) == 5 for query in queries)
    assert len({query.id for query in queries}) == len(queries) == 4 + 2 + 1 + 1


def test_gold_passage_is_the_only_one_with_the_answer() -> None:
    row = rows()["reading-0"]
    texts = {passage["id"]: passage["text"] for passage in row["passages"]}
    assert texts[row["gold_passage_id"]] == READINGS[0].passage
    assert [text for text in texts.values() if "name0" in text] == [READINGS[0].passage]
    assert "a hard one" in texts.values()


def test_combined_questions_have_both_passages_and_answers() -> None:
    row = rows()["two_questions-1"]
    assert row["query"] == "Who is 2? Who is 3?"
    assert row["short_answers"] == [["name2"], ["name3"]]
    assert {READINGS[2].passage, READINGS[3].passage} <= {passage["text"] for passage in row["passages"]}
    assert row["answers"] is None


def test_claims_have_labels_and_instructions_have_no_gold() -> None:
    found = rows()
    assert (found["claim-0"]["input"], found["claim-0"]["answers"]) == ("Fish swim.", ["SUPPORTS"])
    assert found["claim-0"]["choices"] == ["SUPPORTS", "REFUTES"]
    assert (found["instruction-0"]["answers"], found["instruction-0"]["gold_passage_id"]) == (None, None)


def test_gold_passage_is_not_always_first() -> None:
    places = {
        [passage["id"] for passage in row["passages"]].index(row["gold_passage_id"])
        for name, row in rows().items()
        if name.startswith("reading")
    }
    assert len(places) > 1


def test_row_count_is_limited_and_rows_are_deterministic() -> None:
    assert [name for name in rows(1) if not name.startswith("two")] == ["reading-0", "claim-0", "instruction-0"]
    assert rows() == rows()
