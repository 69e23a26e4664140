"""The noise ceiling: how reliable a retrained ground truth is, and what a perfect predictor would score against it.

The reliability is an intraclass correlation: the variance between subsets as a part of the variance of their averaged
repetitions. It is estimated on ranks, as the linear datamodeling score is a correlation of ranks; what is expected of
ranks is that of normal measurements, or of any that an increasing function makes normal.

Axis letters: M subsets, R repetitions, Q queries, B blocks of subsets, G reliabilities of a grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from ..errors import ScoreError
from .arguments import as_confidence, as_measurements
from .statistics import variance_added

FEWEST_SUBSETS = 8  # with 6 the interval of 95% holds in .90 of simulations, and mostly it is of nearly 0 to 1
_BLOCKS = 40  # of subsets, each left out once: more hardly change how well the standard error is known
_GRID, _NODES = 401, 2000


@dataclass(frozen=True)
class NoiseCeiling:
    """The reliability of retrained measurements, and the linear datamodeling score of a perfect predictor.

    per_query: [Q] reliabilities, below 0 where the repetitions of a subset differ more than subsets do, and not a
    number for a query that never varies; reliability: that of all queries together, the correlation to be expected
    between these averaged measurements and as many new ones; ceiling: the Spearman correlation to be expected between
    these averaged measurements and what they would be without noise (0 for a negative reliability); low, high: the
    ceiling's interval of `confidence`, infinite below 8 subsets; left_out: how many queries never vary.
    """

    per_query: np.ndarray
    reliability: float
    ceiling: float
    low: float
    high: float
    confidence: float
    left_out: int

    def __str__(self) -> str:
        given = np.isfinite(self.low)
        interval = f" [{self.low:.3f}, {self.high:.3f}]" if given else f" (no interval below {FEWEST_SUBSETS} subsets)"
        return f"{self.ceiling:.3f}{interval}, reliability {self.reliability:.3f}"


def noise_ceiling(measured: np.ndarray | Tensor, *, confidence: float = 0.95) -> NoiseCeiling:
    """Intraclass reliability of a ground truth, pooled over the queries, and the score of a perfect predictor.

    Each query's reliability is 1 - c (1 - b) / b, of the share b of the variance of ranks that is between subsets, and
    c such that it is 0 on average where there is no signal. Below that share its tangent goes on, so that it has no
    pole. The mean over queries is then corrected for what normal measurements of as many subsets and repetitions give.
    Where queries differ in reliability, the ceiling is that of their mean: the root mean square of the queries'
    ceilings for many subsets, which is at least their mean.

    The interval is Student's, of -log(1 - reliability). Its standard error is from a jackknife over subsets and queries
    (a bootstrap of both at once would count thrice what is theirs together), and at least that of independent normal
    queries. `benchmarks/coverage_noise.py` simulates it. Of normal measurements with some signal it holds in .98 of
    data sets of 8 subsets, .94 of those of 100; without signal, in nearly all. Where the noise has heavy tails, ranks
    show more than averages do: the ceiling comes out too high, by up to .05, and its interval may hold far less often.
    Where signal and noise are both strongly skewed (log-normal) it is too high by .1 to .2, and the interval is wrong.

    Args:
        measured: [M, R, Q], each query's measurement after each of R retrainings of each of M subsets.
        confidence: of the interval.

    Raises:
        ScoreError: fewer than two repetitions or three subsets, a number is not finite, or no query varies.

    Example:
        >>> signal, noise = np.random.default_rng(0).normal(size=(2, 400, 4, 10))
        >>> ceiling = noise_ceiling(signal[:, :1] + noise)  # four repetitions, as much noise as signal in each
        >>> bool(abs(ceiling.reliability - 4 / 5) < 0.02), bool(ceiling.low < perfect_score(4 / 5, 400) < ceiling.high)
        (True, True)
    """
    confidence = as_confidence(confidence)
    values_MRQ, varies_Q = _varying(measured)
    M, R, _ = values_MRQ.shape
    estimates_Q = _estimates(values_MRQ)
    per_query = np.full(len(varies_Q), np.nan)
    per_query[varies_Q] = _corrected(estimates_Q, M, R)
    reliability = float(_corrected(estimates_Q.mean(), M, R))
    low, high = (-np.inf, np.inf) if M < FEWEST_SUBSETS else _interval(values_MRQ, estimates_Q.mean(), confidence)
    ceiling = float(perfect_score(reliability, M))
    return NoiseCeiling(per_query, reliability, ceiling, low, high, confidence, int((~varies_Q).sum()))


def perfect_score(reliability: float | np.ndarray, subsets: int) -> np.ndarray:
    """The Spearman correlation over so many subsets to be expected of what is measured without its noise.

    The root of the reliability is the linear correlation; of normal pairs it gives that of ranks (Moran 1948).

    Example:
        >>> perfect_score(np.array([-0.2, 0.0, 1.0]), 10).round(6).tolist(), round(float(perfect_score(0.81, 10)), 3)
        ([0.0, 0.0, 1.0], 0.843)
    """
    linear = np.sqrt(np.clip(reliability, 0, 1))
    score: np.ndarray = np.arcsin(linear) + (subsets - 2) * np.arcsin(linear / 2)
    return 6 / (np.pi * (subsets + 1)) * score


def moves(values_MRQ: np.ndarray) -> np.ndarray:
    """[Q] booleans: the queries whose measurements differ by more than rounding in some retraining."""
    different: np.ndarray = np.ptp(values_MRQ, axis=(0, 1)) > 1e-14 * np.abs(values_MRQ).max((0, 1))
    return different


def _varying(measured: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The queries that vary, [M, R, queries that do], and which of all they are, [Q]."""
    values_MRQ = as_measurements(measured)
    if values_MRQ.ndim != 3 or values_MRQ.shape[0] < 3 or values_MRQ.shape[1] < 2:
        raise ScoreError(
            f"measured {values_MRQ.shape}: expected [M, R, Q] of at least 3 subsets and 2 repetitions. Do not average "
            "over the repetitions."
        )
    varies_Q = moves(values_MRQ)
    if not varies_Q.any():
        raise ScoreError(
            f"measured {values_MRQ.shape}: each of the {len(varies_Q)} queries has one measurement in all retrainings: "
            "expected some that vary. Vary the subsets, or measure something else."
        )
    return values_MRQ[:, :, varies_Q], varies_Q


