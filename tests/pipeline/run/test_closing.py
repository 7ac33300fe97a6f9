from typing import Any

import pytest

from pipeline.config.sections import ExecutionConfig
from pipeline.output.unit_files import UnitSummary
from pipeline.run.closing import KEEPING_S, Budget, Closing


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"max_hours": 1.5}, Budget(5400, "execution.max_hours = 1.5")),
        ({"max_cost": 6, "price_per_hour": 2, "actors": 4}, Budget(2700, "execution.max_cost = 6")),
        ({"max_cost": 6, "price_per_hour": 2, "max_hours": 3}, Budget(10800, "execution.max_hours = 3")),
        ({"max_cost": 6, "price_per_hour": 2, "max_hours": 3.5}, Budget(10800, "execution.max_cost = 6")),
    ],
)
def test_budget_is_the_smaller_one(settings: dict[str, Any], expected: Budget | None) -> None:
    assert Budget.of(ExecutionConfig(**settings)) == expected


@pytest.mark.parametrize("price", [None, 0.0])
def test_cost_needs_a_price(price: float | None) -> None:
    with pytest.raises(ValueError, match="max_cost needs price_per_hour"):
        ExecutionConfig(max_cost=5, price_per_hour=price)


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_unit_begins_if_it_ends_in_time_when_it_takes_as_long_as_the_slowest() -> None:
    clock = Clock()
    closing = Closing(until=1100.0, clock=clock)
    assert closing.may_begin(10**6)  # no duration is known
    closing.add(rows=10, seconds=20)
    closing.add(rows=10, seconds=50)  # five seconds a row
    closing.add(rows=10, seconds=30)
    clock.now = 1049.9
    assert (closing.may_begin(10), closing.refused) == (True, False)
    clock.now = 1050.1
    assert (closing.may_begin(10), closing.refused) == (False, True)
    assert closing.may_begin(1) is False  # the run ends, and no smaller unit keeps it waiting


def test_spent_budget_refuses_units_of_unknown_duration() -> None:
    clock = Clock()
    assert Closing(until=1000.1, clock=clock).may_begin(1)
    clock.now = 1000.2
    assert not Closing(until=1000.1, clock=clock).may_begin(1)


def test_run_without_a_budget_refuses_nothing() -> None:
    closing = Closing()
    closing.add(rows=1, seconds=1e9)
    assert closing.may_begin(10**9)


def test_slow_unit_is_forgotten_after_twenty_others() -> None:
    clock = Clock()
    closing = Closing(until=1100.0, clock=clock)
    closing.add(rows=1, seconds=1000)
    for _ in range(20):
        closing.add(rows=1, seconds=99)
    assert closing.may_begin(1)


def test_units_of_earlier_calls_tell_how_long_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.run.closing.time", lambda: 5000.0)
    earlier = [
        UnitSummary("a", 10, began=100.0, ended=200.0),
        UnitSummary("b", 10, began=100.0, ended=110.0),
        UnitSummary("c", 10),
    ]
    closing = Closing.of(Budget(90, "set"), earlier)
    assert closing.until == 5090.0
    closing.clock = lambda: 5000.0
    assert closing.may_begin(8)  # ten seconds a row
    assert not closing.may_begin(10)
    assert Closing.of(None, earlier).until is None


def test_recalled_run_refuses_units_and_gives_back_those_in_flight() -> None:
    clock = Clock()
    closing = Closing(clock=clock)
    assert closing.compute_respite("node", {}) is None
    closing.recall(20)
    clock.now = 1005.0
    assert closing.compute_respite("node", {}) == 15
    assert closing.refused
    assert not closing.may_begin(1)
    clock.now = 1100.0
    assert closing.compute_respite("node", {}) == 0


def test_node_that_is_drained_gives_back_its_units_before_it_is_gone() -> None:
    closing = Closing(clock=Clock())
    draining = {"spot": 1_030_000, "soon": 1_005_000, "some day": 0}
    assert closing.compute_respite("spot", draining) == 30 - KEEPING_S
    assert closing.compute_respite("soon", draining) == 0
    assert closing.compute_respite("some day", draining) is None
    assert closing.compute_respite("other", draining) is None
    closing.recall(5)
    assert closing.compute_respite("spot", draining) == 5
    assert closing.may_begin(1) is False
