"""Groups: partitions of the training set.

Axes: N training examples, K groups, C columns of labels, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch

from ..arguments import names, settle, shown, truth, whole_number
from ..data.fingerprints import digest
from ..data.indices import as_indices
from ..data.labels import check_none_missing
from ..data.streams import stream
from ..errors import GroupError
from ..runtime.ranks import current
from .columns import coded, combination_names
from .kmeans import KMeans, cluster
from .splitting import labels_of_parts, places_of, random_parts
from .whitening import Rows, Whitening, feature_rows


@dataclass(frozen=True)
class Groups:
    """Disjoint groups of training examples.

    Args:
        members: for each group an array of its examples' indices, or a mask with a boolean for each example.
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
        settle(self, members=tuple(self.members), labels=tuple(self.labels))
        settle(self, length=whole_number("length", self.length, GroupError, advice="It counts training examples."))
        settle(self, partial=truth("partial", self.partial, GroupError))
        if not self.members:
            raise GroupError("no groups were given. Expected at least one.")
        if len(self.labels) != len(self.members):
            raise GroupError(f"{len(self.labels)} labels for {len(self.members)} groups: expected one for each.")
        if len(set(self.labels)) < len(self.labels):
            twice = next(label for label in self.labels if self.labels.count(label) > 1)
            raise GroupError(f"two groups are called {twice!r}. Give each a label of its own (as text).")
        named = zip(self.labels, self.members, strict=True)
        settle(
            self,
            members=tuple(as_indices(f"group {label!r}", given, self.length, GroupError) for label, given in named),
        )
        for label, member in zip(self.labels, self.members, strict=True):
            if len(member) == 0:
                raise GroupError(f"group {label!r} is empty. Leave it out.")
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
        group_N = np.full(self.length, -1)
        group_N[np.concatenate(self.members)] = np.repeat(np.arange(len(self)), self.sizes)
        return group_N

    @cached_property
    def digest(self) -> str:
        """What tells these groups from others: which group each example is in, and the order of the groups.

        Labels do not count, nor the order within a group.
        """
        return membership_digest(self.membership())

    @classmethod
    def from_lists(
        cls,
        lists: Iterable[Sequence[int] | np.ndarray] | Mapping[Any, Sequence[int] | np.ndarray],
        length: int,
        labels: Sequence[object] | None = None,
        partial: bool = False,
    ) -> Groups:
        """Groups from lists of example indices, or from masks; `length` is the size of the training set.

        A mask has a boolean for each example of the training set, True for the group's. Groups are called "group 0",
        "group 1", ... unless labels are given, which are taken as text; a mapping {label: list}, such as pandas'
        `groupby(...).indices`, has its own. Raises GroupError as `Groups` does.
        """
        if isinstance(lists, Mapping):
            labels, lists = list(lists) if labels is None else labels, lists.values()
        if isinstance(lists, str) or not isinstance(lists, Iterable):
            raise GroupError(f"lists={shown(lists)}: expected a list of example indices for each group.")
        members = tuple(lists)
        called = list([f"group {k}" for k in range(len(members))] if labels is None else labels)
        check_none_missing("labels", called, GroupError)
        return cls(members, names("labels", called, GroupError), length, partial)  # type: ignore[arg-type]

    @classmethod
    def singletons(cls, length: int) -> Groups:
        """Every example a group of its own: per-example attribution."""
        examples = range(whole_number("length", length, GroupError, advice="It counts training examples."))
        return cls(tuple(np.array(examples)[:, None]), tuple(map(str, examples)), len(examples))

    @classmethod
    def random(cls, length: int, size: int, seed: int = 0) -> Groups:
        """A random partition into groups of `size` examples, the last of which may be smaller.

        Raises GroupError for a size below 1.
        """
        length = whole_number("length", length, GroupError, advice="It counts training examples.")
        size = whole_number("size", size, GroupError, 1, advice="It counts examples.")
        shuffled = stream(whole_number("seed", seed, GroupError), "random groups").permutation(length)
        return cls.from_lists([np.sort(shuffled[start : start + size]) for start in range(0, length, size)], length)

    @classmethod
    def by(cls, *columns: Iterable[object]) -> Groups:
        """One group for each distinct label (class, source, annotator, ...), given one label for each example.

        With several columns there is one group for each combination that occurs, called "a / b"; a data frame, or a
        mapping of lists, counts as its columns. Labels that would be the same text are quoted: "1 / 'a'".

        Raises:
            GroupError: there is no column, columns differ in length, or a label is missing or cannot name a group.

        Example:
            >>> Groups.by(["web", "book", "web"], [0, 1, 1]).labels
            ('book / 1', 'web / 0', 'web / 1')
        """
        distinct, code_CN = coded(columns)
        codes_CK, group_N = np.unique(code_CN, axis=1, return_inverse=True)
        combinations = [[distinct[column][code] for column, code in enumerate(codes)] for codes in codes_CK.T.tolist()]
        labels = combination_names(combinations)
        return cls.from_lists(_members(group_N.reshape(-1), len(labels)), code_CN.shape[1], labels)

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
            clusters = torch.from_numpy(cluster(rows_ND, number, whiten, how)) if ranks.main else None
            cluster_N = ranks.broadcast(clusters).numpy()
        members = _members(cluster_N, int(cluster_N.max()) + 1)
        return cls.from_lists(members, len(cluster_N), [f"cluster {place}" for place in range(len(members))])

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
        size = whole_number("size", size, GroupError, 1, advice=f"It counts examples, of {self.length}.")
        chosen = range(len(self)) if only is None else sorted(set(places_of("only", only, self.labels, GroupError)))
        how = KMeans(seed=seed)
        rows = None if features is None else self._whitened(features, whiten, how.memory)
        part_N, ranks = np.zeros(self.length, dtype=np.int64), current()
        with ranks.together("split"):
            for group in chosen if ranks.main else ():
                member = self.members[group]
                count = -(-len(member) // size)
                if rows is None:
                    part_N[member] = random_parts(len(member), count, stream(how.seed, "random parts", group))
                else:
                    part_N[member] = how.labels(rows.of(member), count)
            part_N = ranks.broadcast(torch.from_numpy(part_N) if ranks.main else None).numpy()
        return self._in_parts(part_N)

    def _whitened(self, features: Any, whiten: str, memory: int) -> Rows:
        """The features [N, D] of all examples, whitened; GroupError unless there is a row for each."""
        rows_ND = feature_rows(features)
        if len(rows_ND) != self.length:
            raise GroupError(f"{len(rows_ND)} rows of features for {self.length} examples: expected one for each.")
        return Rows(rows_ND, Whitening.fit(rows_ND, whiten, memory))

    def _in_parts(self, part_N: np.ndarray) -> Groups:
        """The groups, each cut into the parts that its examples fall into."""
        parts = [_members(part_N[member], int(part_N[member].max()) + 1) for member in self.members]
        members = [member[places] for member, cut in zip(self.members, parts, strict=True) for places in cut]
        labels = labels_of_parts(self.labels, [len(cut) for cut in parts])
        return Groups(tuple(members), tuple(chain.from_iterable(labels)), self.length, self.partial)


def membership_digest(group_N: np.ndarray) -> str:
    """`Groups.digest` of the groups in which each example [N] is in the group of this number, or in none at -1."""
    return digest(group_N.astype(np.int64))


def check_groups(groups: object, length: int) -> None:
    """Raise GroupError unless these are groups of a dataset of that length."""
    if not isinstance(groups, Groups):
        raise GroupError(f"groups is a {type(groups).__name__}: expected segflow.Groups, as from Groups.from_lists().")
    if groups.length != length:
        raise GroupError(
            f"the groups are about {groups.length} examples, the training data has {length}. "
            "Make the groups anew from this dataset."
        )


def _members(group_N: np.ndarray, count: int) -> list[np.ndarray]:
    """The examples of each group, in order, from the group of each example [N]."""
    order, ends = np.argsort(group_N, kind="stable"), np.cumsum(np.bincount(group_N, minlength=count))
    return np.split(order, ends[:-1]) if count else []


def _count(length: int, size: int | None, count: int | None) -> int:
    """How many groups are asked for: by their average size, or by their number."""
    if (size is None) == (count is None):
        raise GroupError(f"size={size}, count={count}: give one of them, the examples in a group or how many groups.")
    name, given = ("size", size) if count is None else ("count", count)
    most = length if name == "count" else None
    number = whole_number(name, given, GroupError, 1, most, f"There are {length} examples.")
    return number if name == "count" else -(-length // number)
