"""Scores know the groups that they are about: groups of the same labels and sizes with other members are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf
from segflow.errors import ScoreError
from segflow.evaluation import (
    FunctionTraining,
    empirical_influence,
    leave_one_group_out,
    linear_datamodeling_difference,
    retraining_score,
)
from segflow.evaluation.series import named_runs
from segflow.report import influence_figure

from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

N = 12
GROUPS = sf.Groups.from_lists([[0, 5, 7], [1, 2, 8], [3, 4, 6], [9, 10, 11]], N)
OTHER = sf.Groups.from_lists([[0, 5, 8], [1, 2, 7], [3, 4, 6], [9, 10, 11]], N)  # of the same labels and sizes
HALVES = sf.Groups.from_lists([[0, 5, 7, 1, 2, 8], [3, 4, 6, 9, 10, 11]], N)
SINGLE = sf.Groups.singletons(N)
MOVED = sf.Groups.from_lists([[k] for k in (1, 0, *range(2, N))], N, labels=SINGLE.labels)


# ---- the digest ----

SAME = {
    "lists": sf.Groups.from_lists([[0, 2], [1]], 3),
    "labels": sf.Groups.from_lists([[0, 2], [1]], 3, labels=["a", "b"]),
    "order within a group": sf.Groups.from_lists([[2, 0], [1]], 3),
    "small integers": sf.Groups.from_lists([np.array([0, 2], dtype=np.uint8), range(1, 2)], np.int32(3)),
    "tensors": sf.Groups.from_lists([torch.tensor([0, 2], dtype=torch.int32), torch.tensor([1])], 3),
    "by labels": sf.Groups.by(["a", "b", "a"]),
    "nothing left out": sf.Groups.from_lists([[0, 2], [1]], 3, partial=True),
}
DIFFERENT = {
    "order of groups": sf.Groups.from_lists([[1], [0, 2]], 3),
    "members": sf.Groups.from_lists([[0, 1], [2]], 3),
    "length": sf.Groups.from_lists([[0, 2], [1]], 4, partial=True),
    "an example left out": sf.Groups.from_lists([[0], [1]], 3, partial=True),
    "another left out": sf.Groups.from_lists([[2], [1]], 3, partial=True),
    "singletons": sf.Groups.singletons(3),
}


@pytest.mark.parametrize("name", SAME)
def test_the_digest_is_of_members_alone(name: str) -> None:
    assert SAME[name].digest == SAME["lists"].digest


def test_the_digest_tells_groups_of_other_members_apart() -> None:
    assert len({groups.digest for groups in (SAME["lists"], *DIFFERENT.values())}) == 1 + len(DIFFERENT)
    assert sf.Groups.random(30, 5, seed=0).digest != sf.Groups.random(30, 5, seed=1).digest


# ---- scores that segflow makes ----


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory: pytest.TempPathFactory) -> sf.Analyzer:
    folder, model = tmp_path_factory.mktemp("identity"), mlp()
    runs = [trajectory_of(folder / f"run-{seed}", perturbed_states(model, 2, 0.1 + 0.1 * seed), N) for seed in (0, 1)]
    return analyzer_of(model, runs, folder / "store", method=sf.TracIn())


def _score(analyzer: sf.Analyzer, groups: sf.Groups) -> sf.Scores:
    return analyzer.score(groups, vectors(N), vectors(2, seed=5), keep="run")


def _loaded(scores: sf.Scores, folder: Path) -> sf.Scores:
    scores.save(folder / "scores")
    return sf.Scores.load(folder / "scores")


def _influence(groups: sf.Groups | None, count: int) -> sf.Scores:
    kept = np.array([[(subset >> group) & 1 for group in range(count)] for subset in range(1, 2**count)], dtype=bool)
    return empirical_influence(kept, np.arange(2.0 * len(kept)).reshape(-1, 2), groups)


MADE: dict[str, tuple[sf.Groups, Callable[[sf.Analyzer, Path], sf.Scores]]] = {
    "score of an ensemble": (GROUPS, lambda analyzer, _: _score(analyzer, GROUPS)),
    "from a file": (GROUPS, lambda analyzer, folder: _loaded(_score(analyzer, GROUPS), folder)),
    "total": (GROUPS, lambda analyzer, _: _score(analyzer, GROUPS).total()),
    "rolled_up": (HALVES, lambda analyzer, _: _score(analyzer, GROUPS).rolled_up(GROUPS, HALVES)),
    "by_example": (SINGLE, lambda analyzer, _: _score(analyzer, GROUPS).by_example(GROUPS)),
    "a tree's coarse level": (
        HALVES,
        lambda analyzer, _: sf.GroupTree((HALVES, GROUPS)).scores(_score(analyzer, GROUPS))[0],
    ),
    "empirical influence": (GROUPS, lambda *_: _influence(GROUPS, 4)),
    "empirical influence of examples": (sf.Groups.singletons(4), lambda *_: _influence(None, 4)),
}


@pytest.mark.parametrize("name", MADE)
def test_scores_carry_the_digest_of_their_groups(analyzer: sf.Analyzer, tmp_path: Path, name: str) -> None:
    groups, make = MADE[name]
    assert make(analyzer, tmp_path).provenance["group_digest"] == groups.digest


def test_a_refinements_scores_carry_the_digest_of_its_groups(analyzer: sf.Analyzer) -> None:
    found = analyzer.refine(GROUPS, vectors(N), vectors(2, seed=5), keep=0.5, sizes=(1,))
    assert len(found.groups) > len(GROUPS)
    assert found.scores.provenance["group_digest"] == found.groups.digest != GROUPS.digest
    found.scores.check_groups(found.groups)


# ---- where scores and groups meet ----


def _train(kept: Any, seed: int) -> Any:
    raise AssertionError("something was trained before the groups were compared")


TRAINING = FunctionTraining(_train, {"recipe": "never trained"})
KEPT, MEASURED = ~np.eye(4, dtype=bool), np.arange(8.0).reshape(4, 2) ** 2
MEETINGS: dict[str, Callable[[sf.Scores, Path], Any]] = {
    "check_groups": lambda scores, _: scores.check_groups(OTHER),
    "by_example": lambda scores, _: scores.by_example(OTHER),
    "rolled_up": lambda scores, _: scores.rolled_up(OTHER, sf.Groups.from_lists([range(N)], N)),
    "GroupTree.scores": lambda scores, _: sf.GroupTree((sf.Groups.from_lists([range(N)], N), OTHER)).scores(scores),
    "a tree of one level": lambda scores, _: sf.GroupTree((OTHER,)).scores(scores),
    "leave_one_group_out": lambda scores, folder: leave_one_group_out(scores, OTHER, TRAINING, folder, repetitions=2),
    "a difference of two methods": lambda scores, _: linear_datamodeling_difference(
        scores, _influence(OTHER, 4), KEPT, MEASURED
    ),
    "a table of several series": lambda scores, _: named_runs({"a": scores, "b": _influence(OTHER, 4)}),
    "the runs of one series": lambda scores, _: named_runs({"a": [scores, _influence(OTHER, 4)]}),
}


@pytest.mark.parametrize("meeting", MEETINGS)
def test_groups_of_the_same_labels_and_sizes_with_other_members_are_refused(
    analyzer: sf.Analyzer, tmp_path: Path, meeting: str
) -> None:
    assert (GROUPS.labels, GROUPS.sizes.tolist()) == (OTHER.labels, OTHER.sizes.tolist())
    with pytest.raises(sf.ScoreError, match="hold other examples"):
        MEETINGS[meeting](_score(analyzer, GROUPS), tmp_path)


def test_the_groups_that_were_scored_are_accepted_however_they_were_given(analyzer: sf.Analyzer) -> None:
    again = sf.Groups.from_lists([torch.tensor(member.tolist()[::-1]) for member in GROUPS.members], N)
    scores = _score(analyzer, GROUPS)
    torch.testing.assert_close(scores.by_example(again).values, scores.by_example(GROUPS).values)


def test_random_groups_of_another_seed_are_refused(analyzer: sf.Analyzer) -> None:
    scores = _score(analyzer, sf.Groups.random(N, 3, seed=0))
    scores.by_example(sf.Groups.random(N, 3, seed=0))
    with pytest.raises(sf.ScoreError, match="made with another seed"):
        scores.by_example(sf.Groups.random(N, 3, seed=1))


def test_scores_made_by_hand_are_known_by_labels_and_sizes() -> None:
    by_hand = sf.Scores(torch.arange(4.0)[None], ("q",), GROUPS.labels, tuple(GROUPS.sizes))
    assert by_hand.group_digest is None
    assert by_hand.by_example(OTHER).values[0, 7] == 1 / 3


@pytest.mark.parametrize(
    "use",
    [
        lambda scores, folder: retraining_score(scores, TRAINING, folder, repetitions=2),
        lambda scores, _: influence_figure(scores, 0, np.zeros((2, 2)), np.zeros((N, 2, 2))),
    ],
    ids=["retraining_score", "influence_figure"],
)
def test_groups_of_one_example_in_another_order_do_not_count_as_the_examples(
    analyzer: sf.Analyzer, tmp_path: Path, use: Callable[[sf.Scores, Path], Any]
) -> None:
    """As labels that are sorted as text, "0", "1", "10", make them."""
    moved = analyzer.score(MOVED, vectors(N), vectors(2, seed=5), keep="term")
    with pytest.raises(sf.ScoreError, match=r"not all of the dataset in its order\. Use scores\.by_example"):
        use(moved, tmp_path)
    single = analyzer.score(SINGLE, vectors(N), vectors(2, seed=5))
    torch.testing.assert_close(moved.by_example(MOVED).values, single.values)
    assert moved.by_example(MOVED).group_digest == single.group_digest


def test_a_digest_that_is_no_text_is_refused() -> None:
    with pytest.raises(sf.ScoreError, match="group_digest=3: expected text"):
        sf.Scores(torch.ones(1, 1), ("q",), ("g",), (1,), {"group_digest": 3})


# ---- the same queries ----


def _of_queries(*labels: str) -> sf.Scores:
    return sf.Scores(torch.randn(len(labels), 3), labels, ("a", "b", "c"), (1, 1, 1))


@pytest.mark.parametrize("labels", [("b", "a", "c"), ("c", "a", "b"), ("x", "a", "c")])
def test_queries_in_another_order_are_not_paired_by_their_places(labels: tuple[str, ...]) -> None:
    first, second = _of_queries("a", "b", "c"), _of_queries(*labels)
    with pytest.raises(ScoreError, match=r"scores of 'B': query '.' is in row \d, of 'A' in row \d"):
        named_runs({"A": first, "B": second})
    kept = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=bool)
    with pytest.raises(ScoreError, match="scores of 'second': query"):
        linear_datamodeling_difference(first, second, kept, np.random.default_rng(0).normal(size=(3, 3)))


def test_queries_may_have_other_names() -> None:
    assert len(named_runs({"A": _of_queries("a", "b"), "B": [_of_queries("0", "1"), _of_queries("a", "b")]})) == 2
