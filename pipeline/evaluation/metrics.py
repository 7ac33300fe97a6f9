"""An answer against gold answers. Pure; words are compared as SQuAD's own evaluation does."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from pipeline.decoding.choose import label

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case without ASCII punctuation and English articles, single spaces (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def contains(answer: str, gold: str) -> bool:
    """Whether the gold answer's words stand in the answer, one after the other; parts of words do not count."""
    wanted = normalise(gold)
    return bool(wanted) and f" {wanted} " in f" {normalise(answer)} "


def exact(answer: str, gold: str) -> bool:
    """Whether both are the same after normalisation."""
    return normalise(answer) == normalise(gold)


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of the precision and recall of the answer's words, in [0, 1]."""
    words, wanted = normalise(answer).split(), normalise(gold).split()
    if not words or not wanted:
        return float(words == wanted)
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted))


def best_over_golds(metric: Callable[[str, str], float], answer: str, golds: Sequence[str]) -> float:
    """The metric against the gold answer that fits best."""
    return float(max(metric(answer, gold) for gold in golds))


def same_choice(answer: str, gold: str) -> bool:
    """Whether both are the same label: case and outer punctuation do not count, articles do ("A" is a label)."""
    return label(answer).casefold() == label(gold).casefold()


def string_em(answer: str, sets: Sequence[Sequence[str]]) -> float:
    """Share of the sets of short answers of which one stands in the answer (STR-EM of ASQA, Stelmakh et al. 2022).

    Whole words count, where the original takes parts of words too.
    """
    return sum(any(contains(answer, gold) for gold in golds) for golds in sets) / len(sets)


def rouge_l(answer: str, gold: str) -> float:
    """F-measure of the longest common subsequences of stemmed words, sentence by sentence (ROUGE-Lsum), in [0, 1]."""
    return float(_rouge().score(_sentences(gold), _sentences(answer))["rougeLsum"].fmeasure)


def _sentences(text: str) -> str:
    """One sentence to a line, as the scorer wants them."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text)


@cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=True)


def without_citations(text: str) -> str:
    """The text without ``[1]`` and the like."""
    return re.sub(r"\s*\[\d+\]", "", text)
