"""Linear datamodeling score: do summed group scores rank retrainings as retraining does? (Park et al. 2023)

`linear_datamodeling_score` is of one method and of retrainings that are there already, `linear_datamodeling_difference`
compares two methods on them. `linear_datamodeling_curve`, in a file of its own, retrains by itself.

Axis letters: M subsets, K groups, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..report.row import Estimate
from ..results.scores import Scores
from .arguments import as_confidence
from .predicted import Retrained, left_out, predicted_changes, used_queries
from .rank_agreement import Correlations, correlations, difference_interval, mean_interval
from .statistics import CONFIDENCE, exactly


@dataclass(frozen=True)
class _WithInterval:
    """A number for each query, and their mean with its interval.

    per_query: [Q], not a number where a query is left out; mean: over the others; low, high: the interval of
    `confidence`, infinite where there is none from so few `subsets`; left_out: the labels of queries whose prediction
    or measurement is the same in every subset.
    """

    per_query: np.ndarray
    mean: float
    low: float
    high: float
    confidence: float
    subsets: int
    left_out: tuple[str, ...]

    def _shown(self, sign: str) -> str:
        interval = f"[{self.low:{sign}.3f}, {self.high:{sign}.3f}]"
        if np.isinf(self.low):
            interval = f"(no interval from {self.subsets} subsets)"
        without = f", without {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self.mean:{sign}.3f} {interval}{without}"


@dataclass(frozen=True)
class LinearDatamodelingScore(_WithInterval):
    """Spearman correlations over subsets, one for each query, with the mean and its interval.

    per_query: [Q], not a number where a query is left out; mean: over the other queries; low, high: the interval of
    `confidence`, infinite with fewer than ten subsets; subsets: how many; left_out: labels of the queries whose
    prediction or measurement is the same in every subset.
    """

    def __str__(self) -> str:
        return self._shown("")


def linear_datamodeling_score(
    scores: Scores, subsets: np.ndarray | Tensor, measurements: np.ndarray | Tensor, *, confidence: float = CONFIDENCE
) -> LinearDatamodelingScore:
    """Rank agreement between predicted and retrained measurements over random subsets (Park et al. 2023).

    Predictions that differ by rounding alone are ties. The interval is for other subsets and other queries of the same
    kinds; with fewer than ten queries it is for other subsets and the same queries. Its method: `mean_interval` of
    segflow.evaluation.rank_agreement; how often it holds: docs/STATISTICS.md.

    Args:
        scores: over groups; for subsets of single examples, scores of `Groups.singletons`.
        subsets: [M, K] booleans, which groups each retraining kept; or a list of index lists.
        measurements: [M, Q], each query's measurement after each retraining (averaged over its repetitions).
        confidence: of the interval.

    Raises:
        ScoreError: shapes do not fit, a number is not finite, or no query's prediction and measurement vary.

    Example:
        >>> import torch
        >>> scores = Scores(torch.tensor([[1.0, 2.0, 4.0]]), ("q",), ("a", "b", "c"), (1, 1, 1))
        >>> kept = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0]], dtype=bool)
        >>> print(linear_datamodeling_score(scores, kept, [[4.0], [2.0], [1.0], [6.0]]))
        1.000 (no interval from 4 subsets)
    """
    confidence = as_confidence(confidence)
    given = Retrained.of(subsets, measurements, scores)
    predicted = predicted_changes(scores, given.kept_MK)
    used = used_queries([predicted], given.measured_MQ, scores)
    found = rank_correlations([predicted], given.measured_MQ, used)
    numbers = _over_queries(found, mean_interval(found, confidence), used, scores)
    return LinearDatamodelingScore(confidence=confidence, subsets=len(given.kept_MK), **numbers)


@dataclass(frozen=True)
class LinearDatamodelingDifference(_WithInterval):
    """By how much the first linear datamodeling score exceeds the second, with its paired interval.

    per_query, mean, low, high, subsets, left_out: as of a `LinearDatamodelingScore`, of the differences. An interval
    that excludes 0 says that the two differ by more than the choice of subsets and queries explains.
    """

    def __str__(self) -> str:
        return self._shown("+")


def linear_datamodeling_difference(
    first: Scores,
    second: Scores,
    subsets: np.ndarray | Tensor,
    measurements: np.ndarray | Tensor,
    *,
    confidence: float = CONFIDENCE,
) -> LinearDatamodelingDifference:
    """Compare two methods on the same retrainings, query by query and subset by subset.

    Two methods' scores rise and fall together from subset to subset, so this interval is narrower than the two methods'
    own intervals suggest. It is for other subsets and queries of the same kinds, as that of the score. A query that is
    left out of one score is left out of both.

    Args:
        first, second: scores of the same queries and groups.
        subsets, measurements, confidence: as for `linear_datamodeling_score`.

    Raises:
        ScoreError: as for `linear_datamodeling_score`.

    Example:
        >>> import torch
        >>> values = torch.tensor([[1.0, 2.0, 4.0]])
        >>> good, bad = (Scores(sign * values, ("q",), ("a", "b", "c"), (1, 1, 1)) for sign in (1, -1))
        >>> kept = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0]], dtype=bool)
        >>> linear_datamodeling_difference(good, bad, kept, [[4.0], [2.0], [1.0], [6.0]]).mean
        2.0
    """
    confidence = as_confidence(confidence)
    given = Retrained.of(subsets, measurements, first, second)
    one, other = (predicted_changes(scores, given.kept_MK) for scores in (first, second))
    used = used_queries([one, other], given.measured_MQ, first)
    found = rank_correlations([one], given.measured_MQ, used) - rank_correlations([other], given.measured_MQ, used)
    same = np.array_equal(one, other)  # their difference is known without error
    numbers = _over_queries(found, exactly(0.0) if same else difference_interval(found, confidence), used, first)
    return LinearDatamodelingDifference(confidence=confidence, subsets=len(given.kept_MK), **numbers)


def rank_correlations(predictions: Sequence[np.ndarray], measured_MQ: np.ndarray, used: np.ndarray) -> Correlations:
    """Of the queries that are used, over subsets."""
    return correlations([predicted_MQ[:, used] for predicted_MQ in predictions], measured_MQ[:, used])


def _over_queries(found: Correlations, interval: Estimate, used: np.ndarray, scores: Scores) -> dict[str, Any]:
    """What a result says of its queries."""
    per_query = np.full(len(used), np.nan)
    per_query[used] = found.per_query
    return {"per_query": per_query, "left_out": left_out(used, scores), **interval._asdict()}
