"""One annotated row against its gold answers and gold passage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.metrics import best, contains, exact, rouge_l, same_choice, string_em, token_f1, without_citations

# What a row can bring to be judged by; answers are the only ones that a set must have.
GOLD_COLUMNS = ("answers", "short_answers", "gold_passage_id")
READ_COLUMNS = ("answer", "retrieved", "segments", "candidates", "evidence", *GOLD_COLUMNS)
LONG_FORM = ("str_em", "rouge_l")


@dataclass(frozen=True)
class Judged:
    """What one annotated row is worth.

    Attributes:
        retrieved: whether the answer rests on a passage.
        metrics: by name, in [0, 1]; those that the row has gold for.
        relevance: for each critiqued passage, whether it is the gold one, and p(Relevant).
        support: for each critiqued candidate, whether its passage bears a gold answer that it gives, and s(IsSup).
    """

    retrieved: bool
    metrics: Mapping[str, float]
    relevance: tuple[tuple[bool, float], ...] = field(default=())
    support: tuple[tuple[bool, float], ...] = field(default=())


def judge(row: Mapping[str, Any], metric: str = "match", closed: bool = False) -> Judged:
    """Judge an annotated row.

    Args:
        row: as Arrow gives it; of the gold columns any may be absent or null.
        metric: the one that the row's task is known by; it tells long-form answers apart.
        closed: whether the answer comes from a closed set.
    """
    metrics = {**against_answers(row, metric, closed), **_citations(row), **_recall(row)}
    return Judged(bool(row["retrieved"]), metrics, tuple(_relevance(row)), tuple(_support(row)))


def against_answers(row: Mapping[str, Any], metric: str, closed: bool) -> dict[str, float]:
    """The metrics of the answer's text alone; empty where the row has no gold."""
    answer, golds = without_citations(row["answer"] or ""), row.get("answers") or ()
    found = {}
    if sets := [golds for golds in row.get("short_answers") or () if golds]:
        found["str_em"] = string_em(answer, sets)
    if not golds:
        return found
    if closed or metric == "accuracy":
        return {**found, "accuracy": best(same_choice, answer, golds)}
    if metric in LONG_FORM:
        return {**found, "rouge_l": best(rouge_l, answer, golds)}
    named = {"match": contains, "exact_match": exact, "f1": token_f1}
    return {**found, **{name: best(compare, answer, golds) for name, compare in named.items()}}


def _citations(row: Mapping[str, Any]) -> dict[str, float]:
    """Share of the segments that rest on a passage, for answers of several."""
    texts = [segment for segment in row.get("segments") or () if segment["text"]]
    return {"cited": sum(s["citation"] is not None for s in texts) / len(texts)} if len(texts) > 1 else {}


def _recall(row: Mapping[str, Any]) -> dict[str, float]:
    """Whether the first search found the gold passage, first of all and among all that were read."""
    gold, read = row.get("gold_passage_id"), _first_read(row)
    if gold is None or not read:
        return {}
    rank = next((c["rank"] for c in read if c["passage_id"] == gold), None)
    deepest = max(c["rank"] for c in read)
    return {f"recall@{k}": float(rank is not None and rank <= k) for k in sorted({1, deepest})}


def _first_read(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Candidates of the first segment that read a passage."""
    return [c for c in row.get("candidates") or () if c["passage_id"] is not None and c["parent"] is None]


def _relevance(row: Mapping[str, Any]) -> list[tuple[bool, float]]:
    gold = row.get("gold_passage_id")
    if gold is None:
        return []
    return [(c["passage_id"] == gold, c["is_rel"]) for c in _first_read(row) if c["is_rel"] is not None]


def _support(row: Mapping[str, Any]) -> list[tuple[bool, float]]:
    passages = {p["id"]: p["text"] for p in row.get("evidence") or ()}
    judged = []
    for c in _first_read(row):
        if c["is_sup"] is not None and row.get("answers"):
            text = passages[c["passage_id"]]
            borne = any(contains(c["text"], gold) and contains(text, gold) for gold in row["answers"])
            judged.append((borne, c["is_sup"]))
    return judged
