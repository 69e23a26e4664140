"""Trees of groups: the same examples in coarse groups, and in finer ones within each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from ..arguments import whole_number
from ..errors import GroupError
from ..groups.columns import columns_of
from ..groups.groups import Groups
from ..groups.nesting import parents
from .scores import Scores


@dataclass(frozen=True)
class GroupTree:
    """Groups of the same examples from coarse to fine, each finer group within one coarser group.

    Only the finest level need be scored: the coarser ones follow from it by addition.

    Args:
        levels: groups, the coarsest first.

    Raises:
        GroupError: there is no level, levels are about other examples, or a group is not within one coarser group.

    Example:
        >>> tree = GroupTree.by(["web", "web", "book"], ["ann", "bob", "ann"])
        >>> tree.finest.labels, tree.parents(1).tolist()
        (('book / ann', 'web / ann', 'web / bob'), [0, 1, 1])
    """

    levels: tuple[Groups, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        wrong = [type(level).__name__ for level in self.levels if not isinstance(level, Groups)]
        if wrong or not self.levels:
            raise GroupError(f"levels: found {wrong or 'none'}. Expected segflow.Groups, the coarsest first.")
        _ = self._parents

    @classmethod
    def by(cls, *columns: Iterable[object]) -> GroupTree:
        """Levels by the first column of labels, by the first two, and so on (source, then document, ...).

        Each column has one label for each example; see `Groups.by`.
        """
        flat = [column for given in columns for column in columns_of(given)]
        again = [list(column) if isinstance(column, Iterator) else column for column in flat]
        return cls(tuple(Groups.by(*again[:count]) for count in range(1, len(again) + 1)))

    @property
    def finest(self) -> Groups:
        """The last level, which is to be scored."""
        return self.levels[-1]

    def parents(self, level: int) -> np.ndarray:
        """[K]: for each group of a level (1 for the second) the place of its group one level up."""
        advice = "The coarsest level, 0, has no groups above it."
        return self._parents[whole_number("level", level, GroupError, 1, len(self.levels) - 1, advice) - 1].copy()

    @cached_property
    def _parents(self) -> list[np.ndarray]:
        pairs = enumerate(pairwise(self.levels))
        return [parents(fine, coarse, f"levels {level} and {level + 1}") for level, (coarse, fine) in pairs]

    def scores(self, scores: Scores) -> tuple[Scores, ...]:
        """The scores of every level, from coarse to fine, given those of the finest; they add up.

        Raises ScoreError if these are not the finest level's scores, or of a method whose scores do not add up.
        """
        scores.check_groups(self.finest, "GroupTree.scores: the finest level")
        return (*(scores.rolled_up(self.finest, level) for level in self.levels[:-1]), scores)
