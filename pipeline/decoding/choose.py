"""The last step: choose the answer among all competing paths, and build its text with citations."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from pipeline.decoding.beam import rank_key
from pipeline.decoding.types import Path, RetrievedPassage, Segment


def choose(paths: Sequence[Path], choices: Sequence[str] = ()) -> tuple[Path, str | None]:
    """Choose the best path; for a closed set, the best path of the choice with the highest summed score.

    Returns:
        The path and the choice that it names. The choice is None for open questions, or if no path names one.
    """
    ranked = sorted(paths, key=rank_key)
    named = [match_choice(join_text(path.segments), choices) for path in ranked]
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for path, choice in zip(ranked, named, strict=True):
        if choice is not None:
            scores[choice].append(path.score)
    if not scores:
        return ranked[0], None
    # Sums can be negative, since utility scores range from -1 to 1.
    winner = max(sorted(scores), key=lambda choice: math.fsum(scores[choice]))
    return ranked[named.index(winner)], winner


def match_choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the choice that a text equals or begins with, ignoring case and surrounding punctuation.

    ``"b."`` and ``"B: because"`` name ``"B"``; ``"Because"`` does not. ``"A dog"`` does not name ``"A"``: more text
    may follow a one-letter choice only after a punctuation mark or on a new line. If several choices match, the
    longest is returned; if none does, None.
    """
    fitting = [choice for choice in choices if strip_label(choice) and _begins_with(text, strip_label(choice))]
    return max(fitting, key=len, default=None)


def _begins_with(text: str, choice: str) -> bool:
    mark = r"[^\w\s+\-]|\n" if len(choice) == 1 else r"\W"
    return re.match(rf"[{OPENING}\s]*{re.escape(choice)}(?:[^\S\n]*$|{mark})", text, re.IGNORECASE) is not None


def join_text(segments: Sequence[Segment]) -> str:
    """Join the texts of the segments."""
    return " ".join(segment.text for segment in segments if segment.text)


def list_cited_passages(segments: Sequence[Segment]) -> tuple[RetrievedPassage, ...]:
    """Return each passage that the text rests on once, in the order of first use; citation n is at index n - 1."""
    used: dict[str, RetrievedPassage] = {}
    for segment in segments:
        for read in list_cited(segment):
            used.setdefault(read.passage.id, read)
    return tuple(used.values())


def list_cited(segment: Segment) -> tuple[RetrievedPassage, ...]:
    """Return the passages that a segment cites; empty without passage or text.

    No critic can tell from which of the passages read together the words come, so all of them are cited.
    """
    return segment.evidence.read if segment.evidence is not None and segment.text else ()


def number_citations(segments: Sequence[Segment]) -> list[tuple[int, ...]]:
    """Return the citation numbers of each segment (see :func:`list_cited_passages`); empty without passage or text."""
    numbers = {used.passage.id: n for n, used in enumerate(list_cited_passages(segments), 1)}
    return [tuple(numbers[read.passage.id] for read in list_cited(segment)) for segment in segments]


def join_cited_text(segments: Sequence[Segment]) -> str:
    """Join the texts of the segments, each followed by its citation numbers, as in ``Paris. [1]``."""
    pairs = zip(segments, number_citations(segments), strict=True)
    return " ".join(add_citations(segment.text, numbers) for segment, numbers in pairs if segment.text)


def add_citations(text: str, numbers: Sequence[int]) -> str:
    """Append citation numbers to a text, as in ``Paris. [1] [2]``."""
    return " ".join([text, *(f"[{number}]" for number in numbers)])


# Punctuation around a label, as in (B) or "b."; OPENING is escaped because it is also used in a character class.
OPENING = "\"'`(\\[{*"


CLOSING = "\"'`)]}*.,:;!?"


def strip_label(text: str) -> str:
    """Strip punctuation around a label; signs that may be part of it, as in "-1" and "C++", are kept."""
    return text.strip().lstrip(OPENING).rstrip(CLOSING).strip()
