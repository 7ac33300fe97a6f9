"""Judges an annotated row against its gold answers and its gold passage."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.decoding.passage_ids import is_passage_or_part
from pipeline.evaluation.metrics import (
    best_over_golds,
    contains,
    is_exact_match,
    is_same_choice,
    rouge_l,
    string_em,
    strip_citations,
    token_f1,
)
from pipeline.evaluation.words import SplitPair, split_pair
from pipeline.queries.schema import GOLD_TYPES

# Columns that a row is judged by; a set may lack some of them.
READ_COLUMNS = ("answer", "retrieved", "segments", "candidates", "evidence", *GOLD_TYPES)
SHORT_FORM = ["match", "exact_match", "f1"]
LONG_FORM = ("str_em", "rouge_l")
WORD_METRICS: Mapping[str, Callable[..., float]] = {
    "match": contains,
    "exact_match": is_exact_match,
    "f1": token_f1,
}
TEXT_METRICS: Mapping[str, Callable[[str, str], float]] = {"accuracy": is_same_choice, "rouge_l": rouge_l}


@dataclass(frozen=True)
class Judged:
    """The metrics of one annotated row.

    Attributes:
        retrieved: whether the answer used a passage.
        metrics: metrics by name, in [0, 1]; only those for which the row has gold data.
        relevance: for each critiqued candidate, whether it read the gold passage, and p(Relevant).
        support: for each critiqued candidate, whether it gives a gold answer that a passage it read contains, and
            s(IsSup).
    """

    retrieved: bool
    metrics: Mapping[str, float]
    relevance: tuple[tuple[bool, float], ...] = field(default=())
    support: tuple[tuple[bool, float], ...] = field(default=())


def judge(
    row: Mapping[str, Any],
    metric: str = "match",
    closed: bool = False,
    cites: bool = False,
    split: SplitPair = split_pair,
) -> Judged:
    """Judge an annotated row.

    Args:
        row: row as read from Arrow; gold columns may be absent or null.
        metric: headline metric of the row's task; ``str_em`` and ``rouge_l`` mark long-form answers.
        closed: whether the answer is from a closed set.
        cites: whether the answer was decoded with citations.
        split: splits answers and gold answers into words.
    """
    metrics = {
        **grade_answer(row, metric, closed, split),
        **(_measure_citations(row) if cites else {}),
        **_measure_recall(row),
    }
    return Judged(bool(row["retrieved"]), metrics, tuple(_judge_relevance(row)), tuple(_judge_support(row, split)))


def grade_answer(row: Mapping[str, Any], metric: str, closed: bool, split: SplitPair = split_pair) -> dict[str, float]:
    """Compute the metrics of the answer's text; empty if the row has no gold answers."""
    golds, sets = list_golds(row), list_short_golds(row)
    names = ["str_em"] if sets else []
    if golds:
        names += _choose_metrics(metric, closed)
    return {name: score(row, name, split) for name in names}


def _choose_metrics(headline: str, closed: bool) -> list[str]:
    if closed or headline == "accuracy":
        return ["accuracy"]
    return ["rouge_l"] if headline in LONG_FORM else SHORT_FORM


def score(row: Mapping[str, Any], metric: str, split: SplitPair = split_pair) -> float:
    """Compute one metric of a row that has gold answers for it."""
    answer = strip_citations(row["answer"] or "")
    if metric == "str_em":
        return string_em(answer, list_short_golds(row), split)
    measure = TEXT_METRICS.get(metric) or partial(WORD_METRICS[metric], split=split)
    return best_over_golds(measure, answer, list_golds(row))


def list_golds(row: Mapping[str, Any]) -> list[str]:
    """Return the gold answers of a row, without nulls."""
    return _drop_nulls(row.get("answers"))


def list_short_golds(row: Mapping[str, Any]) -> list[list[str]]:
    """Return the sets of short gold answers of a row, without nulls and empty sets."""
    sets = map(_drop_nulls, row.get("short_answers") or ())
    return [golds for golds in sets if golds]


def _drop_nulls(golds: Sequence[str | None] | None) -> list[str]:
    return [gold for gold in golds or () if gold is not None]


def _measure_citations(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the share of the answer's segments with text that cite a passage."""
    texts = [segment for segment in row.get("segments") or () if segment["text"]]
    if not texts:
        return {}
    return {"cited": sum(segment["citation"] is not None for segment in texts) / len(texts)}


def _measure_recall(row: Mapping[str, Any]) -> dict[str, float]:
    """Return recall@1 and recall@k of the first search: whether its first passage, or any of them, is the gold one."""
    gold, first = row.get("gold_passage_id"), _list_first_candidates(row)
    if gold is None or not first:
        return {}
    ranks = [p["rank"] for c in first for p in _list_read(c) if is_passage_or_part(p["passage_id"], gold)]
    return {"recall@1": float(1 in ranks), "recall@k": float(bool(ranks))}


def _list_first_candidates(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the candidates of the first segment that have a passage."""
    return [c for c in row.get("candidates") or () if c["passage_id"] is not None and c["parent"] is None]


def _list_read(candidate: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the passages that a candidate read; sets of earlier versions have no ``beside``."""
    return [candidate, *(candidate.get("beside") or ())]


def _judge_relevance(row: Mapping[str, Any]) -> list[tuple[bool, float]]:
    gold = row.get("gold_passage_id")
    if gold is None:
        return []
    critiqued = [c for c in _list_first_candidates(row) if c["is_rel"] is not None]
    return [(any(is_passage_or_part(p["passage_id"], gold) for p in _list_read(c)), c["is_rel"]) for c in critiqued]


def _judge_support(row: Mapping[str, Any], split: SplitPair) -> list[tuple[bool, float]]:
    passages = {p["id"]: p["text"] for p in row.get("evidence") or ()}
    golds, judged = list_golds(row), []
    for c in _list_first_candidates(row):
        if c["is_sup"] is not None and golds:
            texts = [passages[p["passage_id"]] for p in _list_read(c)]
            given = [gold for gold in golds if contains(c["text"], gold, split)]
            borne = any(contains(text, gold, split) for gold in given for text in texts)
            judged.append((borne, c["is_sup"]))
    return judged
