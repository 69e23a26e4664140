"""Groups: partitions of the training set, and batches that keep a group together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .errors import GroupError
from .ranks import balanced

_PADDING = 1.5  # a batch's largest piece times its pieces may exceed its examples by this factor


@dataclass(frozen=True)
class Groups:
    """Disjoint groups of training examples.

    Args:
        members: one array of example indices for each group.
        labels: a name for each group.
        length: the number of training examples that the indices are about.
        partial: True if the groups leave examples out on purpose.

    Raises:
        GroupError: a group is empty, groups overlap, exceed the data, or miss examples without `partial`.

    Example:
        >>> Groups.from_lists([[0, 1], [2]], length=3)
        Groups(2 groups of 1 to 2 examples, 3 of 3 examples)
    """

    members: tuple[np.ndarray, ...]
    labels: tuple[str, ...]
    length: int
    partial: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(_indices(member) for member in self.members))
        if not self.members:
            raise GroupError("no groups were given. Expected at least one.")
        if len(self.labels) != len(self.members):
            raise GroupError(f"{len(self.labels)} labels for {len(self.members)} groups: expected one for each.")
        if len(set(self.labels)) < len(self.labels):
            twice = next(label for label in self.labels if self.labels.count(label) > 1)
            raise GroupError(f"two groups are called {twice!r}. Give each a label of its own (as text).")
        for label, member in zip(self.labels, self.members, strict=True):
            if len(member) == 0:
                raise GroupError(f"group {label!r} is empty. Leave it out.")
            if member.min() < 0 or member.max() >= self.length:
                wrong = member[(member < 0) | (member >= self.length)]
                raise GroupError(f"group {label!r} names example {wrong[0]}, but the data has 0..{self.length - 1}.")
        self._check_partition()

    def _check_partition(self) -> None:
        counts = np.bincount(np.concatenate(self.members), minlength=self.length)
        if (counts > 1).any():
            example = int(np.argmax(counts > 1))
            holders = [label for label, m in zip(self.labels, self.members, strict=True) if (m == example).any()]
            raise GroupError(
                f"groups overlap: {int((counts > 1).sum())} examples appear more than once, the first is {example} "
                f"(in {holders}). Give each example to one group."
            )
        missed = int((counts == 0).sum())
        if missed and not self.partial:
            raise GroupError(
                f"groups miss {missed} of {self.length} examples, the first is {int(np.argmax(counts == 0))}. "
                "Add them to a group, or pass partial=True to leave them out on purpose."
            )

    def __len__(self) -> int:
        """The number of groups."""
        return len(self.members)

    def __repr__(self) -> str:
        sizes = self.sizes
        return (
            f"Groups({len(self)} groups of {sizes.min()} to {sizes.max()} examples, "
            f"{sizes.sum()} of {self.length} examples)"
        )

    @property
    def sizes(self) -> np.ndarray:
        """[K]: how many examples each group holds."""
        return np.array([len(member) for member in self.members])

    def membership(self) -> np.ndarray:
        """[length]: the group of each example, -1 where `partial` left it out."""
        of = np.full(self.length, -1)
        for group, member in enumerate(self.members):
            of[member] = group
        return of

    @classmethod
    def from_lists(
        cls,
        lists: Iterable[Sequence[int] | np.ndarray],
        length: int,
        labels: Sequence[object] | None = None,
        partial: bool = False,
    ) -> Groups:
        """Groups from lists of example indices; `length` is the size of the training set."""
        members = tuple(lists)
        names = [f"group {k}" for k in range(len(members))] if labels is None else labels
        return cls(members, tuple(map(str, names)), int(length), partial)  # type: ignore[arg-type]

    @classmethod
    def singletons(cls, length: int) -> Groups:
        """Every example a group of its own: per-example attribution."""
        return cls(tuple(np.arange(length)[:, None]), tuple(map(str, range(length))), int(length))

    @classmethod
    def random(cls, length: int, size: int, seed: int = 0) -> Groups:
        """A random partition into groups of `size` examples; the last may be smaller."""
        if size < 1:
            raise GroupError(f"size={size}: expected at least 1.")
        shuffled = np.random.default_rng(seed).permutation(length)
        return cls.from_lists([np.sort(shuffled[start : start + size]) for start in range(0, length, size)], length)

    @classmethod
    def by(cls, labels: Iterable[object]) -> Groups:
        """One group for each distinct label (class, source, annotator, ...), given one label for each example."""
        try:
            plain = [label.item() if hasattr(label, "item") else label for label in labels]
            distinct = sorted(set(plain), key=lambda label: (str(type(label)), label))  # type: ignore[arg-type, return-value]
        except (TypeError, ValueError, RuntimeError) as problem:  # unhashable, unordered, or an array
            raise GroupError(f"a label cannot name a group ({problem}). Expected numbers or strings.") from problem
        if any(isinstance(label, float) and math.isnan(label) for label in distinct):
            raise GroupError("a label is NaN, which equals nothing. Give such examples a label of their own.")
        place = {label: index for index, label in enumerate(distinct)}
        of = np.array([place[label] for label in plain], dtype=np.int64)
        order, ends = np.argsort(of, kind="stable"), np.cumsum(np.bincount(of, minlength=len(distinct)))
        return cls.from_lists(np.split(order, ends[:-1]) if distinct else [], len(plain), distinct)


def check_groups(groups: object, length: int) -> None:
    """Raise GroupError unless these are groups of a dataset of that length."""
    if not isinstance(groups, Groups):
        raise GroupError(f"groups is a {type(groups).__name__}: expected segflow.Groups, as from Groups.from_lists().")
    if groups.length != length:
        raise GroupError(
            f"the groups are about {groups.length} examples, the training data has {length}. "
            "Make the groups anew from this dataset."
        )


def _indices(given: Sequence[int] | np.ndarray) -> np.ndarray:
    try:
        array = np.asarray(given)
    except ValueError as problem:
        raise GroupError(f"a group must be a list of example indices ({problem}).") from problem
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise GroupError(f"a group must be a list of example indices, found {array.dtype} of shape {array.shape}.")
    return array.astype(np.int64)


class GroupBatch(NamedTuple):
    """Examples of consecutive pieces of a tile, piece after piece.

    examples: their indices; sizes: how many belong to each piece; first: the first piece's place in the tile.
    """

    examples: np.ndarray
    sizes: tuple[int, ...]
    first: int


class Tile(NamedTuple):
    """Pieces whose summed gradients are held at once: each one's group, and the batches that walk their examples."""

    groups: np.ndarray
    batches: tuple[GroupBatch, ...]


