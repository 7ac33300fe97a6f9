"""Annotated rows and gold answers → figures. Pure; answers are compared as SQuAD's own evaluation does."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


def best(metric: Callable[[str, str], float], answer: str, golds: Sequence[str]) -> float:
    """The metric against the gold answer that fits best."""
    return float(max(metric(answer, gold) for gold in golds))


@dataclass(frozen=True)
class Outcome:
    """What one annotated row is judged by.

    Attributes:
        retrieved: whether the answer rests on a passage.
        golds: gold answers; empty where the row has none and is not graded.
        relevance: for each critiqued passage, whether it is the gold one, and p(Relevant).
    """

    answer: str
    retrieved: bool
    golds: tuple[str, ...] = ()
    relevance: tuple[tuple[bool, float], ...] = ()


@dataclass(frozen=True)
class Scores:
    """Figures of a set of rows; None where nothing in it can be judged so.

    Attributes:
        rows: answered rows.
        errors: rows that failed; they are in none of the shares below.
        graded: answered rows with gold answers: match, exact_match and f1 are means over them, in [0, 1].
        retrieval_rate: share of the answered rows that used a passage.
        match: share in which a gold answer's words stand in the answer.
        isrel_auc: how often p(Relevant) of a gold passage is above that of another, over all pairs.
    """

    rows: int
    errors: int
    graded: int
    retrieval_rate: float | None
    match: float | None
    exact_match: float | None
    f1: float | None
    isrel_auc: float | None


@dataclass
class Tally:
    """Adds outcomes up, a few numbers for each, so that a set of any size can pass by."""

    errors: int = 0
    retrieved: list[bool] = field(default_factory=list)
    matches: list[float] = field(default_factory=list)
    exacts: list[float] = field(default_factory=list)
    f1s: list[float] = field(default_factory=list)
    relevance: list[tuple[bool, float]] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count one answered row."""
        self.retrieved.append(outcome.retrieved)
        self.relevance.extend(outcome.relevance)
        if outcome.golds:
            self.matches.append(best(contains, outcome.answer, outcome.golds))
            self.exacts.append(best(exact, outcome.answer, outcome.golds))
            self.f1s.append(best(token_f1, outcome.answer, outcome.golds))

    def scores(self) -> Scores:
        """The figures of all rows counted so far."""
        return Scores(
            rows=len(self.retrieved),
            errors=self.errors,
            graded=len(self.matches),
            retrieval_rate=mean(self.retrieved),
            match=mean(self.matches),
            exact_match=mean(self.exacts),
            f1=mean(self.f1s),
            isrel_auc=auc(self.relevance),
        )


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None


def auc(judged: Sequence[tuple[bool, float]]) -> float | None:
    """Area under the ROC curve of (label, score) pairs; None without both labels."""
    from sklearn.metrics import roc_auc_score

    labels = [label for label, _ in judged]
    if len(set(labels)) < 2:
        return None
    return float(roc_auc_score(labels, [score for _, score in judged]))
