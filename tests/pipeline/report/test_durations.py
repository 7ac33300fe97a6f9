import numpy as np
import pytest

from pipeline.output.unit_files import UnitSummary
from pipeline.report.durations import PARTS, PAUSE, Durations, build_timeline


def unit(began: float | None, ended: float | None, rows: int = 10, tokens: int = 100) -> UnitSummary:
    return UnitSummary("u", rows, generated_tokens=tokens, prompt_tokens=1000, began=began, ended=ended)


def test_overlapping_units_form_one_period_and_pauses_separate_periods():
    units = [unit(1000, 1040), unit(500, 560), unit(540, 600), unit(1039, 1060)]
    found = build_timeline(units)
    assert [(s.began, s.ended, s.rows, s.tokens) for s in found.stretches] == [
        (500, 600, 20, 200),
        (1000, 1060, 20, 200),
    ]
    assert (found.busy, found.pauses, found.rows) == (160, [400], 40)
    assert found.compute_rate(found.rows) == 0.25


def test_short_wait_is_not_a_pause():
    assert len(build_timeline([unit(0.5, 10), unit(10 + PAUSE, 30)]).stretches) == 1
    assert len(build_timeline([unit(0.5, 10), unit(10.1 + PAUSE, 30)]).stretches) == 2


def test_rows_are_spread_over_the_duration_of_their_unit():
    found = build_timeline(
        [unit(100, 160, rows=60), unit(130, 220, rows=90)]
    )  # a row a second each, both for half a minute
    (stretch,) = found.stretches
    assert len(stretch.rates) == PARTS
    by_time = {rate.began: rate for rate in stretch.rates}
    assert [by_time[t].rows for t in (100, 110, 140, 200)] == pytest.approx([1, 1, 2, 1])
    assert sum(rate.rows * (rate.ended - rate.began) for rate in stretch.rates) == pytest.approx(150)
    assert sum(rate.tokens * (rate.ended - rate.began) for rate in stretch.rates) == pytest.approx(200)


def test_periods_divide_the_bins_by_their_length():
    found = build_timeline([unit(0.5, 30.5), unit(1000, 1010)])
    assert [len(stretch.rates) for stretch in found.stretches] == [90, 30]


def test_timeline_of_units_without_times_is_empty():
    found = build_timeline([unit(None, None)])
    assert (found.stretches, found.busy, found.compute_rate(10)) == ((), 0, None)


def test_units_of_zero_duration_have_no_rate():
    found = build_timeline([unit(7, 7)])
    assert (found.busy, found.compute_rate(10), found.stretches[0].rows) == (0, None, 10)


def test_merged_quantiles_are_exact_to_half_a_percent():
    seconds = np.random.default_rng(1).lognormal(1.0, 1.5, 20_000)
    found = Durations.of(seconds[:5000]) + Durations.of(seconds[5000:])
    assert found.total == pytest.approx(seconds.sum())
    for share in (0.01, 0.5, 0.95, 0.99):
        assert found.quantile(share) == pytest.approx(np.quantile(seconds, share, method="inverted_cdf"), rel=0.0051)


def test_quantiles_ignore_unknown_values():
    found = Durations.of(np.array([np.nan, 0.0, 2.0, np.inf]))
    assert (found.rows, found.quantile(0.5), found.quantile(1.0)) == (2, 0.0, pytest.approx(2.0, rel=0.005))
    assert Durations.of(np.array([])).quantile(0.5) is None
