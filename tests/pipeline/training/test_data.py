import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.training.data import Claim, Instruction, Pair, ReadingTriple, TeachingData, read_data

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


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_readings_of_one_file_are_read(tmp_path: Path, form: str) -> None:
    file = tmp_path / f"mine.{form}"
    rows = [{key: READING[key] for key in ("question", "passage", "answer", "title")}] * 2
    rows[1] = {**rows[1], "answer": "is here", "question": "1066?", "title": ""}
    if form == "csv":
        with file.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif form == "jsonl":
        write(file, *rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    passage = "The answer is here."
    assert read_data(file).readings == (
        ReadingTriple("q?", "T", passage, "answer"),
        ReadingTriple("1066?", "", passage, "is here"),
    )


def test_rows_whose_answer_is_not_in_the_passage_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("question,passage,answer\nq?,An answer.,answer\nq?,Another.,none\nq?,Short\n,A b.,b\n")
    assert read_data(file).readings == (ReadingTriple("q?", "", "An answer.", "answer"),)
    (message,) = caplog.messages
    assert "3 of 4 rows are left out" in message
    assert message.endswith("the first is row 2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.csv", "question,passage\nq?,p\n", "mine.csv: row 1 lacks the field 'answer'"),
        ("mine.csv", "question,passage,answer\n", "mine.csv: no row has a question and an answer"),
        ("mine.jsonl", '{}\n\n{"question": \n', "mine.jsonl: cannot be read: line 3: Expecting value"),
        ("mine.jsonl", "[1]\n", "mine.jsonl: cannot be read: line 1 is not an object"),
        (
            "mine.jsonl",
            '{"question": "q?", "passage": "p", "answer": ["p"]}',
            "row 1 has a wrong field: answer is ['p']",
        ),
        ("mine.parquet", "no Parquet", "mine.parquet: cannot be read: "),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_data(tmp_path / name)


def test_numbers_are_texts_and_blanks_are_no_answers(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": 7, "passage": "In 1066 it was.", "answer": 1066}]
    write(tmp_path / "mine.jsonl", *rows, {**rows[0], "answer": " "}, {**rows[0], "question": None})
    assert read_data(tmp_path / "mine.jsonl").readings == (ReadingTriple("7", "", "In 1066 it was.", "1066"),)


def test_long_passages_are_read_from_csv(tmp_path: Path) -> None:
    """Python's reader refuses fields of more than 131,072 characters by default."""
    passage = "long " * 40_000
    (tmp_path / "mine.csv").write_text(f"question,passage,answer\nq?,{passage},long\n")
    assert read_data(tmp_path / "mine.csv").readings == (ReadingTriple("q?", "", passage, "long"),)


def test_wrong_field_is_named(tmp_path: Path) -> None:
    write(tmp_path / "rc.jsonl", READING)
    write(tmp_path / "fact_verification.jsonl", CLAIM, {**CLAIM, "answers": []})
    with pytest.raises(ValueError, match=r"fact_verification\.jsonl: row 2 has a wrong field"):
        read_data(tmp_path)


def test_rows_are_counted_and_identified() -> None:
    row = ReadingTriple("q?", "T", "The answer.", "answer")
    data = TeachingData((row, row), (Instruction("i", "o"),))
    assert data.counts == {"readings": 2, "instructions": 1, "pairs": 0, "claims": 0}
    assert data.compute_digest() == TeachingData((row, row), (Instruction("i", "o"),)).compute_digest()
    assert data.compute_digest() != TeachingData((row,), (Instruction("i", "o"),)).compute_digest()


def test_missing_readings_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rc\.jsonl: not found"):
        read_data(tmp_path)


def test_missing_field_is_named(tmp_path: Path) -> None:
    write(tmp_path / "rc.jsonl", {"question": "q?", "passage": "p"})
    with pytest.raises(ValueError, match=r"rc\.jsonl: row 1 lacks the field 'answer'"):
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


def test_at_least_one_passage_is_held_out() -> None:
    few = TeachingData(tuple(ReadingTriple("q?", "", f"passage {n}", "passage") for n in range(3)))
    train, test = few.split(held_out=0.03, seed=1)
    assert (len(train.readings), len(test.readings)) == (2, 1)
    with pytest.raises(ValueError, match="at least two different passages"):
        TeachingData(few.readings[:1]).split(held_out=0.03, seed=1)
