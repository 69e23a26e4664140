"""Refinement: from coarse groups to the single examples that matter, with the scores that scoring all would give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.runtime.ranks import current

from ..support.gang import Failed, Gang
from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

N = 64
PLANTED = (5, 23, 40)


@pytest.fixture(scope="module")
def query() -> TensorDataset:
    """Three examples much alike, of one class."""
    x, _ = vectors(3, seed=5).tensors
    return TensorDataset(x[:1] + 0.2 * x, torch.tensor([1, 1, 1]))


@pytest.fixture(scope="module")
def train(query: TensorDataset) -> TensorDataset:
    """Three examples are the queries with a wrong label, ten times over in the loss."""
    x, labels = (tensor.clone() for tensor in vectors(N).tensors)
    x[list(PLANTED)], labels[list(PLANTED)] = query.tensors[0], 2
    weights = torch.ones(N, dtype=torch.float64)
    weights[list(PLANTED)] = 10.0
    return TensorDataset(x, labels, weights)


class Weighted(sf.tasks.Classification):
    """A loss in which examples may count several times."""

    def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (losses * batch[2]).sum()


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory: pytest.TempPathFactory) -> sf.Analyzer:
    """With a store that the tests of this file share."""
    folder, model = tmp_path_factory.mktemp("refined"), mlp()
    run = trajectory_of(folder / "run", perturbed_states(model, 2), N)
    return analyzer_of(model, run, folder / "store", Weighted(), method=sf.TracIn())


def _totals(analyzer: sf.Analyzer, train: Any, query: Any) -> torch.Tensor:
    return analyzer.score(sf.Groups.singletons(N), train, query).values.sum(0)


GROUPS = sf.Groups.random(N, 8, seed=1)


def test_planted_harmful_examples_are_found_with_the_scores_of_singletons_by_walking_few_more(
    analyzer: sf.Analyzer, train: TensorDataset, query: TensorDataset
) -> None:
    total_N = _totals(analyzer, train, query)
    refined = analyzer.refine(GROUPS, train, query, keep=0.4, sizes=(3, 1))
    assert {one.group for one in refined.found[:3]} == set(PLANTED)
    assert all(one.score < 0 for one in refined.found[:3]), "without them the queries' losses would fall"
    for one in refined.found:
        assert one.score == pytest.approx(total_N[one.group].item(), rel=1e-9, abs=1e-12)
        place = refined.groups.labels.index(one.label)
        assert refined.groups.members[place].tolist() == [one.group]
    assert refined.levels[0] == (None, 8, N)
    assert [level.size for level in refined.levels] == [None, 3, 1]
    assert refined.examples_walked == sum(level.examples for level in refined.levels) < 2 * N
    assert "single examples found" in repr(refined)


@pytest.mark.parametrize("features", [False, True])
def test_parts_are_a_partition_whose_scores_add_up_to_the_coarse_ones(
    analyzer: sf.Analyzer, train: TensorDataset, query: TensorDataset, features: bool
) -> None:
    coarse = analyzer.score(GROUPS, train, query)
    of = analyzer.features(train, "representation") if features else None
    refined = analyzer.refine(GROUPS, train, query, keep=0.5, sizes=(4, 2, 1), features=of)
    assert sorted(np.concatenate(refined.groups.members).tolist()) == list(range(N))
    rolled = refined.scores.rolled_up(refined.groups, GROUPS)
    torch.testing.assert_close(rolled.values, coarse.values, rtol=1e-9, atol=1e-13)
    exact = analyzer.score(refined.groups, train, query)
    torch.testing.assert_close(refined.scores.values, exact.values, rtol=1e-9, atol=1e-13)
    assert refined.scores.group_sizes == exact.group_sizes


def test_everything_is_kept_down_to_the_singletons(
    analyzer: sf.Analyzer, train: TensorDataset, query: TensorDataset
) -> None:
    refined = analyzer.refine(GROUPS, train, query, keep=1.0, sizes=(1,))
    assert len(refined.groups) == len(refined.found) == N
    assert refined.examples_walked == 2 * N
    total_N = _totals(analyzer, train, query)
    assert [one.group for one in refined.found] == torch.argsort(total_N.abs(), descending=True).tolist()


def test_one_sign_alone_can_be_followed(analyzer: sf.Analyzer, train: TensorDataset, query: TensorDataset) -> None:
    total_N = _totals(analyzer, train, query)
    coarse = analyzer.score(GROUPS, train, query).values.sum(0)
    for largest, sign in ((True, 1), (False, -1)):
        refined = analyzer.refine(GROUPS, train, query, keep=1.0, sizes=(1,), largest=largest)
        followed = {k for k in range(8) if sign * coarse[k] > 0}
        assert {one.group for one in refined.found} == {int(i) for k in followed for i in GROUPS.members[k]}
        assert [sign * one.score for one in refined.found] == sorted(sign * one.score for one in refined.found)[::-1]
        assert refined.found[0].score == pytest.approx(
            max(sign * total_N[one.group].item() for one in refined.found) * sign, rel=1e-9
        )


@pytest.mark.parametrize(
    "options",
    [{"keep": 0.6}, {"sizes": (2, 1)}, {"sizes": (4, 2)}, {"largest": True}, {"seed": 1}, {"features": "input"}],
    ids=str,
)
def test_every_option_changes_what_is_found(
    analyzer: sf.Analyzer, train: TensorDataset, query: TensorDataset, options: dict[str, Any]
) -> None:
    if "features" in options:
        options = {"features": analyzer.features(train, options["features"])}
    usual: dict[str, Any] = {"keep": 0.3, "sizes": (4, 1)}
    own = analyzer.refine(GROUPS, train, query, **usual)
    other = analyzer.refine(GROUPS, train, query, **{**usual, **options})
    again = analyzer.refine(GROUPS, train, query, **usual, batch_size=5)
    assert own.groups.membership().tolist() == again.groups.membership().tolist()
    assert own.groups.membership().tolist() != other.groups.membership().tolist()


def test_groups_that_are_small_already_wait_for_their_size(
    analyzer: sf.Analyzer, train: TensorDataset, query: TensorDataset
) -> None:
    groups = sf.Groups.from_lists([PLANTED, [i for i in range(N) if i not in PLANTED]], N)
    refined = analyzer.refine(groups, train, query, keep=1.0, sizes=(16, 1))
    assert {one.group for one in refined.found} >= set(PLANTED)
    one_step = analyzer.refine(groups, train, query, keep=1.0, sizes=(16,))
    assert one_step.groups.labels[0] == "group 0", "three examples are not split into parts of sixteen"


def test_groups_that_are_called_like_parts_are_refined(
    analyzer: sf.Analyzer, train: TensorDataset, query: TensorDataset
) -> None:
    groups = sf.Groups.by(["a"] * 40 + ["a/0"] * 20 + ["a/0/1"] * 4)
    refined = analyzer.refine(groups, train, query, keep=1.0, sizes=(8, 1))
    assert {one.group for one in refined.found} >= set(PLANTED)
    exact = analyzer.score(refined.groups, train, query)
    assert refined.scores.group_labels == exact.group_labels
    torch.testing.assert_close(refined.scores.values, exact.values, rtol=1e-9, atol=1e-12)


def test_partial_groups_stay_partial(analyzer: sf.Analyzer, train: TensorDataset, query: TensorDataset) -> None:
    groups = sf.Groups.from_lists([range(10), range(20, 30)], N, partial=True)
    refined = analyzer.refine(groups, train, query, keep=0.5, sizes=(1,))
    assert refined.groups.partial
    assert sorted(np.concatenate(refined.groups.members).tolist()) == [*range(10), *range(20, 30)]
    assert len(refined.found) == 10


def test_an_ensembles_spread_is_that_of_each_group_as_it_was_scored(
    tmp_path: Path, train: TensorDataset, query: TensorDataset
) -> None:
    model = mlp()
    states = perturbed_states(model, 4)
    runs = [trajectory_of(tmp_path / f"run-{k}", states[2 * k : 2 * k + 2], N) for k in range(2)]
    analyzer = analyzer_of(model, runs, tmp_path / "store", Weighted(), method=sf.TracIn())  # type: ignore[arg-type]
    refined = analyzer.refine(GROUPS, train, query, keep=0.3, sizes=(1,))
    exact = analyzer.score(refined.groups, train, query)
    assert refined.scores.spread is not None
    torch.testing.assert_close(refined.scores.spread, exact.spread, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep=0\.0"),
        ({"keep": 1.5}, r"keep=1\.5"),
        ({"keep": "a"}, "keep='a': expected a finite number, above 0 and at most 1"),
        ({"largest": "x"}, "largest='x': expected True or False. None takes either"),
        ({"sizes": 1}, "sizes=1: expected a sequence of whole numbers"),
        ({"sizes": ()}, r"sizes=\(\)"),
        ({"sizes": (1, 4)}, r"sizes=\(1, 4\)"),
        ({"sizes": (4, 4)}, r"sizes=\(4, 4\)"),
        ({"sizes": (2.5, 1)}, r"sizes\[0\]=2.5: expected a whole number"),
        ({"sizes": (4, 0)}, "at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"features": np.ones((3, 2))}, "3 rows of features for 64 examples"),
    ],
)
def test_options_that_make_no_sense_are_named(
    analyzer: sf.Analyzer, train: TensorDataset, query: TensorDataset, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(sf.SegflowError, match=message):
        analyzer.refine(GROUPS, train, query, **options)


def test_methods_whose_scores_do_not_add_up_are_refused_before_anything_is_scored(
    tmp_path: Path, train: TensorDataset, query: TensorDataset
) -> None:
    model = mlp()
    run = trajectory_of(tmp_path / "run", perturbed_states(model, 2), N)
    analyzer = analyzer_of(model, run, tmp_path / "store", Weighted(), method=sf.GradientCosine())
    with pytest.raises(sf.ScoreError, match="GradientCosine do not add up"):
        analyzer.refine(GROUPS, train, query)


def _on_ranks(folder: str, with_features: bool) -> list[Any]:
    root, model = Path(folder), mlp()
    run = trajectory_of(root / f"run-{current().index}", perturbed_states(model, 2), N)
    analyzer = analyzer_of(model, run, root / "store", method=sf.TracIn(), task=sf.tasks.Classification())
    data = vectors(N)
    features = analyzer.features(data) if with_features else None
    refined = analyzer.refine(GROUPS, data, vectors(3, seed=5), keep=0.4, sizes=(3, 1), features=features)
    return [refined.groups.membership().tolist(), [one.group for one in refined.found], refined.scores.values.tolist()]


@pytest.mark.parametrize("with_features", [False, True])
def test_every_rank_finds_what_one_process_finds(gang: Gang, tmp_path: Path, with_features: bool) -> None:
    alone = _on_ranks(str(tmp_path / "alone"), with_features)
    for found in gang.run(2, _on_ranks, str(tmp_path), with_features):
        assert not isinstance(found, Failed), found.trace
        assert found[:2] == alone[:2]
        torch.testing.assert_close(torch.tensor(found[2]), torch.tensor(alone[2]), rtol=1e-10, atol=1e-13)
