"""Linear datamodeling score: do summed group scores rank retrainings as retraining does? (Park et al. 2023)

`linear_datamodeling_score` is of one method and of retrainings that are there already, `linear_datamodeling_difference`
compares two methods on them, and `linear_datamodeling_curve` retrains by itself, on subsets of several sizes.

Axis letters: M subsets, K groups, N examples, R repetitions, Q queries.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..arguments import real_numbers, whole_number
from ..errors import ScoreError
from ..report.row import Row
from ..report.table import Table
from ..results.scores import Scores
from .arguments import as_measurements
from .noise import noise_ceiling, perfect_score
from .retraining.pool import random_subsets
from .retraining.reuse import RetrainingOptions, Retrainings
from .retraining.training import Training
from .series import CEILING, RANDOM, Series, check_examples, over_examples, values_of
from .statistics import CONFIDENCE, Bootstrap, quantile_interval, resampled_correlations, spearman
from .subsets import as_subsets

if TYPE_CHECKING:
    from typing_extensions import Unpack

_RANDOM_SERIES = 10  # series of random scores, averaged
_INTERVAL = (
    "Intervals: 95%, the quantiles of a bootstrap that draws subsets and queries, the same ones for each series (of "
    "the mean over the runs, where a series has several). A row's values are those of the queries."
)

# ---- of retrainings that are there ----


@dataclass(frozen=True)
class _WithInterval:
    """A number for each query, and their mean with its interval."""

    per_query: np.ndarray
    mean: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class LinearDatamodelingScore(_WithInterval):
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
    bootstrap = Bootstrap(confidence, resamples, seed)
    predicted, measured = _predicted_and_measured(scores, subsets, measurements)
    correlations = spearman(predicted, measured)
    (means,) = resampled_correlations([predicted], measured, bootstrap)
    interval = quantile_interval(correlations.mean(), means, bootstrap.confidence)
    return LinearDatamodelingScore(correlations, *interval, bootstrap.confidence)


@dataclass(frozen=True)
class LinearDatamodelingDifference(_WithInterval):
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
    bootstrap = Bootstrap(confidence, resamples, seed)
    predicted_first, measured = _predicted_and_measured(first, subsets, measurements)
    predicted_second, _ = _predicted_and_measured(second, subsets, measurements)
    differences = spearman(predicted_first, measured) - spearman(predicted_second, measured)
    means = resampled_correlations([predicted_first, predicted_second], measured, bootstrap)
    interval = quantile_interval(differences.mean(), means[0] - means[1], bootstrap.confidence)
    return LinearDatamodelingDifference(differences, *interval, bootstrap.confidence)


def _predicted_and_measured(
    scores: Scores, subsets: np.ndarray | Tensor, measurements: np.ndarray | Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """The predicted change from leaving groups out and the measurement, each [M, Q], checked to have ranks."""
    kept_MK, measured_MQ, values_QK = (
        as_subsets(subsets, len(scores.group_labels)),
        as_measurements(measurements),
        values_of(scores),
    )
    _check_shapes(kept_MK, measured_MQ, values_QK)
    predicted_MQ = (~kept_MK).astype(float) @ values_QK.T
    _check_varying("predicted change", predicted_MQ)
    _check_varying("measurement", measured_MQ)
    return predicted_MQ, measured_MQ


def _check_shapes(kept_MK: np.ndarray, measured_MQ: np.ndarray, values_QK: np.ndarray) -> None:
    Q, K = values_QK.shape
    if kept_MK.ndim != 2 or kept_MK.shape[1] != K or measured_MQ.shape != (len(kept_MK), Q):
        raise ScoreError(
            f"subsets {kept_MK.shape} and measurements {measured_MQ.shape}: expected [M, {K}] and [M, {Q}] for these "
            "scores."
        )
    if len(kept_MK) < 3:
        raise ScoreError(f"{len(kept_MK)} subsets: expected at least 3 to rank.")
    if not np.isfinite(values_QK).all():
        raise ScoreError("scores: a number is not finite. Score again, or leave the method out.")


def _check_varying(name: str, values_MQ: np.ndarray) -> None:
    spread, size = np.ptp(values_MQ, axis=0), np.abs(values_MQ).max(0)
    constant = np.flatnonzero(spread <= 1e-14 * size)
    if len(constant):
        raise ScoreError(
            f"query {constant[0]}: the {name} is the same for every subset, so there is no rank. Vary the subsets."
        )


# ---- with retrainings of its own ----


def linear_datamodeling_curve(
    scores: Series,
    training: Training,
    folder: str | os.PathLike[str],
    *,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    subsets: int = 50,
    resamples: int = 200,
    **options: Unpack[RetrainingOptions],
) -> Table:
    """Retrain on random subsets of several sizes: the linear datamodeling score of each series over the share kept.

    For retrainings that are there already, `linear_datamodeling_score` is the same number (Park et al. 2023).

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
    retrainings = Retrainings(training, folder, **options)
    check_examples(training, N)
    _check_ratios(ratios := real_numbers("ratios", ratios, ScoreError), N)
    subsets = whole_number("subsets", subsets, ScoreError, 3, advice="It counts retrained subsets, to rank.")
    like = next(iter(series.values()))[0]
    seed = retrainings.seed
    bootstrap = Bootstrap(CONFIDENCE, resamples, seed)
    random_scores = [_random_scores(like, [seed, draw]) for draw in range(_RANDOM_SERIES)]
    rows: dict[str, list[Row]] = {name: [] for name in (*series, RANDOM, CEILING)}
    for place, ratio in enumerate(ratios):
        kept = random_subsets(subsets, N, ratio, seed * len(ratios) + place)
        measured_MRQ = retrainings.measured(kept)
        for name, runs in {**series, RANDOM: random_scores}.items():
            rows[name].append(_row(name, ratio, runs, kept, measured_MRQ.mean(1), bootstrap))
        if retrainings.repetitions > 1:
            rows[CEILING].append(_ceiling_row(ratio, measured_MRQ, bootstrap))
    settings = {
        **retrainings.settings(series),
        "interval": _INTERVAL,
        "examples": N,
        "queries": len(like.query_labels),
        "subsets": subsets,
        "random_draws": _RANDOM_SERIES,
        "resamples": bootstrap.resamples,
    }
    return Table(
        "Linear datamodeling score",
        "share of the training examples kept",
        "Spearman correlation",
        tuple(row for of_series in rows.values() for row in of_series),
        settings=settings,
    )


