"""Metrics of an answer against gold answers."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import regex

from pipeline.decoding.choose import strip_label
from pipeline.evaluation.words import UNSPACED, SplitPair, fold, split_pair

_ROUGE_WORD = regex.compile(rf"{UNSPACED}|(?:(?!{UNSPACED})[\p{{L}}\p{{M}}\p{{N}}])+")
_SENTENCE_END = regex.compile(r"(?<=[.!?])\s+|(?<=[。！？｡])")


def contains(answer: str, gold: str, split: SplitPair = split_pair) -> bool:
    """Whether the answer contains the gold answer as a sequence of whole words."""
    words, wanted = split(answer, gold)
    return bool(wanted) and f" {' '.join(wanted)} " in f" {' '.join(words)} "


def is_exact_match(answer: str, gold: str, split: SplitPair = split_pair) -> bool:
    """Whether the words of both are equal."""
    words, wanted = split(answer, gold)
    return words == wanted


def token_f1(answer: str, gold: str, split: SplitPair = split_pair) -> float:
    """Return the harmonic mean of the precision and recall of the answer's words, in [0, 1]."""
    words, wanted = split(answer, gold)
    if not words or not wanted:
        return float(words == wanted)
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted))


def best_over_golds(metric: Callable[[str, str], float], answer: str, golds: Sequence[str]) -> float:
    """Return the maximum of a metric over the gold answers."""
    return float(max(metric(answer, gold) for gold in golds))


def is_same_choice(answer: str, gold: str) -> bool:
    """Whether both are the same label, ignoring case and outer punctuation but not articles ("A" is a label)."""
    return strip_label(fold(answer)) == strip_label(fold(gold))


def string_em(answer: str, sets: Sequence[Sequence[str]], split: SplitPair = split_pair) -> float:
    """Return the share of the sets of short answers of which the answer contains at least one.

    This is STR-EM of ASQA (Stelmakh et al. 2022), but matches whole words only; the original matches parts of words.
    """
    found = 0
    for golds in sets:
        found += any(contains(answer, gold, split) for gold in golds)
    return found / len(sets)


def rouge_l(answer: str, gold: str) -> float:
    """Return ROUGE-Lsum: the F-measure of longest common subsequences of words, by sentence, in [0, 1].

    English words are stemmed, as in the package ``rouge-score``, whose own tokenizer knows no letters but a to z.
    """
    return float(_load_rouge().score(_split_sentences(gold), _split_sentences(answer))["rougeLsum"].fmeasure)


def _split_sentences(text: str) -> str:
    """Put each sentence on a line of its own, as the scorer expects."""
    return str(_SENTENCE_END.sub("\n", text))


class _Tokenizer:
    """Words of letters, marks and digits, or single characters of scripts without spaces; stems words in ASCII."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Split a text into words."""
        words: list[str] = []
        for word in _ROUGE_WORD.findall(fold(text)):
            words += self._english.tokenize(word) if word.isascii() else [word]
        return words


@cache
def _load_rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeLsum"], tokenizer=_Tokenizer())


def strip_citations(text: str) -> str:
    """Remove citations such as ``[1]``."""
    return re.sub(r"\s*\[\d+\]", "", text)
