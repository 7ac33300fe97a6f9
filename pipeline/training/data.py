"""Reads the training data from a folder, and ranks passages as candidates for wrong passages.

The folder holds four JSON Lines files, of which only the first is required:

- ``rc.jsonl``: ``question``, ``passage``, ``title`` (may be empty or missing), ``answer`` (a substring of the passage);
- ``no_retrieval.jsonl``: ``instruction``, ``output``, ``source`` (optional; training draws evenly from the sources);
- ``question_sentence_pairs.jsonl``: ``question``, ``answer_sentence``;
- ``fact_verification.jsonl``: ``question`` (a claim), ``choices``, ``answers`` (the first is used),
  ``gold_passages`` (``title``, ``text``; the first is used).
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Row = dict[str, Any]
Encode = Callable[[Sequence[str]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class ReadingTriple:
    """A question, a passage that answers it, and the answer as it stands in the passage."""

    question: str
    title: str
    passage: str
    answer: str


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

    def split(self, held_out: float, seed: int) -> tuple["TeachingData", "TeachingData"]:
        """Split into a training and a held-out part; all readings of one passage are in the same part.

        Args:
            held_out: share of the held-out part.
            seed: seed of the random choice of held-out passages; of other rows, the first are held out.
        """
        passages = sorted({reading.passage for reading in self.readings})
        random.Random(seed).shuffle(passages)
        kept_out = set(passages[: int(len(passages) * held_out)])
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


def _read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def read_data(folder: Path) -> TeachingData:
    """Read a data folder.

    Raises:
        ValueError: the folder has no ``rc.jsonl``, or a row lacks a field; the message names the path.
    """
    readings = folder / "rc.jsonl"
    if not readings.exists():
        raise ValueError(
            f"{readings}: not found; a data folder needs at least this file (see python -m jobs.teach --help)"
        )
    try:
        return TeachingData(
            tuple(map(_to_reading, _read_rows(readings))),
            tuple(map(_to_instruction, _read_rows(folder / "no_retrieval.jsonl"))),
            tuple(map(_to_pair, _read_rows(folder / "question_sentence_pairs.jsonl"))),
            tuple(chain.from_iterable(map(_to_claims, _read_rows(folder / "fact_verification.jsonl")))),
        )
    except KeyError as missing:
        raise ValueError(f"{folder}: a row lacks the field {missing}") from None


def _to_reading(row: Row) -> ReadingTriple:
    return ReadingTriple(row["question"], row.get("title", ""), row["passage"], row["answer"])


def _to_instruction(row: Row) -> Instruction:
    return Instruction(row["instruction"], row["output"], row.get("source", ""))


def _to_pair(row: Row) -> Pair:
    return Pair(row["question"], row["answer_sentence"])


def _to_claims(row: Row) -> list[Claim]:
    """Convert a row to the claim with its first gold passage; a row without gold passages has no claim."""
    return [
        Claim(row["question"], tuple(row["choices"]), row["answers"][0], passage["title"], passage["text"])
        for passage in row["gold_passages"][:1]
    ]


def find_nearest(encode: Encode, questions: Sequence[str], texts: Sequence[str], k: int) -> npt.NDArray[np.int64]:
    """Return the indices of the k texts most similar to each question: int64 [questions, k], best first.

    With fewer than k texts, all are returned.

    Args:
        encode: encoder of texts; similarity is the inner product of the vectors.
        questions: questions to search with.
        texts: texts to search in.
        k: number of texts for each question.
    """
    vectors = encode(texts)
    similarity = encode(questions) @ vectors.T
    k = min(k, len(texts))
    top = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(similarity, top, axis=1), axis=1)
    return np.asarray(np.take_along_axis(top, order, axis=1), np.int64)
