"""Groups are exact partitions, and faulty ones are refused with what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import segflow as sf
from segflow.scoring.tiles import shares, tiles


def test_from_lists_keeps_members_labels_and_sizes() -> None:
    groups = sf.Groups.from_lists([[0, 3], range(1, 3), np.array([4]), torch.tensor([5])], 6, labels=["a", 2, "c", "d"])
    assert [member.tolist() for member in groups.members] == [[0, 3], [1, 2], [4], [5]]
    assert groups.labels == ("a", "2", "c", "d")
    assert groups.sizes.tolist() == [2, 2, 1, 1]
    assert groups.membership().tolist() == [0, 1, 1, 0, 2, 3]
    assert (len(groups), groups.length, groups.partial) == (4, 6, False)
    assert repr(groups) == "Groups(4 groups of 1 to 2 examples, 6 of 6 examples)"
    assert sf.Groups.from_lists([[0], [1]], 2).labels == ("group 0", "group 1")


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, list], ids=["array", "tensor", "list"])
def test_masks_are_the_examples_that_they_hold(kind: Any) -> None:
    masks = [kind([True, False, False, True]), kind([False, True, True, False])]
    groups = sf.Groups.from_lists(masks, 4)
    assert [member.tolist() for member in groups.members] == [[0, 3], [1, 2]]


def test_partial_leaves_examples_out_on_purpose() -> None:
    groups = sf.Groups.from_lists([[1], [3]], 5, partial=True)
    assert groups.membership().tolist() == [-1, 0, -1, 1, -1]


def test_members_are_the_groups_own_copies() -> None:
    indices = np.array([0, 1])
    groups = sf.Groups((indices, [2]), ("a", "b"), 3)  # type: ignore[arg-type]
    indices[0] = 1
    assert [member.tolist() for member in groups.members] == [[0, 1], [2]]


def test_singletons_are_one_example_each_in_order() -> None:
    groups = sf.Groups.singletons(4)
    assert [member.tolist() for member in groups.members] == [[0], [1], [2], [3]]
    assert groups.labels == ("0", "1", "2", "3")


@given(length=st.integers(1, 60), size=st.integers(1, 70))
def test_random_is_a_partition_into_groups_of_the_size(length: int, size: int) -> None:
    groups = sf.Groups.random(length, size, seed=3)
    assert sorted(np.concatenate(groups.members).tolist()) == list(range(length))
    assert groups.sizes[:-1].tolist() == [size] * (len(groups) - 1)
    assert 1 <= groups.sizes[-1] <= size


def test_random_depends_on_the_seed_and_repeats_with_it() -> None:
    first, same, other = (sf.Groups.random(30, 7, seed=seed).membership().tolist() for seed in (0, 0, 1))
    assert first == same != other


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([2, 0, 2, 1], {"0": [1], "1": [3], "2": [0, 2]}),
        (["b", "a", "b"], {"a": [1], "b": [0, 2]}),
        (torch.tensor([10, 9, 10]), {"9": [1], "10": [0, 2]}),
        (np.array([1.5, -1.0, 1.5]), {"-1.0": [1], "1.5": [0, 2]}),
        (np.array(["é", "z"]), {"z": [1], "é": [0]}),
        ([torch.tensor(1), 1, np.int64(1), 0], {"0": [3], "1": [0, 1, 2]}),
        (["web", 3, "None", "web", 3], {"3": [1, 4], "None": [2], "web": [0, 3]}),
        ([("web", 1), ("book", 2), ("web", 1)], {"('book', 2)": [1], "('web', 1)": [0, 2]}),
    ],
)
def test_by_makes_one_group_for_each_distinct_label(labels, expected: dict[str, list[int]]) -> None:
    groups = sf.Groups.by(labels)
    found = {label: member.tolist() for label, member in zip(groups.labels, groups.members, strict=True)}
    assert found == expected
    assert list(found) == list(expected), "numbers are ordered as numbers"
    assert groups.length == len(labels)


FAULTS = {
    "overlap": (
        lambda: sf.Groups.from_lists([[0, 1], [1, 2, 0]], 3, labels=["x", "y"]),
        r"groups overlap: 2 examples appear more than once, the first is 0 \(in \['x', 'y'\]\)",
    ),
    "twice in one": (
        lambda: sf.Groups.from_lists([[0, 1, 1]], 2),
        r"groups overlap: 1 examples .* first is 1 \(in \['group 0'\]\)",
    ),
    "overlap of partial groups": (lambda: sf.Groups.from_lists([[0], [0]], 9, partial=True), "groups overlap"),
    "miss": (
        lambda: sf.Groups.from_lists([[0, 2]], 5),
        r"groups miss 3 of 5 examples, the first is 1\. Add them to a group, or pass partial=True",
    ),
    "exceed": (
        lambda: sf.Groups.from_lists([[0], [1, 7]], 2, labels=["x", "y"]),
        r"group 'y' names example 7, but the data has 0\.\.1",
    ),
    "negative": (lambda: sf.Groups.from_lists([[0, -1]], 1), "group 'group 0' names example -1"),
    "empty group": (lambda: sf.Groups.from_lists([[0], []], 1), r"group 'group 1' is empty\. Leave it out"),
    "no groups": (lambda: sf.Groups.from_lists([], 1), "no groups were given. Expected at least one"),
    "no labels": (lambda: sf.Groups.by([]), "no groups were given"),
    "labels": (lambda: sf.Groups.from_lists([[0], [1]], 2, labels=["a"]), "1 labels for 2 groups: expected one for"),
    "floats": (
        lambda: sf.Groups.from_lists([[0.0, 1.0]], 2),
        r"list of example indices.*, found float64 of shape \(2,\)",
    ),
    "mask": (lambda: sf.Groups.from_lists([[True, False]], 3), "group 'group 0' is a mask of 2, but the data has 3"),
    "mask of nothing": (lambda: sf.Groups.from_lists([[True, True], [False, False]], 2), "group 'group 1' is empty"),
    "booleans and numbers": (lambda: sf.Groups.from_lists([[True, 0]], 2), "found both booleans and numbers"),
    "nested": (
        lambda: sf.Groups.from_lists([[[0], [1]]], 2),
        r"list of example indices.*, found int64 of shape \(2, 1\)",
    ),
    "ragged": (lambda: sf.Groups.from_lists([[[0], [1, 2]]], 3), "list of example indices.*inhomogeneous"),
    "flat list": (lambda: sf.Groups.from_lists([0, 1], 2), r"list of example indices.*, found int64 of shape \(\)"),
    "size": (lambda: sf.Groups.random(5, 0), "size=0: expected a whole number, at least 1"),
    "one-hot labels": (lambda: sf.Groups.by(torch.eye(2)), "the column has the shape"),
    "list labels": (lambda: sf.Groups.by([[1], [2]]), "example 0's label cannot be used .*unhashable"),
    "NaN label": (lambda: sf.Groups.by(np.array([1.0, np.nan])), "example 1's label is nan, which stands for none"),
    "batch size": (
        lambda: tiles(shares(sf.Groups.singletons(2), 1)[0], 0, 1),
        "batch_size=0, tile_size=1: expected at least 1",
    ),
    "tile size": (
        lambda: tiles(shares(sf.Groups.singletons(2), 1)[0], 1, 0),
        "batch_size=1, tile_size=0: expected at least 1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_groups_are_refused_with_what_is_wrong(fault: str) -> None:
    make, text = FAULTS[fault]
    with pytest.raises(sf.GroupError, match=text):
        make()


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), np.datetime64("NaT")])
def test_a_missing_label_of_a_list_is_refused(missing: object) -> None:
    with pytest.raises(sf.GroupError, match=r"labels: group 1's label is .*, which stands for none"):
        sf.Groups.from_lists([[0, 2], [1]], 3, labels=["a", missing])
    with pytest.raises(sf.GroupError, match=r"labels: group 0's label"):
        sf.Groups.from_lists({missing: [0, 2], "b": [1]}, 3)
