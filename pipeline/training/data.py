"""Reads the training data.

The data is either a file of readings (CSV with a header, JSON Lines or Parquet), or a folder with four JSON Lines
files, of which only the first is required:

- ``rc.jsonl``, readings: ``question``, ``passage``, ``answer`` (a substring of the passage), ``title`` (optional);
- ``no_retrieval.jsonl``: ``instruction``, ``output``, ``source`` (optional; training draws evenly from the sources);
- ``question_sentence_pairs.jsonl``: ``question``, ``answer_sentence``;
- ``fact_verification.jsonl``: ``question`` (a claim), ``choices``, ``answers`` (the first is used),
  ``gold_passages`` (``title``, ``text``; the first is used).
"""

import csv
import hashlib
import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

log = logging.getLogger(__name__)

# Maximum characters of a field of a CSV file; Python's own limit, 131,072, is below the length of some passages.
MAX_FIELD = 2**31 - 1
# Held-out passages below which their figures say little.
FEW_HELD_OUT = 30

T = TypeVar("T")
Row = dict[str, Any]


@dataclass(frozen=True)
class ReadingTriple:
    """A question, a passage that answers it, and the answer as it stands in the passage."""

    question: str
    title: str
    passage: str
    answer: str

    def is_answered(self) -> bool:
        """Whether there are a question, and an answer that stands word for word in the passage."""
        return bool(self.question.strip() and self.answer.strip()) and self.answer in self.passage


@dataclass(frozen=True)
class Instruction:
    """An instruction that needs no passage, its output, and the collection it comes from."""

    instruction: str
    output: str
    source: str = ""


@dataclass(frozen=True)
class Pair:
    """A question and the sentence that answers it."""

    question: str
    sentence: str


@dataclass(frozen=True)
class Claim:
    """A claim, the possible labels, the correct label, and title and text of an evidence passage."""

    claim: str
    choices: tuple[str, ...]
    label: str
    title: str
    text: str


@dataclass(frozen=True)
class TeachingData:
    """The training data by kind of row."""

    readings: tuple[ReadingTriple, ...]
    instructions: tuple[Instruction, ...] = ()
    pairs: tuple[Pair, ...] = ()
    claims: tuple[Claim, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows by kind."""
        return {field.name: len(getattr(self, field.name)) for field in fields(self)}

    def compute_digest(self) -> str:
        """Return a SHA-256, in hex, over all rows."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def split(self, held_out: float, seed: int) -> tuple["TeachingData", "TeachingData"]:
        """Split into a training and a held-out part; all readings of one passage are in the same part.

        At least one passage is held out.

        Args:
            held_out: share of the held-out part.
            seed: seed of the random choice of held-out passages; of other rows, the first are held out.

        Raises:
            ValueError: the readings have fewer than two passages.
        """
        passages = sorted({reading.passage for reading in self.readings})
        if len(passages) < 2:
            raise ValueError("the readings need at least two different passages, since some are held out")
        random.Random(seed).shuffle(passages)
        kept_out = set(passages[: max(1, int(len(passages) * held_out))])
        if len(kept_out) < FEW_HELD_OUT:
            log.warning("the figures say little: %d of %d passages are held out", len(kept_out), len(passages))
        cut = [int(len(rows) * held_out) for rows in (self.instructions, self.pairs, self.claims)]
        train = TeachingData(
            tuple(r for r in self.readings if r.passage not in kept_out),
            self.instructions[cut[0] :],
            self.pairs[cut[1] :],
            self.claims[cut[2] :],
        )
        test = TeachingData(
            tuple(r for r in self.readings if r.passage in kept_out),
            self.instructions[: cut[0]],
            self.pairs[: cut[1]],
            self.claims[: cut[2]],
        )
        return train, test


def read_data(path: Path) -> TeachingData:
    """Read a file of readings, or a data folder.

    Readings whose answer is not in their passage are left out, with a warning.

    Raises:
        ValueError: the path holds no readings, or a row lacks a field; the message names file and row.
    """
    if not path.is_dir():
        return TeachingData(tuple(_read_readings(path)))
    return TeachingData(
        tuple(_read_readings(path / "rc.jsonl")),
        tuple(_convert(path / "no_retrieval.jsonl", _to_instruction)),
        tuple(_convert(path / "question_sentence_pairs.jsonl", _to_pair)),
        tuple(chain.from_iterable(_convert(path / "fact_verification.jsonl", _to_claims))),
    )


def _read_readings(file: Path) -> list[ReadingTriple]:
    if not file.exists():
        raise ValueError(f"{file}: not found; --data is a file of readings or a folder with rc.jsonl")
    readings = _convert(file, _to_reading)
    unfit = [number for number, row in enumerate(readings, 1) if not row.is_answered()]
    if len(unfit) == len(readings):
        raise ValueError(f"{file}: no row has a question and an answer that stands word for word in its passage")
    if unfit:
        log.warning(
            "%s: %d of %d rows are left out, since their answer does not stand word for word in their passage; "
            "the first is row %d",
            file,
            len(unfit),
            len(readings),
            unfit[0],
        )
    return [row for row in readings if row.is_answered()]


def _read_rows(file: Path) -> list[Row]:
    if file.suffix == ".parquet":
        rows: list[Row] = pq.read_table(file).to_pylist()
        return rows
    # The signature that spreadsheet programs write is no part of the first column's name.
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            csv.field_size_limit(MAX_FIELD)
            return list(csv.DictReader(lines))
        return [_parse_line(line, number) for number, line in enumerate(lines, 1) if line.strip()]


def _parse_line(line: str, number: int) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg} at character {error.pos + 1}") from None
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is not an object")
    return row


def _convert(file: Path, convert: Callable[[Row], T]) -> list[T]:
    """Convert the rows of a file; a file that does not exist has none."""
    try:
        rows = _read_rows(file) if file.exists() else []
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from None
    converted = []
    for number, row in enumerate(rows, 1):
        try:
            converted.append(convert(row))
        except (KeyError, IndexError, TypeError) as error:
            problem = f"lacks the field {error}" if isinstance(error, KeyError) else f"has a wrong field: {error}"
            raise ValueError(f"{file}: row {number} {problem}") from None
    return converted


def _read_text(row: Row, name: str) -> str:
    """Read a field that is a text, or a number as in the columns of a spreadsheet; a missing value is empty."""
    value = row[name]
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int | float):
        return str(value)
    raise TypeError(f"{name} is {value!r}, not a text")


def _to_reading(row: Row) -> ReadingTriple:
    title = _read_text(row, "title") if "title" in row else ""
    return ReadingTriple(_read_text(row, "question"), title, _read_text(row, "passage"), _read_text(row, "answer"))


def _to_instruction(row: Row) -> Instruction:
    source = _read_text(row, "source") if "source" in row else ""
    return Instruction(_read_text(row, "instruction"), _read_text(row, "output"), source)


def _to_pair(row: Row) -> Pair:
    return Pair(_read_text(row, "question"), _read_text(row, "answer_sentence"))


def _to_claims(row: Row) -> list[Claim]:
    """Convert a row to the claim with its first gold passage; a row without gold passages has no claim."""
    return [
        Claim(
            _read_text(row, "question"),
            tuple(row["choices"]),
            row["answers"][0],
            _read_text(passage, "title"),
            _read_text(passage, "text"),
        )
        for passage in row["gold_passages"][:1]
    ]
