"""Ranks, correlations, resampling and 95% intervals, in one place; and how reliable a ground truth is.

Axis letters: M subsets, R repetitions, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from statistics import NormalDist

import numpy as np
from torch import Tensor

from ..errors import ScoreError
from ..report.table import Estimate

CONFIDENCE = 0.95


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


def resampled(
    sides: list[np.ndarray], measured: np.ndarray, resamples: int, seed: int, confidence: float
) -> np.ndarray:
    """[sides, resamples]: each side's mean correlation on the same resampled subsets and queries."""
    if not 0 < confidence < 1 or resamples < 1:
        raise ScoreError(f"confidence={confidence}, resamples={resamples}: expected 0 < confidence < 1 and 1 or more.")
    generator = np.random.default_rng(seed)
    M, Q = measured.shape
    means = np.full((len(sides), resamples), np.nan)
    for index in range(resamples):
        rows, columns = generator.integers(0, M, M), generator.integers(0, Q, Q)
        drawn = np.stack([spearman(side[rows][:, columns], measured[rows][:, columns]) for side in sides])
        ranked = np.isfinite(drawn).all(0)  # a draw of one subset over and over has no ranks
        if ranked.any():
            means[:, index] = drawn[:, ranked].mean(1)
    if not np.isfinite(means).any():
        raise ScoreError(f"no interval from {resamples} resamples of {M} subsets. Give more of either.")
    return means


def checked_subsets(subsets: np.ndarray | Tensor) -> np.ndarray:
    """Subsets as an array of booleans; ScoreError for other numbers."""
    given = plain(subsets)
    if not np.isin(given, (0, 1)).all():
        raise ScoreError("subsets: expected [M, K] booleans (kept or not), found other numbers. Are they indices?")
    return given.astype(bool)


def plain(given: np.ndarray | Tensor) -> np.ndarray:
    """An array of what may be a tensor."""
    return given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman correlation of each column; not a number where one side does not vary."""
    return pearson(_ranks(first), _ranks(second))


def pearson(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson correlation of each column; not a number where one side does not vary."""
    centred = [side - side.mean(0) for side in (first, second)]
    squares = [(side**2).sum(0) for side in centred]
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation: np.ndarray = (centred[0] * centred[1]).sum(0) / np.sqrt(squares[0] * squares[1])
    still = (np.ptp(first, axis=0) == 0) | (np.ptp(second, axis=0) == 0)  # its mean may be rounded
    return np.where(still, np.nan, correlation)


def _ranks(columns: np.ndarray) -> np.ndarray:
    """Ranks down each column, ties sharing their mean rank."""
    rows = np.ascontiguousarray(columns.T)
    order = np.argsort(rows, axis=1)
    ordered = np.take_along_axis(rows, order, 1)
    place = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    begins = np.diff(ordered, axis=1, prepend=np.nan) != 0  # where a run of equal numbers begins, and where it ends
    ends = np.diff(ordered, axis=1, append=np.nan) != 0
    first = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    last = np.minimum.accumulate(np.where(ends, place, rows.shape[1])[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty(rows.shape)
    np.put_along_axis(ranks, order, (first + last) / 2.0, 1)
    return ranks.T


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
        >>> found = noise_ceiling(signal[:, :1] + noise)  # four repetitions, as much noise as signal in each
        >>> bool(abs(found.reliability - 4 / 5) < 0.04), bool(abs(found.ceiling - 0.8**0.5) < 0.03)
        (True, True)
    """
    values_MRQ = plain(measured).astype(float)
    if values_MRQ.ndim != 3 or values_MRQ.shape[0] < 3 or values_MRQ.shape[1] < 2 or splits < 1:
        raise ScoreError(
            f"measured {values_MRQ.shape}, splits={splits}: expected [M, R, Q] of at least 3 subsets and 2 "
            "repetitions, and at least one split. Do not average over the repetitions."
        )
    if not np.isfinite(values_MRQ).all():
        raise ScoreError("measurements are not finite. Look for a retraining that diverged.")
    R = values_MRQ.shape[1]
    found = []
    for first, second in _halves(R, splits, np.random.default_rng(seed)):
        halves = (values_MRQ[:, list(half)].mean(1) for half in (first, second))
        found.append(np.nan_to_num(spearman(*halves)))  # a query that does not vary is not reliable
    r_Q, k = np.mean(found, axis=0), R / (R // 2)
    reliability_Q = k * r_Q / (1 + (k - 1) * r_Q)
    return NoiseCeiling(
        reliability_Q, float(reliability_Q.mean()), float(np.sqrt(np.clip(reliability_Q, 0, None)).mean())
    )


def _halves(R: int, splits: int, generator: np.random.Generator) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of disjoint halves of R repetitions: each pair once, or so many at random."""
    size = R // 2
    ways = (
        (first, second)
        for first in combinations(range(R), size)
        for second in combinations([r for r in range(first[0] + 1, R) if r not in first], size)
    )
    every = list(islice(ways, splits + 1))
    if len(every) <= splits:
        return every
    drawn = (generator.permutation(R) for _ in range(splits))
    return [(tuple(order[:size].tolist()), tuple(order[size : 2 * size].tolist())) for order in drawn]
