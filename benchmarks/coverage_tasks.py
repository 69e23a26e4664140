"""How often the tasks' intervals hold the truth: one function for each, from the parameters of a world to coverage.

Each draws data sets from a world whose truth is known, or is the mean over many data sets of the same size, and counts
the intervals of nominally 95% that hold it. "none" is the share of data sets for which no interval is given; it does
not count. `python -m benchmarks.coverage tasks` writes `coverage_tasks.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

import segflow as sf
from segflow.data.streams import stream
from segflow.evaluation import noisy_label_detection
from segflow.evaluation.intervals import correlation_interval, counted_interval, over_cases_and_runs
from segflow.evaluation.statistics import pearson, spearman, student_interval, unchanged_interval, welch_interval
from segflow.report.row import Estimate

Coverage = dict[str, float]
_SHARES = (0.1, 0.2, 0.5)
_DATA_SETS_FOR_THE_TRUTH = 8  # for each that is counted

# ---- wrong labels ----


def detection_of_examples(
    wrongs: int,
    right: int,
    shift: float,
    runs: int = 1,
    spread: float = 0.0,
    common: float = 0.7,
    draws: int = 300,
    seed: int = 0,
) -> Coverage:
    """Normal scores, those of wrong labels lower by `shift` (in each run by one of its own, `spread` apart).

    common: the part of the noise's variance that all runs share.
    """
    wrong = np.arange(wrongs + right) < wrongs

    def world(generator: np.random.Generator, runs: int) -> tuple[np.ndarray, np.ndarray]:
        shifts = shift + spread * generator.normal(size=(runs, 1))
        shared, own = generator.normal(size=len(wrong)), generator.normal(size=(runs, len(wrong)))
        return common**0.5 * shared + (1 - common) ** 0.5 * own - shifts * wrong, wrong

    return _detection(world, runs, draws, seed)


def detection_of_groups(
    groups: int,
    size: int,
    shift: float,
    runs: int = 1,
    spread: float = 0.0,
    common: float = 0.7,
    draws: int = 300,
    seed: int = 0,
) -> Coverage:
    """Groups whose shares of wrong labels follow a beta distribution (a fifth on average), and lower their scores."""

    def world(generator: np.random.Generator, runs: int) -> tuple[np.ndarray, np.ndarray]:
        share = generator.beta(2, 8, groups)
        wrong = (generator.random((groups, size)) < share[:, None]).ravel()
        shifts = shift + spread * generator.normal(size=(runs, 1))
        shared, own = generator.normal(size=groups), generator.normal(size=(runs, groups))
        noise = common**0.5 * shared + (1 - common) ** 0.5 * own
        return np.repeat(noise - shifts * wrong.reshape(groups, size).mean(1), size, axis=1), wrong

    return _detection(world, runs, draws, seed)


def _detection(
    world: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]], runs: int, draws: int, seed: int
) -> Coverage:
    generator = stream(seed, "detection, for the truth")
    found = [_detected(*world(generator, 1), 1) for _ in range(_DATA_SETS_FOR_THE_TRUTH * draws)]
    truths = np.mean([[estimate.mean for estimate in rows] for rows in found], axis=0)
    generator = stream(seed, "detection")
    counted = [_detected(*world(generator, runs), 100) for _ in range(draws)]
    by_measure = [_share([rows[place] for rows in counted], truth) for place, truth in enumerate(truths)]
    curve = [coverage for coverage, _ in by_measure[:-1]]
    return {"roc": by_measure[-1][0], "curve": float(np.mean(curve)), "none": by_measure[-1][1]}


def _detected(values: np.ndarray, wrong: np.ndarray, resamples: int) -> list[Estimate]:
    """The curve at the shares, and the area under the ROC curve, of scores [runs, N]."""
    labels, sizes = tuple(map(str, range(values.shape[1]))), (1,) * values.shape[1]
    scores = [sf.Scores(torch.from_numpy(run)[None], ("q",), labels, sizes) for run in values]
    found = noisy_label_detection({"S": scores}, wrong, shares=_SHARES, resamples=resamples)
    rows = [*found.curve.of("S"), found.roc_auc.value("S")]
    return [Estimate(row.mean, row.low, row.high) for row in rows]


# ---- retrainings ----


def shares_of_queries(
    queries: int,
    share: float,
    runs: int = 1,
    between: float = 0.0,
    within: float = 0.5,
    draws: int = 2000,
    seed: int = 0,
) -> Coverage:
    """The share of queries that turn: a query's, a run's and their own part decide (`between`, and `within` of noise).

    A single run is taken as it is, so `between` is then no part of the truth.
    """
    from scipy.stats import norm

    generator, total = stream(seed, "shares of queries"), 1 + within**2 + (between**2 if runs > 1 else 0)
    intervals = []
    for _ in range(draws):
        query = generator.normal(size=queries)
        run = between * generator.normal(size=(runs, 1)) if runs > 1 else 0.0
        latent = query + run + within * generator.normal(size=(runs, queries))
        turned = (latent < norm.ppf(share) * total**0.5).astype(float)
        variance = float(np.var(turned.mean(0), ddof=1)) / queries
        intervals.append(over_cases_and_runs(turned.mean(1), variance, queries))
    coverage, none = _share(intervals, share)
    return {"share": coverage, "none": none}


def means_of_retrainings(count: int, skew: float = 0.0, draws: int = 4000, seed: int = 0) -> Coverage:
    """Student's, Welch's and the unchanged interval of normal noise, or of log-normal noise of that exponent."""
    generator = stream(seed, "means of retrainings")

    def noise() -> np.ndarray:
        normal = generator.normal(size=(draws, count))
        return (np.exp(skew * normal) - np.exp(skew**2 / 2)) / skew if skew else normal

    first, second, wide = noise(), noise(), 3 * noise()
    pairs = list(zip(first, second, wide, strict=True))
    unchanged = [(unchanged_interval(a), b.mean() - a.mean()) for a, b, _ in pairs]
    return {
        "student": _share([student_interval(a) for a in first], 0)[0],
        "welch": _share([welch_interval(a, b) for a, b, _ in pairs], 0)[0],
        "welch, spreads 1 to 3": _share([welch_interval(a, c) for a, _, c in pairs], 0)[0],
        "unchanged": float(np.mean([low <= new <= high for (_, low, high), new in unchanged])),
    }


def counted_queries(
    queries: int, retrainings: int, noise: float, common: float = 0.5, draws: int = 2000, seed: int = 0
) -> Coverage:
    """The mean share of queries above 0 (`summary="positive"`): margins of size 1, noise of retrainings on them."""
    from scipy.stats import norm

    generator = stream(seed, "counted queries")
    intervals, truths = [], []
    for _ in range(draws):
        margins = generator.normal(0.5, 1, queries)
        shared, own = generator.normal(size=(retrainings, 1)), generator.normal(size=(retrainings, queries))
        measured = margins + noise * (common**0.5 * shared + (1 - common) ** 0.5 * own)
        intervals.append(counted_interval((measured > 0).mean(1), queries))
        truths.append(float(norm.cdf(margins / noise).mean()))
    given = [(i, truth) for i, truth in zip(intervals, truths, strict=True) if np.isfinite(i.low)]
    held = [low - 1e-12 <= truth <= high + 1e-12 for (_, low, high), truth in given]
    return {"share": float(np.mean(held)) if held else float("nan"), "none": 1 - len(given) / draws}


# ---- groups left out ----


def correlations_over_groups(
    groups: int, correlation: float, freedom: float | None = None, draws: int = 400, seed: int = 0
) -> Coverage:
    """Spearman's and Pearson's of normal pairs, or of pairs with the heavy tails of Student's t."""
    generator = stream(seed, "correlations over groups")

    def pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
        x, e = generator.normal(size=(2, count))
        tail = np.sqrt(generator.chisquare(freedom, count) / freedom) if freedom else np.ones(count)
        return x / tail, (correlation * x + (1 - correlation**2) ** 0.5 * e) / tail

    kinds = {"spearman": spearman, "pearson": pearson}
    x, y = (side[:, None] for side in pairs(200_000))
    truths = {"spearman": float(spearman(x, y)[0]), "pearson": correlation}
    intervals: dict[str, list[Estimate]] = {kind: [] for kind in kinds}
    for _ in range(draws):
        x, y = pairs(groups)
        rows = generator.integers(0, groups, (groups, 200))
        for kind, correlate in kinds.items():
            value = float(correlate(x[:, None], y[:, None])[0])
            drawn = correlate(x[rows], y[rows])
            intervals[kind].append(correlation_interval(value, drawn, groups, kind == "spearman"))
    return {kind: _share(intervals[kind], truths[kind])[0] for kind in kinds}


