"""Best, worst and random rows of an annotated set, with their evidence."""

import heapq
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config.sections import Columns
from pipeline.storage.location import Location
from pipeline.storage.parquet import read_columns

Floats = npt.NDArray[np.float64]

BEST, WORST, RANDOM = KINDS = ("best", "worst", "random")
# Of each kind, shared between the tasks that have any.
EXAMPLES = 8
MOST_TASKS = 8
SEED = 7
# No score lies so far out: rows with evidence go before the others, which lack two of the four parts of the score.
FAR = 1e6
LONGEST_TEXT = 2_000
LONGEST_PASSAGE = 1_200
# Characters of a shortened passage before its first marked word.
LEAD = 300
WORD = re.compile(r"\w+")
# Marked only between others: on their own they tell nothing.
SMALL_WORDS = frozenset(
    WORD.findall("a an and are as at be by for from has have in is it its of on or that the this to was were with")
)


@dataclass(frozen=True)
class Pick:
    """A row that may become an example.

    Attributes:
        key: those with the smallest become it.
        row: its place in the file.
    """

    task: str
    kind: str
    key: float
    file: Location
    row: int


def picks_of(
    file: Location, tasks: npt.NDArray[np.object_], scores: Floats, retrieved: npt.NDArray[np.bool_]
) -> tuple[Pick, ...]:
    """The candidates among a file's rows; the same ones each time.

    Args:
        tasks, scores, retrieved: of the rows, [N] each.
    """
    draws = np.random.default_rng([SEED, zlib.crc32(file.name.encode())]).random(len(tasks))
    keys = {BEST: -(scores + FAR * retrieved), WORST: scores + FAR * ~retrieved, RANDOM: draws}
    found = []
    for task in dict.fromkeys(tasks):
        rows = np.flatnonzero(tasks == task)
        for kind, key in keys.items():
            first = rows[np.argsort(key[rows], kind="stable")[:EXAMPLES]]
            found += [Pick(task, kind, float(key[row]), file, int(row)) for row in first]
    return tuple(found)


def keep(kept: dict[tuple[str, str], list[Pick]], more: Sequence[Pick], names: Mapping[str, str]) -> None:
    """Keep the best of what is kept and of some more, by task and kind.

    Args:
        names: of the tasks as they are counted, by their own.
    """
    found = defaultdict(list)
    for pick in more:
        found[names[pick.task], pick.kind].append(pick)
    for place, picks in found.items():
        kept[place] = heapq.nsmallest(EXAMPLES, [*kept.get(place, []), *picks], key=lambda pick: pick.key)


@dataclass(frozen=True)
class Piece:
    """A part of a text, marked where its words are the answer's."""

    text: str
    marked: bool


@dataclass(frozen=True)
class SourcePassage:
    """A passage that an answer rests on; ``number`` is what citations call it."""

    number: int
    id: str
    title: str
    pieces: tuple[Piece, ...]
    rank: int | None
    retrieval_score: float | None


@dataclass(frozen=True)
class Scored:
    """A segment of an answer; scores as in the output's column ``segments``."""

    text: str
    citation: int | None
    is_rel: float | None
    is_sup: float | None
    is_use: float | None
    sequence_probability: float | None
    score: float | None


@dataclass(frozen=True)
class ExampleRow:
    """A row of the set, its texts shortened.

    Attributes:
        kind: one of ``KINDS``.
    """

    kind: str
    task: str
    id: str
    query: str
    input: str
    answer: str
    retrieve_probability: float | None
    finish_reason: str
    segments: tuple[Scored, ...]
    sources: tuple[SourcePassage, ...]

    @property
    def score(self) -> float | None:
        """The mean of its segments' scores; None without any."""
        scores = [segment.score for segment in self.segments if segment.score is not None]
        return sum(scores) / len(scores) if scores else None


