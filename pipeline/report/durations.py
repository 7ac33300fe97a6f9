"""Computes when an annotated set was produced, its throughput over time, and the latencies of its rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipeline.output.unit_files import UnitSummary

Floats = npt.NDArray[np.float64]

# A gap of more seconds than this with no unit in progress is a pause. Starting an engine alone takes longer.
PAUSE = 10.0
# Number of parts that the time without pauses is cut into, however long it is.
PARTS = 120
# Bin edges in seconds, one percent apart: quantiles are exact to half a percent, whatever the number of rows.
EDGES = np.geomspace(1e-3, 1e6, 2084)


@dataclass(frozen=True)
class Rate:
    """Throughput in a part of a stretch.

    Attributes:
        began, ended: start and end of the part, in seconds since the epoch.
        rows: rows per second.
        tokens: generated tokens per second.
    """

    began: float
    ended: float
    rows: float
    tokens: float


@dataclass(frozen=True)
class Stretch:
    """A period without pauses.

    Attributes:
        began, ended: start and end of the stretch, in seconds since the epoch.
        rows: number of rows annotated in the stretch.
        tokens: number of tokens generated in the stretch.
        rates: throughput in each part of the stretch, in order.
    """

    began: float
    ended: float
    rows: int
    tokens: int
    rates: tuple[Rate, ...]

    @property
    def seconds(self) -> float:
        """Length of the stretch in seconds."""
        return self.ended - self.began


@dataclass(frozen=True)
class Timeline:
    """The stretches in which a set was annotated.

    Attributes:
        stretches: all stretches, in order; empty if no file records times.
        rows: number of rows in the units whose times are known.
        prompt_tokens: number of prompt tokens in these units.
        generated_tokens: number of generated tokens in these units.
    """

    stretches: tuple[Stretch, ...]
    rows: int
    prompt_tokens: int
    generated_tokens: int

    @property
    def busy(self) -> float:
        """Total seconds of all stretches, without the pauses between them."""
        return sum(stretch.seconds for stretch in self.stretches)

    @property
    def pauses(self) -> list[float]:
        """Seconds between each stretch and the next."""
        return [after.began - before.ended for before, after in pairwise(self.stretches)]

    def compute_rate(self, amount: float) -> float | None:
        """Divide an amount of the whole set by the busy seconds; None if no times are known."""
        return amount / self.busy if self.busy else None


def build_timeline(units: Sequence[UnitSummary]) -> Timeline:
    """Group units into stretches by their times; units without times are left out."""
    timed = sorted((unit for unit in units if unit.began and unit.ended), key=_get_begin)
    together: list[list[UnitSummary]] = []
    end = -np.inf
    for unit in timed:
        if _get_begin(unit) - end > PAUSE:
            together.append([])
        together[-1].append(unit)
        end = max(end, _get_end(unit))
    busy = sum(_measure_span(group) for group in together)
    return Timeline(
        tuple(_build_stretch(group, busy) for group in together),
        sum(unit.rows for unit in timed),
        sum(unit.prompt_tokens for unit in timed),
        sum(unit.generated_tokens for unit in timed),
    )


def _get_begin(unit: UnitSummary) -> float:
    return unit.began or 0.0


def _get_end(unit: UnitSummary) -> float:
    return unit.ended or 0.0


def _measure_span(units: Sequence[UnitSummary]) -> float:
    return max(map(_get_end, units)) - _get_begin(units[0])


def _build_stretch(units: Sequence[UnitSummary], busy: float) -> Stretch:
    """Build the stretch of units that have no pause between them.

    The rows and tokens of a unit are spread evenly over its time. The stretch is cut into parts in proportion to its
    length: ``PARTS`` for all stretches together.

    Args:
        units: the units of the stretch, by start.
        busy: total seconds of all stretches.
    """
    began, ended = _get_begin(units[0]), max(map(_get_end, units))
    parts = max(1, round(PARTS * (ended - began) / busy)) if busy else 1
    edges = np.linspace(began, ended, parts + 1)
    begun = np.array([_get_begin(unit) for unit in units])
    taken = np.maximum(np.array([_get_end(unit) for unit in units]) - begun, 1e-9)
    amounts = np.array([(unit.rows, unit.generated_tokens) for unit in units], np.float64)
    done = np.stack([np.clip((edge - begun) / taken, 0.0, 1.0) @ amounts for edge in edges])
    speeds = np.diff(done, axis=0) / max((ended - began) / parts, 1e-9)
    rates = tuple(
        Rate(float(left), float(right), float(rows), float(tokens))
        for left, right, (rows, tokens) in zip(edges[:-1], edges[1:], speeds, strict=True)
    )
    total_rows = sum(unit.rows for unit in units)
    total_tokens = sum(unit.generated_tokens for unit in units)
    return Stretch(began, ended, total_rows, total_tokens, rates)


@dataclass(frozen=True, eq=False)
class Durations:
    """A histogram of the seconds that rows took, in bins one percent wide.

    Attributes:
        counts: int64 [len(EDGES) + 1], number of rows between two edges; rows below the first edge count as 0 seconds.
        total: sum of the seconds of all rows.
    """

    counts: npt.NDArray[np.int64]
    total: float

    @classmethod
    def of(cls, seconds: Floats) -> "Durations":
        """Count the seconds of rows; NaN is left out."""
        known = seconds[np.isfinite(seconds)]
        places = np.searchsorted(EDGES, known, side="right")
        return cls(np.bincount(places, minlength=len(EDGES) + 1), float(known.sum()))

    def __add__(self, other: "Durations") -> "Durations":
        return Durations(self.counts + other.counts, self.total + other.total)

    @property
    def rows(self) -> int:
        """Number of rows with a known duration."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float | None:
        """Return a quantile in seconds, such as the median for a share of 0.5; None if there are no rows."""
        if not self.rows:
            return None
        place = int(np.searchsorted(np.cumsum(self.counts), np.ceil(share * self.rows)))
        return 0.0 if place == 0 else float(np.sqrt(EDGES[place - 1] * EDGES[min(place, len(EDGES) - 1)]))
