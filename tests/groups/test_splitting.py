"""Groups by several columns of labels, and groups that are split into parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf

SOURCES = ["web", "book", "web", "book", "web", "web"]
DOCUMENTS = [1, 1, 2, 1, 1, 2]


def _named(groups: sf.Groups) -> dict[str, list[int]]:
    return {label: member.tolist() for label, member in zip(groups.labels, groups.members, strict=True)}


# Several columns


def test_several_columns_make_a_group_for_each_combination_that_is_there() -> None:
    assert _named(sf.Groups.by(SOURCES, DOCUMENTS)) == {"book / 1": [1, 3], "web / 1": [0, 4], "web / 2": [2, 5]}
    assert _named(sf.Groups.by(np.array([2, 10, 2]), torch.tensor([0, 0, 1]))) == {
        "2 / 0": [0],
        "2 / 1": [2],
        "10 / 0": [1],
    }
    assert _named(sf.Groups.by(SOURCES)) == {"book": [1, 3], "web": [0, 2, 4, 5]}


def test_combinations_that_would_be_the_same_text_are_quoted_and_no_others() -> None:
    groups = sf.Groups.by(["a / b", "a", "a"], ["c", "b / c", "d"])
    assert _named(groups) == {"'a / b' / 'c'": [0], "'a' / 'b / c'": [1], "a / d": [2]}
    assert _named(sf.Groups.by([1, "1", 2])) == {"1": [0], "'1'": [1], "2": [2]}
    assert _named(sf.Groups.by([1, "1", "'1'"])) == {"1": [0], "'1'": [1], "\"'1'\"": [2]}, "a quoted one was there"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ((), "no column"),
        ((SOURCES, [1, 2]), r"have \[6, 2\] labels"),
        ((SOURCES, [float("nan")] * 6), "example 0's label is nan"),
        ((SOURCES, [[1]] * 6), "labels of column 1: example 0's label cannot be used"),
        (([], []), "no groups"),
    ],
)
def test_columns_that_make_no_sense_are_named(columns: Any, message: str) -> None:
    with pytest.raises(sf.GroupError, match=message):
        sf.Groups.by(*columns)


# Parts


def _two_blobs() -> tuple[sf.Groups, np.ndarray]:
    """Two groups of ten, each of two far blobs of five."""
    generator = np.random.default_rng(0)
    blob = generator.permutation(np.repeat(np.arange(4), 5))
    x = np.stack([blob % 2 * 10.0, blob // 2 * 1.0], 1) + 0.01 * generator.standard_normal((20, 2))
    return sf.Groups.by((blob // 2).tolist()), x


def test_groups_are_split_into_clusters_within_them() -> None:
    groups, x = _two_blobs()
    parts = groups.split(x, size=5)
    assert parts.labels == ("0/0", "0/1", "1/0", "1/1")
    for label, member in _named(parts).items():
        assert set(member) <= set(groups.members[int(label[0])].tolist())
        assert np.ptp(x[member, 0]) < 1, "a blob each"


def test_groups_are_split_at_random_into_even_parts_without_features() -> None:
    groups, _ = _two_blobs()
    parts, again, other = (groups.split(size=4, seed=seed) for seed in (0, 0, 1))
    assert parts.sizes.tolist() == [4, 3, 3, 4, 3, 3]
    assert parts.membership().tolist() == again.membership().tolist() != other.membership().tolist()
    assert set(parts.members[0]) | set(parts.members[1]) | set(parts.members[2]) == set(groups.members[0])


def test_only_the_groups_that_are_named_are_split_and_as_they_are_among_all() -> None:
    groups, x = _two_blobs()
    for only in ([1], ["1"], iter([1, "1"]), np.array([1]), torch.tensor([1])):
        parts = groups.split(size=4, only=only)
        assert parts.labels == ("0", "1/0", "1/1", "1/2")
        assert parts.members[1].tolist() == groups.split(size=4).members[3].tolist()
    assert groups.split(x, size=5, only=[]).labels == ("0", "1")


def test_parts_whose_labels_are_taken_are_marked() -> None:
    groups = sf.Groups.by(["a"] * 4 + ["a/0"] * 2)
    parts = groups.split(size=2, only=["a"])
    assert parts.labels == ("a'/0", "a'/1", "a/0")
    assert [set(member) for member in parts.members[2:]] == [{4, 5}]
    assert groups.split(size=1).labels == ("a'/0", "a'/1", "a'/2", "a'/3", "a/0/0", "a/0/1")
    marked = sf.Groups.by(["a"] * 2 + ["a'"] * 2 + ["a/1"])
    assert marked.split(size=1).labels == ("a'/0", "a'/1", "a''/0", "a''/1", "a/1")


def test_groups_of_the_size_stay_whole_and_partial_ones_partial() -> None:
    groups = sf.Groups.from_lists([[0, 1, 2], [5]], 8, partial=True)
    parts = groups.split(size=2)
    assert parts.labels == ("group 0/0", "group 0/1", "group 1")
    assert (parts.length, parts.partial) == (8, True)
    assert groups.split(np.ones((8, 1)), size=1).labels == ("group 0/0", "group 0/1", "group 0/2", "group 1")


def test_whitening_of_the_parts_features_is_over_all_data_and_can_be_chosen() -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((60, 2)) * [1.0, 30.0]
    groups = sf.Groups.by([0] * 30 + [1] * 30)
    found = {kind: groups.split(x, size=10, whiten=kind).membership().tolist() for kind in ("full", "none")}
    assert found["full"] != found["none"]
    assert groups.split(x, size=10, seed=5).membership().tolist() != found["full"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 2, "only": [2]}, "only=2: expected a whole number, 0 to 1. Give places or labels"),
        ({"size": 2, "only": ["missing"]}, "no group 'missing'"),
        ({"size": 2, "only": [-1]}, "only=-1: expected a whole number, 0 to 1"),
        ({"size": 2, "only": [0.7]}, "only=0.7: expected a whole number"),
        ({"size": 2, "only": [True]}, "only=True: expected a whole number"),
        ({"size": 2, "only": "01"}, "only='01': expected a list"),
        ({"size": 2, "only": 1}, "only=1: expected a list"),
        ({"size": 2, "features": np.ones((3, 1))}, "3 rows of features for 20 examples"),
        ({"size": 2, "features": np.full((20, 1), np.nan)}, "example 0 has NaN"),
        ({"size": 2, "features": np.ones((20, 1)), "whiten": "zca"}, "zca"),
        ({"size": 2, "seed": -1}, "seed=-1"),
    ],
)
def test_parts_that_make_no_sense_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sf.GroupError, match=message):
        _two_blobs()[0].split(**options)
