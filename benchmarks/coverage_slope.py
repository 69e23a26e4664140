"""How often the interval of the slope of real changes on predicted ones holds the truth, in worlds where it is known.

Each data set has M random subsets of K groups and Q queries with scores of the groups; each query's measurement is its
own slope times what is predicted, and noise that the queries of a subset share in part. `python -m benchmarks.coverage
slope` writes `coverage_slope.json`; what the shares are: see `benchmarks.coverage_tasks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np

from segflow.data.streams import stream
from segflow.evaluation.magnitude import pooled_slope
from segflow.evaluation.rank_agreement import FEWEST_QUERIES

from .coverage_tasks import Coverage

_GROUPS = 50
_DATA_SETS = 400
_IN_COMMON = 0.4  # the part of each variance, of scores and of noise, that all queries share


def slopes(
    subsets: int,
    queries: int,
    removed: float,
    agreement: float,
    spread: float = 0.0,
    sizes: float = 0.0,
    freedom: int | None = None,
    seed: int = 0,
) -> Coverage:
    """The pooled slope, where the mean query's is 1.

    removed: the share of the groups that a subset leaves out; agreement: the correlation of predicted and real changes;
    spread: the standard deviation of the queries' slopes; sizes: that of the logarithm of the size of their
    predictions; freedom: degrees of freedom of the noise, of Student's t; None for normal noise.
    """
    generator, held = stream(seed, "slopes of changes"), []
    count = round(removed * _GROUPS)
    for _ in range(_DATA_SETS):
        size_Q = np.exp(sizes * generator.normal(size=queries))
        values_QK = size_Q[:, None] * _shared(generator.normal, queries, _GROUPS).T
        slope_Q = 1 + spread * generator.normal(size=queries)
        out_MK = generator.permuted(np.tile(np.arange(_GROUPS) < count, (subsets, 1)), axis=1)
        predicted_MQ = out_MK @ values_QK.T
        deviation_Q = values_QK.std(1) * np.sqrt(count * (_GROUPS - count) / (_GROUPS - 1))  # over all subsets
        noise_MQ = _shared(_noise(generator, freedom), queries, subsets)
        real_MQ = slope_Q * predicted_MQ + deviation_Q * noise_MQ * np.sqrt(agreement**-2 - 1)
        of_these = np.average(slope_Q, weights=deviation_Q**2)
        found = pooled_slope(predicted_MQ, real_MQ)
        held.append(found.low <= (1.0 if queries >= FEWEST_QUERIES else of_these) <= found.high)
    return {"slope": float(np.mean(held))}


def uneven_queries(subsets: int, queries: int, removed: float, agreement: float) -> Coverage:
    """As `slopes`, of queries whose predictions differ so much in size that few of them decide."""
    return slopes(subsets, queries, removed, agreement, spread=0.3, sizes=1.0)


def _noise(generator: np.random.Generator, freedom: int | None) -> Callable[..., np.ndarray]:
    """Numbers of variance 1."""
    if freedom is None:
        return generator.normal
    return lambda size: generator.standard_t(freedom, size) * np.sqrt((freedom - 2) / freedom)


def _shared(draw: Callable[..., np.ndarray], queries: int, rows: int) -> np.ndarray:
    """[rows, Q] numbers of variance 1, of which the queries of a row share a part."""
    numbers: np.ndarray = _IN_COMMON**0.5 * draw(size=(rows, 1)) + (1 - _IN_COMMON) ** 0.5 * draw(size=(rows, queries))
    return numbers


def worlds() -> Iterator[tuple[Callable[..., Coverage], dict[str, Any]]]:
    """Each world that the results are for."""
    counts = [(3, 1), (3, 20), (5, 5), (5, 20), *product((10, 20, 100), (1, 5, 10, 20, 100))]
    for (subsets, queries), removed in product(counts, (0.5, 0.1, 0.02)):
        world = {"subsets": subsets, "queries": queries, "removed": removed}
        yield slopes, world | {"agreement": 0.5}
        yield slopes, world | {"agreement": 0.7, "spread": 0.3, "sizes": 0.5}
        yield slopes, world | {"agreement": 0.3, "freedom": 3, "sizes": 0.3}
    for (subsets, queries), agreement in product(product((10, 100), (10, 20, 100)), (0.3, 0.9)):
        yield uneven_queries, {"subsets": subsets, "queries": queries, "removed": 0.5, "agreement": agreement}
