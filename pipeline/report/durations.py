"""When a set was annotated and how fast, and how long its rows took."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipeline.output.folder import UnitSummary

Floats = npt.NDArray[np.float64]

# With no unit at work for longer than this (seconds), the run stood still; an engine alone takes longer to start.
PAUSE = 10.0
# Parts that the working time is cut into, however long it was.
PARTS = 120
# Seconds, a hundredth apart: quantiles are exact to half a percent, whatever the number of rows.
EDGES = np.geomspace(1e-3, 1e6, 2084)


@dataclass(frozen=True)
class Rate:
    """How fast a part of a stretch was: rows and generated tokens per second; times in seconds since the epoch."""

    began: float
    ended: float
    rows: float
    tokens: float


@dataclass(frozen=True)
class Stretch:
    """A time without pauses.

    Attributes:
        began, ended: seconds since the epoch.
        rows, tokens: annotated and generated in it.
        rates: of its parts, in order.
    """

    began: float
    ended: float
    rows: int
    tokens: int
    rates: tuple[Rate, ...]

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.ended - self.began


@dataclass(frozen=True)
class Timeline:
    """All stretches of a set, in order; none where its files say no times.

    Attributes:
        rows, prompt_tokens, generated_tokens: of the units whose times are known.
    """

    stretches: tuple[Stretch, ...]
    rows: int
    prompt_tokens: int
    generated_tokens: int

    @property
    def busy(self) -> float:
        """Seconds with a unit at work, pauses left out."""
        return sum(stretch.seconds for stretch in self.stretches)

    @property
    def pauses(self) -> list[float]:
        """Seconds between one stretch and the next."""
        return [after.began - before.ended for before, after in pairwise(self.stretches)]

    def per_second(self, amount: float) -> float | None:
        """An amount of the whole set per busy second; None where that is unknown."""
        return amount / self.busy if self.busy else None


def timeline(units: Sequence[UnitSummary]) -> Timeline:
    """When the units were annotated; those without times are left out."""
    timed = sorted((unit for unit in units if unit.began and unit.ended), key=_began)
    together: list[list[UnitSummary]] = []
    end = -np.inf
    for unit in timed:
        if _began(unit) - end > PAUSE:
            together.append([])
        together[-1].append(unit)
        end = max(end, _ended(unit))
    busy = sum(_span(group) for group in together)
    return Timeline(
        tuple(_stretch(group, busy) for group in together),
        sum(unit.rows for unit in timed),
        sum(unit.prompt_tokens for unit in timed),
        sum(unit.generated_tokens for unit in timed),
    )


def _began(unit: UnitSummary) -> float:
    return unit.began or 0.0


def _ended(unit: UnitSummary) -> float:
    return unit.ended or 0.0


def _span(units: Sequence[UnitSummary]) -> float:
    return max(map(_ended, units)) - _began(units[0])


def _stretch(units: Sequence[UnitSummary], busy: float) -> Stretch:
    """Units whose times touch; a unit's rows are spread evenly over its time."""
    began, ended = _began(units[0]), max(map(_ended, units))
    parts = max(1, round(PARTS * (ended - began) / busy)) if busy else 1
    edges = np.linspace(began, ended, parts + 1)
    begun = np.array([_began(unit) for unit in units])
    taken = np.maximum(np.array([_ended(unit) for unit in units]) - begun, 1e-9)
    amounts = np.array([(unit.rows, unit.generated_tokens) for unit in units], np.float64)
    done = np.stack([np.clip((edge - begun) / taken, 0.0, 1.0) @ amounts for edge in edges])
    speeds = np.diff(done, axis=0) / max((ended - began) / parts, 1e-9)
    rates = tuple(
        Rate(float(left), float(right), float(rows), float(tokens))
        for left, right, (rows, tokens) in zip(edges[:-1], edges[1:], speeds, strict=True)
    )
    return Stretch(began, ended, sum(u.rows for u in units), sum(u.generated_tokens for u in units), rates)


@dataclass(frozen=True, eq=False)
class Durations:
    """How long rows took, in bins a hundredth apart.

    Attributes:
        counts: int64 [len(EDGES) + 1], rows between two edges; what is below the first counts as 0.
        total: seconds of all rows together.
    """

    counts: npt.NDArray[np.int64]
    total: float

    @classmethod
    def of(cls, seconds: Floats) -> "Durations":
        """Of some rows; NaN is left out."""
        known = seconds[np.isfinite(seconds)]
        places = np.searchsorted(EDGES, known, side="right")
        return cls(np.bincount(places, minlength=len(EDGES) + 1), float(known.sum()))

    def __add__(self, other: "Durations") -> "Durations":
        return Durations(self.counts + other.counts, self.total + other.total)

    @property
    def rows(self) -> int:
        """Rows that say how long they took."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float | None:
        """Seconds that this share of the rows did not exceed; None of no rows."""
        if not self.rows:
            return None
        place = int(np.searchsorted(np.cumsum(self.counts), np.ceil(share * self.rows)))
        return 0.0 if place == 0 else float(np.sqrt(EDGES[place - 1] * EDGES[min(place, len(EDGES) - 1)]))
