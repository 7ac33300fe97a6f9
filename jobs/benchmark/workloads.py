"""Workloads of the benchmark: query sets of the demo's questions and instructions, in several forms.

The embedded model retrieves for questions and not for instructions (infra/demo/adapter/README.md), so that their mix
sets the retrieval rate.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow.parquet as pq

from jobs.demo import DEMO
from pipeline.decoding.types import Passage, RetrievedPassage

Row = dict[str, Any]
# Words of a short passage, and whole passages in a long one.
SHORT_WORDS, LONG_PASSAGES = 40, 3


@dataclass(frozen=True)
class Workload:
    """A query set and its decoding settings.

    Attributes:
        questions: share of the rows that are questions; the others are instructions.
        decoding: decoding settings in addition to the benchmark's own.
        choices: whether rows have a closed set of four answers.
        body: function that makes the given passages from retrieved ones; None if the run searches the index itself.
    """

    name: str
    questions: float = 1.0
    decoding: dict[str, Any] = field(default_factory=dict)
    choices: bool = False
    body: Callable[[Sequence[Passage]], list[Passage]] | None = None

    @property
    def short_form(self) -> bool:
        """Whether an answer is one segment, so that the released short-form steps apply."""
        return int(self.decoding.get("segments", 1)) == 1

    def replace_bodies(self, found: Sequence[RetrievedPassage]) -> list[RetrievedPassage]:
        """Return the found passages with the texts that the workload gives them."""
        if self.body is None:
            return list(found)
        passages = self.body([one.passage for one in found])
        return [replace(one, passage=passage) for one, passage in zip(found, passages, strict=True)]

    def build_rows(self, count: int) -> list[Row]:
        """Return so many rows, with questions and instructions spread evenly."""
        source = pq.read_table(DEMO / "queries_full.parquet", columns=["id", "query", "task", "answers"]).to_pylist()
        asked = [row for row in source if row["task"] == "qa"]
        told = [row for row in source if row["task"] == "instruction"]
        wanted = [round((n + 1) * self.questions) > round(n * self.questions) for n in range(count)]
        rows = {True: self._repeat_rounds(asked), False: self._repeat_rounds(told)}
        return [next(rows[question]) for question in wanted]

    def _repeat_rounds(self, source: Sequence[Row]) -> Iterator[Row]:
        """Yield all rows in endless rounds; from the second on, the round's number precedes id and query."""
        for place in itertools.count():
            round_, n = divmod(place, len(source))
            mark = f"{round_ + 1}: " if round_ else ""
            row: Row = {"id": f"{mark}{source[n]['id']}", "query": f"{mark}{source[n]['query']}"}
            if self.choices:
                row["choices"] = [source[(n + other) % len(source)]["answers"][0] for other in range(4)]
            yield row


def choose_names(parts: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """Return the names that begin with one of the parts; all names if no part is given.

    Raises:
        ValueError: no name begins with one of the parts.
    """
    for part in parts or ():
        if not any(name.startswith(part) for name in names):
            raise ValueError(f"--only {part!r}: no name starts with this; known names: {'; '.join(names)}")
    return [name for name in names if name.startswith(tuple(parts or [""]))]


def trim_passages(passages: Sequence[Passage]) -> list[Passage]:
    """Cut each passage to its first ``SHORT_WORDS`` words."""
    return [Passage(p.id, p.title, " ".join(p.text.split()[:SHORT_WORDS])) for p in passages]


def lengthen_passages(passages: Sequence[Passage]) -> list[Passage]:
    """Extend each passage with the next ones to ``LONG_PASSAGES`` whole passages."""
    texts = [p.text for p in passages]
    several = [" ".join((texts[n:] + texts[:n])[:LONG_PASSAGES]) for n in range(len(texts))]
    return [Passage(p.id, p.title, text) for p, text in zip(passages, several, strict=True)]


WORKLOADS = (
    Workload("short form, 50 % retrieve", questions=0.5),
    Workload("short form, 100 % retrieve"),
    Workload("short form, 0 % retrieve", questions=0.0),
    Workload("short passages", body=trim_passages),
    Workload("long passages", body=lengthen_passages),
    Workload("closed set", choices=True),
    Workload("long form, beam of 2", decoding={"segments": 3, "beam_width": 2, "mode": "always"}),
)