class Piece(NamedTuple):
    """Examples of one group that stay together: the whole group, or a part of one that is large."""

    group: int
    members: np.ndarray


def shares(groups: Groups, count: int, whole: bool = False) -> list[list[Piece]]:
    """Deal groups out to `count` ranks, balanced by their sizes.

    A group larger than a quarter of a rank's fair share is cut into even pieces, whose scores add up; one rank gets
    whole groups, as do all if `whole`.
    """
    cuts = count > 1 and not whole
    limit = max(1, int(groups.sizes.sum()) // (4 * count)) if cuts else groups.length
    pieces = [
        Piece(group, part)
        for group, members in enumerate(groups.members)
        for part in ([members] if len(members) <= limit else np.array_split(members, -(-len(members) // limit)))
    ]
    owners = balanced([len(piece.members) for piece in pieces], count)
    dealt: list[list[Piece]] = [[] for _ in range(count)]
    for piece, owner in zip(pieces, owners, strict=True):
        dealt[owner].append(piece)
    return dealt


def tiles(pieces: Sequence[Piece], batch_size: int, tile_size: int) -> list[Tile]:
    """Plan the walk over all pieces: largest first, so that those of one batch are of nearly one size.

    A piece of up to `batch_size` examples stays in one batch; a larger one is split evenly, each part a batch of its
    own.
    """
    if batch_size < 1 or tile_size < 1:
        raise GroupError(f"batch_size={batch_size}, tile_size={tile_size}: expected at least 1.")
    order = sorted(pieces, key=lambda piece: -len(piece.members))
    return [_tile(order[start : start + tile_size], batch_size) for start in range(0, len(order), tile_size)]


def _tile(chosen: Sequence[Piece], batch_size: int) -> Tile:
    walked: list[GroupBatch] = []
    waiting: list[np.ndarray] = []  # whole groups that will share a batch
    first = 0

    def flush() -> None:
        nonlocal first
        if waiting:
            walked.append(GroupBatch(np.concatenate(waiting), tuple(map(len, waiting)), first))
        first += len(waiting)
        waiting.clear()

    for place, (_, member) in enumerate(chosen):
        held = sum(map(len, waiting))
        blow_up = waiting and len(waiting[0]) * (len(waiting) + 1) > _PADDING * (held + len(member))
        if held + len(member) > batch_size or blow_up:
            flush()
        if len(member) > batch_size:
            pieces = np.array_split(member, -(-len(member) // batch_size))
            walked += [GroupBatch(piece, (len(piece),), place) for piece in pieces]
            first = place + 1
        else:
            waiting.append(member)
    flush()
    return Tile(np.array([piece.group for piece in chosen]), tuple(walked))
