"""Linear datamodeling score: do summed group scores rank retrainings as retraining does? (Park et al. 2023)"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import ScoreError, is_whole
from ..report.table import Estimate, Row, Table
from ..results.scores import Scores
from .retraining.bank import Training
from .retraining.pool import random_subsets
from .retraining.reuse import RetrainingOptions, Retrainings
from .series import CEILING, RANDOM, Series, check_training, numbers, over_examples
from .statistics import CONFIDENCE, checked_subsets, noise_ceiling, plain, quantiles, resampled, spearman

if TYPE_CHECKING:
    from typing_extensions import Unpack


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


_DRAWS = 10  # random scores, averaged
_SPLITS = 10  # of the repetitions, in each resample of the noise ceiling


_INTERVAL = (
    "Intervals: 95%, the quantiles of a bootstrap that draws subsets and queries, the same ones for each series (of "
    "the mean over the runs, where a series has several). A row's values are those of the queries."
)


def linear_datamodeling_scores(
    scores: Series,
    training: Training,
    folder: str | os.PathLike[str],
    *,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    subsets: int = 50,
    resamples: int = 200,
    **options: Unpack[RetrainingOptions],
) -> Table:
    """The linear datamodeling score (Park et al. 2023) of each series at several shares of kept data.

    Args:
        scores: over single examples [Q, N] with a row for each query; or {name: scores}; or {name: [scores of each of
            several runs]}, whose linear datamodeling scores are averaged.
        training, folder, options: as for `retraining_score`; `subsets` times `repetitions` models are trained for each
            ratio.
        ratios: shares of the examples that each subset keeps.
        subsets: random subsets of each ratio.
        resamples: of the bootstrap.

    Returns:
        A Table with a row for each series and ratio. "random" is the mean of ten series of random numbers; "noise
        ceiling" is what a perfect predictor would reach (see `noise_ceiling`), where there are two or more repetitions.

    Raises:
        ScoreError: scores or training do not fit, a ratio keeps none or all, or the folder holds something else.
    """
    series, N = over_examples(scores)
    how = Retrainings(training, folder, **options)
    check_training(training, N)
    ratios = _checked(numbers("ratios", ratios), N)
    if not is_whole(subsets, 3) or not is_whole(resamples, 1):
        raise ScoreError(f"subsets={subsets}, resamples={resamples}: expected at least 3 subsets and 1 resample.")
    like = next(iter(series.values()))[0]
    chance = [_random_scores(like, [how.seed, draw]) for draw in range(_DRAWS)]
    found: dict[str, list[Row]] = {name: [] for name in (*series, RANDOM, CEILING)}
    for place, ratio in enumerate(ratios):
        kept = random_subsets(subsets, N, ratio, how.seed * len(ratios) + place)
        measured_MRQ = how.measured(kept)
        for name, runs in {**series, RANDOM: chance}.items():
            found[name].append(_row(name, ratio, runs, kept, measured_MRQ.mean(1), (resamples, how.seed)))
        if how.repetitions > 1:
            found[CEILING].append(_ceiling(ratio, measured_MRQ, resamples, how.seed))
    settings = {
        **how.settings(series),
        "interval": _INTERVAL,
        "examples": N,
        "queries": len(like.query_labels),
        "subsets": subsets,
        "random_draws": _DRAWS,
        "resamples": resamples,
    }
    rows = tuple(row for own in found.values() for row in own)
    return Table(
        "Linear datamodeling score", "share of the training examples kept", "Spearman correlation", rows, {}, settings
    )


def _checked(ratios: tuple[float, ...], examples: int) -> tuple[float, ...]:
    """The ratios, before anything is trained; ScoreError if one keeps none or all, or two keep as many."""
    kept = [round(ratio * examples) for ratio in ratios]
    if not kept or not all(0 < count < examples for count in kept) or len(set(kept)) < len(kept):
        raise ScoreError(
            f"ratios={ratios} keep {kept} of {examples} examples: expected a ratio or more that keep some, but not "
            "all, and no two of them as many."
        )
    return ratios


def _row(
    name: str,
    ratio: float,
    runs: Sequence[Scores],
    kept: np.ndarray,
    measured_MQ: np.ndarray,
    bootstrap: tuple[int, int],
) -> Row:
    """bootstrap: its resamples and its seed."""
    sides = [compared(run, kept, measured_MQ)[0] for run in runs]
    per_query = np.mean([spearman(side, measured_MQ) for side in sides], axis=0)
    means = resampled(sides, measured_MQ, *bootstrap, CONFIDENCE).mean(0)
    return Row(name, ratio, *quantiles(float(per_query.mean()), means), tuple(per_query))


def _ceiling(ratio: float, measured_MRQ: np.ndarray, resamples: int, seed: int) -> Row:
    M, _, Q = measured_MRQ.shape
    found, generator = noise_ceiling(measured_MRQ, seed=seed), np.random.default_rng(seed)
    draws = [
        noise_ceiling(
            measured_MRQ[generator.integers(0, M, M)][:, :, generator.integers(0, Q, Q)], splits=_SPLITS
        ).ceiling
        for _ in range(resamples)
    ]
    estimate: Estimate = quantiles(found.ceiling, np.array(draws))
    return Row(CEILING, ratio, *estimate, tuple(np.sqrt(np.clip(found.per_query, 0, None))))


def _random_scores(like: Scores, seed: Sequence[int]) -> Scores:
    values = np.random.default_rng(seed).normal(size=tuple(like.values.shape))
    return Scores(torch.from_numpy(values), like.query_labels, like.group_labels, like.group_sizes)
