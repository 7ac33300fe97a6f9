"""Metrics of an answer against gold answers. Words are normalized as in SQuAD's own evaluation."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from pipeline.decoding.choose import strip_label

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lower-case a text and remove ASCII punctuation, English articles and extra spaces (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def contains(answer: str, gold: str) -> bool:
    """Whether the answer contains the gold answer as a sequence of whole words."""
    wanted = normalize(gold)
    return bool(wanted) and f" {wanted} " in f" {normalize(answer)} "


def is_exact_match(answer: str, gold: str) -> bool:
    """Whether both are equal after normalization."""
    return normalize(answer) == normalize(gold)


def token_f1(answer: str, gold: str) -> float:
    """Return the harmonic mean of the precision and recall of the answer's words, in [0, 1]."""
    words, wanted = normalize(answer).split(), normalize(gold).split()
    if not words or not wanted:
        return float(words == wanted)
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted))


def best_over_golds(metric: Callable[[str, str], float], answer: str, golds: Sequence[str]) -> float:
    """Return the maximum of a metric over the gold answers."""
    return float(max(metric(answer, gold) for gold in golds))


def is_same_choice(answer: str, gold: str) -> bool:
    """Whether both are the same label, ignoring case and outer punctuation but not articles ("A" is a label)."""
    return strip_label(answer).casefold() == strip_label(gold).casefold()


def string_em(answer: str, sets: Sequence[Sequence[str]]) -> float:
    """Return the share of the sets of short answers of which the answer contains at least one.

    This is STR-EM of ASQA (Stelmakh et al. 2022), but matches whole words only; the original matches parts of words.
    """
    return sum(_contains_any(answer, golds) for golds in sets) / len(sets)


def _contains_any(answer: str, golds: Sequence[str]) -> bool:
    return any(contains(answer, gold) for gold in golds)


def rouge_l(answer: str, gold: str) -> float:
    """Return ROUGE-Lsum: the F-measure of longest common subsequences of stemmed words, by sentence, in [0, 1]."""
    return float(_load_rouge().score(_split_sentences(gold), _split_sentences(answer))["rougeLsum"].fmeasure)


def _split_sentences(text: str) -> str:
    """Put each sentence on a line of its own, as the scorer expects."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text)


@cache
def _load_rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=True)


def strip_citations(text: str) -> str:
    """Remove citations such as ``[1]``."""
    return re.sub(r"\s*\[\d+\]", "", text)
