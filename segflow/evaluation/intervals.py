"""Intervals of 95% of shares and of correlations, by methods that hold for few cases, or none where none does.

`benchmarks/coverage_tasks.py` simulates how often they hold the truth.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from ..report.row import Estimate
from .statistics import UPPER, student_interval

FEWEST_CASES = 8  # with fewer blocks of examples (or queries), what is simulated falls to .87
_FEWEST_COUNTED = 3  # two shares that are counted say too little of how they differ: .84
_UNSEEN = (
    0.1  # of a case at one half, which few cases may not have shown: 8 wrong labels, ROC area .98: from .87 to .97
)


def unknown(value: float) -> Estimate:
    """A number of whose spread the data say nothing."""
    return Estimate(float(value), -np.inf, np.inf)


def counted_interval(shares: np.ndarray, count: int) -> Estimate:
    """The mean of a few shares that are each counted among as many things, with Student's interval within 0 and 1.

    It is wider by half a step of counting at each end: a few shares are often all the same, though their mean over many
    retrainings lies between two steps.
    """
    if len(shares) < _FEWEST_COUNTED:
        return unknown(float(np.mean(shares)))
    mean, low, high = student_interval(shares)
    return Estimate(mean, max(0.0, low - 0.5 / count), min(1.0, high + 0.5 / count))


def share_interval(share: float, variance: float, t: float, cases: int) -> Estimate:
    """A share (or a probability, such as an area) with the interval of Agresti and Coull (1998), within 0 and 1.

    Theirs is for a count of independent cases and the normal quantile; here the count is the one that has the variance,
    and `t` is the quantile that allows for how well that is known. Where nothing varies, it is that of the cases.
    """
    varies = variance > 0 and 0 < share < 1
    variance += _UNSEEN * ((share - 0.5) / (cases + 1)) ** 2
    count = share * (1 - share) / variance if varies else cases
    centre = (count * share + t**2 / 2) / (count + t**2)
    half = t * float(np.sqrt(centre * (1 - centre) / (count + t**2)))
    return Estimate(float(share), min(max(0.0, centre - half), share), max(min(1.0, centre + half), share))


def over_cases_and_runs(by_run: np.ndarray, of_cases: float, cases: int, freedom: int | None = None) -> Estimate:
    """The mean over runs of shares that are all of the same cases, for other cases and other runs of their kinds.

    A single run is taken as it is. The variances of cases and of runs are added, and so are their parts of the squared
    quantile, each with degrees of freedom of its own (Cochran and Cox 1957): few runs hardly know how far they differ.
    What differs between cases and runs at once counts twice, so that the interval is a little wide.

    Args:
        by_run: each run's share.
        of_cases: the variance of their mean, by the choice of the cases; cases: how many there are, independent ones.
        freedom: of that variance; by default one less than the cases.
    """
    runs, mean = len(by_run), float(np.mean(by_run))
    freedom = cases - 1 if freedom is None else freedom
    if cases < FEWEST_CASES or freedom < 1 or not np.isfinite(of_cases):
        return unknown(mean)
    squared_t, total = _t(freedom) ** 2, of_cases
    if runs > 1 and (of_runs := float(np.var(by_run, ddof=1)) / runs) > 0:
        total = of_cases + of_runs
        squared_t = (of_cases * squared_t + of_runs * _t(runs - 1) ** 2) / total
    return share_interval(mean, total, squared_t**0.5, cases)


def _t(freedom: int) -> float:
    """The quantile of Student's t at which a two-sided interval ends."""
    from scipy import stats

    return float(stats.t.ppf(UPPER, freedom))


def correlation_interval(value: float, draws: np.ndarray, cases: int, ranks: bool) -> Estimate:
    """A correlation over independent cases with its interval, by Fisher's transformation; all of -1 to 1 below four.

    The standard error is the larger of two: of the transformed correlations of a bootstrap, and of the formula for
    normal numbers (Fisher 1921; for ranks Bonett and Wright 2000), as a bootstrap of few cases is too narrow. Where
    numbers have heavy tails, the interval of a correlation that is not of ranks holds less often (simulated: .90).
    """
    half_step = 6 / (cases * (cases**2 - 1))  # half the distance from 1 to the next lower rank correlation
    step, drawn_step = (half_step, half_step) if ranks else (1e-12, 1e-3 / cases)
    centre = float(np.arctanh(np.clip(value, step - 1, 1 - step)))
    error = np.sqrt((1 + (value**2 / 2 if ranks else 0)) / (cases - 3)) if cases > 3 else np.inf
    drawn = draws[np.isfinite(draws)]
    if len(drawn) > 1:
        error = max(error, float(np.arctanh(np.clip(drawn, drawn_step - 1, 1 - drawn_step)).std()))
    half = NormalDist().inv_cdf(UPPER) * error
    return Estimate(float(value), min(value, float(np.tanh(centre - half))), max(value, float(np.tanh(centre + half))))
