"""Clustering: k-means on whitened features, with clusters of bounded size; arrays in, labels out.

Groups of like examples are k-means clusters of features in Ley et al. 2024 (arXiv 2410.09940).
Axes: N examples, n or L some of them, R whitened features, K clusters, M nearest centres.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import real_number, settle, whole_number
from ..data.streams import stream
from ..errors import GroupError
from .whitening import Rows, Whitening, feature_rows

_LARGEST_SEED = 2**32 - 1  # that scikit-learn takes
_NEAREST = 16  # centres that an example may ask at a time
_SEEDED_ON = 10_000  # examples that the first centres are drawn from, or ten for each of them
_MANY = 1000  # centres beyond which each is drawn once
_BATCH = 4096  # examples of one step beyond memory, or three for each centre
_DISTANCES = 64 << 20  # bytes of distances at a time


def cluster(features: Any, count: int, whiten: str = "full", how: KMeans | None = None) -> np.ndarray:
    """The cluster of each example [N], numbered from 0 without gaps.

    Args:
        features: [N, ...], numbers that tell examples apart.
        count: of clusters; fewer come out where fewer rows are distinct, more where `how.max_size` needs it.
        whiten: see `Whitening.fit`.
        how: k-means++ on a sample and Lloyd's steps follow, until the centres move by less than `tolerance` of the
            features' variance, at most `iterations` times. Whitened features beyond `memory` bytes are read batch by
            batch (mini-batch k-means). `max_size` bounds the clusters by deferred acceptance among each example's
            nearest 16 centres, see `balanced`.

    Raises:
        GroupError: features or options make no sense.

    Example:
        >>> cluster([[0.0], [0.1], [9.0], [9.1]], 2).tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])
        True
    """
    how = how or KMeans()
    rows_ND = feature_rows(features)
    return how.labels(Rows(rows_ND, Whitening.fit(rows_ND, whiten, how.memory)), count)


@dataclass(frozen=True)
class KMeans:
    """How clusters are made.

    max_size: the most rows of a cluster; None: any number. seed: of the first centres and of mini-batches. tolerance,
    iterations: the steps end when the centres move by less than this share of the variance, or after so many. memory:
    bytes for the whitened rows, beyond which mini-batches are read.
    """

    max_size: int | None = None
    seed: int = 0
    tolerance: float = 1e-3
    iterations: int = 60
    memory: int = 1 << 30

    def __post_init__(self) -> None:
        if self.max_size is not None:
            settle(self, max_size=whole_number("max_size", self.max_size, GroupError, 1, advice="None sets no bound."))
        for name in ("iterations", "memory"):
            settle(self, **{name: whole_number(name, getattr(self, name), GroupError, 1)})
        settle(self, seed=whole_number("seed", self.seed, GroupError, most=_LARGEST_SEED))
        settle(self, tolerance=real_number("tolerance", self.tolerance, GroupError, 0))

    def labels(self, rows: Rows, count: int) -> np.ndarray:
        """The cluster of each row [N], numbered from 0 without gaps: at most `count` (more if `max_size` needs it)."""
        if self.max_size is not None:
            count = max(count, -(-len(rows) // self.max_size))
        if count >= len(rows):
            return np.arange(len(rows))
        held = rows.all() if rows.nbytes <= self.memory or rows.device.type != "cpu" else None
        centres_KR = self._first(rows, count)
        if held is None:
            centres_KR = self._streamed(rows, centres_KR)
        elif rows.device.type == "cpu":
            centres_KR = self._in_memory(held, centres_KR)
        else:
            centres_KR = lloyd(held, centres_KR, self.tolerance, self.iterations)
        if self.max_size is None:
            label_N = nearest(rows if held is None else held, centres_KR, 1)[0][:, 0]
        else:
            label_N = balanced(rows if held is None else held, centres_KR, self.max_size)
        return np.unique(label_N, return_inverse=True)[1].reshape(-1)

    def _first(self, rows: Rows, count: int) -> Tensor:
        """The first centres [K, R]: k-means++ on a sample of the rows."""
        from sklearn.cluster import kmeans_plusplus

        size = min(len(rows), max(_SEEDED_ON, 10 * count))
        sampled = stream(self.seed, "first centres").choice(len(rows), size, replace=False)
        sample_nR = rows.of(np.sort(sampled)).all()
        trials = 1 if count > _MANY else None  # None: several for each centre, of which the best is taken
        centres, _ = kmeans_plusplus(sample_nR.cpu().numpy(), count, random_state=self.seed, n_local_trials=trials)
        return torch.from_numpy(centres).to(sample_nR)

    def _in_memory(self, x_NR: Tensor, centres_KR: Tensor) -> Tensor:
        """The centres after Lloyd's steps on all rows at once."""
        from sklearn import cluster

        model = cluster.KMeans(
            len(centres_KR),
            init=centres_KR.numpy(),
            n_init=1,
            max_iter=self.iterations,
            tol=self.tolerance,
            random_state=self.seed,
            algorithm="lloyd",
            copy_x=False,  # moved by the mean and back
        )
        with _few_distinct_rows():
            model.fit(x_NR.numpy())
        return torch.from_numpy(model.cluster_centers_).to(x_NR)

    def _streamed(self, rows: Rows, centres_KR: Tensor) -> Tensor:
        """The centres after steps towards the means of mini-batches, until a pass over the rows moves them little."""
        from sklearn.cluster import MiniBatchKMeans

        K, R = centres_KR.shape
        size = max(K, min(max(_BATCH, 3 * K), self.memory // (8 * R)))
        options: dict[str, Any] = {"n_init": 1, "compute_labels": False, "random_state": self.seed}
        model = MiniBatchKMeans(K, init=centres_KR.numpy(), batch_size=size, reassignment_ratio=0, **options)
        generator = stream(self.seed, "mini-batches")
        for _ in range(self.iterations):
            for chosen in _shuffled(len(rows), size, generator):
                model.partial_fit(rows.of(chosen).all().numpy())
            moved_KR = torch.from_numpy(model.cluster_centers_.copy())
            shift = (moved_KR - centres_KR).square().sum(1).mean().item()
            centres_KR = moved_KR
            if shift <= self.tolerance * rows.whitening.variance:
                break
        return centres_KR


def lloyd(x_NR: Tensor, centres_KR: Tensor, tolerance: float, iterations: int) -> Tensor:
    """Centres [K, R] after Lloyd's steps from the given ones, on the tensors' device; empty clusters stay in place.

    Ends when the squared shifts of all centres add up to at most `tolerance` times the features' mean variance.
    """
    limit = tolerance * x_NR.var(0, correction=0).mean()
    step = _step(centres_KR)
    for _ in range(iterations):
        sums_KR, counts_K = torch.zeros_like(centres_KR), centres_KR.new_zeros(len(centres_KR))
        for x_nR in x_NR.split(step):
            label_n = _squared_distances(x_nR, centres_KR).argmin(1)
            sums_KR.index_add_(0, label_n, x_nR)
            counts_K.index_add_(0, label_n, x_nR.new_ones(len(x_nR)))
        moved_KR = torch.where(counts_K[:, None] > 0, sums_KR / counts_K[:, None].clamp_min(1), centres_KR)
        shift = (moved_KR - centres_KR).square().sum()
        centres_KR = moved_KR
        if bool(shift <= limit):
            break
    return centres_KR


def nearest(rows: Rows | Tensor, centres_KR: Tensor, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centres of each row, and their squared distances, from near to far: both [N, M]."""
    places, distances = [], []
    step, M = _step(centres_KR), min(most, len(centres_KR))
    for chunk in rows.chunks() if isinstance(rows, Rows) else [rows]:
        for x_nR in chunk.split(step):
            far_nK = _squared_distances(x_nR, centres_KR)
            near_nM = far_nK.min(1, keepdim=True) if M == 1 else far_nK.topk(M, largest=False)
            places.append(near_nM.indices.cpu().numpy())
            distances.append(near_nM.values.cpu().numpy())
    return np.concatenate(places), np.concatenate(distances)


def balanced(rows: Rows | Tensor, centres_KR: Tensor, max_size: int) -> np.ndarray:
    """The centre of each row [N], none with more than `max_size` rows (K max_size must be at least N).

    Deferred acceptance (Gale, Shapley 1962): each example asks its centres from near to far, and each centre keeps
    the nearest examples that asked it. Each example asks its nearest 16 centres at first; those that all of them
    refuse then ask, in the same manner, the nearest 16 that have room, until all have a centre.

    No example and one of its nearest 16 centres would both rather have each other than what they have: with up to 16
    centres the matching is stable. Farther centres are not held to this: one that is full is not asked, even if it
    holds a farther example, and one that has room does not give up what it holds already.
    """
    label_N = np.full(len(rows), -1)
    room_K = np.full(len(centres_KR), max_size)
    left = np.arange(len(rows))
    while len(left):
        free = np.flatnonzero(room_K)
        asked = rows.of(left) if isinstance(rows, Rows) else rows[torch.from_numpy(left).to(rows.device)]
        near_LM, distance_LM = nearest(asked, centres_KR[torch.from_numpy(free).to(centres_KR.device)], _NEAREST)
        taken_L = _accepted(free[near_LM], distance_LM, room_K)
        label_N[left] = taken_L
        room_K -= np.bincount(taken_L[taken_L >= 0], minlength=len(room_K))
        left = left[taken_L < 0]
    return label_N


def _accepted(choice_LM: np.ndarray, distance_LM: np.ndarray, room_K: np.ndarray) -> np.ndarray:
    """The centre that keeps each example [L], -1 where all of its choices refuse it."""
    refusals_L = np.zeros(len(choice_LM), dtype=np.int64)
    held_L = np.full(len(choice_LM), -1)
    asking = np.arange(len(choice_LM))
    while len(asking):
        held_L[asking] = choice_LM[asking, refusals_L[asking]]
        asked_K = np.zeros(len(room_K) + 1, dtype=bool)  # the last place is that of examples without a centre
        asked_K[held_L[asking]] = True
        rivals = np.flatnonzero(asked_K[held_L])
        centre = held_L[rivals]  # that each of them asks
        order = np.lexsort((distance_LM[rivals, refusals_L[rivals]], centre))
        rivals, centre = rivals[order], centre[order]
        rank = np.arange(len(centre)) - np.searchsorted(centre, centre)
        refused = rivals[rank >= room_K[centre]]
        held_L[refused] = -1
        refusals_L[refused] += 1
        asking = refused[refusals_L[refused] < choice_LM.shape[1]]
    return held_L


def _squared_distances(x_nR: Tensor, centres_KR: Tensor) -> Tensor:
    """[n, K], of every row to every centre."""
    far_nK = torch.addmm(centres_KR.square().sum(1), x_nR, centres_KR.mT, alpha=-2)
    return far_nK.add_(x_nR.square().sum(1, keepdim=True)).clamp_min_(0)


def _step(centres_KR: Tensor) -> int:
    """How many rows' distances to all centres are held at a time."""
    return max(1, _DISTANCES // (centres_KR.element_size() * len(centres_KR)))


def _shuffled(count: int, size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of about `size` places, of short runs from everywhere, so that sorted data is read well mixed."""
    run = max(1, size // 64)
    starts = generator.permutation(np.arange(0, count, run))
    for first in range(0, len(starts), -(-size // run)):
        chosen = np.sort(starts[first : first + -(-size // run)])
        places = (chosen[:, None] + np.arange(run)).reshape(-1)
        yield places[places < count]


@contextmanager
def _few_distinct_rows() -> Iterator[None]:
    """Clusters that stay empty for want of distinct rows are no cause for a warning: they are left out."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
