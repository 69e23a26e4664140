"""Intervals of 95%, correlations, and resampling.

scipy.stats takes about a second to import, so the functions that need it import it, and `import segflow` does not.

Axis letters: M subsets, X queries or runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from ..report.row import Estimate

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


def quantile_interval(value: float, draws: np.ndarray) -> Estimate:
    """A number with the quantiles of what resampling gave; draws that are not numbers do not count."""
    if not np.isfinite(draws).any():
        return Estimate(float(value), -np.inf, np.inf)
    low, high = np.nanquantile(draws, [1 - UPPER, UPPER])
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


# ---- crossed factors ----


def variance_added(by_MX: np.ndarray) -> float:
    """What the columns' choice adds to the variance of the mean of all, beyond what the rows' choice explains."""
    M, X = by_MX.shape
    means_X = by_MX.mean(0)
    rest = by_MX - by_MX.mean(1, keepdims=True) - means_X + by_MX.mean()
    return max(0.0, float(np.var(means_X, ddof=1)) / X - float((rest**2).sum()) / ((M - 1) * (X - 1) * M * X))
