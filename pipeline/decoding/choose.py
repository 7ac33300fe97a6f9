"""The last step: the answer among all paths that compete to be it, and its text."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from pipeline.decoding.beam import rank_key
from pipeline.decoding.types import Path, RetrievedPassage, Segment


def choose(paths: Sequence[Path], choices: Sequence[str] = ()) -> tuple[Path, str | None]:
    """The best path; for a closed set, the best one of the answer with the highest summed score.

    Returns:
        The path, and the choice that it stands for: None for open questions, and where no path names a choice.
    """
    ranked = sorted(paths, key=rank_key)
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for path in ranked:
        if (answer := closed_answer(plain_text(path.segments), choices)) is not None:
            scores[answer].append(path.score)
    if not scores:
        return ranked[0], None
    # Scores can be negative: utility is worth -1 to 1.
    winner = max(sorted(scores), key=lambda answer: math.fsum(scores[answer]))
    return next(path for path in ranked if closed_answer(plain_text(path.segments), choices) == winner), winner


def closed_answer(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a text names: equal to it, or beginning with it; case and outer punctuation do not count.

    ``"b."`` and ``"B: because"`` name ``"B"``; ``"Because"`` does not, nor does ``"A dog"`` name ``"A"``: after
    a choice of one letter, words may follow only behind a punctuation mark or on a new line. None where no choice is
    named; the longest where several are.
    """
    fitting = [choice for choice in choices if label(choice) and _begins_with(text, label(choice))]
    return max(fitting, key=len, default=None)


def _begins_with(text: str, choice: str) -> bool:
    mark = r"[^\w\s+\-]|\n" if len(choice) == 1 else r"\W"
    return re.match(rf"[{OPENING}\s]*{re.escape(choice)}(?:[^\S\n]*$|{mark})", text, re.IGNORECASE) is not None


def plain_text(segments: Sequence[Segment]) -> str:
    """The segments' texts in one."""
    return " ".join(segment.text for segment in segments if segment.text)


def cited_passages(segments: Sequence[Segment]) -> tuple[RetrievedPassage, ...]:
    """The passages that the text rests on, each once, in the order of first use: number n is place n - 1."""
    used: dict[str, RetrievedPassage] = {}
    for segment in segments:
        if segment.evidence is not None and segment.text:
            used.setdefault(segment.evidence.passage.id, segment.evidence)
    return tuple(used.values())


def citation_numbers(segments: Sequence[Segment]) -> list[int | None]:
    """Each segment's number in :func:`cited_passages`; None without a passage or without text."""
    numbers = {used.passage.id: n for n, used in enumerate(cited_passages(segments), 1)}
    return [numbers[s.evidence.passage.id] if s.evidence is not None and s.text else None for s in segments]


def cited_text(segments: Sequence[Segment]) -> str:
    """The segments' texts in one, each followed by the number of its passage, as in ``Paris. [1]``."""
    numbered = zip(segments, citation_numbers(segments), strict=True)
    return " ".join(s.text if n is None else f"{s.text} [{n}]" for s, n in numbered if s.text)


# Marks around a label, as in (B) or "b."; escaped for use in a character class too.
OPENING = "\"'`(\\[{*"


CLOSING = "\"'`)]}*.,:;!?"


def label(text: str) -> str:
    """A label without what is put around it; signs that may be part of it, as in "-1" and "C++", stay."""
    return text.strip().lstrip(OPENING).rstrip(CLOSING).strip()
