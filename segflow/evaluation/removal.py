"""Removing examples in the order of their scores, and retraining without them.

Axis letters: Q queries, N examples, C counts that are removed, R repetitions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arguments import real_numbers, settle, truth, whole_number
from ..data.streams import stream, stream_seed
from ..errors import ScoreError, check_choice
from ..report.row import Estimate, Row
from ..report.table import Table
from ..results.scores import Scores
from .intervals import counted_interval
from .retraining.reuse import RetrainingOptions, Retrainings
from .retraining.training import Training
from .series import (
    NOTHING_REMOVED,
    RANDOM,
    Series,
    check_examples,
    ordered,
    over_examples,
    random_order,
    summed_over_queries,
    values_of,
    without,
)
from .statistics import student_interval

if TYPE_CHECKING:
    from typing_extensions import Unpack

_INTERVAL = (
    "Intervals: 95%, Student's t, of the mean over the retrainings; where a series has several runs, of the mean over "
    "the runs, each averaged over its retrainings; for random, over as many random orders, each retrained once. Those "
    "of a share of queries are wider by half a query at each end, and not given for fewer than three values."
)


def removal_order(scores: Scores, largest: bool = True, seed: int = 0, absolute: bool = False) -> np.ndarray:
    """[N]: the examples in the order in which they are removed, by their scores summed over the queries.

    Ties are broken at random. Examples that have the same scores for every query, as the members of one group have
    after `Scores.by_example`, stay together.

    Args:
        scores: of single examples.
        largest: begin with those whose removal raises the measurement most; False: lowers it most.
        seed: of the ties.
        absolute: go by the size of the summed scores, whatever their sign.

    Example:
        >>> import torch
        >>> scores = Scores(torch.tensor([[1.0, -3.0, 2.0]]), ("q",), ("0", "1", "2"), (1, 1, 1))
        >>> removal_order(scores), removal_order(scores, largest=False), removal_order(scores, absolute=True)
        (array([2, 0, 1]), array([1, 0, 2]), array([1, 2, 0]))
    """
    falling, seed = truth("largest", largest, ScoreError), whole_number("seed", seed, ScoreError)
    sums = summed_over_queries(scores)
    sums = np.abs(sums) if truth("absolute", absolute, ScoreError) else sums
    return ordered(sums if falling else -sums, values_of(scores), stream(seed, "ties of a removal order"))


def retraining_score(
    scores: Series,
    training: Training,
    folder: str | os.PathLike[str],
    *,
    shares: Sequence[float] = (0.01, 0.05, 0.1, 0.2),
    largest: bool = True,
    summary: str = "mean",
    **options: Unpack[RetrainingOptions],
) -> Table:
    """How far the measurement moves when the examples that a method calls most important are removed.

    The better the method, the further its curve lies from that of random removal and from the line without removal
    (the retraining score of Ley et al. 2024, arXiv 2410.09940).

    Args:
        scores: over single examples [Q, N]; or {name: scores}; or {name: [scores of each of several runs]}. Scores of
            groups become such by `Scores.by_example`.
        training: what trains and measures, such as `BatchedTraining`; its examples are those of the scores.
        folder: where the retrainings are kept; what is there already is not trained again. Other tasks may share it.
        shares: shares of the examples that are removed, each more than none and less than all.
        largest: True where low measurements are good (a loss): removal of the most important raises it. False where
            high ones are good (a margin): removal of the most important lowers it.
        summary: "mean" over the queries, or "positive": the share of queries whose measurement is above 0, which is
            the accuracy where it is a margin.
        options: `repetitions` (3) of each retraining; `seed` (0) of ties, random orders and trainings; `measurement`
            (0), which one where the training measures several; `progress` (None) shows a bar.

    Returns:
        A Table with a row for each series (also "random") and share; the reference is "nothing removed". A row's
        values are those that its interval is of.

    Raises:
        ScoreError: scores or training do not fit, a share removes none or all, or the folder holds something else.
    """
    curve = _Curve(
        "Retraining score: the most important examples removed",
        True,
        shares,
        largest,
        summary,
    )
    return _table(curve, scores, Retrainings(training, folder, **options))


def dataset_pruning(
    scores: Series,
    training: Training,
    folder: str | os.PathLike[str],
    *,
    shares: Sequence[float] = (0.25, 0.5, 0.75),
    largest: bool = True,
    summary: str = "mean",
    **options: Unpack[RetrainingOptions],
) -> Table:
    """How well a model trains on what is left when the least important examples are removed, most harmful first.

    The better the method, the more can be removed before the measurement suffers (Ley et al. 2024, arXiv 2410.09940).

    Args:
        scores, training, folder, shares, summary, options: as for `retraining_score`.
        largest: True where low measurements are good (a loss), so that the least important examples have the lowest
            scores; False where high ones are good (a margin).

    Returns:
        A Table as that of `retraining_score`.

    Raises:
        ScoreError: as for `retraining_score`.
    """
    curve = _Curve("Pruning: the least important examples removed", False, shares, largest, summary)
    return _table(curve, scores, Retrainings(training, folder, **options))


@dataclass(frozen=True)
class _Curve:
    """What a task removes and shows; most_important: remove the most important examples first, or the least."""

    title: str
    most_important: bool
    shares: Sequence[float]
    largest: bool
    summary: str

    def __post_init__(self) -> None:
        settle(self, shares=real_numbers("shares", self.shares, ScoreError))
        settle(self, largest=truth("largest", self.largest, ScoreError))
        check_choice("summary", self.summary, ("mean", "positive"), ScoreError)

    @property
    def largest_first(self) -> bool:
        """The order of removal, by the scores."""
        return self.largest == self.most_important

    def counts(self, examples: int) -> list[int]:
        """How many examples each share is; ScoreError for none or all."""
        counts = [round(share * examples) for share in self.shares]
        for share, count in zip(self.shares, counts, strict=True):
            if not 0 < count < examples:
                raise ScoreError(f"shares: {share} of {examples} examples removes {count}. Remove some, but not all.")
        if not counts or len(set(counts)) < len(counts):
            raise ScoreError(f"shares {self.shares}: expected some, each of another number of examples: {counts}.")
        return counts

    def summarised(self, measured: np.ndarray) -> np.ndarray:
        """One number of the queries' measurements [..., Q]."""
        summary: np.ndarray = (measured > 0).mean(-1) if self.summary == "positive" else measured.mean(-1)
        return summary

    def interval(self, values: np.ndarray, queries: int) -> Estimate:
        """Of the mean of summaries of as many queries."""
        return counted_interval(values, queries) if self.summary == "positive" else student_interval(values)

    @property
    def y(self) -> str:
        """The name of the y axis."""
        return "share of queries above 0" if self.summary == "positive" else "mean measurement"


