"""Magnitude: by how much does a measurement really change for each unit of change that scores predict?

`benchmarks/coverage_slope.py` simulates how often the interval holds the truth.

Axis letters: M subsets, K groups, R repetitions, Q queries.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..report.row import Estimate
from ..results.scores import Scores, check_additive
from ..results.slope import Slope
from .arguments import as_measurements
from .predicted import Retrained, predicted_changes, used_queries
from .rank_agreement import FEWEST_QUERIES
from .statistics import UPPER, variance_added
from .subsets import Subsets


def slope_of_change(scores: Scores, subsets: Subsets, measurements: np.ndarray | Tensor) -> Slope:
    """The slope of real changes on predicted ones over subsets, pooled over queries.

    A subset's predicted change is the sum of the scores of the groups that it leaves out. Both changes are taken
    around their mean over the subsets, query by query. A slope of .2 says that predictions are five times too large. It
    is about subsets of the size that was retrained: half of the data may have another slope than 1% of it.

    The interval of 95% is for other subsets and other queries of the same kinds; with fewer than ten queries it is for
    other subsets and the same queries. Its method: `pooled_slope`; how often it holds: docs/STATISTICS.md.

    Args:
        scores: over groups; for subsets of single examples, scores of `Groups.singletons`.
        subsets: [M, K] booleans, which groups each retraining kept; or a list of index lists.
        measurements: [M, Q], or [M, R, Q] of R repetitions, each query's measurement after each retraining.

    Raises:
        ScoreError: shapes do not fit, there are fewer than three subsets, a number is not finite, no query's prediction
            varies, or the method's scores do not add up.

    Example:
        >>> import torch
        >>> scores = Scores(torch.tensor([[1.0, 2.0, 4.0]]), ("q",), ("a", "b", "c"), (1, 1, 1))
        >>> kept = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0]], dtype=bool)
        >>> slope_of_change(scores, kept, [[8.0], [4.0], [2.0], [12.0]]).value
        2.0
    """
    check_additive(scores.provenance, "slope_of_change")
    measured = as_measurements(measurements)
    measured_MRQ = measured if measured.ndim == 3 else measured[:, None]
    given = Retrained.of(subsets, measured_MRQ.mean(1), scores)
    predicted_MQ = predicted_changes(scores, given.kept_MK)
    used = used_queries([predicted_MQ], None, scores)
    found = pooled_slope(predicted_MQ[:, used], given.measured_MQ[:, used])
    sizes_K = np.array(scores.group_sizes)
    return Slope(
        *found,
        subsets=len(given.kept_MK),
        repetitions=measured_MRQ.shape[1],
        queries=int(used.sum()),
        left_out=float((~given.kept_MK @ sizes_K).mean() / sizes_K.sum()),
        of=scores.provenance,
    )


def pooled_slope(predicted_MQ: np.ndarray, measured_MQ: np.ndarray) -> Estimate:
    """The slope of measured on predicted changes, each around its column's mean, with its interval.

    The variance is that of crossed factors, subsets and queries, robust to errors that subsets or queries share
    (Cameron, Gelbach and Miller 2011), of residuals as each subset or query in turn would have them if it were left out
    of the fit (the jackknife: Cameron and Miller 2015). Each factor's part of the squared quantile of Student's t has
    degrees of freedom of its own, one less than the number of equal subsets (or queries) that weigh as these do:
    where few predictions are large, they decide alone. Queries count from `FEWEST_QUERIES` on.
    """
    x_MQ, y_MQ = (side - side.mean(0) for side in (predicted_MQ, measured_MQ))
    weights_MQ = x_MQ**2 / (x_MQ**2).sum()
    M, Q = x_MQ.shape
    slope = float((x_MQ * y_MQ).sum() / (x_MQ**2).sum())
    errors_MQ = x_MQ * (y_MQ - slope * x_MQ) / (x_MQ**2).mean()  # whose mean is the slope's error
    weights_M, weights_Q = weights_MQ.sum(1), weights_MQ.sum(0)
    of_subsets_M = errors_MQ.mean(1) / _rest(weights_M * M / (M - 1))  # without a subset the means move, too
    squared = float(np.var(of_subsets_M, ddof=1)) / M * _squared_t(weights_M)
    if Q >= FEWEST_QUERIES:
        squared += variance_added(errors_MQ * (1 - 1 / Q) / _rest(weights_Q)) * _squared_t(weights_Q)
    half = squared**0.5
    return Estimate(slope, slope - half, slope + half)


def _rest(weights_X: np.ndarray) -> np.ndarray:
    """[X]: the weight of all others; not 0 where one alone decides, whose error is 0."""
    return np.maximum(1 - weights_X, 1e-9)


def _squared_t(weights_X: np.ndarray) -> float:
    """The squared quantile of Student's t for as many subsets (or queries) of equal weight as these are worth."""
    from scipy import stats

    worth = 1 / float((weights_X**2).sum())
    return float(stats.t.ppf(UPPER, max(worth - 1, 1.0))) ** 2  # of one degree at least
