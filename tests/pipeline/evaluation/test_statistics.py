import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.statistics import compare, estimate, fit_temperature, mean, measure_calibration


def test_mean_of_no_values_is_none() -> None:
    assert mean([]) is None
    assert mean([True, False, False, False]) == 0.25


def test_interval_of_a_share_is_binomial() -> None:
    found = estimate([1.0] * 40 + [0.0] * 60)
    assert (found.mean, found.rows) == (0.4, 100)
    # sqrt(0.4 · 0.6 / 100) = 0.049, times 1.96
    assert found.low == pytest.approx(0.304, abs=0.02)
    assert found.high == pytest.approx(0.496, abs=0.02)


def test_interval_of_one_value_or_equal_values_is_the_value() -> None:
    assert (estimate([0.5]).low, estimate([0.5]).high) == (0.5, 0.5)
    assert (estimate([1.0] * 9).low, estimate([1.0] * 9).high) == (1.0, 1.0)


def test_calibration_matches_a_worked_example() -> None:
    judged = [(True, 0.9), (True, 0.4), (False, 0.5), (False, 0.1)]
    found = measure_calibration([(pair,) for pair in judged])
    assert found is not None
    assert found.auc == pytest.approx(3 / 4)
    assert found.brier == pytest.approx((0.1**2 + 0.6**2 + 0.5**2 + 0.1**2) / 4)
    assert found.ece == pytest.approx((0.1 + 0.6 + 0.5 + 0.1) / 4)  # each in a bin of its own
    assert found.judged == 4


def test_ece_compares_means_within_bins() -> None:
    found = measure_calibration([((True, 0.95), (False, 0.91)), (), ((False, 0.05), (False, 0.01))])
    assert found is not None
    assert found.ece == pytest.approx((abs(1.86 - 1) + abs(0.06 - 0)) / 4)
    first, last = found.bins
    assert (first.low, first.high, first.judged, first.truth) == (0.0, 0.1, 2, 0.0)
    assert (last.low, last.high, last.judged, last.truth) == (0.9, 1.0, 2, 0.5)
    assert (first.score, last.score) == (pytest.approx(0.03), pytest.approx(0.93))


def test_temperature_calibrates_probabilities_that_are_too_extreme() -> None:
    """Of the scores 0.9, two thirds are true; σ(logit(0.9) / T) = 2/3 at T = ln 9 / ln 2."""
    rows = [((truth, 0.9), (not truth, 0.1)) for truth in (True, True, True, True, False, False)]
    fit = fit_temperature(rows)
    assert fit is not None
    assert fit.temperature == pytest.approx(np.log(9) / np.log(2), rel=1e-3)
    assert fit.before == pytest.approx(-(2 * np.log(0.9) + np.log(0.1)) / 3)
    assert fit.after == pytest.approx(-(2 * np.log(2 / 3) + np.log(1 / 3)) / 3, rel=1e-4)


def test_temperature_is_measured_on_other_rows() -> None:
    rows = [((True, 0.9), (False, 0.1)), ((False, 0.9), (True, 0.1))] * 10
    fit = fit_temperature(rows)
    assert fit is not None
    assert fit.temperature < 0.1  # as sure as possible on the half that is always right
    assert fit.after > fit.before
    assert fit_temperature([((True, 0.9), (False, 0.1)), ((True, 0.9),)]) is None


def test_calibration_requires_both_classes() -> None:
    assert measure_calibration([((True, 0.9),)]) is None
    assert measure_calibration([]) is None


def test_clear_difference_is_significant_and_noise_is_not() -> None:
    ids = [str(n) for n in range(40)]
    right = dict.fromkeys(ids, 1.0)
    half = {id_: float(n % 2) for n, id_ in enumerate(ids)}
    other_half = {id_: float(n % 2 == 0) for n, id_ in enumerate(ids)}
    clear, noise = compare(right, half), compare(half, other_half)
    assert clear is not None
    assert noise is not None
    assert (clear.mean, clear.rows) == (0.5, 40)
    assert clear.p_value < 0.001
    assert clear.low > 0.3
    assert noise.mean == 0.0
    assert noise.p_value > 0.5


def test_only_rows_in_both_sets_are_compared() -> None:
    found = compare({"a": 1.0, "b": 1.0}, {"b": 0.0, "c": 1.0})
    assert found is not None
    assert (found.rows, found.mean) == (1, 1.0)
    assert compare({"a": 1.0}, {"b": 1.0}) is None


@given(st.dictionaries(st.text("abc", max_size=3), st.floats(0, 1), min_size=1, max_size=8))
def test_set_does_not_differ_from_itself(values: dict[str, float]) -> None:
    found = compare(values, values)
    assert found is not None
    assert (found.mean, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)
