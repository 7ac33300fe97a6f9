import json

from pipeline.exports import alce, factscore

ROW = {
    "query": "Who led the Normans?",
    "answer": "Rollo led them. [1]",
    "passages": [{"id": "p1", "title": "Normans", "text": "Led by Rollo.", "retrieval_score": 0.5, "rank": 3}],
    "short_answers": [["Rollo", "Hrolf"]],
    "answers": ["They were led by Rollo."],
}


def test_alce_item() -> None:
    assert json.loads(alce([ROW])) == {
        "data": [
            {
                "question": "Who led the Normans?",
                "output": "Rollo led them. [1]",
                "docs": [{"id": "p1", "title": "Normans", "text": "Led by Rollo."}],
                "qa_pairs": [{"short_answers": ["Rollo", "Hrolf"]}],
                "annotations": [{"long_answer": "They were led by Rollo."}],
                "answer": "They were led by Rollo.",
            }
        ]
    }


def test_alce_item_without_gold() -> None:
    row = {"q": "Who?", "answer": None, "passages": []}
    assert json.loads(alce([row], "q"))["data"] == [{"question": "Who?", "output": "", "docs": []}]


def test_factscore_has_a_line_for_each_row() -> None:
    lines = factscore([{"name": "Rollo", "answer": "A Viking.\nAnd a duke."}, {"name": "Ann", "answer": None}], "name")
    assert [json.loads(line) for line in lines.splitlines()] == [
        {"topic": "Rollo", "output": "A Viking.\nAnd a duke."},
        {"topic": "Ann", "output": ""},
    ]
