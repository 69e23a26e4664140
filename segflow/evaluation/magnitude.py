"""Magnitude: by how much does a measurement really change for each unit of change that scores predict?

Axis letters: M subsets, K groups, R repetitions, Q queries.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..errors import ScoreError
from ..results.scores import Scores, check_additive
from ..results.slope import Slope
from .arguments import as_measurements
from .datamodeling import _check_shapes, _predicted, _varies
from .statistics import UPPER, variance_added
from .subsets import Subsets, as_subsets


def slope_of_change(scores: Scores, subsets: Subsets, measurements: np.ndarray | Tensor) -> Slope:
    """The slope of real changes on predicted ones over subsets, pooled over queries, with its interval.

    Args:
        scores: over groups; for subsets of single examples, scores of `Groups.singletons`.
        subsets: [M, K] booleans, which groups each retraining kept; or a list of index lists.
        measurements: [M, Q], or [M, R, Q] of R repetitions, each query's measurement after each retraining.

    Raises:
        ScoreError: shapes do not fit, a number is not finite, no prediction varies, or the scores do not add up.

    Example:
        >>> import torch
        >>> scores = Scores(torch.tensor([[1.0, 2.0, 4.0]]), ("q",), ("a", "b", "c"), (1, 1, 1))
        >>> kept = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0]], dtype=bool)
        >>> slope_of_change(scores, kept, [[8.0], [4.0], [2.0], [12.0]]).value
        2.0
    """
    check_additive(scores.provenance, "slope_of_change")
    kept_MK, measured = as_subsets(subsets, len(scores.group_labels)), as_measurements(measurements)
    measured_MRQ = measured if measured.ndim == 3 else measured[:, None]
    measured_MQ = measured_MRQ.mean(1)
    _check_shapes(kept_MK, measured_MQ, scores)
    predicted_MQ = _predicted(scores, kept_MK)
    used = _varies(predicted_MQ)
    if not used.any():
        raise ScoreError("no query's predicted change varies from subset to subset, so there is no slope.")
    value, low, high = _fit(predicted_MQ[:, used], measured_MQ[:, used])
    left_out = float((~kept_MK @ np.array(scores.group_sizes)).mean() / sum(scores.group_sizes))
    counts = (len(kept_MK), measured_MRQ.shape[1], int(used.sum()))
    return Slope(value, low, high, *counts, left_out, scores.provenance)


def _fit(predicted_MQ: np.ndarray, measured_MQ: np.ndarray) -> tuple[float, float, float]:
    """The slope and its interval."""
    from scipy import stats

    x_MQ, y_MQ = (side - side.mean(0) for side in (predicted_MQ, measured_MQ))
    slope = (x_MQ * y_MQ).sum() / (x_MQ**2).sum()
    residual_MQ = x_MQ * (y_MQ - slope * x_MQ) / (x_MQ**2).mean()
    M, Q = residual_MQ.shape
    clusters, variance = M, float(np.var(residual_MQ.mean(1), ddof=1)) / M
    if Q > 1:
        clusters, variance = min(M, Q), variance + variance_added(residual_MQ)
    half = float(stats.t.ppf(UPPER, clusters - 1)) * variance**0.5
    return float(slope), float(slope - half), float(slope + half)
