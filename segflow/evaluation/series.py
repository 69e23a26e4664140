"""What the tasks compare: named series of scores, each of one run or several, and the order in which they rank.

Axis letters: Q queries, N examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from ..data.streams import stream
from ..errors import ScoreError
from ..results.same_groups import check_same_groups, check_single_examples
from ..results.scores import Scores
from ..results.slope import check_calibrated_alike
from .ties import precision, summed

RANDOM, PERFECT, CEILING = "random", "perfect ranking", "noise ceiling"  # baselines and bounds, beside the series
NOTHING_REMOVED = "nothing removed"  # the reference
Series = Scores | Mapping[str, Scores | Sequence[Scores]]


def named_runs(scores: Series) -> dict[str, list[Scores]]:
    """The runs of each series, by its name; a bare Scores is called by its method's name.

    Raises:
        ScoreError: there are none, they are not about the same groups, one has a
            baseline's name, or some runs of a series are calibrated and others are not.
    """
    if isinstance(scores, Scores):
        scores = {str(scores.provenance.get("method", "scores")): scores}
    if not isinstance(scores, Mapping) or not scores:
        raise ScoreError(
            f"scores: expected segflow.Scores or a mapping of names to them, found {type(scores).__name__} "
            "with nothing to compare. Give {name: scores} or {name: [scores of each run]}."
        )
    series = {name: [runs] if isinstance(runs, Scores) else list(runs) for name, runs in scores.items()}
    for name in series:
        if not isinstance(name, str):
            raise ScoreError(f"scores: a series is called {name!r}, a {type(name).__name__}. Name series by a str.")
    for name in (RANDOM, PERFECT, CEILING):
        if name in series:
            raise ScoreError(f"scores: a series is called {name!r}, which the tables use. Give it another name.")
    for name, runs in series.items():
        if not runs or not all(isinstance(run, Scores) for run in runs):
            raise ScoreError(f"scores of {name!r}: expected segflow.Scores, or a sequence of at least one.")
        check_calibrated_alike(name, (run.provenance for run in runs))
    check_same_groups((name, run) for name, runs in series.items() for run in runs)
    return series


def check_queries(series: Mapping[str, Sequence[Scores]], queries: int) -> None:
    """ScoreError unless all scores have a row for each query that the training measures."""
    for name, runs in series.items():
        for run in runs:
            if len(run.query_labels) != queries:
                raise ScoreError(
                    f"scores of {name!r}: {len(run.query_labels)} queries, the training measures {queries}. Score each "
                    "of the queries that are measured, not their sum."
                )


def over_examples(scores: Series) -> tuple[dict[str, list[Scores]], int]:
    """The runs of each series, checked to be over single examples, and how many examples there are."""
    series = named_runs(scores)
    for run in chain.from_iterable(series.values()):
        check_single_examples(run, "scores")
    return series, len(run.group_sizes)


def check_examples(training: object, examples: int) -> None:
    """ScoreError if the training says that it has another number of examples."""
    trained_on = getattr(training, "examples", examples)
    if trained_on != examples:
        raise ScoreError(
            f"the training has {trained_on} examples, the scores are about {examples}. Give those that fit."
        )


def values_of(scores: Scores) -> np.ndarray:
    """The values [Q, N] of scores, in float64."""
    values: np.ndarray = np.ascontiguousarray(scores.values.detach().cpu().double().numpy())
    return values


def summed_over_queries(scores: Scores) -> np.ndarray:
    """[N]: the sums over the queries, in float64; those that differ by rounding alone are equal."""
    return summed(values_of(scores), precision(scores.values))


def ordered(values_N: np.ndarray, columns_QN: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """[N] places by falling value; ties at random, except that examples with the same column stay together."""
    mark_N = np.zeros(len(values_N))
    for weight, row_N in zip(generator.normal(size=len(columns_QN)), columns_QN, strict=True):
        mark_N += weight * row_N  # not a matrix product: equal columns give equal marks, to the last bit
    marks, block_N = np.unique(mark_N, return_inverse=True)
    turn_N = generator.permutation(len(marks))[block_N]
    order: np.ndarray = np.lexsort((generator.random(len(values_N)), turn_N, -values_N))
    return order


def random_order(examples: int, seed: int, number: int) -> np.ndarray:
    """The examples in random order; number: which of several."""
    return stream(seed, "random order", number).permutation(examples)


def without(order: np.ndarray, count: int) -> np.ndarray:
    """[N] booleans: what is kept when the first `count` of the order are removed."""
    kept = np.ones(len(order), dtype=bool)
    kept[order[:count]] = False
    return kept