# ---- estimates ----


def _estimates(values_MRQ: np.ndarray) -> np.ndarray:
    """Each query's reliability, 0 on average without signal, and a little low for few subsets with some."""
    from scipy.stats import rankdata

    M, R, Q = values_MRQ.shape
    ranks_MRQ = rankdata(values_MRQ.reshape(M * R, Q), axis=0).reshape(M, R, Q) - (M * R + 1) / 2
    between_Q, total_Q = R * (ranks_MRQ.mean(1) ** 2).sum(0), (ranks_MRQ**2).sum((0, 1))
    share_Q = np.divide(between_Q, total_Q, out=np.full(Q, _chance(M, R)), where=total_Q > 0)
    theory = _theory(M, R)
    above = share_Q > _chance(M, R)
    share_Q = np.where(above, np.interp(share_Q, theory.ranks_G, theory.values_G), share_Q)
    return 1 - theory.factor * _noise_to_signal(share_Q, M, R)


def _corrected(estimate: np.ndarray | float, M: int, R: int) -> np.ndarray:
    """The reliability at which normal measurements give such an estimate on average; below 0 in proportion."""
    theory = _theory(M, R)
    above = np.interp(estimate, theory.estimate_G, theory.reliability_G)
    return np.where(np.less(estimate, 0), theory.slope * np.asarray(estimate), above)


def _chance(M: int, R: int) -> float:
    """The share of the variance that is between subsets on average if there is no signal, of ranks and of numbers."""
    return (M - 1) / (M * R - 1)


def _noise_to_signal(share: np.ndarray, M: int, R: int) -> np.ndarray:
    """The variance within subsets over that between them; its tangent where less is between them than by chance."""
    chance = _chance(M, R)
    return np.where(share > chance, 1 / np.maximum(share, chance) - 1, 1 / chance - 1 - (share - chance) / chance**2)


@dataclass(frozen=True)
class _Theory:
    """What normal measurements give on average, over a grid of reliabilities from 0 to 1.

    ranks_G, values_G: the share of the variance that is between subsets, of ranks and of the numbers themselves;
    estimate_G: the estimate, 1 - factor * noise to signal; slope: of what is below 0, such that a query's corrected
    estimate is still 0 on average without signal.
    """

    reliability_G: np.ndarray
    ranks_G: np.ndarray
    values_G: np.ndarray
    estimate_G: np.ndarray
    factor: float
    slope: float


