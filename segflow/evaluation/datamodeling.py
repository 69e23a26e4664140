"""Linear datamodeling score: do summed group scores rank retrainings as retraining does? (Park et al. 2023)

`linear_datamodeling_score` is of one method and of retrainings that are there already, `linear_datamodeling_difference`
compares two methods on them, and `linear_datamodeling_curve` retrains by itself, on subsets of several sizes.

Axis letters: M subsets, K groups, N examples, R repetitions, Q queries.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import real_numbers, whole_number
from ..data.streams import stream, stream_seed
from ..errors import ScoreError
from ..report.row import Estimate, Row
from ..report.table import Table
from ..results.same_groups import check_same_groups
from ..results.scores import Scores
from .arguments import as_confidence, as_measurements
from .noise import moves, noise_ceiling, perfect_score
from .rank_agreement import FEWEST_QUERIES, FEWEST_RUNS, Correlations, correlations, difference_interval, mean_interval
from .retraining.pool import random_subsets
from .retraining.reuse import RetrainingOptions, Retrainings
from .retraining.training import Training
from .series import CEILING, RANDOM, Series, check_examples, over_examples, values_of
from .statistics import CONFIDENCE, exactly
from .subsets import as_subsets
from .ties import merged, precision

if TYPE_CHECKING:
    from typing_extensions import Unpack

_RANDOM_SERIES = 10  # series of random scores, averaged
_FEWEST_RANKED = 3  # two subsets agree or disagree, and nothing between
_INTERVAL = (
    f"Intervals: 95%, for other subsets, and for other queries and runs where there are {FEWEST_QUERIES} and "
    f"{FEWEST_RUNS} or more, by the jackknife and Student's t. A "
    "row's values are those of the queries."
)

# ---- of retrainings that are there ----


@dataclass(frozen=True)
class _WithInterval:
    """A number for each query, and their mean with its interval.

    per_query: [Q], not a number where a query is left out; mean: over the others; low, high: the interval of
    `confidence`, infinite where there is none from so few `subsets`; left_out: the labels of queries whose prediction
    or measurement is the same in every subset.
    """

    per_query: np.ndarray
    mean: float
    low: float
    high: float
    confidence: float
    subsets: int
    left_out: tuple[str, ...]

    def _shown(self, sign: str) -> str:
        interval = f"[{self.low:{sign}.3f}, {self.high:{sign}.3f}]"
        if np.isinf(self.low):
            interval = f"(no interval from {self.subsets} subsets)"
        without = f", without {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self.mean:{sign}.3f} {interval}{without}"


@dataclass(frozen=True)
class LinearDatamodelingScore(_WithInterval):
    """Spearman correlations over subsets, one for each query, with the mean and its interval.

    per_query: [Q], not a number where a query is left out; mean: over the other queries; low, high: the interval of
    `confidence`, infinite with fewer than ten subsets; subsets: how many; left_out: labels of the queries whose
    prediction or measurement is the same in every subset.
    """

    def __str__(self) -> str:
        return self._shown("")


def linear_datamodeling_score(
    scores: Scores, subsets: np.ndarray | Tensor, measurements: np.ndarray | Tensor, *, confidence: float = CONFIDENCE
) -> LinearDatamodelingScore:
    """Rank agreement between predicted and retrained measurements over random subsets (Park et al. 2023).

    Predictions that differ by rounding alone are ties. The interval is for other subsets and other queries of the same
    kinds; with fewer than ten queries it is for other subsets and the same queries. Its method: `mean_interval` of
    segflow.evaluation.rank_agreement; how often it holds: docs/STATISTICS.md.

    Args:
        scores: over groups; for subsets of single examples, scores of `Groups.singletons`.
        subsets: [M, K] booleans, which groups each retraining kept; or a list of index lists.
        measurements: [M, Q], each query's measurement after each retraining (averaged over its repetitions).
        confidence: of the interval.

    Raises:
        ScoreError: shapes do not fit, a number is not finite, or no query's prediction and measurement vary.

    Example:
        >>> import torch
        >>> scores = Scores(torch.tensor([[1.0, 2.0, 4.0]]), ("q",), ("a", "b", "c"), (1, 1, 1))
        >>> kept = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0]], dtype=bool)
        >>> print(linear_datamodeling_score(scores, kept, [[4.0], [2.0], [1.0], [6.0]]))
        1.000 (no interval from 4 subsets)
    """
    confidence = as_confidence(confidence)
    given = _Given.of(subsets, measurements, scores)
    predicted = _predicted(scores, given.kept_MK)
    used = _used([predicted], given.measured_MQ, scores)
    found = _correlations([predicted], given.measured_MQ, used)
    numbers = _over_queries(found, mean_interval(found, confidence), used, scores)
    return LinearDatamodelingScore(confidence=confidence, subsets=len(given.kept_MK), **numbers)


@dataclass(frozen=True)
class LinearDatamodelingDifference(_WithInterval):
    """By how much the first linear datamodeling score exceeds the second, with its paired interval.

    per_query, mean, low, high, subsets, left_out: as of a `LinearDatamodelingScore`, of the differences. An interval
    that excludes 0 says that the two differ by more than the choice of subsets and queries explains.
    """

    def __str__(self) -> str:
        return self._shown("+")


def linear_datamodeling_difference(
    first: Scores,
    second: Scores,
    subsets: np.ndarray | Tensor,
    measurements: np.ndarray | Tensor,
    *,
    confidence: float = CONFIDENCE,
) -> LinearDatamodelingDifference:
    """Compare two methods on the same retrainings, query by query and subset by subset.

    Two methods' scores rise and fall together from subset to subset, so this interval is narrower than the two methods'
    own intervals suggest. It is for other subsets and queries of the same kinds, as that of the score. A query that is
    left out of one score is left out of both.

    Args:
        first, second: scores of the same queries and groups.
        subsets, measurements, confidence: as for `linear_datamodeling_score`.

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
    confidence = as_confidence(confidence)
    given = _Given.of(subsets, measurements, first, second)
    one, other = (_predicted(scores, given.kept_MK) for scores in (first, second))
    used = _used([one, other], given.measured_MQ, first)
    found = _correlations([one], given.measured_MQ, used) - _correlations([other], given.measured_MQ, used)
    same = np.array_equal(one, other)  # their difference is known without error
    numbers = _over_queries(found, exactly(0.0) if same else difference_interval(found, confidence), used, first)
    return LinearDatamodelingDifference(confidence=confidence, subsets=len(given.kept_MK), **numbers)


