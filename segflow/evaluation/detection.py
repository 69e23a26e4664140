"""Finding wrong labels: what share of them is met when examples are inspected from the most harmful on.

`noisy_label_detection` compares series of scores and gives intervals; `found_among_lowest` and `detection_auc` are one
number for one ranking.

Axis letters: N examples, Q queries, T blocks of tied examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..arguments import real_numbers, truth, whole_number
from ..data.streams import stream
from ..errors import ScoreError
from ..report.row import Estimate, Row
from ..report.table import Table
from ..results.scores import Scores
from .arguments import as_booleans, as_numbers
from .intervals import FEWEST_CASES, over_cases_and_runs
from .series import PERFECT, RANDOM, Series, over_examples, summed_over_queries, values_of
from .statistics import exactly

_GRID = tuple(round(0.05 * step, 2) for step in range(1, 21))
_INTERVAL = (
    "Intervals: 95%, Agresti and Coull's with Student's t, for other examples and runs of the same kind. The spread is "
    "that of a bootstrap that draws examples; examples whose scores are identical for every query (and run), such as "
    "the members of one group, are drawn together, as one block. Where a series has several runs, the spread between "
    f"them is added; a single run is taken as it is. None is given where fewer than {FEWEST_CASES} blocks have a wrong "
    "label, or a right one. The area under the detection curve, the random and the perfect ranking "
    "are for this share of wrong labels."
)

# ---- one ranking, one number ----


def found_among_lowest(ranking: np.ndarray | Tensor, wrong: np.ndarray | Tensor, count: int | None = None) -> float:
    """How many of the `count` examples with the lowest `ranking` are wrong (count: as many as are wrong).

    Of ties, such as the members of one group, not all may be among the lowest: each then counts by the share of them
    that is, as it would on average over random orders. Only equal numbers tie.

    ranking: [N], low where an example is suspected, such as the predicted change of its own loss on its removal;
    wrong: [N] booleans.

    Example:
        >>> found_among_lowest(np.array([0.3, -2.0, 0.1, 5.0]), np.array([False, True, True, False]))
        2.0
        >>> found_among_lowest(np.zeros(4), np.array([False, True, True, False]))
        1.0
    """
    ranked, is_wrong = _checked_pair(ranking, wrong)
    advice = "It counts the examples to look at."
    size = int(is_wrong.sum()) if count is None else whole_number("count", count, ScoreError, advice=advice)
    lowest = np.sort(ranked)[:size]
    below = ranked < lowest[-1] if size else np.zeros(len(ranked), dtype=bool)
    tied = ranked == lowest[-1] if size else below
    share = (len(lowest) - below.sum()) / max(1, tied.sum())
    return float(is_wrong[below].sum() + share * is_wrong[tied].sum())


def detection_auc(ranking: np.ndarray | Tensor, wrong: np.ndarray | Tensor) -> float:
    """Probability that a wrong example ranks below a right one (area under the ROC curve; 0.5 is chance).

    Only equal numbers tie; a tie counts as one half.

    Example:
        >>> detection_auc(np.array([0.3, -2.0, 0.1, 5.0]), np.array([False, True, True, False]))
        1.0
    """
    from scipy.stats import rankdata

    ranked, is_wrong = _checked_pair(ranking, wrong)
    wrongs, rights = int(is_wrong.sum()), int((~is_wrong).sum())
    if not wrongs or not rights:
        raise ScoreError("detection_auc needs both wrong and right examples.")
    pairs_in_order = rankdata(ranked)[~is_wrong].sum() - rights * (rights + 1) / 2  # Mann and Whitney 1947; ties: half
    return float(pairs_in_order / (wrongs * rights))


def _checked_pair(ranking: np.ndarray | Tensor, wrong: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays [N], of numbers and of booleans; ScoreError if unfit."""
    ranked, is_wrong = as_numbers("ranking", ranking), as_booleans("wrong", wrong, "[N]")
    if ranked.ndim != 1 or ranked.shape != is_wrong.shape:
        raise ScoreError(f"ranking {ranked.shape} and wrong {is_wrong.shape}: expected [N] and [N].")
    if not np.isfinite(ranked).all():
        raise ScoreError(f"ranking: example {np.flatnonzero(~np.isfinite(ranked))[0]} has a number that is not finite.")
    return ranked, is_wrong


# ---- series of scores, with intervals ----


@dataclass(frozen=True)
class Detection:
    """The detection of wrong labels.

    curve: the share of the wrong labels found against the share of examples inspected; auc: the area under that curve
    (random: 0.5); roc_auc: the probability that a wrong example ranks before a right one. The values of a row are those
    of the runs.
    """

    curve: Table
    auc: Table
    roc_auc: Table

    def __str__(self) -> str:
        return "\n\n".join(map(str, (self.auc, self.roc_auc, self.curve)))


