"""How often the intervals of linear datamodeling scores hold the truth, in worlds where it is known.

Each data set has M subsets and Q queries; predictions and measurements are normal numbers, and the rank correlation of
a query over unlimited subsets follows from that of its world. `python -m benchmarks.coverage lds` writes
`coverage_lds.json`; what the shares are: see `benchmarks.coverage_tasks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from segflow.data.streams import stream
from segflow.evaluation.rank_agreement import (
    FEWEST_QUERIES,
    FEWEST_RUNS,
    FEWEST_SUBSETS,
    Correlations,
    correlations,
    difference_interval,
    mean_interval,
)
from segflow.report.row import Estimate

from .coverage_tasks import Coverage

_MOST_NUMBERS = 300_000  # subsets times queries times data sets, so that a world takes seconds
_NOISE_IN_COMMON = 0.8  # of two methods that err alike
_LOWER = 0.1  # the second of them, on Fisher's scale


def linear_datamodeling_scores(
    subsets: int, queries: int, correlation: float, spread: float = 0.0, common: float = 0.0, seed: int = 0
) -> Coverage:
    """The mean correlation of one method, and its difference from a somewhat worse one that errs alike.

    spread: standard deviation of the queries' correlations around the world's, on Fisher's scale; common: the part of
    each variance that all queries share.
    """
    draws, generator = _draws(subsets * queries), stream(seed, "linear datamodeling scores")
    z_DQ = np.arctanh(correlation) + spread * generator.normal(size=(draws, queries))
    measured, error, other = (_normal(generator, (subsets, draws, queries), common) for _ in range(3))
    worse = _NOISE_IN_COMMON**0.5 * error + (1 - _NOISE_IN_COMMON) ** 0.5 * other
    one = _correlations([_predicted(z_DQ, measured, error)], measured)
    two = _correlations([_predicted(z_DQ - _LOWER, measured, worse)], measured)
    scores, differences = [], []
    for z_Q, first, second in zip(z_DQ, one, two, strict=True):
        truth, lower = (_truth(z_Q, FEWEST_QUERIES, correlation, spread, by) for by in (0, _LOWER))
        scores.append(_held(mean_interval(first), truth))
        differences.append(_held(difference_interval(first - second), truth - lower))
    return {"score": float(np.mean(scores)), "difference": float(np.mean(differences))}


def several_runs(
    subsets: int, queries: int, runs: int, correlation: float, spread: float = 0.0, seed: int = 0
) -> Coverage:
    """A curve's row: the mean over runs whose correlations are `spread` apart, on Fisher's scale."""
    draws, generator = _draws(subsets * queries * runs), stream(seed, "several runs")
    z_DR = np.arctanh(correlation) + spread * generator.normal(size=(draws, runs))
    measured, *errors = (_normal(generator, (subsets, draws, queries), 0.0) for _ in range(runs + 1))
    predictions = [_predicted(z_D[:, None], measured, e) for z_D, e in zip(z_DR.T, errors, strict=True)]
    found = zip(z_DR, _correlations(predictions, measured), strict=True)
    return {
        "row": float(np.mean([_held(mean_interval(f), _truth(z, FEWEST_RUNS, correlation, spread)) for z, f in found]))
    }


def random_scores(subsets: int, queries: int, examples: int, seed: int = 0) -> Coverage:
    """A curve's "random": ten series of random scores, whose predictions of retraining are right on average by 0."""
    draws, generator = _draws(subsets * queries * 10), stream(seed, "random scores of a world")
    removed = (
        generator.permuted(np.broadcast_to(np.arange(examples), (draws, subsets, examples)), axis=-1) < examples // 2
    )
    worlds_MDQ = [np.moveaxis(removed @ generator.normal(size=(draws, examples, queries)), 0, 1) for _ in range(11)]
    found = _correlations(worlds_MDQ[1:], worlds_MDQ[0])
    return {"row": float(np.mean([_held(mean_interval(f), 0.0) for f in found]))}


def _draws(numbers: int) -> int:
    return int(np.clip(_MOST_NUMBERS / numbers, 200, 1000))


def _correlations(predictions: Sequence[np.ndarray], measured: np.ndarray) -> list[Correlations]:
    """Of each data set, from numbers [M, data sets, Q]: all at once, as they are columns side by side."""
    M, draws, Q = measured.shape
    found = correlations([side.reshape(M, -1) for side in predictions], measured.reshape(M, -1))
    columns = [slice(draw * Q, (draw + 1) * Q) for draw in range(draws)]
    return [Correlations(found.of_all[:, of], found.left_out[:, :, of]) for of in columns]


def _normal(generator: np.random.Generator, shape: tuple[int, int, int], common: float) -> np.ndarray:
    shared, own = generator.normal(size=(*shape[:2], 1)), generator.normal(size=shape)
    numbers: np.ndarray = common**0.5 * shared + (1 - common) ** 0.5 * own
    return numbers


def _predicted(z: np.ndarray, measured: np.ndarray, error: np.ndarray) -> np.ndarray:
    predicted: np.ndarray = np.tanh(z) * measured + error / np.cosh(z)
    return predicted


def _truth(z_X: np.ndarray, fewest: int, correlation: float, spread: float, lower: float = 0.0) -> float:
    """The mean rank correlation over unlimited subsets: of all queries (or runs), or of these if they are few."""
    if len(z_X) >= fewest:
        nodes, weights = np.polynomial.hermite_e.hermegauss(40)
        rank = _rank_correlation(np.arctanh(correlation) + spread * nodes - lower)
        return float((weights * rank).sum() / weights.sum())
    return float(_rank_correlation(z_X - lower).mean())


def _rank_correlation(z: np.ndarray) -> np.ndarray:
    """Spearman's of normal numbers whose Pearson correlation is tanh(z)."""
    rank: np.ndarray = 6 / np.pi * np.arcsin(np.tanh(z) / 2)
    return rank


def _held(interval: Estimate, truth: float) -> bool:
    return bool(interval.low - 1e-12 <= truth <= interval.high + 1e-12)


def worlds() -> Iterator[tuple[Callable[..., Coverage], dict[str, Any]]]:
    """Each task with the parameters that the results are for."""
    sizes = [
        *product((FEWEST_SUBSETS, 20, 40), (1, 2, 5, 10, 20)),
        (FEWEST_SUBSETS, 100),
        (20, 100),
        (100, 1),
        (100, 20),
    ]
    for (subsets, queries), correlation in product(sizes, (0.0, 0.1, 0.5, 0.9)):
        world = {"subsets": subsets, "queries": queries, "correlation": correlation}
        yield linear_datamodeling_scores, world
        yield linear_datamodeling_scores, world | {"spread": 0.3, "common": 0.5}
    for subsets, runs, correlation in product((FEWEST_SUBSETS, 20, 50), (2, 5, 10), (0.0, 0.5, 0.9)):
        yield several_runs, {"subsets": subsets, "queries": 5, "runs": runs, "correlation": correlation, "spread": 0.2}
    for subsets, queries, examples in product((FEWEST_SUBSETS, 20, 50), (1, 5, 20), (20, 200)):
        yield random_scores, {"subsets": subsets, "queries": queries, "examples": examples}