def _table(curve: _Curve, scores: Series, retrainings: Retrainings) -> Table:
    series, N = over_examples(scores)
    check_examples(retrainings.training, N)
    counts, repetitions, seed = curve.counts(N), retrainings.repetitions, retrainings.seed
    orders = [
        [removal_order(run, curve.largest_first, stream_seed(seed, "run", number)) for number, run in enumerate(runs)]
        for runs in series.values()
    ]
    runs = [len(of_series) for of_series in orders]
    draws = max(runs) * repetitions
    random_orders = [random_order(N, seed, number) for number in range(draws)]
    subsets = _subsets([order for of_series in orders for order in of_series], counts)
    measured = retrainings.measured(np.concatenate([subsets, np.ones((1, N), dtype=bool)]))
    measured_at_random = retrainings.measured(_subsets(random_orders, counts), repetitions=1)
    by_order = curve.summarised(measured[:-1]).reshape(-1, len(counts), repetitions)
    values = dict(zip(series, _by_series(by_order, runs), strict=True))
    values[RANDOM] = curve.summarised(measured_at_random[:, 0]).reshape(draws, len(counts))
    rows = tuple(
        Row(name, share, *curve.interval(of_series[:, place], measured.shape[-1]), tuple(of_series[:, place]))
        for name, of_series in values.items()
        for place, share in enumerate(curve.shares)
    )
    settings: dict[str, Any] = {
        **retrainings.settings(series),
        "interval": _INTERVAL,
        "examples": N,
        "queries": measured.shape[-1],
        "removed": counts,
        "random_orders": draws,
        "largest": curve.largest,
        "summary": curve.summary,
    }
    references = {NOTHING_REMOVED: curve.interval(curve.summarised(measured[-1]), measured.shape[-1])}
    return Table(curve.title, "share of the training examples removed", curve.y, rows, references, settings)


def _subsets(orders: Sequence[np.ndarray], counts: Sequence[int]) -> np.ndarray:
    """[orders x C, N] booleans: what is kept."""
    return np.stack([without(order, count) for order in orders for count in counts])


def _by_series(values: np.ndarray, runs: Sequence[int]) -> list[np.ndarray]:
    """[values, C] of each series from [orders, C, R]: its retrainings, or its runs' means where there are several."""
    of_series = np.split(values, np.cumsum(runs)[:-1])
    return [of_runs[0].T if len(of_runs) == 1 else of_runs.mean(2) for of_runs in of_series]
