"""How true noise ceilings are, and how often their intervals hold: functions from parameters of a world to coverage.

Each draws measurements whose reliability is known, most of them normal. "ceiling" is the score of a perfect predictor
in normal worlds of that reliability, "reached" the mean Spearman correlation of the measurements' averages with what
they would be without noise in this world; "bias" is that of the reliability, with its Monte Carlo error.
`python -m benchmarks.coverage noise` writes `coverage_noise.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from segflow.data.streams import stream
from segflow.evaluation import noise_ceiling
from segflow.evaluation.noise import FEWEST_SUBSETS, perfect_score
from segflow.evaluation.statistics import spearman

Coverage = dict[str, float]
SIGNALS = (0.0, 0.1, 0.5, 0.9)
_DRAWS = {40: 80, 100: 40}  # of many subsets fewer, as they take long; else 200


def alike(
    subsets: int, repetitions: int, queries: int, signal: float, common: float = 0.3, draws: int = 200, seed: int = 0
) -> Coverage:
    """Queries of one reliability: `signal` is the part of the variance of one retraining that is between subsets.

    common: the part of the signal's variance, and of the noise's, that all queries share.
    """
    return _coverage(subsets, repetitions, np.full(queries, signal), common, draws, stream(seed, "alike"))


def different(
    subsets: int, repetitions: int, queries: int, signal: float, common: float = 0.3, draws: int = 200, seed: int = 0
) -> Coverage:
    """Queries whose signals are drawn evenly between 0 and twice `signal`, others in each data set.

    Here "ceiling" is that of the mean reliability, and somewhat above what is reached.
    """
    generator = stream(seed, "different")
    return _coverage(subsets, repetitions, lambda: generator.uniform(0, 2 * signal, queries), common, draws, generator)


def skewed(subsets: int, repetitions: int, queries: int, signal: float, draws: int = 200, seed: int = 0) -> Coverage:
    """As `alike`, of what is measured the exponential: a long tail on one side, of signal and noise."""
    signals = np.full(queries, signal)
    return _coverage(subsets, repetitions, signals, 0.3, draws, stream(seed, "skewed"), np.exp)


def heavy_tails(
    subsets: int, repetitions: int, queries: int, signal: float, freedom: int = 3, draws: int = 200, seed: int = 0
) -> Coverage:
    """Noise with the tails of Student's t, of the variance that `alike` has."""
    generator = stream(seed, "heavy tails")
    signals = np.full(queries, signal)
    return _coverage(subsets, repetitions, signals, 0.3, draws, generator, freedom=freedom)


def _coverage(
    subsets: int,
    repetitions: int,
    signals: np.ndarray | Callable[[], np.ndarray],
    common: float,
    draws: int,
    generator: np.random.Generator,
    shown: Callable[[np.ndarray], np.ndarray] = np.asarray,
    freedom: int | None = None,
) -> Coverage:
    found, reached, reliabilities = [], [], []
    for _ in range(draws):
        signals_Q = signals() if callable(signals) else signals
        reliabilities.append(repetitions * signals_Q / (1 + (repetitions - 1) * signals_Q))
        true_MQ = _normal(generator, (subsets, 1, len(signals_Q)), common)
        noise_MRQ = _normal(generator, (subsets, repetitions, len(signals_Q)), common)
        if freedom:
            tails = np.sqrt(generator.chisquare(freedom, noise_MRQ.shape) / (freedom - 2))
            noise_MRQ = noise_MRQ / tails
        measured = shown(signals_Q**0.5 * true_MQ + (1 - signals_Q) ** 0.5 * noise_MRQ)
        found.append(noise_ceiling(measured))
        reached.append(spearman(true_MQ[:, 0], measured.mean(1)).mean())
    reliability = float(np.mean(reliabilities))
    return _summary(found, reached, reliability, float(perfect_score(reliability, subsets)))


def _summary(found: list[Any], reached: list[float], reliability: float, ceiling: float) -> Coverage:
    biases = np.array([c.reliability for c in found]) - reliability
    given = [c for c in found if np.isfinite(c.low)]

    def holds(truth: float) -> float:
        held = [c.low - 1e-9 <= truth <= c.high + 1e-9 for c in given]
        return float(np.mean(held)) if held else float("nan")

    mean = max(float(np.mean(reached)), 0.0) if reliability else 0.0
    return {
        "reliability": reliability,
        "bias": float(biases.mean()),
        "error of the bias": float(biases.std(ddof=1) / len(biases) ** 0.5),
        "ceiling": ceiling,
        "reached": mean,
        "estimate": float(np.mean([c.ceiling for c in found])),
        "interval holds": holds(ceiling),
        "interval holds what is reached": holds(mean),
    }


def _normal(generator: np.random.Generator, shape: tuple[int, int, int], common: float) -> np.ndarray:
    """Normal numbers [M, R, Q] of variance 1, of which all queries share a part."""
    shared, own = generator.normal(size=(*shape[:2], 1)), generator.normal(size=shape)
    return common**0.5 * shared + (1 - common) ** 0.5 * own


# ---- all of them ----


def worlds() -> Iterator[tuple[Callable[..., Coverage], dict[str, Any]]]:
    """Each function with the parameters that the results are for."""
    for subsets in (3, 5, FEWEST_SUBSETS, 10, 40, 100):
        for repetitions in (2, 3, 5):
            for queries in (1, 5, 50):
                for signal in SIGNALS:
                    size = {"subsets": subsets, "repetitions": repetitions, "queries": queries, "signal": signal}
                    yield alike, size | _draws(subsets)
    for subsets, repetitions in ((FEWEST_SUBSETS, 2), (10, 5), (40, 3)):
        for signal in SIGNALS:
            size = {"subsets": subsets, "repetitions": repetitions, "signal": signal} | _draws(subsets)
            yield alike, {**size, "queries": 2, "common": 0.9}
            yield alike, {**size, "queries": 50, "common": 0.9}
            yield alike, {**size, "queries": 50, "common": 0.0}
            yield skewed, {**size, "queries": 20}
            yield heavy_tails, {**size, "queries": 20}
            if 0 < signal <= 0.5:
                yield different, {**size, "queries": 20}
                yield different, {**size, "queries": 100}


def _draws(subsets: int) -> dict[str, int]:
    return {"draws": _DRAWS[subsets]} if subsets in _DRAWS else {}
