"""Statistics over rows: means with confidence intervals, calibration of probabilities, and paired comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

# From this number on, percentile intervals are stable to half a point.
RESAMPLES = 1000
CONFIDENCE = 0.95
# Resamples drawn at once; bounds the memory for large sets.
BATCH = 20
BINS = 10
# Probabilities of 0 and 1 have no logit.
EPSILON = 1e-6
# Range in which a temperature is searched.
TEMPERATURES = (0.05, 20.0)

# The (truth, probability) pairs of a row.
JudgedPairs = tuple[tuple[bool, float], ...]
Truths = npt.NDArray[np.bool_]
Probabilities = npt.NDArray[np.float64]


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
class ReliabilityBin:
    """The probabilities between two bounds.

    Attributes:
        low, high: bounds.
        judged: number of probabilities between them.
        score: mean of these probabilities.
        truth: share of them that are true.
    """

    low: float
    high: float
    judged: int
    score: float
    truth: float


@dataclass(frozen=True)
class TemperatureFit:
    """The temperature T that would calibrate a probability p, as σ(logit(p) / T).

    Attributes:
        temperature: T with the least log loss on every second row; above 1 if the probabilities are too extreme.
        before: mean log loss on the other rows, in nats.
        after: mean log loss on the other rows with this temperature.
    """

    temperature: float
    before: float
    after: float


@dataclass(frozen=True)
class Calibration:
    """Discrimination and calibration of a probability.

    Attributes:
        auc: area under the ROC curve: the rate at which a true case has a higher probability than a false one.
        brier: mean squared difference between probability and truth.
        ece: expected calibration error over ten bins of equal width.
        judged: number of probabilities.
        bins: the bins that hold probabilities, in their order: a reliability diagram.
        temperature: temperature that would calibrate it; None unless each half has true and false cases.
    """

    auc: float
    brier: float
    ece: float
    judged: int
    bins: tuple[ReliabilityBin, ...]
    temperature: TemperatureFit | None


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


def measure_calibration(rows: Sequence[JudgedPairs]) -> Calibration | None:
    """Compute the calibration of the (truth, probability) pairs of all rows; None unless both true and false occur."""
    from sklearn.metrics import brier_score_loss, roc_auc_score

    truths, probabilities = _split_pairs(rows)
    if len(set(truths.tolist())) < 2:
        return None
    bins = _bin_probabilities(truths, probabilities)
    return Calibration(
        auc=float(roc_auc_score(truths, probabilities)),
        brier=float(brier_score_loss(truths, probabilities)),
        ece=sum(part.judged * abs(part.score - part.truth) for part in bins) / len(truths),
        judged=len(truths),
        bins=tuple(bins),
        temperature=fit_temperature(rows),
    )


def _split_pairs(rows: Sequence[JudgedPairs]) -> tuple[Truths, Probabilities]:
    pairs = list(chain.from_iterable(rows))
    truths = np.array([truth for truth, _ in pairs], bool)
    return truths, np.clip(np.array([probability for _, probability in pairs], np.float64), 0.0, 1.0)


def _bin_probabilities(truths: Truths, probabilities: Probabilities) -> list[ReliabilityBin]:
    numbers = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    bins = []
    for number in np.unique(numbers).tolist():
        inside = numbers == number
        score, truth = float(probabilities[inside].mean()), float(truths[inside].mean())
        bins.append(ReliabilityBin(number / BINS, (number + 1) / BINS, int(inside.sum()), score, truth))
    return bins


def fit_temperature(rows: Sequence[JudgedPairs]) -> TemperatureFit | None:
    """Fit a temperature on every second row and measure it on the others (Guo et al. 2017, section 4.2).

    None unless both halves have true and false cases.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import expit, logit
    from sklearn.metrics import log_loss

    present = [row for row in rows if row]
    fitted, held_out = (_split_pairs(half) for half in (present[::2], present[1::2]))
    if any(len(set(truths.tolist())) < 2 for truths, _ in (fitted, held_out)):
        return None

    def measure(half: tuple[Truths, Probabilities], temperature: float) -> float:
        truths, probabilities = half
        logits = logit(np.clip(probabilities, EPSILON, 1 - EPSILON))
        return float(log_loss(truths, expit(logits / temperature)))

    bounds = tuple(map(float, np.log(TEMPERATURES)))
    found = minimize_scalar(lambda exponent: measure(fitted, np.exp(exponent)), bounds=bounds)
    temperature = float(np.exp(found.x))
    return TemperatureFit(temperature, measure(held_out, 1.0), measure(held_out, temperature))


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
