"""Removing the examples that hold a query's prediction up: does it turn?

Axis letters: Q queries, N examples, C counts that are removed, M subsets, R repetitions, D random draws.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..arguments import whole_numbers
from ..data.streams import stream
from ..errors import ScoreError
from ..report.row import Estimate, Row
from ..report.table import Table
from ..results.scores import Scores
from .intervals import FEWEST_CASES, over_cases_and_runs
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
from .ties import precision, summed

if TYPE_CHECKING:
    from typing_extensions import Unpack

_DRAWS = 5  # random sets of each count, each for all queries
_INTERVAL = (
    "Intervals: 95%, Agresti and Coull's with Student's t, of a share of the queries, for other queries and other runs "
    "(for random: other draws, each of which is removed for all queries): the spread between the queries and that "
    "between the runs (draws) are added; a single run is taken as it is, and so are the retrainings in which nothing "
    f"is removed. None is given for fewer than {FEWEST_CASES} right queries. A row's values are those "
    "of the queries, of which each counts by the share of the runs in which it turns; those of random are the draws' "
    "shares."
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
        Row(name, count, *_interval(runs[..., place]), tuple(runs[..., place].mean(1 if name == RANDOM else 0)))
        for name, runs in turned.items()
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
        {NOTHING_REMOVED: _interval((second_Q[None, right] < 0).astype(float))},
        settings,
    )


def _checked_counts(given: Sequence[int], examples: int) -> list[int]:
    advice = f"Remove some of the {examples} examples, but not all."
    counts = whole_numbers("counts", given, ScoreError, 1, examples - 1, advice)
    if not counts or len(set(counts)) < len(counts):
        raise ScoreError(f"counts={counts} of {examples} examples: expected one or more, each of them once.")
    return list(counts)


def _interval(turned: np.ndarray) -> Estimate:
    """Of the share [runs, right queries] that turned."""
    queries = turned.shape[1]
    of_queries = float(np.var(turned.mean(0), ddof=1)) / queries if queries > 1 else np.inf
    return over_cases_and_runs(turned.mean(1), of_queries, queries)


def _turned(
    series: Mapping[str, Sequence[Scores]],
    retrainings: Retrainings,
    counts: Sequence[int],
    right: np.ndarray,
) -> dict[str, np.ndarray]:
    """{series: [runs, right queries, C]}: whether each query turns without its own supporters, as 0 or 1."""
    subsets = []
    for runs in series.values():
        for number, run in enumerate(runs):
            values_QN = values_of(run)
            for query in right:
                supporters_N = -summed(values_QN[query : query + 1], precision(run.values))
                order = ordered(
                    supporters_N, values_QN, stream(retrainings.seed, "ties of a query", number, int(query))
                )
                subsets += [without(order, count) for count in counts]
    measured_MQ = retrainings.measured(np.stack(subsets)).mean(1)
    shape = (len(right), len(counts))
    query_M = np.tile(np.repeat(right, len(counts)), len(subsets) // (shape[0] * shape[1]))
    turned = (measured_MQ[np.arange(len(subsets)), query_M] < 0).astype(float).reshape(-1, *shape)
    by_series = np.split(turned, np.cumsum([len(runs) for runs in series.values()])[:-1])
    return dict(zip(series, by_series, strict=True))


def _turned_at_random(retrainings: Retrainings, counts: Sequence[int], right: np.ndarray, examples: int) -> np.ndarray:
    """[D, right queries, C]: whether each turns when the same random examples are removed for all of them."""
    orders = [random_order(examples, retrainings.seed, draw) for draw in range(_DRAWS)]
    subsets = np.stack([without(order, count) for order in orders for count in counts])
    turned = (retrainings.measured(subsets).mean(1)[:, right] < 0).astype(float)
    return np.swapaxes(turned.reshape(_DRAWS, len(counts), len(right)), 1, 2)
