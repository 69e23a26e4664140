"""Scores move between groups: shared out to single examples, and rolled up to coarser groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import segflow as sf

from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

FINE = sf.Groups.from_lists([[0, 5], [1], [2, 3, 6], [4]], 7, labels="abcd")
COARSE = sf.Groups.from_lists([[0, 1, 5], [2, 3, 4, 6]], 7, labels=["first", "second"])


def _scores(groups: sf.Groups = FINE, dtype: torch.dtype = torch.float64, **provenance: Any) -> sf.Scores:
    """Two queries, with every kind of part; values are the mean of the two runs."""
    parts = torch.randn(2, 2, len(groups), generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    return sf.Scores(
        parts.mean(0),
        ("p", "q"),
        groups.labels,
        tuple(groups.sizes),
        {"method": "Source", **provenance},
        by_term={"term": parts[0], "other term": parts.mean(0) - parts[0]},
        by_layer={"layer": parts[1], "other layer": parts.mean(0) - parts[1]},
        by_run={"run 1": parts[0], "run 2": parts[1]},
        spread=parts.std(0),
    )


def _every_part(scores: sf.Scores) -> dict[str, torch.Tensor]:
    return {
        "values": scores.values,
        "term": scores.by_term["term"],
        "layer": scores.by_layer["layer"],
        **scores.by_run,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_example_gets_its_groups_score_over_the_groups_size_in_every_part(dtype: torch.dtype) -> None:
    scores = _scores(dtype=dtype)
    single = scores.by_example(FINE)
    assert single.group_labels == tuple("0123456")
    assert single.group_sizes == (1,) * 7
    found = _every_part(single) | {"spread": single.spread}
    for name, part in (_every_part(scores) | {"spread": scores.spread}).items():
        assert found[name].dtype == dtype
        for group, members in enumerate(FINE.members):
            for example in members:
                assert found[name][:, example].equal(part[:, group] / len(members)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finer_groups_add_up_to_the_coarser_ones_in_every_part(dtype: torch.dtype) -> None:
    scores = _scores(dtype=dtype)
    coarse = scores.rolled_up(FINE, COARSE)
    assert (coarse.group_labels, coarse.group_sizes) == (("first", "second"), (3, 4))
    for name, part in _every_part(scores).items():
        expected = torch.stack([part[:, 0] + part[:, 1], part[:, 2] + part[:, 3]], 1)
        torch.testing.assert_close(_every_part(coarse)[name], expected)
    torch.testing.assert_close(coarse.spread, torch.stack(list(coarse.by_run.values())).std(0))
    assert not torch.allclose(coarse.spread[:, 1], scores.spread[:, 2] + scores.spread[:, 3])
    assert replace(scores, by_run={}).rolled_up(FINE, COARSE).spread is None


def test_sharing_out_and_rolling_up_undo_each_other() -> None:
    scores = _scores()
    again = scores.by_example(FINE).rolled_up(sf.Groups.singletons(7), FINE)
    torch.testing.assert_close(again.values, scores.values)
    assert again.group_labels == scores.group_labels


def test_rolled_up_scores_of_single_examples_are_the_scores_of_the_groups(tmp_path: Path) -> None:
    model, train, query = mlp(), vectors(12), vectors(3, seed=5)
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 2), 12)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store")
    analyzer.fit(train)
    groups, single = sf.Groups.random(12, 5), sf.Groups.singletons(12)
    expected = analyzer.score(groups, train, query).values
    torch.testing.assert_close(analyzer.score(single, train, query).rolled_up(single, groups).values, expected)


def test_what_was_done_is_said_and_survives_a_file(tmp_path: Path) -> None:
    for scores in (_scores().by_example(FINE), _scores().rolled_up(FINE, COARSE)):
        assert "4 groups" in scores.provenance.values()
        scores.save(tmp_path / "scores")
        assert sf.Scores.load(tmp_path / "scores").values.equal(scores.values)


@pytest.mark.parametrize(
    "groups",
    [COARSE, sf.Groups.from_lists(FINE.members, 7), sf.Groups.from_lists([[0], [1, 5], [2, 3, 6], [4]], 7, "abcd")],
    ids=["other groups", "other labels", "other sizes"],
)
def test_groups_that_were_not_scored_are_refused(groups: sf.Groups) -> None:
    with pytest.raises(sf.ScoreError, match=r"by_example: groups: .*Give the groups that were scored"):
        _scores().by_example(groups)
    with pytest.raises(sf.ScoreError, match=r"rolled_up: fine: .*Give the groups that were scored"):
        _scores().rolled_up(groups, COARSE)


def test_examples_without_a_group_have_no_score() -> None:
    part = sf.Groups.from_lists([[0, 1], [4]], 6, partial=True)
    with pytest.raises(sf.ScoreError, match="leave out 3 of 6 examples, the first is 2"):
        _scores(part).by_example(part)


@pytest.mark.parametrize(
    ("coarse", "message"),
    [
        (sf.Groups.from_lists([[0, 1], [2, 3, 4, 5, 6]], 7, ["x", "y"]), r"group 'a' .*are in \['x', 'y'\]"),
        (sf.Groups.from_lists([[0, 1, 5]], 7, ["x"], partial=True), r"group 'c' .*are in \['none'\]"),
        (sf.Groups.from_lists([[0, 1, 5, 2, 3, 6, 4, 7]], 8), "about 7 examples, the coarser ones about 8"),
    ],
)
def test_groups_that_are_not_nested_are_refused_by_name(coarse: sf.Groups, message: str) -> None:
    with pytest.raises(sf.GroupError, match=f"rolled_up: .*{message}"):
        _scores().rolled_up(FINE, coarse)


def test_a_coarser_group_that_holds_unscored_examples_is_refused() -> None:
    fine = sf.Groups.from_lists([[0, 5], [2]], 7, ["a", "b"], partial=True)
    with pytest.raises(sf.GroupError, match=r"4 examples of the coarser groups .*the first is 1 \(in 'first'\)"):
        _scores(fine).rolled_up(fine, COARSE)
    covered = sf.Groups.from_lists([[0, 2, 5]], 7, partial=True)
    torch.testing.assert_close(_scores(fine).rolled_up(fine, covered).values, _scores(fine).values.sum(1, keepdim=True))


def test_scores_that_do_not_add_up_are_neither_rolled_up_nor_shared_out() -> None:
    scores = _scores(method="Mine", additive=False)
    with pytest.raises(sf.ScoreError, match="rolled_up: scores of Mine do not add up"):
        scores.rolled_up(FINE, COARSE)
    with pytest.raises(sf.ScoreError, match="by_example: scores of Mine do not add up"):
        scores.by_example(FINE)
    singles = sf.Groups.singletons(7)
    alone = sf.Scores(torch.ones(2, 7), ("a", "b"), singles.labels, (1,) * 7, {"method": "Mine", "additive": False})
    assert torch.equal(alone.by_example(singles).values, alone.values)
    with pytest.raises(sf.ScoreError, match="do not add up"):
        alone.rolled_up(singles, FINE)


@dataclass(frozen=True)
class MyCosine:
    """A method of one's own whose plan tells that its scores do not add up."""

    def plan(self, trajectory: sf.Trajectory, stage: int = -1) -> Any:
        return sf.GradientCosine().plan(trajectory, stage)