def noisy_label_detection(
    scores: Series,
    wrong: np.ndarray | Tensor,
    *,
    shares: Sequence[float] = _GRID,
    largest: bool = False,
    resamples: int = 200,
    seed: int = 0,
) -> Detection:
    """Inspect examples from the most harmful on: what share of the wrong labels has been met? (Ley et al. 2024)

    Tied examples, such as the members of one group, are inspected in random order: the expected share is computed
    exactly, so it does not depend on a draw. For the intervals, examples with identical columns of scores are one case,
    not many, as the members of a group are.

    Args:
        scores: over single examples [Q, N], of which the sums over the queries rank; or {name: scores}; or {name:
            [scores of each of several runs]}, whose curves are averaged.
        wrong: [N] booleans, whose label is wrong.
        shares: of the examples that are inspected, where the curve is read.
        largest: False: the lowest sums are inspected first, as removal of a harmful example lowers a loss. True: the
            largest, for measurements where high is good.
        resamples, seed: of the bootstrap.

    Raises:
        ScoreError: scores and labels do not fit, all or no labels are wrong, or an option makes no sense.

    Example:
        >>> import torch
        >>> from segflow import Scores
        >>> scores = Scores(torch.tensor([[-2.0, 0.0, -1.0, 3.0]]), ("q",), tuple("0123"), (1,) * 4)
        >>> detection = noisy_label_detection({"Source": scores}, [True, False, False, False], shares=(0.25, 0.5))
        >>> detection.curve.value("Source", 0.25).mean, detection.curve.value("random", 0.25).mean
        (1.0, 0.25)
        >>> detection.auc.value("Source").mean, detection.auc.references["perfect ranking"][0]
        (0.875, 0.875)
    """
    series, N = over_examples(scores)
    points = np.array(real_numbers("shares", shares, ScoreError))
    seed, resamples = whole_number("seed", seed, ScoreError), whole_number("resamples", resamples, ScoreError, 1)
    largest = truth("largest", largest, ScoreError)
    if not points.size or not ((points > 0) & (points <= 1)).all():
        raise ScoreError(f"shares={tuple(points.tolist())}: expected 0 < share <= 1, one share or more.")
    sign = -1.0 if largest else 1.0
    rankings = {
        name: [_Ranking.of(*_checked_pair(sign * summed_over_queries(run), wrong)) for run in runs]
        for name, runs in series.items()
    }
    is_wrong = as_booleans("wrong", wrong, "[N]")
    wrong_share = float(is_wrong.mean())
    if wrong_share in (0.0, 1.0):
        raise ScoreError(f"wrong: {int(is_wrong.sum())} of {N} labels are wrong. Detection needs wrong and right ones.")
    settings = {
        "interval": _INTERVAL,
        "examples": N,
        "wrong": int(is_wrong.sum()),
        "runs": {name: len(runs) for name, runs in series.items()},
        "resamples": resamples,
        "seed": seed,
        "largest": largest,
    }
    numbers = {
        name: _with_intervals(rankings[name], _identical(runs), points, resamples, seed)
        for name, runs in series.items()
    }
    return _tables(numbers, wrong_share, points, settings)


@dataclass(frozen=True)
class _Ranking:
    """The order of inspection of one run.

    block: [N], the place of each example's score among the T distinct ones; wrong: [N] booleans.
    """

    block: np.ndarray
    wrong: np.ndarray

    @classmethod
    def of(cls, ranking: np.ndarray, wrong: np.ndarray) -> _Ranking:
        return cls(np.unique(ranking, return_inverse=True)[1].reshape(-1), wrong)

    def measures(self, shares: np.ndarray, times: np.ndarray | None = None) -> np.ndarray:
        """[shares + 1]: the share met at each share inspected, and the area under the ROC curve.

        Within a block of ties the expected curve is a straight line. times: [N], how often each example is taken.
        """
        taken = np.ones(len(self.wrong)) if times is None else times.astype(float)
        ends = [np.cumsum(np.bincount(self.block, weights)) for weights in (taken, taken * self.wrong)]
        if ends[1][-1] in (0.0, ends[0][-1]):
            return np.full(len(shares) + 1, np.nan)
        inspected, met = (np.concatenate([[0.0], end / end[-1]]) for end in ends)
        area = float((np.diff(inspected) * (met[1:] + met[:-1])).sum() / 2)
        wrong_share = ends[1][-1] / ends[0][-1]
        return np.array([*np.interp(shares, inspected, met), (area - wrong_share / 2) / (1 - wrong_share)])


