"""Groups: partitions of the training set."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import GroupError, is_whole
from ..runtime.ranks import current
from .kmeans import KMeans, cluster
from .whitening import Rows, Whitening, feature_rows


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
    def by(cls, *columns: Iterable[object]) -> Groups:
        """One group for each distinct label (class, source, annotator, ...), given one label for each example.

        Of several columns, one group for each combination that is there, called "a / b". Labels that would be the same
        text are quoted: "1 / 'a'".

        Example:
            >>> Groups.by(["web", "book", "web"], [0, 1, 1]).labels
            ('book / 1', 'web / 0', 'web / 1')
        """
        distinct, of_CN = _coded(columns)
        combined, of_N = np.unique(of_CN, axis=1, return_inverse=True)
        names = _names([[distinct[column][code] for column, code in enumerate(codes)] for codes in combined.T.tolist()])
        return cls.from_lists(_members(of_N.reshape(-1), len(names)), of_CN.shape[1], names)

    @classmethod
    def kmeans(
        cls,
        features: Any,
        *,
        size: int | None = None,
        count: int | None = None,
        whiten: str = "full",
        max_size: int | None = None,
        seed: int = 0,
        tolerance: float = 1e-3,
        iterations: int = 60,
        memory: int = 1 << 30,
    ) -> Groups:
        """Clusters of like examples, by k-means on features (Ley et al. 2024, arXiv 2410.09940).

        Under several processes the first one clusters and the others receive its groups.

        Args:
            features: [N, ...], a tensor, array or np.memmap with a row for each example, as from
                `Analyzer.features`; rows are flattened.
            size: examples in a group on average; or count: how many groups. Give one of them. Fewer groups come out
                where fewer rows are distinct; at one example a group all are singletons.
            whiten: "full" gives all directions in which the features vary the same weight (with nearly as many
                features as examples this leaves nothing to tell them apart), "scale" all features, "none" leaves
                their weights as they are.
            max_size: no group exceeds it; there are more groups where this needs them. No example and one of its
                nearest 16 centres would both rather have each other; farther centres are not held to this.
            seed: of the first centres.
            tolerance, iterations: ends when centres move by less than this share of the variance, or after so many
                steps.
            memory: bytes for the whitened features; beyond it mini-batches are read.

        Raises:
            GroupError: features are not finite numbers [N, ...], or options make no sense.

        Example:
            >>> Groups.kmeans(np.arange(6.0)[:, None] // 2, size=2)
            Groups(3 groups of 2 to 2 examples, 6 of 6 examples)
        """
        rows_ND = feature_rows(features)
        how = KMeans(max_size, seed, tolerance, iterations, memory)
        number = _count(len(rows_ND), size, count)
        ranks = current()
        with ranks.together("k-means"):
            own = torch.from_numpy(cluster(rows_ND, number, whiten, how)) if ranks.main else None
            of_N = ranks.broadcast(own).numpy()
        members = _members(of_N, int(of_N.max()) + 1)
        return cls.from_lists(members, len(of_N), [f"cluster {place}" for place in range(len(members))])

    def split(
        self,
        features: Any = None,
        *,
        size: int,
        only: Iterable[int | str] | None = None,
        whiten: str = "full",
        seed: int = 0,
    ) -> Groups:
        """Each group in parts of about `size` examples, "cluster 3/0", "cluster 3/1", ...; smaller ones stay whole.

        Parts whose labels are taken get a mark: "cluster 3'/0".

        Args:
            features: [length, ...], parts are then k-means clusters within the group (see `kmeans`; features are
                whitened over the whole dataset); None: random parts of even size.
            size: examples in a part on average.
            only: places or labels of the groups to split; by default all.
            whiten: as for `kmeans`; seed: of the random parts, or of the first centres.

        Raises:
            GroupError: `only` names no group, or features or size make no sense.

        Example:
            >>> Groups.by(["web", "book", "web"]).split(size=1).labels
            ('book', 'web/0', 'web/1')
        """
        _count(self.length, size, None)
        chosen, rows = self._chosen(only), None
        how = KMeans(seed=seed)
        if features is not None:
            rows_ND = feature_rows(features)
            if len(rows_ND) != self.length:
                raise GroupError(f"{len(rows_ND)} rows of features for {self.length} examples: expected one for each.")
            rows = Rows(rows_ND, Whitening.fit(rows_ND, whiten, how.memory))
        part_N, ranks = np.zeros(self.length, dtype=np.int64), current()
        with ranks.together("split"):
            for group in chosen if ranks.main else ():
                member = self.members[group]
                count = -(-len(member) // size)
                if rows is not None:
                    part_N[member] = how.labels(rows.of(member), count)
                else:
                    shuffled = np.random.default_rng([seed, group]).permutation(member)
                    for part, own in enumerate(np.array_split(shuffled, count)):
                        part_N[own] = part
            part_N = ranks.broadcast(torch.from_numpy(part_N) if ranks.main else None).numpy()
        return self._in_parts(part_N)

    def _chosen(self, only: Iterable[int | str] | None) -> list[int]:
        """The places of the groups that `split` is about."""
        if only is None:
            return list(range(len(self)))
        if isinstance(only, str) or not isinstance(only, Iterable):
            raise GroupError(f"only={only!r}: expected a list of places or labels of groups.")
        place, found = {label: group for group, label in enumerate(self.labels)}, set()
        for given in only:
            one = given.item() if hasattr(given, "item") else given
            if not isinstance(one, str | int | np.integer) or isinstance(one, bool):
                raise GroupError(f"only: found {one!r}, expected the place (a whole number) or label of a group.")
            group = place.get(one, -1) if isinstance(one, str) else int(one)
            if not 0 <= group < len(self):
                raise GroupError(f"only: there is no group {one!r}. The {len(self)} groups are {self.labels[:8]}...")
            found.add(group)
        return sorted(found)

    def _in_parts(self, part_N: np.ndarray) -> Groups:
        """The groups, each in the parts that its examples are in."""
        members, labels, taken = [], [], set(self.labels)
        for label, member in zip(self.labels, self.members, strict=True):
            numbers = part_N[member]
            parts = _members(numbers, int(numbers.max()) + 1)
            members += [member[part] for part in parts]
            own, mark = [label], ""
            while len(parts) > 1 and not taken.isdisjoint(own):
                own, mark = [f"{label}{mark}/{part}" for part in range(len(parts))], mark + "'"
            labels += own
            taken.update(own)
        return Groups(tuple(members), tuple(labels), self.length, self.partial)


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


def _coded(columns: Sequence[Iterable[object]]) -> tuple[list[list[object]], np.ndarray]:
    """Each column's distinct labels in order, and the place of each example's label among them, [columns, N]."""
    if not columns:
        raise GroupError("no column of labels was given. Expected one label for each example.")
    distinct, codes = [], []
    for column in columns:
        try:
            plain = [label.item() if hasattr(label, "item") else label for label in column]
            found = sorted(set(plain), key=lambda label: (str(type(label)), label))  # type: ignore[arg-type, return-value]
        except (TypeError, ValueError, RuntimeError) as problem:  # unhashable, unordered, or an array
            raise GroupError(f"a label cannot name a group ({problem}). Expected numbers or strings.") from problem
        if any(isinstance(label, float) and math.isnan(label) for label in found):
            raise GroupError("a label is NaN, which equals nothing. Give such examples a label of their own.")
        place = {label: index for index, label in enumerate(found)}
        distinct.append(found)
        codes.append(np.array([place[label] for label in plain], dtype=np.int64))
    lengths = [len(code) for code in codes]
    if len(set(lengths)) > 1:
        raise GroupError(f"the columns have {lengths} labels. Expected one label for each example in each of them.")
    return distinct, np.stack(codes)


def _names(labels: Sequence[Sequence[object]]) -> list[str]:
    """A text for each combination of labels; the parts of those that would be the same text are quoted."""
    names, quoted = [" / ".join(map(str, parts)) for parts in labels], set[int]()
    while True:
        times = Counter(names)
        same = [place for place, name in enumerate(names) if times[name] > 1 and place not in quoted]
        if not same:
            return names
        quoted.update(same)
        for place in same:
            names[place] = " / ".join(map(repr, labels[place]))


def _members(of_N: np.ndarray, count: int) -> list[np.ndarray]:
    """The examples of each group, in order, from each example's group."""
    order, ends = np.argsort(of_N, kind="stable"), np.cumsum(np.bincount(of_N, minlength=count))
    return np.split(order, ends[:-1]) if count else []


def _count(length: int, size: int | None, count: int | None) -> int:
    """How many groups are asked for."""
    if (size is None) == (count is None):
        raise GroupError(f"size={size}, count={count}: give one of them, the examples in a group or how many groups.")
    name, given = ("size", size) if count is None else ("count", count)
    if given is None or not is_whole(given, 1) or (name == "count" and given > length):
        raise GroupError(f"{name}={given!r}: expected a whole number of at least 1, for {length} examples.")
    return int(given) if name == "count" else -(-length // int(given))