@dataclass(frozen=True)
class MyLargest:
    """A method of one's own that says so itself; its plan would add up."""

    additive: ClassVar[bool] = False

    def plan(self, trajectory: sf.Trajectory, stage: int = -1) -> Any:
        return sf.GradientDot().plan(trajectory, stage)


@pytest.mark.parametrize(
    "method", [sf.GradientCosine(), MyCosine(), MyLargest()], ids=lambda method: type(method).__name__
)
def test_methods_that_are_not_additive_are_refused_by_name(tmp_path: Path, method: Any) -> None:
    model, train, query, name = mlp(), vectors(12), vectors(3, seed=5), type(method).__name__
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 2), 12)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", method=method)
    groups, single = sf.Groups.random(12, 5), sf.Groups.singletons(12)
    scores = analyzer.score(single, train, query)
    scores.save(tmp_path / "scores")
    for read in (scores, sf.Scores.load(tmp_path / "scores")):
        assert read.provenance["additive"] is False
        with pytest.raises(sf.ScoreError, match=f"rolled_up: scores of {name} do not add up"):
            read.rolled_up(single, groups)
        with pytest.raises(sf.ScoreError, match=f"scores of {name} do not add up"):
            sf.GroupTree((groups, single)).scores(read)
    with pytest.raises(sf.ScoreError, match=f"refine: scores of {name} do not add up"):
        analyzer.refine(groups, train, query)


def test_float32_sums_are_rounded_once() -> None:
    """Added one by one in float32, the small ones would be lost."""
    single = sf.Groups.singletons(1001)
    values = torch.full((1, 1001), 2.0**-25)
    values[0, 0] = 1.0
    scores = sf.Scores(values, ("q",), single.labels, (1,) * 1001)
    whole = scores.rolled_up(single, sf.Groups.from_lists([np.arange(1001)], 1001)).values
    assert whole.dtype == torch.float32
    assert whole.item() == np.float32(1 + 1000 * 2.0**-25)
