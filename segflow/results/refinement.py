"""Refinement: from coarse groups down to the single examples that matter, scoring only what lies on the way.

Axes: Q queries, K groups, k new parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from ..arguments import real_number, shown, truth, whole_number, whole_numbers
from ..errors import GroupError
from ..groups.groups import Groups
from ..groups.nesting import parents
from .scores import GROUP_DIGEST, Ranked, Scores, check_additive


class Level(NamedTuple):
    """One level of a refinement.

    size: examples in a part on average, None for the coarse groups. groups: how many groups were scored. examples: how
    many training examples they hold, each of which was walked at every training checkpoint of the method's plan.
    """

    size: int | None
    groups: int
    examples: int


@dataclass(frozen=True)
class Refinement:
    """Coarse groups, of which those that matter are split into parts.

    groups: the coarse groups, with those that were split replaced by their parts. scores: of these groups, [Q, K]; the
    scores of a group's parts add up to the group's up to rounding. levels: what was scored, from coarse to fine.
    found: the groups of a single example, those that matter most first, each with the example's index, its label in
    `groups` and its score summed over the queries.
    """

    groups: Groups
    scores: Scores
    levels: tuple[Level, ...]
    found: tuple[Ranked, ...]

    @property
    def examples_walked(self) -> int:
        """Training examples walked in all; to score every example by itself walks each of them once."""
        return sum(level.examples for level in self.levels)

    def __repr__(self) -> str:
        return (
            f"Refinement({len(self.groups)} groups, {len(self.found)} single examples found, "
            f"{self.examples_walked:,} examples walked, the data has {self.groups.length:,})"
        )


def checked_options(
    keep: float, sizes: Sequence[int], largest: bool | None, seed: int
) -> tuple[float, tuple[int, ...], bool | None, int]:
    """The options of `refine`; GroupError unless they make sense."""
    keep = real_number("keep", keep, GroupError, above=0, most=1, advice="It is the share of groups that are split.")
    largest = None if largest is None else truth("largest", largest, GroupError, "None takes either sign.")
    falling = whole_numbers("sizes", sizes, GroupError, 1)
    if not falling or list(falling) != sorted(set(falling), reverse=True):
        raise GroupError(f"sizes={shown(sizes)}: expected whole numbers of at least 1, each below the one before.")
    return keep, falling, largest, whole_number("seed", seed, GroupError)


def refine(
    score: Callable[[Groups], Scores],
    groups: Groups,
    features: Any,
    *,
    keep: float,
    sizes: Sequence[int],
    largest: bool | None,
    seed: int,
) -> Refinement:
    """Score the groups, then the parts of those that matter, then theirs; options are those of `Analyzer.refine`.

    score: gives the scores [Q, K] of any groups of the data; ScoreError where they do not add up.
    """
    keep, sizes, largest, seed = checked_options(keep, sizes, largest, seed)
    scores = score(groups)
    check_additive(scores.provenance, "refine")
    levels = [Level(None, len(groups), int(groups.sizes.sum()))]
    reached = np.arange(len(groups))  # the places of the groups that the refinement has come down to
    for size in sizes:
        chosen = _chosen(scores, reached, keep, largest)
        large = [place for place in chosen if len(groups.members[place]) > size]
        if not large:
            reached = chosen
            continue
        split = groups.split(features, size=size, only=large, seed=seed)
        parent_K = parents(split, groups, "refine")
        new = np.flatnonzero(np.bincount(parent_K)[parent_K] > 1)
        reached = np.flatnonzero(np.isin(parent_K, chosen))
        if len(new):
            parts = _subset(split, new)
            scores = _replaced(scores, score(parts), split, parent_K, new)
            levels.append(Level(size, len(parts), int(parts.sizes.sum())))
        groups = split
    return Refinement(groups, scores, tuple(levels), _single_examples(groups, scores, largest))


def _importance(scores: Scores, largest: bool | None) -> np.ndarray:
    """[K]: how much each group matters, by its score summed over the queries."""
    total_K: np.ndarray = scores.values.double().sum(0).cpu().numpy()
    return np.abs(total_K) if largest is None else total_K if largest else -total_K


def _chosen(scores: Scores, reached: np.ndarray, keep: float, largest: bool | None) -> np.ndarray:
    """Those of the groups reached that matter: the share `keep` of them, of the sign that is asked for."""
    importance = _importance(scores, largest)[reached]
    first = np.argsort(-importance, kind="stable")[: math.ceil(keep * len(reached))]
    return reached[first[importance[first] > 0]]


def _single_examples(groups: Groups, scores: Scores, largest: bool | None) -> tuple[Ranked, ...]:
    """The groups of a single example, those that matter most first."""
    importance_K, total_K = _importance(scores, largest), scores.values.double().sum(0).tolist()
    order = [place for place in np.argsort(-importance_K, kind="stable") if len(groups.members[place]) == 1]
    return tuple(Ranked(int(groups.members[k][0]), groups.labels[k], total_K[k]) for k in order)


def _subset(groups: Groups, places: np.ndarray) -> Groups:
    """The groups at some places alone."""
    members, labels = (tuple(column[place] for place in places) for column in (groups.members, groups.labels))
    return Groups(members, labels, groups.length, partial=True)  # type: ignore[arg-type]


def _replaced(scores: Scores, parts: Scores, split: Groups, parent_K: np.ndarray, new: np.ndarray) -> Scores:
    """Scores of the split groups: those of the groups that stayed whole, and of the new parts."""
    parent, places = torch.from_numpy(parent_K), torch.from_numpy(new)

    def joined(whole_QK: torch.Tensor, parts_Qk: torch.Tensor) -> torch.Tensor:
        scores_QK = whole_QK.index_select(1, parent.to(whole_QK.device))
        return scores_QK.index_copy_(1, places.to(whole_QK.device), parts_Qk.to(whole_QK))

    spread = None if scores.spread is None or parts.spread is None else joined(scores.spread, parts.spread)
    return replace(
        scores,
        values=joined(scores.values, parts.values),
        group_labels=split.labels,
        group_sizes=tuple(split.sizes.tolist()),
        provenance={**scores.provenance, GROUP_DIGEST: split.digest},
        spread=spread,
    )
