import json

from pipeline.evaluation.exports import encode_alce, encode_factscore, join_cited

ROW = {
    "query": "Who led the Normans?",
    "answer": "Rollo led them. [1] They came",
    "segments": [{"text": "Rollo led\nthem.", "citation": 1}, {"text": "They came", "citation": None}],
    "passages": [{"id": "p1", "title": "Normans", "text": "Led by Rollo.", "retrieval_score": 0.5, "rank": 3}],
    "short_answers": [["Rollo", "Hrolf"]],
    "answers": ["They were led by Rollo."],
}


def test_alce_export_matches_a_worked_example() -> None:
    assert json.loads(encode_alce([ROW])) == {
        "data": [
            {
                "question": "Who led the Normans?",
                "output": "Rollo led them [1]. They came",
                "docs": [{"id": "p1", "title": "Normans", "text": "Led by Rollo."}],
                "qa_pairs": [{"short_answers": ["Rollo", "Hrolf"]}],
                "annotations": [{"long_answer": "They were led by Rollo."}] * 2,
                "answer": "They were led by Rollo.",
            }
        ]
    }


def test_gold_missing_in_a_row_is_omitted() -> None:
    bare = {"query": "Who?", "answer": None, "passages": [], "segments": [], "answers": ["x", "y"]}
    first, second = json.loads(encode_alce([ROW, bare]))["data"]
    assert "qa_pairs" not in first | second
    assert second["annotations"] == [{"long_answer": "x"}, {"long_answer": "y"}]
    assert second["output"] == ""


def test_citations_are_placed_inside_their_sentence() -> None:
    cited: list[tuple[str, int | None, list[int]]] = [("Who? Rollo!", 2, []), ("", None, []), ("In 911.", 1, [3, 2])]
    segments = [{"text": text, "citation": number, "further_citations": more} for text, number, more in cited]
    assert join_cited(segments) == "Who? Rollo [2]! In 911 [1] [3] [2]."


def test_factscore_export_has_one_line_per_row() -> None:
    lines = encode_factscore(
        [{"name": "Rollo", "answer": "A Viking.\nAnd a duke."}, {"name": "Ann", "answer": None}], "name"
    )
    assert [json.loads(line) for line in lines.splitlines()] == [
        {"topic": "Rollo", "output": "A Viking.\nAnd a duke."},
        {"topic": "Ann", "output": ""},
    ]
