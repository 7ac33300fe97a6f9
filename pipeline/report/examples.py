"""Selects the best, worst and random rows of an annotated set, and reads them with their evidence."""

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
from pipeline.storage.parquet import RowRange, read_range

Floats = npt.NDArray[np.float64]

BEST, WORST, RANDOM = KINDS = ("best", "worst", "random")
# Examples of each kind, divided among the tasks that have answered rows.
EXAMPLES = 8
MOST_TASKS = 8
SEED = 7
# Exceeds every score, so that rows with evidence rank before the others: without evidence, two of the four parts of
# the score are missing.
FAR = 1e6
LONGEST_TEXT = 2_000
LONGEST_PASSAGE = 1_200
# Maximum characters of a shortened passage before its first marked word.
LEAD = 300
WORD = re.compile(r"\w+")
# Marked only between other marked words: on their own they mean nothing.
SMALL_WORDS = frozenset(
    WORD.findall("a an and are as at be by for from has have in is it its of on or that the this to was were with")
)


@dataclass(frozen=True)
class Pick:
    """A candidate for an example.

    Attributes:
        task: task of the row.
        kind: one of ``KINDS``.
        key: sort key; the candidates with the smallest keys become examples.
        file: data file that holds the row.
        row: position of the row in the file.
    """

    task: str
    kind: str
    key: float
    file: Location
    row: int


def pick_rows(
    file: Location, tasks: npt.NDArray[np.object_], scores: Floats, retrieved: npt.NDArray[np.bool_]
) -> tuple[Pick, ...]:
    """Choose the candidates of each task and kind among the N rows of a file; deterministic.

    Args:
        file: data file that holds the rows.
        tasks: [N], task of each row.
        scores: float64 [N], score of each row.
        retrieved: bool [N], whether each row used a passage.
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


def keep_best(kept: dict[tuple[str, str], list[Pick]], more: Sequence[Pick], names: Mapping[str, str]) -> None:
    """Add candidates to ``kept``, which keeps the best ``EXAMPLES`` of each task and kind.

    Args:
        kept: candidates by task and kind; changed in place.
        more: candidates to add.
        names: reported name of each task; several tasks may share one.
    """
    found = defaultdict(list)
    for pick in more:
        found[names[pick.task], pick.kind].append(pick)
    for place, picks in found.items():
        kept[place] = heapq.nsmallest(EXAMPLES, [*kept.get(place, []), *picks], key=lambda pick: pick.key)


@dataclass(frozen=True)
class Piece:
    """A part of a passage; ``marked`` if its words also occur in the answer."""

    text: str
    marked: bool


@dataclass(frozen=True)
class SourcePassage:
    """A passage that an answer is based on; ``number`` is its number in citations."""

    number: int
    id: str
    title: str
    pieces: tuple[Piece, ...]
    rank: int | None
    retrieval_score: float | None


@dataclass(frozen=True)
class Scored:
    """A segment of an answer, with citations and scores from the output's column ``segments``."""

    text: str
    citation: int | None
    further_citations: list[int] | None
    is_rel: float | None
    is_sup: float | None
    is_use: float | None
    sequence_probability: float | None
    score: float | None


@dataclass(frozen=True)
class ExampleRow:
    """An example: a row of the set with shortened texts.

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
        """Mean score of the segments, or None if no segment has a score."""
        scores = [segment.score for segment in self.segments if segment.score is not None]
        return sum(scores) / len(scores) if scores else None


def read_examples(
    picks: Mapping[tuple[str, str], Sequence[Pick]], rows: Mapping[str, int], columns: Columns
) -> list[ExampleRow]:
    """Choose examples from the candidates of the ``MOST_TASKS`` largest tasks, and read their rows.

    Args:
        picks: candidates by task and kind, best first.
        rows: number of answered rows of each task.
        columns: names of the columns of the query set.

    Raises:
        ValueError: a file is damaged.
        StorageError: a file cannot be read.
    """
    chosen = list(_choose_picks(picks, rows))
    by_file: defaultdict[str, list[Pick]] = defaultdict(list)
    for _, pick in chosen:
        by_file[pick.file.path].append(pick)
    names = [columns.id, columns.query, columns.input, "answer", "retrieve_probability", "finish_reason"]
    read: dict[tuple[str, int], Mapping[str, Any]] = {}
    for path, wanted in by_file.items():
        numbers = sorted(pick.row for pick in wanted)
        for row, values in _read_rows(wanted[0].file, numbers, [*names, "segments", "passages"]):
            read[path, row] = values
    return [_build_example(pick.kind, task, read[pick.file.path, pick.row], columns) for task, pick in chosen]


def _read_rows(file: Location, rows: Sequence[int], names: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield rows of a file with their numbers, which are sorted; a batch at a time is in memory."""
    for start, batch in read_range(RowRange(file, rows[0], rows[-1] + 1), names):
        here = [row for row in rows if start <= row < start + batch.num_rows]
        yield from ((row, batch.slice(row - start, 1).to_pylist()[0]) for row in here)