# ---- all of them ----


def _share(intervals: Sequence[Estimate], truth: float) -> tuple[float, float]:
    """The share of the given intervals that hold the truth, and the share that are not given."""
    given = [interval for interval in intervals if np.isfinite(interval.low)]
    held = [low - 1e-12 <= truth <= high + 1e-12 for _, low, high in given]
    return (float(np.mean(held)) if held else float("nan")), 1 - len(given) / len(intervals)


def worlds() -> Iterator[tuple[Callable[..., Coverage], dict[str, Any]]]:
    """Each task with the parameters that the results are for."""
    yield from _of_detection()
    yield from _of_retrainings()


def _of_detection() -> Iterator[tuple[Callable[..., Coverage], dict[str, Any]]]:
    for wrongs in (8, 15, 40):
        for shift in (0.0, 1.0, 2.0, 3.0):
            yield detection_of_examples, {"wrongs": wrongs, "right": 9 * wrongs, "shift": shift}
    for runs in (2, 3, 5):
        for spread in (0.0, 0.5, 1.0):
            world = {"wrongs": 20, "right": 180, "shift": 1.5, "runs": runs, "spread": spread}
            yield detection_of_examples, world
            world = {"groups": 16, "size": 32, "shift": 5.0, "runs": runs, "spread": 4 * spread}
            yield detection_of_groups, world
    for groups in (8, 16, 32, 64):
        for shift in (0.0, 3.0, 10.0):
            yield detection_of_groups, {"groups": groups, "size": 32, "shift": shift}


def _of_retrainings() -> Iterator[tuple[Callable[..., Coverage], dict[str, Any]]]:
    for queries in (8, 20, 100):
        for share in (0.02, 0.1, 0.3, 0.5):
            yield shares_of_queries, {"queries": queries, "share": share}
            for runs in (2, 5):
                yield shares_of_queries, {"queries": queries, "share": share, "runs": runs, "between": 0.3}
    for count in (2, 3, 5, 10):
        for skew in (0.0, 0.5):
            yield means_of_retrainings, {"count": count, "skew": skew}
    for queries in (5, 20, 100, 1000):
        for retrainings in (3, 5, 10):
            yield counted_queries, {"queries": queries, "retrainings": retrainings, "noise": 0.2}
    for groups in (4, 5, 8, 12, 30, 100):
        for correlation in (0.0, 0.5, 0.9, 0.99):
            yield correlations_over_groups, {"groups": groups, "correlation": correlation}
            yield correlations_over_groups, {"groups": groups, "correlation": correlation, "freedom": 4}
