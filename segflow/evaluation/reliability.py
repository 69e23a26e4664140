"""How reliable is the ground truth? What no method can exceed, because retrainings differ among themselves."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np
from torch import Tensor

from ..errors import ScoreError
from .lds import plain, spearman


@dataclass(frozen=True)
class NoiseCeiling:
    """The reliability of retrained measurements, and the linear datamodeling score of a perfect predictor.

    per_query: [Q] reliabilities; reliability: their mean, the correlation to be expected between these averaged
    measurements and as many new ones; ceiling: the mean of their square roots (0 for negative ones), the correlation to
    be expected between these measurements and what they would be without noise.
    """

    per_query: np.ndarray
    reliability: float
    ceiling: float

    def __str__(self) -> str:
        return f"{self.ceiling:.3f} (reliability {self.reliability:.3f})"


def noise_ceiling(measured: np.ndarray | Tensor, *, splits: int = 100, seed: int = 0) -> NoiseCeiling:
    """Split-half reliability of a ground truth (Spearman 1910 and Brown 1910, for rank correlations).

    The repetitions are split into two halves (of equal size: an odd one is left out, another one in each split), each
    half is averaged, and the halves' Spearman correlation over the subsets is averaged over the splits. A mean of h
    repetitions that correlates by r with another one has reliability k r / (1 + (k - 1) r) when there are k h of them.

    Args:
        measured: [M, R, Q], each query's measurement after each of R retrainings of each of M subsets.
        splits: random ways of splitting; where there are no more ways than that, each is taken once.
        seed: of the splits.

    Raises:
        ScoreError: fewer than two repetitions or three subsets, or a number is not finite.

    Example:
        >>> signal, noise = np.random.default_rng(0).normal(size=(2, 400, 4, 1))
        >>> found = noise_ceiling(signal[:, :1] + noise)  # four repetitions, as much noise as signal in each
        >>> bool(abs(found.reliability - 4 / 5) < 0.04), bool(abs(found.ceiling - 0.8**0.5) < 0.03)
        (True, True)
    """
    values_MRQ = plain(measured).astype(float)
    if values_MRQ.ndim != 3 or values_MRQ.shape[0] < 3 or values_MRQ.shape[1] < 2 or splits < 1:
        raise ScoreError(
            f"measured {values_MRQ.shape}, splits={splits}: expected [M, R, Q] of at least 3 subsets and 2 "
            "repetitions, and at least one split. Do not average over the repetitions."
        )
    if not np.isfinite(values_MRQ).all():
        raise ScoreError("measurements are not finite. Look for a retraining that diverged.")
    R = values_MRQ.shape[1]
    found = []
    for first, second in _halves(R, splits, np.random.default_rng(seed)):
        halves = (values_MRQ[:, list(half)].mean(1) for half in (first, second))
        found.append(np.nan_to_num(spearman(*halves)))  # a query that does not vary is not reliable
    r_Q, k = np.mean(found, axis=0), R / (R // 2)
    reliability_Q = k * r_Q / (1 + (k - 1) * r_Q)
    return NoiseCeiling(
        reliability_Q, float(reliability_Q.mean()), float(np.sqrt(np.clip(reliability_Q, 0, None)).mean())
    )


def _halves(R: int, splits: int, generator: np.random.Generator) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of disjoint halves of R repetitions: each pair once, or so many at random."""
    size = R // 2
    ways = (
        (first, second)
        for first in combinations(range(R), size)
        for second in combinations([r for r in range(first[0] + 1, R) if r not in first], size)
    )
    every = list(islice(ways, splits + 1))
    if len(every) <= splits:
        return every
    drawn = (generator.permutation(R) for _ in range(splits))
    return [(tuple(order[:size].tolist()), tuple(order[size : 2 * size].tolist())) for order in drawn]
