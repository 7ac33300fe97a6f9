"""Annotated rows in the input formats of other projects' judges.

ALCE (github.com/princeton-nlp/ALCE, ``eval.py``) reads one JSON object; FActScore (github.com/shmsw25/FActScore,
``factscorer.py``) reads JSON Lines. Neither is run here: both need models of billions of weights, or an API.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]
EXPORTED = ("answer", "answers", "short_answers", "passages")


def alce(rows: Iterable[Row], query: str = "query") -> str:
    """Rows for ALCE: question, output with citations, cited passages in their order, and gold where there is some.

    Args:
        query: the column of the question.
    """
    return json.dumps({"data": [_alce(row, query) for row in rows]}, ensure_ascii=False)


def _alce(row: Row, query: str) -> dict[str, Any]:
    item: dict[str, Any] = {
        "question": row[query],
        "output": row["answer"] or "",
        "docs": [{"id": p["id"], "title": p["title"], "text": p["text"]} for p in row["passages"] or ()],
    }
    if sets := row.get("short_answers"):
        item["qa_pairs"] = [{"short_answers": golds} for golds in sets]
    if answers := row.get("answers"):
        item["annotations"] = [{"long_answer": answer} for answer in answers]
        item["answer"] = answers[0]
    return item


def factscore(rows: Iterable[Row], query: str = "query") -> str:
    """Rows for FActScore: one line for each, with the topic (the query, a person's name) and the output.

    Args:
        query: the column of the topic.
    """
    lines = ({"topic": row[query], "output": row["answer"] or ""} for row in rows)
    return "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
