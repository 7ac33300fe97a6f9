"""Statistics over rows: means with confidence intervals, calibration of probabilities, and paired comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# From this number on, percentile intervals are stable to half a point.
RESAMPLES = 1000
CONFIDENCE = 0.95
# Resamples drawn at once; bounds the memory for large sets.
BATCH = 20
BINS = 10


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval (percentile).

    Attributes:
        mean: mean of the values.
        low, high: bounds of the interval.
        rows: number of values.
    """

    mean: float
    low: float
    high: float
    rows: int


@dataclass(frozen=True)
class Calibration:
    """Discrimination and calibration of a probability.

    Attributes:
        auc: area under the ROC curve: the rate at which a true case has a higher probability than a false one.
        brier: mean squared difference between probability and truth.
        ece: expected calibration error over ten bins of equal width.
        judged: number of probabilities.
    """

    auc: float
    brier: float
    ece: float
    judged: int


@dataclass(frozen=True)
class Difference:
    """The mean paired difference of two sets, over the rows that both have.

    Attributes:
        mean: mean of the differences.
        low, high: bounds of its 95 % bootstrap interval (percentile).
        p_value: two-sided p-value of a permutation test that flips the signs of the rows' differences.
        rows: number of rows compared.
    """

    mean: float
    low: float
    high: float
    p_value: float
    rows: int


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None if there are no values."""
    return float(np.mean(values)) if len(values) else None


def _compute_interval(values: Sequence[float]) -> tuple[float, float]:
    from scipy.stats import bootstrap

    if len(values) < 2:
        return values[0], values[0]
    found = bootstrap(
        (np.asarray(values, np.float64),),
        np.mean,
        n_resamples=RESAMPLES,
        batch=BATCH,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=0,
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate the mean of at least one value; deterministic."""
    low, high = _compute_interval(values)
    return Estimate(float(np.mean(values)), low, high, len(values))


def measure_calibration(judged: Sequence[tuple[bool, float]]) -> Calibration | None:
    """Compute the calibration of (truth, probability) pairs; None unless both true and false occur."""
    from sklearn.metrics import brier_score_loss, roc_auc_score

    truths = np.array([truth for truth, _ in judged], bool)
    probabilities = np.clip([probability for _, probability in judged], 0.0, 1.0)
    if len(set(truths.tolist())) < 2:
        return None
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = [abs(float((probabilities[bins == b] - truths[bins == b]).sum())) for b in range(BINS)]
    return Calibration(
        auc=float(roc_auc_score(truths, probabilities)),
        brier=float(brier_score_loss(truths, probabilities)),
        ece=sum(gaps) / len(truths),
        judged=len(truths),
    )


def compare(values: Mapping[str, float], others: Mapping[str, float]) -> Difference | None:
    """Compare values with others by id, as values minus others; None if they share no id."""
    from scipy.stats import permutation_test

    shared = sorted(values.keys() & others.keys())
    if not shared:
        return None
    differences = [values[key] - others[key] for key in shared]
    low, high = _compute_interval(differences)
    # Differences of zero do not change the test: flipping their sign has no effect.
    unequal = np.array([d for d in differences if d], np.float64)
    p_value = 1.0  # fewer than two such differences are no evidence
    if len(unequal) > 1:
        flips = permutation_test((unequal,), np.sum, permutation_type="samples", batch=BATCH, rng=0)
        p_value = float(flips.pvalue)
    return Difference(float(np.mean(differences)), low, high, p_value, len(shared))