@dataclass(frozen=True)
class _Given:
    """Retrainings that are there, checked to fit the scores: kept_MK and measured_MQ, whose ties are merged."""

    kept_MK: np.ndarray
    measured_MQ: np.ndarray

    @classmethod
    def of(cls, subsets: np.ndarray | Tensor, measurements: np.ndarray | Tensor, *compared: Scores) -> _Given:
        kept_MK, measured_MQ = as_subsets(subsets, len(compared[0].group_labels)), as_measurements(measurements)
        for scores in compared:
            _check_shapes(kept_MK, measured_MQ, scores)
        check_same_groups(zip(("first", "second"), compared, strict=False))
        return cls(kept_MK, _measured(measured_MQ))


def _measured(measured_MQ: np.ndarray) -> np.ndarray:
    """The measurements, where those that differ by rounding alone (of a mean over repetitions) are equal."""
    return merged(measured_MQ, 5e-15 * np.abs(measured_MQ))


def _predicted(scores: Scores, kept_MK: np.ndarray) -> np.ndarray:
    """[M, Q]: the predicted change from leaving groups out; those that differ by rounding alone are equal."""
    values_QK = values_of(scores)
    if not np.isfinite(values_QK).all():
        raise ScoreError("scores: a number is not finite. Score again, or leave the method out.")
    predicted_MQ = (~kept_MK).astype(float) @ values_QK.T
    steps = values_QK.shape[1] * np.finfo(float).eps * np.abs(values_QK).sum(1)  # of the sums
    held, summed_MQ = precision(scores.values), merged(predicted_MQ, steps)
    columns = (_as_held(*pair, kept_MK, held) for pair in zip(summed_MQ.T, values_QK, strict=True))
    return np.stack(list(columns), axis=1)


def _as_held(predicted_M: np.ndarray, values_K: np.ndarray, kept_MK: np.ndarray, held: float) -> np.ndarray:
    """The predictions, where those that differ by how their terms are held alone are equal.

    held: the precision of the terms. Terms that two subsets share are rounded alike, and do not count.
    """
    size_K, lowest, equal_M = held * np.abs(values_K), int(predicted_M.argmin()), predicted_M.copy()
    most = size_K.sum()
    for subset in np.argsort(predicted_M, kind="stable"):
        gap = predicted_M[subset] - predicted_M[lowest]
        if gap > most or gap > size_K[kept_MK[subset] != kept_MK[lowest]].sum():
            lowest = subset
        equal_M[subset] = predicted_M[lowest]
    return equal_M


def _varies(values_MQ: np.ndarray) -> np.ndarray:
    varies: np.ndarray = np.ptp(values_MQ, axis=0) > 0
    return varies


