"""Makes a query set from the held-out part of the training data, to evaluate a trained model with full decoding.

Every row has its own passages, so that no index is needed: the gold passage and others that the encoder ranks high.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
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
# Passages of a row, including the gold ones; the number that decoding reads by default.
PASSAGES = 5

Row = dict[str, Any]


def build_held_out_queries(data: TeachingData, negatives: Negatives, rows: int, seed: int = 0) -> pa.Table:
    """Build a query set of questions, two-part questions, claims and instructions.

    The column ``task`` is ``reading``, ``two_questions``, ``claim`` or ``instruction``. Gold answers are in
    ``answers``, those of two-part questions in ``short_answers``. Instructions need no passage and have no gold
    answers.

    Args:
        data: held-out data.
        negatives: source of the wrong passages.
        rows: maximum rows of each task; half of it for two-part questions.
        seed: seed of the random choice and order of the passages.
    """
    rng = random.Random(seed)
    readings = [_build_reading(row, negatives, rng) for row in data.readings[:rows]]
    pairs = list(_build_pairs(data.readings, negatives, rows // 2, rng))
    claims = [_build_claim(row, negatives, rng) for row in data.claims[:rows]]
    instructions = [_build_instruction(row, negatives, rng) for row in data.instructions[:rows]]
    found = [
        *_number_rows("reading", readings),
        *_number_rows("two_questions", pairs),
        *_number_rows("claim", claims),
        *_number_rows("instruction", instructions),
    ]
    return pa.Table.from_pylist(found, schema=SCHEMA)


def _number_rows(task: str, rows: Iterable[Row]) -> list[Row]:
    return [{"id": f"{task}-{n}", "task": task, **row} for n, row in enumerate(rows)]


def _to_passage(title: str, text: str) -> Row:
    return {"id": hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()[:12], "title": title, "text": text}


def _mix_passages(
    right: list[Row], question: str, answer: str, titled: bool, negatives: Negatives, rng: random.Random
) -> list[Row]:
    """Mix the gold passages with distinct wrong ones, up to ``PASSAGES``, in random order.

    Args:
        right: gold passages.
        question: question whose own list of wrong passages is drawn from first.
        answer: text that wrong passages should not contain.
        titled: whether the wrong passages have titles.
        negatives: source of the wrong passages.
        rng: source of randomness.
    """
    passages = {passage["id"]: passage for passage in right}
    for attempt in range(10 * PASSAGES):
        if len(passages) == PASSAGES:
            break
        # The question's own list may hold too few passages without the answer; later attempts draw from all passages.
        hard = 1.0 if attempt < 5 * PASSAGES else 0.0
        if (drawn := negatives.draw(question, answer, titled, rng, hard)) is not None:
            other = _to_passage(*drawn)
            passages.setdefault(other["id"], other)
    mixed = list(passages.values())
    rng.shuffle(mixed)
    return mixed


def _build_reading(row: ReadingTriple, negatives: Negatives, rng: random.Random) -> Row:
    gold = _to_passage(row.title, row.passage)
    passages = _mix_passages([gold], row.question, row.answer, bool(row.title), negatives, rng)
    return {"query": row.question, "passages": passages, "answers": [row.answer], "gold_passage_id": gold["id"]}


def _build_pairs(
    readings: tuple[ReadingTriple, ...], negatives: Negatives, pairs: int, rng: random.Random
) -> Iterator[Row]:
    """Yield two-part questions, each joined from two neighboring rows.

    About half of the pairs share their passage, since the data has several questions for each passage.
    """
    for first, second in list(zip(readings[::2], readings[1::2], strict=False))[:pairs]:
        gold = [_to_passage(row.title, row.passage) for row in (first, second)]
        question = f"{first.question} {second.question}"
        passages = _mix_passages(gold, first.question, first.answer, bool(first.title), negatives, rng)
        yield {"query": question, "passages": passages, "short_answers": [[first.answer], [second.answer]]}


def _build_claim(row: Claim, negatives: Negatives, rng: random.Random) -> Row:
    evidence = _to_passage(row.title, row.text)
    return {
        "query": CLAIM_INSTRUCTION.format(choices=", ".join(row.choices)),
        "input": row.claim,
        "choices": list(row.choices),
        "passages": _mix_passages([evidence], row.claim, row.text, bool(row.title), negatives, rng),
        "answers": [row.label],
        "gold_passage_id": evidence["id"],
    }


def _build_instruction(row: Instruction, negatives: Negatives, rng: random.Random) -> Row:
    return {"query": row.instruction, "passages": _mix_passages([], row.instruction, "\0", True, negatives, rng)}
