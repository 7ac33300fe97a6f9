"""Exports annotated rows in the input formats of ALCE and FActScore.

ALCE (github.com/princeton-nlp/ALCE, ``eval.py``) reads one JSON object; FActScore (github.com/shmsw25/FActScore,
``factscorer.py``) reads JSON Lines. Neither is run here: both need models with billions of weights, or an API.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.decoding.choose import add_citations

Row = Mapping[str, Any]
EXPORTED = ("answer", "answers", "short_answers", "passages", "segments")


def encode_alce(rows: Iterable[Row], query: str = "query") -> str:
    """Encode rows for ALCE: question, output with citations, cited passages in order, and gold answers.

    ALCE detects the kinds of gold answers from the first row, so a kind is written for all rows or for none. It
    compares with two long answers, so a single one is written twice.

    Args:
        query: column of the question.

    Returns:
        One JSON object.
    """
    items = [_convert_row(row, query) for row in rows]
    for kind in ("qa_pairs", "annotations", "answer"):
        if not all(item[kind] for item in items):
            for item in items:
                del item[kind]
    return json.dumps({"data": items}, ensure_ascii=False)


def _convert_row(row: Row, query: str) -> dict[str, Any]:
    references = list(row.get("answers") or ())
    long_answers = (references * 2)[: max(2, len(references))]
    return {
        "question": row[query],
        "output": join_cited(row["segments"] or ()),
        "docs": [{"id": p["id"], "title": p["title"], "text": p["text"]} for p in row["passages"] or ()],
        "qa_pairs": [{"short_answers": golds} for golds in row.get("short_answers") or ()],
        "annotations": [{"long_answer": answer} for answer in long_answers],
        "answer": references[0] if references else "",
    }


def join_cited(segments: Iterable[Row]) -> str:
    """Join segments into one line, each with its citations before its final punctuation, where ALCE splits the text."""
    parts = []
    for segment in segments:
        text = " ".join(segment["text"].split())
        if segment["citation"] is not None:
            body = text.rstrip(".!?")
            further = segment.get("further_citations") or ()  # sets of earlier versions lack them
            text = f"{add_citations(body, [segment['citation'], *further])}{text[len(body) :]}"
        parts.append(text)
    return " ".join(filter(None, parts))


def encode_factscore(rows: Iterable[Row], query: str = "query") -> str:
    """Encode rows for FActScore: one JSON line per row, with the topic (the query, a person's name) and the output.

    Args:
        query: column of the topic.
    """
    lines = ({"topic": row[query], "output": row["answer"] or ""} for row in rows)
    return "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
