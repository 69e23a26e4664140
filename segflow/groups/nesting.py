"""Nested groups: whether each finer group lies within one coarser group, and within which.

Axes: N examples, K finer groups, n examples of the finer groups, group after group.
"""

from __future__ import annotations

import numpy as np

from ..errors import GroupError
from .groups import Groups


def parents(fine: Groups, coarse: Groups, where: str = "nested groups") -> np.ndarray:
    """[K]: for each finer group the place of the coarser group that holds all of its examples.

    Args:
        fine: the finer groups.
        coarse: groups of the same examples; what `partial` leaves out of one is left out of both.
        where: what the groups are needed for, with which the error's text begins.

    Raises:
        GroupError: the two are not about the same examples, or a finer group does not lie within one coarser group.

    Example:
        >>> parents(Groups.singletons(3), Groups.from_lists([[0, 2], [1]], length=3)).tolist()
        [0, 1, 0]
    """
    if fine.length != coarse.length:
        raise GroupError(
            f"{where}: the finer groups are about {fine.length} examples, the coarser ones about {coarse.length}. "
            "Give groups of one dataset."
        )
    coarse_N, examples_n = coarse.membership(), np.concatenate(fine.members)
    coarse_n, starts_K = coarse_N[examples_n], np.cumsum(fine.sizes) - fine.sizes
    parent_K: np.ndarray = coarse_n[starts_K]
    differs_n = coarse_n != np.repeat(parent_K, fine.sizes)
    outside = np.flatnonzero(np.logical_or.reduceat(differs_n, starts_K) | (parent_K < 0))
    if len(outside):
        holders = sorted({coarse.labels[k] if k >= 0 else "none" for k in coarse_N[fine.members[outside[0]]]})
        raise GroupError(
            f"{where}: the finer group {fine.labels[outside[0]]!r} does not lie within one coarser group: its "
            f"examples are in {holders}. Give groups that are nested."
        )
    missed = np.setdiff1d(np.flatnonzero(coarse_N >= 0), examples_n)
    if len(missed):
        raise GroupError(
            f"{where}: {len(missed)} examples of the coarser groups are in no finer group, the first is {missed[0]} "
            f"(in {coarse.labels[coarse_N[missed[0]]]!r}). Give finer groups that cover them."
        )
    return parent_K
