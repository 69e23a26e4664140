"""Nested groups: each finer group lies within one coarser group, and which one is said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import segflow as sf
from segflow.groups.nesting import parents

FINE = sf.Groups.from_lists([[0, 5], [1], [2, 3, 6], [4]], 7, labels="abcd")


def test_each_finer_groups_parent_holds_all_of_its_examples() -> None:
    coarse = sf.Groups.from_lists([[2, 3, 4, 6], [0, 1, 5]], 7, labels=["late", "early"])
    assert parents(FINE, coarse).tolist() == [1, 1, 0, 0]
    assert parents(FINE, FINE).tolist() == [0, 1, 2, 3]
    assert parents(sf.Groups.singletons(7), FINE).tolist() == FINE.membership().tolist()


@given(seed=st.integers(0, 999), length=st.integers(1, 40), covered=st.integers(1, 40))
def test_groups_that_were_split_are_the_parents_of_their_parts(seed: int, length: int, covered: int) -> None:
    """Also where some examples are in no group: by the definition, example by example."""
    generator = np.random.default_rng(seed)
    examples = generator.permutation(length)[:covered]
    cuts = np.sort(generator.choice(len(examples), generator.integers(1, len(examples) + 1), replace=False))[1:]
    coarse = sf.Groups.from_lists(np.split(examples, cuts[cuts > 0]), length, partial=True)
    fine = coarse.split(size=int(generator.integers(1, 5)), seed=seed)
    for member, parent in zip(fine.members, parents(fine, coarse), strict=True):
        assert set(member.tolist()) <= set(coarse.members[parent].tolist())


@pytest.mark.parametrize(
    ("coarse", "message"),
    [
        (
            sf.Groups.from_lists([[0, 1], [2, 3, 4, 5, 6]], 7, ["x", "y"]),
            r"here: the finer group 'a' does not lie within one coarser group: its examples are in \['x', 'y'\]",
        ),
        (sf.Groups.from_lists([[0, 1, 5]], 7, ["x"], partial=True), r"the finer group 'c' .*are in \['none'\]"),
        (
            sf.Groups.from_lists([[0, 1, 5, 2, 3, 6, 4, 7]], 8),
            "here: the finer groups are about 7 examples, the coarser ones about 8. Give groups of one dataset",
        ),
    ],
)
def test_groups_that_are_not_nested_are_refused_by_name(coarse: sf.Groups, message: str) -> None:
    with pytest.raises(sf.GroupError, match=message):
        parents(FINE, coarse, "here")


def test_finer_groups_that_lack_examples_of_the_coarser_ones_are_refused() -> None:
    fine = sf.Groups.from_lists([[0, 5], [2]], 7, partial=True)
    coarse = sf.Groups.from_lists([[0, 1, 5], [2, 3, 4, 6]], 7, labels=["first", "second"])
    with pytest.raises(
        sf.GroupError, match=r"4 examples of the coarser .*first is 1 \(in 'first'\)\. Give finer groups"
    ):
        parents(fine, coarse)
