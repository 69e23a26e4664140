"""Linear datamodeling score: do summed group scores rank retrainings as retraining does? (Park et al. 2023)"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..errors import ScoreError
from ..scores import Scores
from .intervals import quantiles


@dataclass(frozen=True)
class _Estimate:
    """per_query: [Q]; mean: over queries; low, high: the interval of `confidence`, from resampling."""

    per_query: np.ndarray
    mean: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class LinearDatamodelingScore(_Estimate):
    """Spearman correlations over subsets, one for each query, with the mean and its bootstrap interval.

    per_query: [Q]; mean: over queries; low, high: the interval of `confidence`, from resampling subsets and queries.
    """

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
    predicted, measured = compared(scores, subsets, measurements)
    correlations = spearman(predicted, measured)
    (means,) = resampled([predicted], measured, resamples, seed, confidence)
    estimate = quantiles(correlations.mean(), means, confidence)
    return LinearDatamodelingScore(correlations, *estimate, confidence)


@dataclass(frozen=True)
class LinearDatamodelingDifference(_Estimate):
    """By how much the first linear datamodeling score exceeds the second, with its paired bootstrap interval.

    per_query: [Q]; mean: over queries; low, high: the interval of `confidence`. One that excludes 0 says that the two
    differ by more than the choice of subsets and queries explains.
    """

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def linear_datamodeling_difference(
    first: Scores,
    second: Scores,
    subsets: np.ndarray | Tensor,
    measurements: np.ndarray | Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> LinearDatamodelingDifference:
    """Compare two methods on the same retrainings: each resample draws its subsets and queries for both.

    Two methods' scores rise and fall together from draw to draw, so this interval is narrower than the two methods' own
    intervals suggest.

    Args:
        first, second: scores of the same queries and groups.
        subsets, measurements, confidence, resamples, seed: as for `linear_datamodeling_score`.

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
    (one, measured), (other, _) = (compared(scores, subsets, measurements) for scores in (first, second))
    difference = spearman(one, measured) - spearman(other, measured)
    means = resampled([one, other], measured, resamples, seed, confidence)
    estimate = quantiles(difference.mean(), means[0] - means[1], confidence)
    return LinearDatamodelingDifference(difference, *estimate, confidence)


def compared(
    scores: Scores, subsets: np.ndarray | Tensor, measurements: np.ndarray | Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """The predicted and the measured side [M, Q], checked."""
    kept, measured = checked_subsets(subsets), plain(measurements).astype(float)
    values = scores.values.detach().cpu().double().numpy()
    _check_shapes(kept, measured, values)
    predicted = (~kept).astype(float) @ values.T  # the predicted change from leaving groups out
    _check_varying(predicted, measured)
    return predicted, measured


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
