"""A training whose measurements are known in closed form, and the scores that predict them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import segflow as sf
from segflow.evaluation import FunctionTraining, random_subsets

N, Q = 20, 3
EFFECTS = np.random.default_rng(0).normal(size=(Q, N))  # what each example lowers each query's measurement by


def scores_of(values: Any, **provenance: Any) -> sf.Scores:
    values = torch.as_tensor(np.atleast_2d(values))
    queries, examples = values.shape
    labels = tuple(map(str, range(examples)))
    return sf.Scores(values, tuple(f"q{q}" for q in range(queries)), labels, (1,) * examples, provenance)


TRUE = scores_of(EFFECTS, method="Oracle")


class Linear:
    """A training that measures minus the sum of what is kept of `effects`, plus noise of the seed; it counts."""

    def __init__(self, effects: np.ndarray = EFFECTS, noise: float = 0.0, offset: float = 0.0, recipe: Any = 0):
        self.effects, self.noise, self.offset = effects, noise, offset
        self.inner = FunctionTraining(self._measured, {"recipe": recipe}, processes=1)
        self.settings, self.batches = self.inner.settings, self.inner.batches
        self.jobs: list[tuple[tuple[int, ...], int]] = []

    def _measured(self, kept: np.ndarray, seed: int) -> np.ndarray:
        return self.offset - self.effects[:, kept].sum(1) + self.noise * noise_of(seed, len(self.effects))

    def run(self, jobs: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
        self.jobs += [(tuple(kept.tolist()), seed) for kept, seed in jobs]
        return self.inner.run(jobs)


def noise_of(seed: int, queries: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=queries)


MARGINS = np.array([1.0, 3.0, -1.0])  # of the three queries when nothing is removed


class Margins(Linear):
    """Margins that fall by an example's effect when it is removed (scores are then minus the effects)."""

    def _measured(self, kept: np.ndarray, seed: int) -> np.ndarray:
        removed = np.setdiff1d(np.arange(N), kept)
        return MARGINS - self.effects[:, removed].sum(1) + self.noise * noise_of(seed, Q)


SUPPORT = scores_of(-EFFECTS, method="Oracle")


def noisy_truth(M: int = 60, R: int = 5, Q: int = 40, K: int = 20, noise: float = 1.0, seed: int = 0):
    """values [Q, K], subsets [M, K], measured [M, R, Q]; the signal's variance is 1."""
    generator = np.random.default_rng(seed)
    values, subsets = generator.normal(size=(Q, K)), random_subsets(M, K, seed=seed)
    signal = (~subsets) @ values.T
    values, signal = values / signal.std(0)[:, None], signal / signal.std(0)
    return values, subsets, signal[:, None] + noise * generator.normal(size=(M, R, Q))
