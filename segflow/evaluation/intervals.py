"""95% intervals, in one place: Student, Welch, Wilson, and quantiles of resamples."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A number and the ends of its interval; infinite ends where the data say nothing of the spread."""

    mean: float
    low: float
    high: float


def exactly(value: float) -> Estimate:
    """A number that is known without error."""
    return Estimate(float(value), float(value), float(value))


def student(values: np.ndarray | Sequence[float]) -> Estimate:
    """The mean of independent values and its interval by Student's t; unbounded for a single value.

    Example:
        >>> [round(number, 3) for number in student([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
    """
    return _around(float(np.mean(values)), _squared_error(values), len(values) - 1)


def welch(first: np.ndarray | Sequence[float], second: np.ndarray | Sequence[float]) -> Estimate:
    """The difference of two means of independent values, first less second (Welch 1947)."""
    errors = np.array([_squared_error(first), _squared_error(second)])
    freedom = np.array([len(first) - 1, len(second) - 1])
    if not errors.sum() or not np.isfinite(errors).all():
        degrees = float(freedom.min())
    else:
        degrees = float(errors.sum() ** 2 / (errors**2 / freedom).sum())
    return _around(float(np.mean(first)) - float(np.mean(second)), float(errors.sum()), degrees)


def unchanged(values: np.ndarray | Sequence[float]) -> Estimate:
    """Where the mean of as many new values, less the mean of these, lies in 95% of cases if nothing has changed.

    The width is that of a difference of two equal samples; Student's t has the degrees of freedom of the one sample
    that its spread is known from.
    """
    return _around(0.0, 2 * _squared_error(values), len(values) - 1)


def wilson(share: float, count: int) -> Estimate:
    """A share among `count` independent cases, with Wilson's interval (1927), which stays within 0 and 1."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * float(np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)))
    return Estimate(float(share), max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def quantiles(value: float, draws: np.ndarray, confidence: float = CONFIDENCE) -> Estimate:
    """A number with the quantiles of what resampling gave; draws that are not numbers do not count."""
    if not np.isfinite(draws).any():
        return Estimate(float(value), -np.inf, np.inf)
    low, high = np.nanquantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(value), float(low), float(high))


def _squared_error(values: np.ndarray | Sequence[float]) -> float:
    """The squared standard error of the mean."""
    return float(np.var(values, ddof=1) / len(values)) if len(values) > 1 else np.inf


def _around(mean: float, squared_error: float, degrees: float) -> Estimate:
    if not np.isfinite(squared_error):
        return Estimate(mean, -np.inf, np.inf)
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    half = float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) * squared_error**0.5
    return Estimate(mean, mean - half, mean + half)