@lru_cache(64)
def _theory(M: int, R: int) -> _Theory:
    from scipy.special import betaincinv

    icc_G = 1 - np.linspace(1, 0, _GRID) ** 2  # of single retrainings, most of them near 1
    ratio_G = (1 - icc_G) / (1 + (R - 1) * icc_G)  # 1 - reliability
    nodes = betaincinv((M - 1) / 2, M * (R - 1) / 2, (np.arange(_NODES) + 0.5) / _NODES)  # shares, without signal
    shares = nodes / (nodes + ratio_G[:, None] * (1 - nodes))
    noise = _noise_to_signal(shares, M, R)
    factor = 1 / noise[0].mean()
    estimate_G, unsignalled = 1 - factor * noise.mean(1), 1 - factor * noise[0]
    slope = np.interp(unsignalled, estimate_G, 1 - ratio_G).mean() / -np.minimum(unsignalled, 0).mean()
    values_G = shares.mean(1) + (1 - icc_G) * (_chance(M, R) - shares[0].mean())  # without the error of the nodes
    ranks_G = _share_of_ranks(icc_G, M, R)
    return _Theory(1 - ratio_G, ranks_G, values_G, estimate_G, float(factor), float(slope))


def _share_of_ranks(icc: np.ndarray, M: int, R: int) -> np.ndarray:
    """The share of the variance of M R ranks that is between M subsets, on average over normal measurements.

    A rank is a sum of signs of differences, and the product of two signs has the mean 2 / pi asin(r) (Sheppard 1899)
    where r is the correlation of the differences. The covariance of two ranks of a subset is summed over with whom each
    is compared: one another, others of the subset, or those outside.
    """
    inside, outside, total = R - 2, M * R - R, M * R
    own = -np.pi / 2 - inside * np.pi / 6 - 2 * outside * np.arcsin(np.sqrt(1 - icc) / 2)
    same = np.arcsin((1 + icc) / 2) + (R - 1) * np.arcsin(icc)  # both with the same one outside, or two of one subset
    other = (outside - R) * np.arcsin(icc / 2)
    covariance = (own + outside * (same + other)) / (2 * np.pi)
    return (1 + (R - 1) * covariance * 12 / (total**2 - 1)) / R


# ---- the interval ----


def _interval(values_MRQ: np.ndarray, estimate: float, confidence: float) -> tuple[float, float]:
    """The ceiling's interval, from Student's of -log(1 - estimate)."""
    from scipy import stats

    M, R, Q = values_MRQ.shape
    most = 1.0 if estimate >= 1 else 0.0
    estimate = min(estimate, 1 - 1 / (M * R * Q))  # few repetitions, or rounded ones, may be all alike by chance
    error = _standard_error(values_MRQ, estimate)
    half = float(stats.t.ppf((1 + confidence) / 2, min(M, _BLOCKS) - 1)) * error
    lower, upper = 1 - (1 - estimate) * np.exp(half), 1 - (1 - max(estimate, 0.0)) * np.exp(-half)
    low, high = perfect_score(_corrected(np.array([lower, upper]), M, R), M)
    return float(low), max(float(high), most)


def _standard_error(values_MRQ: np.ndarray, estimate: float) -> float:
    """Of -log(1 - estimate): by the jackknife, and at least what independent normal queries have."""
    from scipy.special import polygamma

    M, R, Q = values_MRQ.shape
    normal = polygamma(1, (M - 1) / 2) + polygamma(1, M * (R - 1) / 2)  # of the logarithm of an F ratio
    return float(np.sqrt(max(_variance(_pseudo_values(values_MRQ)) / (1 - estimate) ** 2, normal / Q)))


def _pseudo_values(values_MRQ: np.ndarray) -> np.ndarray:
    """[B, Q]: what each block of subsets adds to each query's estimate (Tukey 1958)."""
    M = len(values_MRQ)
    blocks = min(M, _BLOCKS)
    without = [_estimates(values_MRQ[np.arange(M) % blocks != block]) for block in range(blocks)]
    return blocks * _estimates(values_MRQ) - (blocks - 1) * np.stack(without)


def _variance(pseudo_BQ: np.ndarray) -> float:
    """Of the mean, for other subsets and other queries: both vary, and what is theirs together counts once."""
    B, Q = pseudo_BQ.shape
    of_subsets = float(pseudo_BQ.mean(1).var(ddof=1)) / B
    return of_subsets + (variance_added(pseudo_BQ) if Q > 1 else 0.0)
