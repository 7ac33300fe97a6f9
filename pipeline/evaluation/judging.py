"""One annotated row against its gold answers and gold passage."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.evaluation.metrics import (
    best_over_golds,
    contains,
    exact,
    rouge_l,
    same_choice,
    string_em,
    token_f1,
    without_citations,
)
from pipeline.queries.schema import GOLD_TYPES

# What a row is judged by, as far as its set has it.
READ_COLUMNS = ("answer", "retrieved", "segments", "candidates", "evidence", *GOLD_TYPES)
SHORT_FORM = ["match", "exact_match", "f1"]
LONG_FORM = ("str_em", "rouge_l")
METRICS: Mapping[str, Callable[[str, str], float]] = {
    "match": contains,
    "exact_match": exact,
    "f1": token_f1,
    "accuracy": same_choice,
    "rouge_l": rouge_l,
}


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


def judge(row: Mapping[str, Any], metric: str = "match", closed: bool = False, cites: bool = False) -> Judged:
    """Judge an annotated row.

    Args:
        row: as Arrow gives it; of the gold columns any may be absent or null.
        metric: the one that the row's task is known by; it tells long-form answers apart.
        closed: whether the answer comes from a closed set.
        cites: whether citations were asked for.
    """
    metrics = {**against_answers(row, metric, closed), **(_citations(row) if cites else {}), **_recall(row)}
    return Judged(bool(row["retrieved"]), metrics, tuple(_relevance(row)), tuple(_support(row)))


def against_answers(row: Mapping[str, Any], metric: str, closed: bool) -> dict[str, float]:
    """The metrics of the answer's text alone; empty where the row has no gold."""
    golds, sets = golds_of(row), short_golds_of(row)
    names = ["str_em"] if sets else []
    if golds:
        names += ["accuracy"] if closed or metric == "accuracy" else ["rouge_l"] if metric in LONG_FORM else SHORT_FORM
    return {name: score(row, name) for name in names}


def score(row: Mapping[str, Any], metric: str) -> float:
    """One metric of a row's answer, which has gold for it."""
    answer = without_citations(row["answer"] or "")
    if metric == "str_em":
        return string_em(answer, short_golds_of(row))
    return best_over_golds(METRICS[metric], answer, golds_of(row))


def golds_of(row: Mapping[str, Any]) -> list[str]:
    """Gold answers of a row."""
    return [gold for gold in row.get("answers") or () if gold is not None]


def short_golds_of(row: Mapping[str, Any]) -> list[list[str]]:
    """Sets of short gold answers of a row."""
    sets = [[gold for gold in golds or () if gold is not None] for golds in row.get("short_answers") or ()]
    return [golds for golds in sets if golds]


def _citations(row: Mapping[str, Any]) -> dict[str, float]:
    """Share of the answer's segments that name a passage."""
    texts = [segment for segment in row.get("segments") or () if segment["text"]]
    return {"cited": sum(s["citation"] is not None for s in texts) / len(texts)} if texts else {}


def _recall(row: Mapping[str, Any]) -> dict[str, float]:
    """Whether the first passage read is the gold one, and whether any is, of those that the first search found."""
    gold, read = row.get("gold_passage_id"), _first_read(row)
    if gold is None or not read:
        return {}
    ranks = [c["rank"] for c in read if c["passage_id"] == gold]
    return {"recall@1": float(1 in ranks), "recall@k": float(bool(ranks))}


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
        if c["is_sup"] is not None and golds_of(row):
            text = passages[c["passage_id"]]
            borne = any(contains(c["text"], gold) and contains(text, gold) for gold in golds_of(row))
            judged.append((borne, c["is_sup"]))
    return judged
