"""Mean rank correlations with their intervals, where all queries (and runs) share the same subsets.

`benchmarks/coverage_lds.py` simulates how often the intervals hold the truth.

Axis letters: R runs of a method, M subsets, Q queries, X of either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..report.row import Estimate
from .intervals import unknown
from .statistics import CONFIDENCE, pearson, variance_added

FEWEST_SUBSETS = 10  # with fewer, what is simulated is too wide (.99) or, of differences, too narrow (.84)
FEWEST_QUERIES = 10  # with fewer, what their choice adds is hardly known: simulated with five, .90, with two, .86
FEWEST_RUNS = 5  # runs differ less than queries do


@dataclass(frozen=True)
class Correlations:
    """Spearman correlations over subsets of predictions with what was measured, or differences of two of them.

    of_all: [R, Q]; left_out: [R, M, Q], without each of the subsets in turn.
    """

    of_all: np.ndarray
    left_out: np.ndarray

    @property
    def per_query(self) -> np.ndarray:
        """[Q]: the mean over the runs."""
        mean: np.ndarray = self.of_all.mean(0)
        return mean

    @property
    def pseudo_values(self) -> np.ndarray:
        """[R, M, Q]: of Tukey's jackknife (1958), whose mean is free of most of the bias that few subsets bring."""
        M = self.left_out.shape[1]
        values: np.ndarray = M * self.of_all[:, None] - (M - 1) * self.left_out
        return values

    def __sub__(self, other: Correlations) -> Correlations:
        """The differences, run by run."""
        return Correlations(self.of_all - other.of_all, self.left_out - other.left_out)


def correlations(predictions: Sequence[np.ndarray], measured: np.ndarray) -> Correlations:
    """Of each run's predictions [M, Q] with the measurements [M, Q].

    Where one side does not vary without a subset, the correlation without it is taken as 0.
    """
    from scipy.stats import rankdata

    runs_MRQ = np.stack(predictions, 1)
    sides = [runs_MRQ, np.broadcast_to(measured[:, None], runs_MRQ.shape)]
    ranks = [rankdata(side, axis=0) for side in sides]
    left_out = []
    for m in range(len(measured)):
        others = np.arange(len(measured)) != m
        # without a number, those above it move down by a rank, and those that tie with it by half a rank
        moved = [(r - (s > s[m]) - 0.5 * (s == s[m]))[others] for r, s in zip(ranks, sides, strict=True)]
        left_out.append(np.nan_to_num(pearson(*moved)))
    return Correlations(pearson(*ranks), np.stack(left_out, 1))


def mean_interval(found: Correlations, confidence: float = CONFIDENCE) -> Estimate:
    """The mean correlation with its interval for other subsets and queries (and runs) of the same kinds.

    Fisher's transformation of the jackknife's mean, with Student's t. The standard error is that of crossed factors,
    and at least that of independent queries by the formula of Bonett and Wright (2000), so that agreement by chance
    has no interval of width 0. With fewer than `FEWEST_QUERIES` queries, or `FEWEST_RUNS` runs, it speaks of
    these ones.
    """
    R, M, Q = found.left_out.shape
    mean = float(found.of_all.mean())
    if M < FEWEST_SUBSETS:
        return unknown(mean)
    end = 1 - _half_step(M)
    clipped, centre = np.clip([mean, found.pseudo_values.mean()], -end, end)
    variance, t = _variance_and_t(found.pseudo_values, confidence)
    least = (1 + clipped**2 / 2) / ((M - 3) * Q * R)
    half = t * np.sqrt(max(variance / ((1 - clipped**2) * (1 - centre**2)), least))
    return _around(mean, np.tanh(np.arctanh(centre) - half), np.tanh(np.arctanh(centre) + half))


def difference_interval(found: Correlations, confidence: float = CONFIDENCE) -> Estimate:
    """The mean difference of correlations, with its interval for other subsets and queries of the same kinds.

    As `mean_interval`, without a transformation. The least variance is that of two predictions that rank all subsets
    alike but for half a step: twice that step over M - 3 (Steiger 1980, for correlations that hardly differ).
    """
    R, M, Q = found.left_out.shape
    mean = float(found.of_all.mean())
    if M < FEWEST_SUBSETS:
        return unknown(mean)
    variance, t = _variance_and_t(found.pseudo_values, confidence)
    half = t * np.sqrt(max(variance, 2 * _half_step(M) / ((M - 3) * Q * R)))
    centre = found.pseudo_values.mean()
    return _around(mean, max(-2.0, centre - half), min(2.0, centre + half))


def _half_step(M: int) -> float:
    """Half the distance from a rank correlation of 1 to the next lower one."""
    return 6 / (M * (M**2 - 1))


def _around(mean: float, low: float, high: float) -> Estimate:
    return Estimate(mean, min(mean, float(low)), max(mean, float(high)))


def _variance_and_t(pseudo_RMQ: np.ndarray, confidence: float) -> tuple[float, float]:
    """The variance of the mean, and the quantile of Student's t for it.

    What subsets, queries and runs add to the variance is summed, and so are their parts of the squared quantile, each
    with degrees of freedom of its own (Cochran and Cox 1957).
    """
    from scipy import stats

    M = pseudo_RMQ.shape[1]
    parts = [(float(np.var(pseudo_RMQ.mean((0, 2)), ddof=1)) / M, M - 1)]
    for by_MX, fewest in ((pseudo_RMQ.mean(0), FEWEST_QUERIES), (pseudo_RMQ.mean(2).T, FEWEST_RUNS)):
        if by_MX.shape[1] >= fewest:
            parts.append((variance_added(by_MX), by_MX.shape[1] - 1))
    variances, freedoms = np.array(parts).T
    quantiles = stats.t.ppf((1 + confidence) / 2, freedoms)
    total = float(variances.sum())
    t = np.sqrt((variances * quantiles**2).sum() / total) if total > 0 else quantiles[0]
    return total, float(t)