def _used(predictions: Sequence[np.ndarray], measured_MQ: np.ndarray | None, scores: Scores) -> np.ndarray:
    """[Q] booleans: the queries whose predictions and measurement vary; ScoreError if there are none."""
    predicted_Q = np.all([_varies(predicted_MQ) for predicted_MQ in predictions], axis=0)
    used = predicted_Q if measured_MQ is None else predicted_Q & _varies(measured_MQ)
    if not used.any():
        label, what = scores.query_labels[0], "measurement" if predicted_Q[0] else "predicted change"
        raise ScoreError(
            f"query {label!r}: the {what} is the same for every subset, so there is no rank, and the other queries "
            f"({len(used) - 1}) have none either. Vary the subsets, or leave the method out."
        )
    return used


def _correlations(predictions: Sequence[np.ndarray], measured_MQ: np.ndarray, used: np.ndarray) -> Correlations:
    return correlations([predicted_MQ[:, used] for predicted_MQ in predictions], measured_MQ[:, used])


def _over_queries(found: Correlations, interval: Estimate, used: np.ndarray, scores: Scores) -> dict[str, Any]:
    """What a result says of its queries."""
    per_query = np.full(len(used), np.nan)
    per_query[used] = found.per_query
    return {"per_query": per_query, "left_out": _left_out(used, scores), **interval._asdict()}


def _left_out(used: np.ndarray, scores: Scores) -> tuple[str, ...]:
    return tuple(label for label, is_used in zip(scores.query_labels, used, strict=True) if not is_used)


def _check_shapes(kept_MK: np.ndarray, measured_MQ: np.ndarray, scores: Scores) -> None:
    Q, K = scores.values.shape
    if kept_MK.ndim != 2 or kept_MK.shape[1] != K or measured_MQ.shape != (len(kept_MK), Q):
        raise ScoreError(
            f"subsets {kept_MK.shape} and measurements {measured_MQ.shape}: expected [M, {K}] and [M, {Q}] for these "
            "scores."
        )
    if len(kept_MK) < _FEWEST_RANKED:
        raise ScoreError(f"{len(kept_MK)} subsets: expected at least {_FEWEST_RANKED} to rank.")


# ---- with retrainings of its own ----


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
    subsets = whole_number("subsets", subsets, ScoreError, _FEWEST_RANKED, advice="It counts retrained subsets.")
    like, seed = next(iter(series.values()))[0], retrainings.seed
    every_series = {**series, RANDOM: [_random_scores(like, seed, draw) for draw in range(_RANDOM_SERIES)]}
    drawn = {ratio: random_subsets(subsets, N, ratio, _seed_of(seed, ratio, N)) for ratio in ratios}
    for runs, kept in product(every_series.values(), drawn.values()):
        _used([_predicted(run, kept) for run in runs], None, like)  # refused before anything is trained
    rows: dict[str, list[Row]] = {name: [] for name in (*every_series, CEILING)}
    left_out: dict[str, dict[str, tuple[str, ...]]] = {}
    for ratio, kept in drawn.items():
        measured_MRQ, found = retrainings.measured(kept), dict[str, _Found]()
        for name, runs in every_series.items():
            found[name] = _row(name, ratio, runs, kept, measured_MRQ.mean(1))
        if retrainings.repetitions > 1:
            found[CEILING] = _ceiling_row(ratio, measured_MRQ, like)
        for name, (row, without) in found.items():
            rows[name] += [row] if row else []
            if without:
                left_out.setdefault(name, {})[f"{ratio:g}"] = without
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
        "left_out": left_out,
        "notes": {name: _note(of_series) for name, of_series in left_out.items()},
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


def _note(left_out: Mapping[str, tuple[str, ...]]) -> str:
    """In words: which queries are left out at which ratios."""
    places = [f"{', '.join(labels)} (at {ratio})" for ratio, labels in left_out.items()]
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
    given = _Given.of(kept, measured_MQ, *runs)
    predictions = [_predicted(run, kept) for run in runs]
    used = np.all([_varies(values_MQ) for values_MQ in (*predictions, given.measured_MQ)], axis=0)
    if not used.any():
        return None, runs[0].query_labels
    found = _correlations(predictions, given.measured_MQ, used)
    return Row(name, ratio, *mean_interval(found), tuple(found.per_query)), _left_out(used, runs[0])


def _ceiling_row(ratio: float, measured_MRQ: np.ndarray, like: Scores) -> _Found:
    """The noise ceiling at one ratio, and the queries that never move."""
    if not moves(measured_MRQ).any():
        return None, like.query_labels
    found = noise_ceiling(measured_MRQ)
    used = np.isfinite(found.per_query)
    of_queries = tuple(perfect_score(found.per_query[used], len(measured_MRQ)))
    return Row(CEILING, ratio, found.ceiling, found.low, found.high, of_queries), _left_out(used, like)


def _random_scores(like: Scores, seed: int, draw: int) -> Scores:
    values = stream(seed, "random scores", draw).normal(size=tuple(like.values.shape))
    return Scores(torch.from_numpy(values), like.query_labels, like.group_labels, like.group_sizes)
