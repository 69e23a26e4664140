"""Removing the examples that hold a query's prediction up: does it turn?

Axis letters: Q queries, N examples, C counts that are removed, M subsets, R repetitions, D random draws.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..arguments import whole_numbers
from ..errors import ScoreError
from ..report.row import Estimate, Row
from ..report.table import Table
from ..results.scores import Scores
from .retraining.reuse import RetrainingOptions, Retrainings
from .retraining.training import Training
from .series import (
    NOTHING_REMOVED,
    RANDOM,
    Series,
    check_examples,
    check_queries,
    ordered,
    over_examples,
    random_order,
    values_of,
    without,
)
from .statistics import student_interval, wilson_interval

if TYPE_CHECKING:
    from typing_extensions import Unpack

_DRAWS = 5  # random sets of each count, each for all queries
_INTERVAL = (
    "Intervals: 95%, Wilson's, of a share of the queries; a query of a series with several runs counts by the share of "
    "the runs in which it turns. A row's values are those of the queries. For random, whose draws are each removed for "
    "all queries: Student's t, within 0 and 1, of the mean over the draws; its values are the draws' shares."
)


def removal_counterfactual(
    scores: Series,
    training: Training,
    folder: str | os.PathLike[str],
    *,
    counts: Sequence[int] = (10, 50, 100),
    **options: Unpack[RetrainingOptions],
) -> Table:
    """What share of the right predictions turns wrong without the examples that support them most?

    For each query on its own, the examples whose removal lowers its measurement most by its own scores are removed, and
    the model is retrained: the query turns if its measurement, averaged over the repetitions, is below 0. The
    measurement must be a margin, above 0 where the query is right. Queries that are not right on average when nothing
    is removed are left out (Ilyas et al. 2022, arXiv 2202.00622, ask so for one method).

    Args:
        scores: over single examples [Q, N] with a row for each query; or {name: scores}; or {name: [scores of each of
            several runs]}.
        training, folder, options: as for `retraining_score`. A series costs `repetitions` retrainings for each right
            query, count and run.
        counts: how many examples are removed.

    Returns:
        A Table with a row for each series and count; "random" removes the same random examples for all queries, five
        times. The reference, "nothing removed", is the share of these queries that turn when only the seeds change:
        it is not 0 where predictions are unsure.

    Raises:
        ScoreError: scores or training do not fit, no query is right, or the folder holds something else.
    """
    series, N = over_examples(scores)
    retrainings = Retrainings(training, folder, **options)
    check_examples(training, N)
    counts = _checked_counts(counts, N)
    repetitions = retrainings.repetitions
    whole_RQ = retrainings.nothing_removed(N, 2 * repetitions)
    first_Q, second_Q = whole_RQ[:repetitions].mean(0), whole_RQ[repetitions:].mean(0)
    right = np.flatnonzero(first_Q > 0)
    check_queries(series, len(first_Q))
    if not len(right):
        raise ScoreError(
            f"none of {len(first_Q)} queries has a measurement above 0 when nothing is removed. Measure margins, not "
            "losses."
        )
    turned = {**_turned(series, retrainings, counts, right), RANDOM: _turned_at_random(retrainings, counts, right, N)}
    rows = tuple(
        Row(name, count, *_interval(name, values[:, place]), tuple(values[:, place]))
        for name, values in turned.items()
        for place, count in enumerate(counts)
    )
    settings = {
        **retrainings.settings(series),
        "interval": _INTERVAL,
        "examples": N,
        "queries": len(first_Q),
        "queries_right": len(right),
        "queries_left_out": len(first_Q) - len(right),
        "right": right.tolist(),
        "random_draws": _DRAWS,
    }
    return Table(
        "Counterfactual: each query's own supporters removed",
        "training examples removed for each query",
        "share of right queries that turn wrong",
        rows,
        {NOTHING_REMOVED: wilson_interval(float((second_Q[right] < 0).mean()), len(right))},
        settings,
    )


def _checked_counts(given: Sequence[int], examples: int) -> list[int]:
    advice = f"Remove some of the {examples} examples, but not all."
    counts = whole_numbers("counts", given, ScoreError, 1, examples - 1, advice)
    if not counts or len(set(counts)) < len(counts):
        raise ScoreError(f"counts={counts} of {examples} examples: expected one or more, each of them once.")
    return list(counts)


def _interval(name: str, values: np.ndarray) -> Estimate:
    """Of the queries, which are independent, or of the random draws: each is the same for all queries."""
    if name != RANDOM:
        return wilson_interval(float(values.mean()), len(values))
    mean, low, high = student_interval(values)
    return Estimate(mean, max(0.0, low), min(1.0, high))


def _turned(
    series: Mapping[str, Sequence[Scores]],
    retrainings: Retrainings,
    counts: Sequence[int],
    right: np.ndarray,
) -> dict[str, np.ndarray]:
    """{series: [right queries, C]}: the share of the series' runs in which each query turns."""
    subsets = []
    for runs in series.values():
        for number, run in enumerate(runs):
            values_QN = values_of(run)
            orders = (ordered(-values_QN[query], values_QN, [retrainings.seed, number, query]) for query in right)
            subsets += [without(order, count) for order in orders for count in counts]
    measured_MQ = retrainings.measured(np.stack(subsets)).mean(1)
    shape = (len(right), len(counts))
    query_M = np.tile(np.repeat(right, len(counts)), len(subsets) // (shape[0] * shape[1]))
    turned = (measured_MQ[np.arange(len(subsets)), query_M] < 0).reshape(-1, *shape)
    by_series = np.split(turned, np.cumsum([len(runs) for runs in series.values()])[:-1])
    return {name: of_runs.mean(0) for name, of_runs in zip(series, by_series, strict=True)}


def _turned_at_random(retrainings: Retrainings, counts: Sequence[int], right: np.ndarray, examples: int) -> np.ndarray:
    """[D, C]: the share of the right queries that turn when the same random examples are removed for all of them."""
    orders = [random_order(examples, [retrainings.seed, draw]) for draw in range(_DRAWS)]
    subsets = np.stack([without(order, count) for order in orders for count in counts])
    turned = retrainings.measured(subsets).mean(1)[:, right] < 0
    share: np.ndarray = turned.reshape(_DRAWS, len(counts), len(right)).mean(2)
    return share