def _choose_picks(
    picks: Mapping[tuple[str, str], Sequence[Pick]], rows: Mapping[str, int]
) -> Iterator[tuple[str, Pick]]:
    """Yield the chosen candidates with their reported tasks; no row is chosen for two kinds.

    Each kind gets at most a third of a task's rows, rounded up, so that a small task can show rows of all kinds.
    """
    tasks = sorted((task for task in rows if rows[task]), key=lambda task: (-rows[task], task))[:MOST_TASKS]
    seen: set[tuple[str, int]] = set()
    for kind in KINDS:
        for task in tasks:
            each = min(EXAMPLES // len(tasks), -(-rows[task] // len(KINDS)))
            fresh = [p for p in picks.get((task, kind), []) if (p.file.path, p.row) not in seen][:each]
            seen |= {(pick.file.path, pick.row) for pick in fresh}
            yield from ((task, pick) for pick in fresh)


def _build_example(kind: str, task: str, row: Mapping[str, Any], columns: Columns) -> ExampleRow:
    answer = row["answer"] or ""
    segments = tuple(map(_to_scored, row["segments"] or []))
    sources = tuple(_to_source(number, passage, answer) for number, passage in enumerate(row["passages"] or [], 1))
    return ExampleRow(
        kind=kind,
        task=task,
        id=str(row.get(columns.id)),
        query=shorten_text(row.get(columns.query) or ""),
        input=shorten_text(row.get(columns.input) or ""),
        answer=shorten_text(answer),
        retrieve_probability=row["retrieve_probability"],
        finish_reason=row.get("finish_reason") or "",
        segments=segments,
        sources=sources,
    )


def _to_scored(segment: Mapping[str, Any]) -> Scored:
    values: dict[str, Any] = {name: segment.get(name) for name in Scored.__annotations__}
    return Scored(**values)


def _to_source(number: int, passage: Mapping[str, Any], answer: str) -> SourcePassage:
    pieces = mark_words(passage["text"] or "", answer)
    title, rank, score = passage["title"] or "", passage["rank"], passage["retrieval_score"]
    return SourcePassage(number, passage["id"], title, pieces, rank, score)


def shorten_text(text: str, longest: int = LONGEST_TEXT) -> str:
    """Cut a text to at most ``longest`` characters; a cut text ends with an ellipsis."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def mark_words(text: str, answer: str) -> tuple[Piece, ...]:
    """Mark the words of the answer in a passage; a long passage is shortened around the first marked word."""
    spans = _find_spans(text, answer)
    start = max(0, spans[0][0] - LEAD) if spans and len(text) > LONGEST_PASSAGE else 0
    end = min(len(text), start + LONGEST_PASSAGE)
    found = [Piece("…", False)] if start else []
    place = start
    for left, right in spans:
        if left < end:
            stop = min(right, end)
            found += [Piece(text[place:left], False), Piece(text[left:stop], True)]
            place = stop
    found += [Piece(text[place:end], False), Piece("…" * (end < len(text)), False)]
    return tuple(piece for piece in found if piece.text)


def _find_spans(text: str, answer: str) -> list[tuple[int, int]]:
    """Return start and end of each run of consecutive answer words; small words neither begin nor end a run."""
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