def examples(
    picks: Mapping[tuple[str, str], Sequence[Pick]], rows: Mapping[str, int], columns: Columns
) -> list[ExampleRow]:
    """Read the rows that were picked: of the largest tasks, and of each kind about as many.

    Args:
        rows: answered ones, by task.

    Raises:
        StorageError: a file cannot be read.
    """
    chosen = list(_chosen(picks, rows))
    by_file: defaultdict[str, list[Pick]] = defaultdict(list)
    for _, pick in chosen:
        by_file[pick.file.path].append(pick)
    names = [columns.id, columns.query, columns.input, "answer", "retrieve_probability", "finish_reason"]
    read: dict[tuple[str, int], Mapping[str, Any]] = {}
    for path, wanted in by_file.items():
        table = read_columns(wanted[0].file, [*names, "segments", "passages"]).take([pick.row for pick in wanted])
        read.update(((path, pick.row), row) for pick, row in zip(wanted, table.to_pylist(), strict=True))
    return [_example(pick.kind, task, read[pick.file.path, pick.row], columns) for task, pick in chosen]


def _chosen(picks: Mapping[tuple[str, str], Sequence[Pick]], rows: Mapping[str, int]) -> Iterator[tuple[str, Pick]]:
    """Each row once, with its task's name."""
    tasks = sorted((task for task in rows if rows[task]), key=lambda task: (-rows[task], task))[:MOST_TASKS]
    seen: set[tuple[str, int]] = set()
    for kind in KINDS:
        for task in tasks:
            each = min(EXAMPLES // len(tasks), -(-rows[task] // len(KINDS)))
            fresh = [p for p in picks.get((task, kind), []) if (p.file.path, p.row) not in seen][:each]
            seen |= {(pick.file.path, pick.row) for pick in fresh}
            yield from ((task, pick) for pick in fresh)


def _example(kind: str, task: str, row: Mapping[str, Any], columns: Columns) -> ExampleRow:
    answer = row["answer"] or ""
    segments = [Scored(**{name: s.get(name) for name in Scored.__annotations__}) for s in row["segments"] or []]
    sources = [
        SourcePassage(
            number, p["id"], p["title"] or "", pieces(p["text"] or "", answer), p["rank"], p["retrieval_score"]
        )
        for number, p in enumerate(row["passages"] or [], 1)
    ]
    return ExampleRow(
        kind=kind,
        task=task,
        id=str(row.get(columns.id)),
        query=shorten(row.get(columns.query) or ""),
        input=shorten(row.get(columns.input) or ""),
        answer=shorten(answer),
        retrieve_probability=row["retrieve_probability"],
        finish_reason=row.get("finish_reason") or "",
        segments=tuple(segments),
        sources=tuple(sources),
    )


def shorten(text: str, longest: int = LONGEST_TEXT) -> str:
    """At most so many characters, the last of them an ellipsis where there are more."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def pieces(text: str, answer: str) -> tuple[Piece, ...]:
    """A passage with the answer's words marked; a long one shortened around the first of them."""
    spans = _spans(text, answer)
    start = max(0, spans[0][0] - LEAD) if spans and len(text) > LONGEST_PASSAGE else 0
    end = min(len(text), start + LONGEST_PASSAGE)
    found, place = [Piece("…", False)] * bool(start), start
    for left, right in ((left, min(right, end)) for left, right in spans if left < end):
        found += [Piece(text[place:left], False), Piece(text[left:right], True)]
        place = right
    found += [Piece(text[place:end], False), Piece("…" * (end < len(text)), False)]
    return tuple(piece for piece in found if piece.text)


def _spans(text: str, answer: str) -> list[tuple[int, int]]:
    """From where to where words of the answer follow one another, small words only between others."""
    words = {word.casefold() for word in WORD.findall(answer)}
    spans: list[tuple[int, int]] = []
    follows = False
    for found in WORD.finditer(text):
        word = found[0].casefold()
        if word not in words:
            follows = False
        elif word not in SMALL_WORDS:
            spans.append((spans.pop()[0] if follows else found.start(), found.end()))
            follows = True
    return spans
