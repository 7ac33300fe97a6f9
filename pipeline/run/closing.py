"""Decides which units still begin before a run, or one of its nodes, ends early."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from time import time

from pipeline.config.sections import ExecutionConfig
from pipeline.output.unit_files import UnitSummary

# A unit is expected to take as long for each row as the slowest of this many units that ended last.
RECENT = 20
# Seconds before a node is gone in which the finished rows of its units are written.
KEEPING_S = 10.0


@dataclass(frozen=True)
class Budget:
    """The time that one call of a run may take.

    Attributes:
        seconds: seconds from the start of the actors.
        setting: the setting that limits them, with its value, for messages.
    """

    seconds: float
    setting: str

    @classmethod
    def of(cls, execution: ExecutionConfig) -> "Budget | None":
        """Return the budget, the smaller one if both time and cost are limited; None if neither is."""
        budgets = []
        if execution.max_hours is not None:
            budgets.append(cls(3600 * execution.max_hours, f"execution.max_hours = {execution.max_hours:g}"))
        if execution.max_cost is not None and execution.price_per_hour:
            hours = execution.max_cost / (execution.price_per_hour * execution.actors)
            budgets.append(cls(3600 * hours, f"execution.max_cost = {execution.max_cost:g}"))
        return min(budgets, key=lambda budget: budget.seconds, default=None)


@dataclass
class Closing:
    """The early end of a run, and the durations of its units, from which follows whether others still begin.

    Times are in seconds since the epoch.

    Attributes:
        until: time by which a unit must be expected to end, or it does not begin; None without a budget.
        recall_at: time when the units in flight are given back; None if they are not.
        refused: whether units are refused from now on.
        clock: returns the current time.
    """

    until: float | None = None
    recall_at: float | None = None
    refused: bool = False
    clock: Callable[[], float] = time
    _paces: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    @classmethod
    def of(cls, budget: Budget | None, earlier: Iterable[UnitSummary]) -> "Closing":
        """Return the state at the start of a call.

        Args:
            budget: budget of the call, which begins now.
            earlier: units of earlier calls.
        """
        closing = cls(time() + budget.seconds if budget else None)
        timed = [(unit.ended, unit.began, unit.rows) for unit in earlier if unit.ended and unit.began and unit.rows]
        for ended, began, rows in sorted(timed):
            closing.add(rows, ended - began)
        return closing

    def add(self, rows: int, seconds: float) -> None:
        """Note the duration of a unit."""
        self._paces.append(seconds / rows)

    def may_begin(self, rows: int) -> bool:
        """Whether a unit may begin; as long as no duration is known, it may until the budget is spent."""
        if self.until is not None and self._expect_end(rows) > self.until:
            self.refused = True
        return not self.refused

    def _expect_end(self, rows: int) -> float:
        return self.clock() + max(self._paces, default=0.0) * rows

    def recall(self, seconds: float) -> None:
        """Refuse further units, and have those in flight given back after some seconds."""
        self.refused = True
        self.recall_at = self.clock() + seconds

    def compute_respite(self, node: str, draining: Mapping[str, int]) -> float | None:
        """Return the seconds until a node gives back its units in flight, at least 0; None if it does not.

        Args:
            node: id of the node.
            draining: time when each node that is being drained will be gone, in milliseconds; 0 if unknown.
        """
        times = [] if self.recall_at is None else [self.recall_at]
        if draining.get(node):
            times.append(draining[node] / 1000 - KEEPING_S)
        return max(min(times) - self.clock(), 0.0) if times else None
