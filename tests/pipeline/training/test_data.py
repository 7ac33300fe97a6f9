import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.training.data import Claim, Instruction, Pair, ReadingTriple, TeachingData, find_nearest, read_data

READING = {"question": "q?", "passage": "The answer is here.", "title": "T", "answer": "answer", "source": "x"}
CLAIM = {
    "question": "It is so.",
    "choices": ["SUPPORTS", "REFUTES"],
    "answers": ["REFUTES"],
    "gold_passages": [{"title": "T", "text": "It is not."}, {"title": "U", "text": "Nor here."}],
}


def write(file: Path, *rows: dict[str, Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n", encoding="utf-8")


def test_all_four_files_are_read(tmp_path: Path) -> None:
    untitled = {key: value for key, value in READING.items() if key != "title"}
    write(tmp_path / "rc.jsonl", READING, untitled)
    write(tmp_path / "no_retrieval.jsonl", {"instruction": "Say é", "output": "é"})
    write(tmp_path / "question_sentence_pairs.jsonl", {"question": "q?", "answer_sentence": "Here."})
    write(tmp_path / "fact_verification.jsonl", CLAIM)
    data = read_data(tmp_path)
    passage = "The answer is here."
    assert data.readings == (ReadingTriple("q?", "T", passage, "answer"), ReadingTriple("q?", "", passage, "answer"))
    assert data.instructions == (Instruction("Say é", "é"),)
    assert data.pairs == (Pair("q?", "Here."),)
    assert data.claims == (Claim("It is so.", ("SUPPORTS", "REFUTES"), "REFUTES", "T", "It is not."),)


def test_readings_are_the_only_required_file(tmp_path: Path) -> None:
    write(tmp_path / "rc.jsonl", READING)
    data = read_data(tmp_path)
    assert len(data.readings) == 1
    assert data.instructions == data.pairs == data.claims == ()


def test_missing_readings_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rc\.jsonl: not found"):
        read_data(tmp_path)


def test_missing_field_is_named(tmp_path: Path) -> None:
    write(tmp_path / "rc.jsonl", {"question": "q?", "passage": "p"})
    with pytest.raises(ValueError, match="lacks the field 'answer'"):
        read_data(tmp_path)


@pytest.fixture
def hundred() -> TeachingData:
    """200 readings of 100 passages, 100 instructions."""
    readings = tuple(ReadingTriple(f"q{n}", "", f"passage {n // 2}", "passage") for n in range(200))
    return TeachingData(readings, tuple(Instruction(f"i{n}", "o") for n in range(100)))


def test_split_shares_no_passage_and_loses_no_row(hundred: TeachingData) -> None:
    train, test = hundred.split(held_out=0.1, seed=1)
    assert {r.passage for r in train.readings}.isdisjoint(r.passage for r in test.readings)
    assert (len(train.readings), len(test.readings)) == (180, 20)
    assert set(train.readings) | set(test.readings) == set(hundred.readings)
    assert test.instructions == hundred.instructions[:10]
    assert train.instructions == hundred.instructions[10:]


def test_split_depends_only_on_its_seed(hundred: TeachingData) -> None:
    assert hundred.split(0.1, seed=1) == hundred.split(0.1, seed=1)
    assert hundred.split(0.1, seed=1) != hundred.split(0.1, seed=2)


def test_nearest_texts_are_ranked_by_inner_product() -> None:
    vectors = {"east": (1.0, 0.0), "north": (0.0, 1.0), "north-east": (0.6, 0.8), "west": (-1.0, 0.0)}

    def encode(texts: Any) -> Any:
        return np.array([vectors[text] for text in texts], np.float32)

    texts = ["west", "north", "north-east", "east"]
    assert find_nearest(encode, ["north", "east"], texts, k=2).tolist() == [[1, 2], [3, 2]]
    assert find_nearest(encode, ["east"], texts, k=9).tolist() == [[3, 2, 1, 0]]
