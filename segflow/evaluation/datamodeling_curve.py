"""Linear datamodeling scores over the share of the examples that is kept, by retraining on random subsets of each size.

Axis letters: M subsets, N examples, R repetitions, Q queries.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..arguments import real_numbers, whole_number
from ..data.streams import stream, stream_seed
from ..errors import ScoreError
from ..report.row import Row
from ..report.table import Table
from ..results.scores import Scores
from .datamodeling import rank_correlations
from .noise import moves, noise_ceiling, perfect_score
from .predicted import FEWEST_SUBSETS, Retrained, left_out, predicted_changes, used_queries, varies
from .rank_agreement import FEWEST_QUERIES, FEWEST_RUNS, mean_interval
from .retraining.pool import random_subsets
from .retraining.reuse import RetrainingOptions, Retrainings
from .retraining.training import Training
from .series import CEILING, RANDOM, Series, check_examples, over_examples

if TYPE_CHECKING:
    from typing_extensions import Unpack

_RANDOM_SERIES = 10  # series of random scores, averaged
_INTERVAL = (
    f"Intervals: 95%, for other subsets, and for other queries and runs where there are {FEWEST_QUERIES} and "
    f"{FEWEST_RUNS} or more, by the jackknife and Student's t. A "
    "row's values are those of the queries."
)


def linear_datamodeling_curve(
    scores: Series,
    training: Training,
    folder: str | os.PathLike[str],
    *,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    subsets: int = 50,
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

    A query that never moves, or whose prediction never does, is left out of a row by name (`settings["left_out"]`); a
    ratio at which all queries are left out has no row.

    Returns:
        A Table with a row for each series and ratio. "random" is the mean of ten series of random numbers; "noise
        ceiling" is what a perfect predictor would reach (see `noise_ceiling`), where there are two or more repetitions.

    Raises:
        ScoreError: scores or training do not fit, a ratio keeps none or all, the folder holds something else, or
            no series has a row.
    """
    series, N = over_examples(scores)
    retrainings = Retrainings(training, folder, **options)
    check_examples(training, N)
    _check_ratios(ratios := real_numbers("ratios", ratios, ScoreError), N)
    subsets = whole_number("subsets", subsets, ScoreError, FEWEST_SUBSETS, advice="It counts retrained subsets.")
    like, seed = next(iter(series.values()))[0], retrainings.seed
    every_series = {**series, RANDOM: [_random_scores(like, seed, draw) for draw in range(_RANDOM_SERIES)]}
    drawn = {ratio: random_subsets(subsets, N, ratio, _seed_of(seed, ratio, N)) for ratio in ratios}
    for runs, kept in product(every_series.values(), drawn.values()):
        used_queries([predicted_changes(run, kept) for run in runs], None, like)  # refused before anything is trained
    rows: dict[str, list[Row]] = {name: [] for name in (*every_series, CEILING)}
    unmoved: dict[str, dict[str, tuple[str, ...]]] = {}
    for ratio, kept in drawn.items():
        measured_MRQ, found = retrainings.measured(kept), dict[str, _Found]()
        for name, runs in every_series.items():
            found[name] = _row(name, ratio, runs, kept, measured_MRQ.mean(1))
        if retrainings.repetitions > 1:
            found[CEILING] = _ceiling_row(ratio, measured_MRQ, like)
        for name, (row, without) in found.items():
            rows[name] += [row] if row else []
            if without:
                unmoved.setdefault(name, {})[f"{ratio:g}"] = without
    if not any(rows[name] for name in every_series):
        raise ScoreError(
            f"query {like.query_labels[0]!r}: at none of the ratios {ratios} does its measurement, or any other "
            "query's, vary from subset to subset. Measure something else, or take other ratios."
        )
    settings = {
        **retrainings.settings(series),
        "interval": _INTERVAL,
        "examples": N,
        "queries": len(like.query_labels),
        "subsets": subsets,
        "random_draws": _RANDOM_SERIES,
        "left_out": unmoved,
        "notes": {name: _note(of_series) for name, of_series in unmoved.items()},
    }
    return Table(
        "Linear datamodeling score",
        "share of the training examples kept",
        "Spearman correlation",
        tuple(row for of_series in rows.values() for row in of_series),
        settings=settings,
    )


def _seed_of(seed: int, ratio: float, examples: int) -> int:
    """Of a ratio's subsets, by how many examples they keep."""
    return stream_seed(seed, "subsets of the linear datamodeling curve", round(ratio * examples))


def _note(unmoved: Mapping[str, tuple[str, ...]]) -> str:
    """In words: which queries are left out at which ratios."""
    places = [f"{', '.join(labels)} (at {ratio})" for ratio, labels in unmoved.items()]
    return f"without queries that never move: {'; '.join(places)}"


def _check_ratios(ratios: tuple[float, ...], examples: int) -> None:
    """ScoreError, before anything is trained, if a ratio keeps none or all, or two keep as many."""
    kept = [round(ratio * examples) for ratio in ratios]
    if not kept or not all(0 < count < examples for count in kept) or len(set(kept)) < len(kept):
        raise ScoreError(
            f"ratios={ratios} keep {kept} of {examples} examples: expected a ratio or more that keep some, but not "
            "all, and no two of them as many."
        )


_Found = tuple[Row | None, tuple[str, ...]]  # no row where every query is left out; the labels of those that are


def _row(name: str, ratio: float, runs: Sequence[Scores], kept: np.ndarray, measured_MQ: np.ndarray) -> _Found:
    """The score of one series at one ratio, averaged over its runs, and the queries that are left out."""
    given = Retrained.of(kept, measured_MQ, *runs)
    predictions = [predicted_changes(run, kept) for run in runs]
    used = np.all([varies(values_MQ) for values_MQ in (*predictions, given.measured_MQ)], axis=0)
    if not used.any():
        return None, runs[0].query_labels
    found = rank_correlations(predictions, given.measured_MQ, used)
    return Row(name, ratio, *mean_interval(found), tuple(found.per_query)), left_out(used, runs[0])


def _ceiling_row(ratio: float, measured_MRQ: np.ndarray, like: Scores) -> _Found:
    """The noise ceiling at one ratio, and the queries that never move."""
    if not moves(measured_MRQ).any():
        return None, like.query_labels
    found = noise_ceiling(measured_MRQ)
    used = np.isfinite(found.per_query)
    of_queries = tuple(perfect_score(found.per_query[used], len(measured_MRQ)))
    return Row(CEILING, ratio, found.ceiling, found.low, found.high, of_queries), left_out(used, like)


def _random_scores(like: Scores, seed: int, draw: int) -> Scores:
    values = stream(seed, "random scores", draw).normal(size=tuple(like.values.shape))
    return Scores(torch.from_numpy(values), like.query_labels, like.group_labels, like.group_sizes)
