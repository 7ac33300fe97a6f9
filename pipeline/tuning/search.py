"""Searches for the fastest settings: one knob after the other, each on top of the best so far.

Pure: what a setting gains is measured by a function that the caller passes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from pipeline.config.loading import Frozen
from pipeline.tuning.knobs import Knob

# Trials of the configured settings.
CONFIGURED = 2
# Two measurements of the same settings differ by some percent; a difference of less than this is none.
LEAST_MARGIN = 0.05
# A unit that takes so many times as long as any unit with the best settings so far stops its trial as plainly slower.
# With as many units in flight, the seconds of a unit are in proportion to those of the whole (Little's law).
SLOWEST = 1.5
# Seconds that a unit may take in any case: an engine may hesitate for as long, for instance to compile a kernel.
HESITATION_S = 15.0
# Scores of the same answer that differ by more than this, on average, do not come from the same log-probabilities.
MOST_SHIFT = 0.1


class EngineTrial(Frozen):
    """The outcome of a trial.

    Attributes:
        number: number of the trial in its folder, from 1.
        settings: arguments of the engine by name, in addition to those configured.
        rate: rows per second of an actor; None if the trial does not count.
        changed: share of the rows answered as configured that have another answer, or none.
        shift: mean absolute difference of the scores of the same answers.
        longest: seconds of the slowest unit; None if the trial does not count.
        problem: why the trial does not count; empty if it does.
        stopped_after: seconds that a unit had taken when the trial was stopped as plainly slower; None if it was not.
    """

    number: int = 0
    settings: dict[str, Any] = Field(default_factory=dict)
    rate: Annotated[float, Field(gt=0)] | None = None
    changed: Annotated[float, Field(ge=0, le=1)] = 0.0
    shift: Annotated[float, Field(ge=0)] = 0.0
    longest: Annotated[float, Field(ge=0)] | None = None
    problem: str = ""
    stopped_after: float | None = None


# Measures settings, given the seconds that a unit may take (None: any).
Measure = Callable[[Mapping[str, Any], float | None], EngineTrial]


@dataclass(frozen=True)
class Tuned:
    """The outcome of a search.

    Attributes:
        configured: rows per second of an actor as configured.
        margin: relative difference of rates that is not due to chance.
        settings: best arguments of the engine, in addition to those configured; empty if nothing is faster.
        rate: rows per second with them.
        changed: share of the answers that they change.
        refused: fastest trial that changes too many answers or scores, if it is faster than the best.
        unconfirmed: best trial, if it was not faster when it was measured again.
    """

    configured: float
    margin: float
    settings: dict[str, Any]
    rate: float
    changed: float
    refused: EngineTrial | None
    unconfirmed: EngineTrial | None


@dataclass
class Search:
    """A search for the fastest settings that change few answers.

    Args:
        measure: measures settings.
        most_changed: share of the answers that settings may change, beyond what a repetition changes.

    Attributes:
        margin: relative difference of rates that is not due to chance.
        noise: share of the answers that a repetition changes.
        best: fastest trial so far of those that change few answers.
        refused: fastest trial so far of the others, if it was faster than the best at that time.
    """

    measure: Measure
    most_changed: float
    margin: float = LEAST_MARGIN
    noise: float = 0.0
    best: EngineTrial = field(default_factory=EngineTrial)
    refused: EngineTrial | None = None

    def run(self, knobs: Sequence[Knob]) -> Tuned:
        """Try the knobs and return the outcome.

        Raises:
            RuntimeError: the configured settings cannot be measured.
        """
        configured = self._measure_configured()
        for knob in knobs:
            self._try(knob)
        confirmed = self._confirm(configured)
        rate, found = (configured, EngineTrial()) if confirmed is None else (confirmed, self.best)
        refused = self.refused if self.refused and _rate(self.refused) > rate else None
        unconfirmed = self.best if confirmed is None and self.best.settings else None
        return Tuned(configured, self.margin, found.settings, rate, found.changed, refused, unconfirmed)

    def _measure_configured(self) -> float:
        """Measure the configured settings twice; the difference tells what is due to chance."""
        trials = list[EngineTrial]()
        while len(trials) < CONFIGURED:
            trials.append(self.measure({}, None))
            if trials[-1].rate is None:
                raise RuntimeError(f"the run as it is configured cannot be measured: {trials[-1].problem}")
        slow, fast = sorted(map(_rate, trials))
        self.margin = max(LEAST_MARGIN, fast / slow - 1)
        self.noise = trials[1].changed
        self.best = max(trials, key=_rate)
        return (slow + fast) / 2

    def _try(self, knob: Knob) -> None:
        """Try the values of a knob in their order, until they make the run slower; values that fail are passed over."""
        start, before = self.best.settings, 0.0
        for value in knob.values:
            trial = self.measure({**start, knob.argument: value}, self._limit())
            if _rate(trial) > _rate(self.best) * (1 + self.margin):
                self._consider(trial)
            if trial.rate is None and trial.stopped_after is None:
                continue
            if _rate(trial) < before * (1 - self.margin):
                return
            before = _rate(trial)

    def _limit(self) -> float:
        return SLOWEST * (self.best.longest or 0.0) + HESITATION_S

    def _consider(self, faster: EngineTrial) -> None:
        if self._allows(faster):
            self.best = faster
        elif self.refused is None or _rate(faster) > _rate(self.refused):
            self.refused = faster

    def _allows(self, trial: EngineTrial) -> bool:
        return trial.changed <= self.noise + self.most_changed and trial.shift <= MOST_SHIFT

    def _confirm(self, configured: float) -> float | None:
        """Measure the best settings again, since the fastest of many trials owes something to chance.

        Returns:
            Their mean rate; None if they are not faster after all, or are the configured ones.
        """
        if not self.best.settings:
            return None
        again = self.measure(self.best.settings, self._limit())
        rate = (_rate(self.best) + _rate(again)) / 2
        confirmed = again.rate is not None and self._allows(again) and rate > configured * (1 + self.margin)
        return rate if confirmed else None


def _rate(trial: EngineTrial) -> float:
    return trial.rate or 0.0


def list_first_trials(knobs: Sequence[Knob]) -> Iterator[dict[str, Any]]:
    """Yield the settings of each trial as if nothing were faster than configured; the search leaves some out."""
    yield from ({} for _ in range(CONFIGURED))
    yield from ({knob.argument: value} for knob in knobs for value in knob.values)
