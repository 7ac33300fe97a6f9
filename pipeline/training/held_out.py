"""The held-out part of teaching data as a query set: what a taught model is worth when it decodes by itself.

Every row brings its passages, so no index is needed: the right one among others that the encoder ranks high.
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.training.data import Claim, Instruction, ReadingTriple, TeachingData
from pipeline.training.rows import CLAIM_INSTRUCTION, Negatives

STRINGS = pa.list_(pa.string())
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("query", pa.string()),
        ("input", pa.string()),
        ("choices", STRINGS),
        ("passages", pa.list_(pa.struct([("id", pa.string()), ("title", pa.string()), ("text", pa.string())]))),
        ("answers", STRINGS),
        ("short_answers", pa.list_(STRINGS)),
        ("gold_passage_id", pa.string()),
    ]
)
# Passages of a row, the right ones among them: what decoding reads by default.
PASSAGES = 5

Row = dict[str, Any]


def held_out_queries(data: TeachingData, negatives: Negatives, rows: int, seed: int = 0) -> pa.Table:
    """Questions, questions of two parts, claims and instructions, at most so many rows of each.

    The column ``task`` is ``reading``, ``two_questions``, ``claim`` or ``instruction``; gold answers are in
    ``answers``, of two-part questions in ``short_answers``; instructions need no passage and have no gold.
    """
    rng = random.Random(seed)
    found = [
        *_numbered("reading", (_reading(row, negatives, rng) for row in data.readings[:rows])),
        *_numbered("two_questions", _pairs(data.readings, negatives, rows // 2, rng)),
        *_numbered("claim", (_claim(row, negatives, rng) for row in data.claims[:rows])),
        *_numbered("instruction", (_instruction(row, negatives, rng) for row in data.instructions[:rows])),
    ]
    return pa.Table.from_pylist(found, schema=SCHEMA)


def _numbered(task: str, rows: Iterator[Row]) -> list[Row]:
    return [{"id": f"{task}-{n}", "task": task, **row} for n, row in enumerate(rows)]


def _passage(title: str, text: str) -> Row:
    return {"id": hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()[:12], "title": title, "text": text}


def _among_others(
    right: list[Row], question: str, answer: str, titled: bool, negatives: Negatives, rng: random.Random
) -> list[Row]:
    """The right passages and others without the answer, each once, in any order."""
    passages = {passage["id"]: passage for passage in right}
    for attempt in range(10 * PASSAGES):
        if len(passages) == PASSAGES:
            break
        # A question's own list may hold too few without the answer: then any passage will do.
        hard = 1.0 if attempt < 5 * PASSAGES else 0.0
        other = _passage(*negatives.draw(question, answer, titled, rng, hard))
        passages.setdefault(other["id"], other)
    mixed = list(passages.values())
    rng.shuffle(mixed)
    return mixed


def _reading(row: ReadingTriple, negatives: Negatives, rng: random.Random) -> Row:
    gold = _passage(row.title, row.passage)
    passages = _among_others([gold], row.question, row.answer, bool(row.title), negatives, rng)
    return {"query": row.question, "passages": passages, "answers": [row.answer], "gold_passage_id": gold["id"]}


def _pairs(readings: tuple[ReadingTriple, ...], negatives: Negatives, pairs: int, rng: random.Random) -> Iterator[Row]:
    """Neighbours asked in one go: about half of them share their passage, as the data has several for each."""
    for first, second in list(zip(readings[::2], readings[1::2], strict=False))[:pairs]:
        gold = [_passage(row.title, row.passage) for row in (first, second)]
        question = f"{first.question} {second.question}"
        passages = _among_others(gold, first.question, first.answer, bool(first.title), negatives, rng)
        yield {"query": question, "passages": passages, "short_answers": [[first.answer], [second.answer]]}


def _claim(row: Claim, negatives: Negatives, rng: random.Random) -> Row:
    evidence = _passage(row.title, row.text)
    return {
        "query": CLAIM_INSTRUCTION.format(choices=", ".join(row.choices)),
        "input": row.claim,
        "choices": list(row.choices),
        "passages": _among_others([evidence], row.claim, row.text, bool(row.title), negatives, rng),
        "answers": [row.label],
        "gold_passage_id": evidence["id"],
    }


def _instruction(row: Instruction, negatives: Negatives, rng: random.Random) -> Row:
    return {"query": row.instruction, "passages": _among_others([], row.instruction, "\0", True, negatives, rng)}
