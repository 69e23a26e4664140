"""Linear datamodeling score: do summed group scores rank retrainings as retraining does? (Park et al. 2023)"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..errors import ScoreError
from ..scores import Scores


@dataclass(frozen=True)
class LinearDatamodelingScore:
    """Spearman correlations over subsets, one for each query, with the mean and its bootstrap interval.

    per_query: [Q]; mean: over queries; low, high: the interval of `confidence`, from resampling subsets and queries.
    """

    per_query: np.ndarray
    mean: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def linear_datamodeling_score(
    scores: Scores,
    subsets: np.ndarray | Tensor,
    measurements: np.ndarray | Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> LinearDatamodelingScore:
    """Rank agreement between predicted and retrained measurements over random subsets (Park et al. 2023).

    Args:
        scores: over groups; for subsets of single examples, scores of `Groups.singletons`.
        subsets: [M, K] booleans, which groups each retraining kept.
        measurements: [M, Q], each query's measurement after each retraining (averaged over its repetitions).
        confidence, resamples, seed: of the bootstrap interval.

    Raises:
        ScoreError: shapes do not fit, a number is not finite, or a query's measurement is the same in every subset.

    Example:
        >>> import torch
        >>> scores = Scores(torch.tensor([[1.0, 2.0, 4.0]]), ("q",), ("a", "b", "c"), (1, 1, 1))
        >>> kept = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0]], dtype=bool)
        >>> linear_datamodeling_score(scores, kept, [[4.0], [2.0], [1.0], [6.0]]).mean
        1.0
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ScoreError(f"confidence={confidence}, resamples={resamples}: expected 0 < confidence < 1 and 1 or more.")
    given, measured = _plain(subsets), _plain(measurements).astype(float)
    if not np.isin(given, (0, 1)).all():
        raise ScoreError("subsets: expected [M, K] booleans (kept or not), found other numbers. Are they indices?")
    kept = given.astype(bool)
    values = scores.values.detach().cpu().double().numpy()
    _check_shapes(kept, measured, values)
    predicted = (~kept).astype(float) @ values.T  # [M, Q]: the predicted change from leaving groups out
    _check_varying(predicted, measured)
    correlations = _spearman(predicted, measured)
    generator = np.random.default_rng(seed)
    M, Q = measured.shape
    means = np.empty(resamples)
    for index in range(resamples):
        rows, columns = generator.integers(0, M, M), generator.integers(0, Q, Q)
        drawn = _spearman(predicted[rows][:, columns], measured[rows][:, columns])
        ranked = np.isfinite(drawn)  # a draw of one subset over and over has no ranks
        means[index] = drawn[ranked].mean() if ranked.any() else np.nan
    if not np.isfinite(means).any():
        raise ScoreError(f"no interval from {resamples} resamples of {M} subsets. Give more of either.")
    low, high = np.nanquantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return LinearDatamodelingScore(correlations, float(correlations.mean()), float(low), float(high), confidence)


def _plain(given: np.ndarray | Tensor) -> np.ndarray:
    return given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)


def _check_shapes(kept: np.ndarray, measured: np.ndarray, values: np.ndarray) -> None:
    Q, K = values.shape
    if kept.ndim != 2 or kept.shape[1] != K or measured.shape != (len(kept), Q):
        raise ScoreError(
            f"subsets {kept.shape} and measurements {measured.shape}: expected [M, {K}] and [M, {Q}] for these scores."
        )
    if len(kept) < 3:
        raise ScoreError(f"{len(kept)} subsets: expected at least 3 to rank.")
    if not np.isfinite(measured).all() or not np.isfinite(values).all():
        raise ScoreError("scores or measurements are not finite. Look for a retraining that diverged.")


def _check_varying(predicted: np.ndarray, measured: np.ndarray) -> None:
    for name, side in (("predicted change", predicted), ("measurement", measured)):
        spread, size = np.ptp(side, axis=0), np.abs(side).max(0)
        constant = np.flatnonzero(spread <= 1e-14 * size)
        if len(constant):
            raise ScoreError(
                f"query {constant[0]}: the {name} is the same for every subset, so there is no rank. Vary the subsets."
            )


def _spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman correlation of each column."""
    ranks = [_ranks(side) for side in (first, second)]
    centred = [side - side.mean(0) for side in ranks]
    squares = [(side**2).sum(0) for side in centred]
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation: np.ndarray = (centred[0] * centred[1]).sum(0) / np.sqrt(squares[0] * squares[1])
    return correlation


def _ranks(columns: np.ndarray) -> np.ndarray:
    """Ranks down each column, ties sharing their mean rank."""
    ordered = np.sort(columns, axis=0)
    sides = ("left", "right")
    bounds = [
        np.stack([np.searchsorted(o, c, side=side) for o, c in zip(ordered.T, columns.T, strict=True)], 1)  # type: ignore[call-overload]
        for side in sides
    ]
    return (bounds[0] + bounds[1] - 1) / 2.0
