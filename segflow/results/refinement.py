"""Refinement: from coarse groups down to the single examples that matter, scoring only what lies on the way.

Axes: Q queries, K groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import GroupError, ScoreError
from ..groups.groups import Groups
from .scores import NOT_SUMS, Ranked, Scores


class Level(NamedTuple):
    """One level of a refinement.

    size: examples in a part on average, None for the coarse groups; groups: how many were scored; examples: how many
    training examples were walked for it (at each training checkpoint of the method's plan).
    """

    size: int | None
    groups: int
    examples: int


@dataclass(frozen=True)
class Refinement:
    """Coarse groups, of which those that matter are in parts.

    groups: a partition, the groups that were split replaced by their parts. scores: of these groups [Q, K]; the parts'
    add up to their group's up to rounding. levels: what was scored, from coarse to fine. found: the groups of a single
    example, those that matter most first: the example's index, its label in `groups`, its score summed over queries.
    """

    groups: Groups
    scores: Scores
    levels: tuple[Level, ...]
    found: tuple[Ranked, ...]

    @property
    def examples_walked(self) -> int:
        """Training examples walked in all; scoring every example walks each once."""
        return sum(level.examples for level in self.levels)

    def __repr__(self) -> str:
        return (
            f"Refinement({len(self.groups)} groups, {len(self.found)} single examples found, "
            f"{self.examples_walked:,} examples walked, the data has {self.groups.length:,})"
        )


@dataclass(frozen=True)
class Refiner:
    """How groups are refined; see `Analyzer.refine`.

    method: the name of the method that scores.
    """

    method: str
    keep: float
    sizes: Sequence[int]
    largest: bool | None
    seed: int

    def __post_init__(self) -> None:
        if self.method in NOT_SUMS:
            raise ScoreError(f"refine: scores of {self.method} do not add up, so a group's says nothing of its parts.")
        if not isinstance(self.keep, int | float | np.integer | np.floating) or not 0 < self.keep <= 1:
            raise GroupError(f"keep={self.keep!r}: expected a share above 0, up to 1.")
        if not (self.largest is None or isinstance(self.largest, bool)):
            raise GroupError(f"largest={self.largest!r}: expected True, False or None (either sign).")
        sizes = list(self.sizes) if isinstance(self.sizes, Sequence | np.ndarray) else []
        whole = all(isinstance(size, int | np.integer) and size >= 1 for size in sizes)
        if not sizes or not whole or sizes != sorted(set(sizes), reverse=True):
            raise GroupError(
                f"sizes={self.sizes!r}: expected a list of whole numbers of at least 1, each below the one before."
            )

    def refine(self, score: Callable[[Groups], Scores], groups: Groups, features: Any) -> Refinement:
        """Score the groups, then the parts of those that matter, then theirs; score: scores any groups of the data."""
        scores = score(groups)
        levels = [Level(None, len(groups), int(groups.sizes.sum()))]
        current = np.arange(len(groups))  # the places of the groups that were reached at this level
        for size in self.sizes:
            chosen = self._chosen(scores, current)
            coarse = [place for place in chosen if len(groups.members[place]) > size]
            if not coarse:
                current = chosen
                continue
            split = groups.split(features, size=size, only=coarse, seed=self.seed)
            came_from = _origins(groups, split)
            new = np.flatnonzero(np.bincount(came_from)[came_from] > 1)
            reached = np.flatnonzero(np.isin(came_from, chosen))
            if len(new):
                parts = _some(split, new)
                scores = _replaced(scores, score(parts), split, came_from, new)
                levels.append(Level(int(size), len(parts), int(parts.sizes.sum())))
            groups, current = split, reached
        return Refinement(groups, scores, tuple(levels), self._found(groups, scores))

    def _matter(self, scores: Scores) -> np.ndarray:
        """[K]: how much each group matters."""
        total_K: np.ndarray = scores.values.double().sum(0).cpu().numpy()
        return np.abs(total_K) if self.largest is None else total_K if self.largest else -total_K

    def _chosen(self, scores: Scores, current: np.ndarray) -> np.ndarray:
        """Those of the current groups that matter: the share `keep` of them, of the sign that is asked for."""
        matter_K = self._matter(scores)[current]
        first = np.argsort(-matter_K, kind="stable")[: math.ceil(self.keep * len(current))]
        return current[first[matter_K[first] > 0]]

    def _found(self, groups: Groups, scores: Scores) -> tuple[Ranked, ...]:
        matter_K, total_K = self._matter(scores), scores.values.double().sum(0).tolist()
        order = [place for place in np.argsort(-matter_K, kind="stable") if len(groups.members[place]) == 1]
        return tuple(Ranked(int(groups.members[k][0]), groups.labels[k], total_K[k]) for k in order)


def _origins(groups: Groups, split: Groups) -> np.ndarray:
    """[K]: the group that each part is of."""
    of_N = groups.membership()
    return of_N[[member[0] for member in split.members]]


def _some(groups: Groups, places: np.ndarray) -> Groups:
    members, labels = (tuple(of[place] for place in places) for of in (groups.members, groups.labels))
    return Groups(members, labels, groups.length, partial=True)  # type: ignore[arg-type]


def _replaced(scores: Scores, parts: Scores, split: Groups, came_from: np.ndarray, new: np.ndarray) -> Scores:
    """Scores of the split groups: those of the groups that stayed whole, and of the new parts."""
    origin_K, new_K = torch.from_numpy(came_from), torch.from_numpy(new)

    def joined(whole: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        both = whole.index_select(1, origin_K.to(whole.device))
        return both.index_copy_(1, new_K.to(whole.device), own.to(whole))

    spread = None if scores.spread is None or parts.spread is None else joined(scores.spread, parts.spread)
    return replace(
        scores,
        values=joined(scores.values, parts.values),
        group_labels=split.labels,
        group_sizes=tuple(split.sizes.tolist()),
        spread=spread,
    )