def _identical(runs: Sequence[Scores]) -> np.ndarray:
    """[N]: the block of each example, counted from its first one; a block's columns are identical in every run."""
    block_N = np.zeros(len(runs[0].group_sizes), dtype=np.int64)
    for run in runs:
        columns_NQ = np.ascontiguousarray(values_of(run).T) + 0.0  # -0 becomes 0
        seen: dict[tuple[int, bytes], int] = {}
        keys = ((block, sha256(column).digest()) for block, column in zip(block_N.tolist(), columns_NQ, strict=True))
        block_N = np.array([seen.setdefault(key, len(seen)) for key in keys])
    return block_N


def _times(block_N: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """[N]: how often each example is taken when as many blocks are drawn as there are."""
    T = int(block_N.max()) + 1
    times: np.ndarray = np.bincount(generator.integers(0, T, T), minlength=T)[block_N]
    return times


class _Number(NamedTuple):
    """A number with its interval, and the numbers of the runs that it is the mean of."""

    estimate: Estimate
    values: tuple[float, ...]

    def row(self, series: str, x: float) -> Row:
        return Row(series, x, *self.estimate, self.values)

    def under_the_curve(self, wrong_share: float) -> _Number:
        """The area under the detection curve, of that under the ROC curve: its wrong examples are inspected as well."""

        def area(roc: float) -> float:
            return roc * (1 - wrong_share) + wrong_share / 2

        return _Number(Estimate(*map(area, self.estimate)), tuple(map(area, self.values)))


def _with_intervals(
    runs: Sequence[_Ranking], block_N: np.ndarray, shares: np.ndarray, resamples: int, seed: int
) -> list[_Number]:
    """The measures of one series, averaged over its runs, with their intervals."""
    by_run = np.stack([run.measures(shares) for run in runs])
    generator = stream(seed, "bootstrap of wrong labels")
    drawn = np.full((resamples, len(shares) + 1), np.nan)
    for draw in range(resamples):
        times_N = _times(block_N, generator)
        drawn[draw] = np.mean([run.measures(shares, times_N) for run in runs], axis=0)
    drawn = drawn[np.isfinite(drawn).all(1)]  # one without wrong, or without right, examples says nothing
    cases = min(len(np.unique(block_N[side])) for side in (runs[0].wrong, ~runs[0].wrong))
    freedom = min(cases, len(drawn)) - 1
    variance = np.var(drawn, axis=0, ddof=1) * cases / (cases - 1) if freedom > 0 else np.full(len(by_run[0]), np.inf)
    estimates = [over_cases_and_runs(*pair, cases, freedom) for pair in zip(by_run.T, variance, strict=True)]
    known = [exactly(1.0) if share == 1 else found for share, found in zip(shares, estimates, strict=False)]
    pairs = zip([*known, estimates[-1]], by_run.T, strict=True)
    return [_Number(estimate, tuple(values)) for estimate, values in pairs]


def _tables(
    numbers: Mapping[str, Sequence[_Number]], wrong_share: float, shares: np.ndarray, settings: Mapping[str, Any]
) -> Detection:
    """Each series' measures, in the order of `_Ranking.measures`, as tables beside the random and perfect rankings."""
    at_random = [exactly(value) for value in (*shares, 0.5)]
    perfect = [exactly(value) for value in (*np.minimum(1.0, shares / wrong_share), 1.0)]
    series = {**numbers, RANDOM: [_Number(estimate, (estimate.mean,)) for estimate in at_random]}
    curves = {**series, PERFECT: [_Number(estimate, (estimate.mean,)) for estimate in perfect]}
    curve = Table(
        "Wrong labels found",
        "share of the examples inspected",
        "share of the wrong labels found",
        tuple(
            of_series[place].row(name, share)
            for name, of_series in curves.items()
            for place, share in enumerate(shares)
        ),
        settings=settings,
    )

    def areas(title: str, y: str, of: Callable[[_Number], _Number]) -> Table:
        found = {name: of(of_series[-1]) for name, of_series in curves.items()}
        best = found.pop(PERFECT).estimate
        rows = tuple(number.row(name, x) for x, (name, number) in enumerate(found.items()))
        return Table(title, "series", y, rows, {PERFECT: best}, settings, "bars")

    under_the_curve = areas(
        "Area under the detection curve",
        "mean share of the wrong labels found",
        lambda number: number.under_the_curve(wrong_share),
    )
    return Detection(
        curve,
        under_the_curve,
        areas("Area under the ROC curve", "probability that a wrong label ranks before a right one", lambda n: n),
    )
