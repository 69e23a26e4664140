"""Trees of groups: levels that are nested, and scores of every level from those of the finest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf

from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

SOURCES = ["web", "book", "web", "book", "web", "web"]
DOCUMENTS = [1, 1, 2, 1, 1, 2]
ANNOTATORS = ["ann", "ann", "bob", "bob", "ann", "ann"]


def test_a_tree_by_columns_has_a_level_for_each_more_column() -> None:
    tree = sf.GroupTree.by(iter(SOURCES), iter(DOCUMENTS), iter(ANNOTATORS))
    assert [level.labels for level in tree.levels[:2]] == [("book", "web"), ("book / 1", "web / 1", "web / 2")]
    assert tree.finest is tree.levels[2]
    assert tree.finest.labels == ("book / 1 / ann", "book / 1 / bob", "web / 1 / ann", "web / 2 / ann", "web / 2 / bob")
    assert tree.parents(1).tolist() == [0, 1, 1]
    assert tree.parents(2).tolist() == [0, 0, 1, 2, 2]


def test_a_tree_of_parts_names_each_parts_group() -> None:
    groups = sf.Groups.by([0] * 10 + [1] * 10)
    x = np.arange(20.0)[:, None] // 5
    tree = sf.GroupTree((groups, groups.split(x, size=5), sf.Groups.singletons(20)))
    assert tree.parents(1).tolist() == [0, 0, 1, 1]
    middle = tree.levels[1].membership()
    assert tree.parents(2).tolist() == middle.tolist()


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((), "found none"),
        ((sf.Groups.singletons(3), [[0]]), "found .'list'."),
        (
            (sf.Groups.singletons(3), sf.Groups.singletons(4)),
            "levels 0 and 1: the finer groups are about 4 examples, the coarser ones about 3",
        ),
        (
            (sf.Groups.singletons(3), sf.Groups.from_lists([[0], [1]], 3, partial=True)),
            r"levels 0 and 1: 1 examples of the coarser groups are in no finer group, the first is 2 \(in '2'\)",
        ),
        (
            (sf.Groups.by(["a", "a", "b"]), sf.Groups.by(["x", "y", "y"])),
            r"levels 0 and 1: the finer group 'y' does not lie within one .*examples are in \['a', 'b'\]",
        ),
    ],
)
def test_levels_that_are_not_nested_are_named(levels: Any, message: str) -> None:
    with pytest.raises(sf.GroupError, match=message):
        sf.GroupTree(levels)


def test_the_coarsest_level_has_no_parents() -> None:
    tree = sf.GroupTree.by(SOURCES, DOCUMENTS)
    for level in (0, 2, -1):
        with pytest.raises(sf.GroupError, match=f"level={level}: expected a whole number, 1 to 1"):
            tree.parents(level)


def test_every_levels_scores_are_those_that_scoring_it_gives(tmp_path: Path) -> None:
    train, query = vectors(24), vectors(3, seed=5)
    tree = sf.GroupTree.by([i % 2 for i in range(24)], [i % 3 for i in range(24)], [i % 4 for i in range(24)])
    model = mlp()
    analyzer = analyzer_of(
        model,
        trajectory_of(tmp_path / "run", perturbed_states(model, 2), 24),
        tmp_path / "store",
        method=sf.TracIn(),
    )
    levels = tree.scores(analyzer.score(tree.finest, train, query, keep=("layer",)))
    assert len(levels) == 3
    for level, found in zip(tree.levels, levels, strict=True):
        exact = analyzer.score(level, train, query, keep=("layer",))
        torch.testing.assert_close(found.values, exact.values, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(dict(found.by_layer), dict(exact.by_layer), rtol=1e-10, atol=1e-14)
        assert found.group_labels == level.labels


def test_scores_of_other_groups_are_refused() -> None:
    tree = sf.GroupTree.by(SOURCES, DOCUMENTS)
    scores = sf.Scores(torch.zeros(1, 2), ("q",), tree.levels[0].labels, (2, 4))
    with pytest.raises(sf.ScoreError):
        tree.scores(scores)
