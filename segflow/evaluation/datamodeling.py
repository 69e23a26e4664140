"""Linear datamodeling scores at several shares of kept data, with the noise ceiling and chance beside them.

Axis letters: M subsets, N examples, R repetitions, Q queries.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import ScoreError, is_whole
from ..scores import Scores
from .bank import Training
from .intervals import CONFIDENCE, Estimate, quantiles
from .lds import compared, resampled, spearman
from .pool import RetrainingOptions, Retrainings
from .reliability import noise_ceiling
from .retraining import random_subsets
from .series import CEILING, RANDOM, Series, check_training, numbers, over_examples
from .table import Row, Table

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
