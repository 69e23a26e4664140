"""Parameters whose steps were all alike so far, told apart as soon as they differ. Pure: states in, numbers out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any


class Histories:
    """A partition of parameters, each told by its place, that only ever becomes finer.

    Members of one history are of one parameter group of the optimizer and had the same state in every step.

    Example:
        >>> histories = Histories()
        >>> histories.add([0, 0, 1])
        >>> histories.of, histories.groups
        ([0, 0, 1], [0, 1])
        >>> histories.states(["moved", "left out", "moved"]), histories.of
        (['moved', 'moved', 'left out'], [0, 2, 1])
    """

    def __init__(self) -> None:
        self.of: list[int] = []  # the history of each parameter
        self.groups: list[int] = []  # the optimizer's parameter group of each history

    def add(self, groups: Sequence[int]) -> None:
        """More parameters, by their parameter groups; they have no steps in common with those before."""
        first: dict[int, int] = {}
        for group in groups:
            if group not in first:
                first[group] = len(self.groups)
                self.groups.append(group)
            self.of.append(first[group])

    def states(self, of_parameters: Sequence[Hashable]) -> list[Any]:
        """Each history's state in a step, where members that differ have been given histories of their own."""
        seen: dict[int, Hashable] = {}
        split: dict[tuple[int, Hashable], int] = {}
        for place, state in enumerate(of_parameters):
            history = self.of[place]
            if seen.setdefault(history, state) != state:
                if (history, state) not in split:
                    split[history, state] = len(self.groups)
                    self.groups.append(self.groups[history])
                self.of[place] = split[history, state]
        return [seen.get(h) for h in range(len(self.groups) - len(split))] + [s for _, s in split]