def _check_ratios(ratios: tuple[float, ...], examples: int) -> None:
    """ScoreError, before anything is trained, if a ratio keeps none or all, or two keep as many."""
    kept = [round(ratio * examples) for ratio in ratios]
    if not kept or not all(0 < count < examples for count in kept) or len(set(kept)) < len(kept):
        raise ScoreError(
            f"ratios={ratios} keep {kept} of {examples} examples: expected a ratio or more that keep some, but not "
            "all, and no two of them as many."
        )


def _row(
    name: str,
    ratio: float,
    runs: Sequence[Scores],
    kept: np.ndarray,
    measured_MQ: np.ndarray,
    bootstrap: Bootstrap,
) -> Row:
    """The score of one series at one ratio, averaged over its runs."""
    predictions = [_predicted_and_measured(run, kept, measured_MQ)[0] for run in runs]
    score_Q = np.mean([spearman(predicted_MQ, measured_MQ) for predicted_MQ in predictions], axis=0)
    means = resampled_correlations(predictions, measured_MQ, bootstrap).mean(0)
    return Row(name, ratio, *quantile_interval(float(score_Q.mean()), means), tuple(score_Q))


def _ceiling_row(ratio: float, measured_MRQ: np.ndarray, bootstrap: Bootstrap) -> Row:
    found = noise_ceiling(measured_MRQ, confidence=bootstrap.confidence)
    of_queries = perfect_score(found.per_query[np.isfinite(found.per_query)], len(measured_MRQ))
    return Row(CEILING, ratio, found.ceiling, found.low, found.high, tuple(of_queries))


def _random_scores(like: Scores, seed: Sequence[int]) -> Scores:
    values = np.random.default_rng(seed).normal(size=tuple(like.values.shape))
    return Scores(torch.from_numpy(values), like.query_labels, like.group_labels, like.group_sizes)
