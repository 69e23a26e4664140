"""Intervals of 95%, correlations, resampling, and how reliable a ground truth is.

scipy.stats takes about a second to import, so the functions that need it import it, and `import segflow` does not.

Axis letters: M subsets, R repetitions, Q queries.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np
from torch import Tensor

from ..arguments import real_number, settle, whole_number
from ..errors import ScoreError
from ..report.row import Estimate
from .arguments import as_measurements

CONFIDENCE = 0.95
UPPER = (1 + CONFIDENCE) / 2  # the quantile at which a two-sided interval ends

# ---- intervals ----


def exactly(value: float) -> Estimate:
    """A number that is known without error."""
    return Estimate(float(value), float(value), float(value))


def student_interval(values: np.ndarray | Sequence[float]) -> Estimate:
    """The mean of independent values and its interval by Student's t; unbounded for a single value.

    Example:
        >>> [round(number, 3) for number in student_interval([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
    """
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, -np.inf, np.inf)
    half = float(stats.t.ppf(UPPER, len(values) - 1) * stats.sem(values))
    return Estimate(mean, mean - half, mean + half)


def welch_interval(first: np.ndarray | Sequence[float], second: np.ndarray | Sequence[float]) -> Estimate:
    """The difference of two means of independent values, first less second (Welch 1947); unbounded for one value."""
    from scipy import stats

    difference = float(np.mean(first)) - float(np.mean(second))
    if min(len(first), len(second)) < 2:
        return Estimate(difference, -np.inf, np.inf)
    with warnings.catch_warnings():  # of values that hardly vary; the interval is then as narrow as it should be
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        ends = stats.ttest_ind(first, second, equal_var=False).confidence_interval(CONFIDENCE)
    return Estimate(difference, float(ends.low), float(ends.high))


def unchanged_interval(values: np.ndarray | Sequence[float]) -> Estimate:
    """Where the mean of as many new values, less the mean of these, lies in 95% of cases if nothing has changed.

    The variance is that of a difference of two equal samples, twice that of one mean; Student's t has the degrees of
    freedom of the one sample that its spread is known from.
    """
    _, low, high = student_interval(values)
    half = 2**0.5 * (high - low) / 2
    return Estimate(0.0, 0.0 - half, half)  # no -0


def quantile_interval(value: float, draws: np.ndarray, confidence: float = CONFIDENCE) -> Estimate:
    """A number with the quantiles of what resampling gave; draws that are not numbers do not count."""
    if not np.isfinite(draws).any():
        return Estimate(float(value), -np.inf, np.inf)
    low, high = np.nanquantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(value), float(low), float(high))


# ---- correlations ----


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman correlation of each column with its counterpart; not a number where one side does not vary.

    scipy's `spearmanr` would correlate every column with every other.
    """
    from scipy.stats import rankdata

    return pearson(rankdata(first, axis=0), rankdata(second, axis=0))


def pearson(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson correlation of each column with its counterpart; not a number where one side does not vary."""
    centred = [side - side.mean(0) for side in (first, second)]
    squares = [(side**2).sum(0) for side in centred]
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations: np.ndarray = (centred[0] * centred[1]).sum(0) / np.sqrt(squares[0] * squares[1])
    constant = (np.ptp(first, axis=0) == 0) | (np.ptp(second, axis=0) == 0)  # its mean may be rounded
    return np.where(constant, np.nan, correlations)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn; ScoreError, by an option's name, where one makes no sense."""

    confidence: float
    resamples: int
    seed: int

    def __post_init__(self) -> None:
        settle(
            self,
            confidence=real_number("confidence", self.confidence, ScoreError, above=0, below=1),
            resamples=whole_number("resamples", self.resamples, ScoreError, 1),
            seed=whole_number("seed", self.seed, ScoreError),
        )


# ---- how reliable a ground truth is ----


@dataclass(frozen=True)
class NoiseCeiling:
    """The reliability of retrained measurements, and the linear datamodeling score of a perfect predictor.

    per_query: [Q] reliabilities; reliability: their mean, the correlation to be expected between these averaged
    measurements and as many new ones; ceiling: the mean of their square roots (0 for negative ones), the correlation to
    be expected between these measurements and what they would be without noise.
    """

    per_query: np.ndarray
    reliability: float
    ceiling: float

    def __str__(self) -> str:
        return f"{self.ceiling:.3f} (reliability {self.reliability:.3f})"


def noise_ceiling(measured: np.ndarray | Tensor, *, splits: int = 100, seed: int = 0) -> NoiseCeiling:
    """Split-half reliability of a ground truth (Spearman 1910 and Brown 1910, for rank correlations).

    The repetitions are split into two halves (of equal size: an odd one is left out, another one in each split), each
    half is averaged, and the halves' Spearman correlation over the subsets is averaged over the splits. A mean of h
    repetitions that correlates by r with another one has reliability k r / (1 + (k - 1) r) when there are k h of them.

    Args:
        measured: [M, R, Q], each query's measurement after each of R retrainings of each of M subsets.
        splits: random ways of splitting; where there are no more ways than that, each is taken once.
        seed: of the splits.

    Raises:
        ScoreError: fewer than two repetitions or three subsets, or a number is not finite.

    Example:
        >>> signal, noise = np.random.default_rng(0).normal(size=(2, 400, 4, 1))
        >>> ceiling = noise_ceiling(signal[:, :1] + noise)  # four repetitions, as much noise as signal in each
        >>> bool(abs(ceiling.reliability - 4 / 5) < 0.04), bool(abs(ceiling.ceiling - 0.8**0.5) < 0.03)
        (True, True)
    """
    splits, seed = whole_number("splits", splits, ScoreError, 1), whole_number("seed", seed, ScoreError)
    values_MRQ = as_measurements(measured)
    if values_MRQ.ndim != 3 or values_MRQ.shape[0] < 3 or values_MRQ.shape[1] < 2:
        raise ScoreError(
            f"measured {values_MRQ.shape}: expected [M, R, Q] of at least 3 subsets and 2 repetitions. Do not average "
            "over the repetitions."
        )
    R = values_MRQ.shape[1]
    correlations = []
    for halves in _halves(R, splits, np.random.default_rng(seed)):
        means = (values_MRQ[:, list(half)].mean(1) for half in halves)
        correlations.append(np.nan_to_num(spearman(*means)))  # a query that does not vary is not reliable
    r_Q, k = np.mean(correlations, axis=0), R / (R // 2)
    reliability_Q = k * r_Q / (1 + (k - 1) * r_Q)
    ceiling_Q = np.sqrt(np.clip(reliability_Q, 0, None))
    return NoiseCeiling(reliability_Q, float(reliability_Q.mean()), float(ceiling_Q.mean()))


def _halves(R: int, splits: int, generator: np.random.Generator) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of disjoint halves of R repetitions: each pair once, or so many at random."""
    size = R // 2
    pairs = (
        (first, second)
        for first in combinations(range(R), size)
        for second in combinations([r for r in range(first[0] + 1, R) if r not in first], size)
    )
    every_pair = list(islice(pairs, splits + 1))
    if len(every_pair) <= splits:
        return every_pair
    orders = (generator.permutation(R) for _ in range(splits))
    return [(tuple(order[:size].tolist()), tuple(order[size : 2 * size].tolist())) for order in orders]
