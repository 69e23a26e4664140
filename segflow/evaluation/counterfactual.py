"""Removing the examples that hold a query's prediction up: does it turn?

Axis letters: Q queries, N examples, C counts that are removed, R repetitions, D random draws.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ScoreError, is_whole
from ..report.table import Estimate, Row, Table
from ..results.scores import Scores
from .retraining.bank import Training
from .retraining.reuse import RetrainingOptions, Retrainings
from .series import (
    RANDOM,
    Series,
    check_queries,
    check_training,
    numbers,
    ordered,
    over_examples,
    random_order,
    values_of,
    without,
)
from .statistics import student, wilson

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
    how = Retrainings(training, folder, **options)
    check_training(training, N)
    wanted = numbers("counts", counts)
    if not wanted or not all(is_whole(own, 1) and own < N for own in wanted) or len(set(wanted)) < len(wanted):
        raise ScoreError(f"counts={wanted} of {N} examples: expected some, each once, from 1 to {N - 1}.")
    counts = [int(own) for own in wanted]
    whole = how.nothing_removed(N, 2 * how.repetitions)
    first, second = whole[: how.repetitions].mean(0), whole[how.repetitions :].mean(0)
    right = np.flatnonzero(first > 0)
    check_queries(series, len(first))
    if not len(right):
        raise ScoreError(
            f"none of {len(first)} queries has a measurement above 0 when nothing is removed. Measure margins, not "
            "losses."
        )
    rows = tuple(
        Row(name, count, *_interval(name, columns[:, place]), tuple(columns[:, place]))
        for name, columns in _turned(series, how, counts, right, N).items()
        for place, count in enumerate(counts)
    )
    settings = {
        **how.settings(series),
        "interval": _INTERVAL,
        "examples": N,
        "queries": len(first),
        "queries_right": len(right),
        "queries_left_out": len(first) - len(right),
        "right": right.tolist(),
        "random_draws": _DRAWS,
    }
    return Table(
        "Counterfactual: each query's own supporters removed",
        "training examples removed for each query",
        "share of right queries that turn wrong",
        rows,
        {"nothing removed": wilson(float((second[right] < 0).mean()), len(right))},
        settings,
    )


def _interval(name: str, values: np.ndarray) -> Estimate:
    """Of the queries, which are independent, or of the random draws: each is the same for all queries."""
    if name != RANDOM:
        return wilson(float(values.mean()), len(values))
    mean, low, high = student(values)
    return Estimate(mean, max(0.0, low), min(1.0, high))


def _turned(
    series: Mapping[str, Sequence[Scores]], how: Retrainings, counts: Sequence[int], right: np.ndarray, N: int
) -> dict[str, np.ndarray]:
    """{series: [right queries, C]}: the share of the runs in which each query turns; random: [D, C], of the queries."""
    subsets = []
    for runs in series.values():
        for number, run in enumerate(runs):
            values_QN = values_of(run)
            orders = (ordered(-values_QN[query], values_QN, [how.seed, number, query]) for query in right)
            subsets += [without(order, count) for order in orders for count in counts]
    shape = (len(right), len(counts))
    measured = how.measured(np.stack(subsets)).mean(1)
    own_Q = np.tile(np.repeat(right, len(counts)), len(measured) // (shape[0] * shape[1]))
    below = (measured[np.arange(len(measured)), own_Q] < 0).reshape(-1, *shape)
    parts = np.split(below, np.cumsum([len(runs) for runs in series.values()])[:-1])
    chance = [random_order(N, [how.seed, draw]) for draw in range(_DRAWS)]
    drawn = how.measured(np.stack([without(order, count) for order in chance for count in counts])).mean(1)
    by_chance = (drawn[:, right] < 0).reshape(_DRAWS, len(counts), len(right)).mean(2)
    return {**{name: part.mean(0) for name, part in zip(series, parts, strict=True)}, RANDOM: by_chance}
