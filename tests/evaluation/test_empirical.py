"""The empirical estimator of influence, in worlds where effects add up and are known."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import segflow as sf
from segflow.errors import ScoreError
from segflow.evaluation import (
    FunctionTraining,
    empirical_influence,
    leave_one_group_out,
    linear_datamodeling_score,
    random_subsets,
)

from .closed_form import noisy_truth

K = 20
EFFECTS = np.random.default_rng(0).normal(1.0, 0.2, (1, K))  # removal of any group raises the measurement
WHOLE = 30 - EFFECTS.sum(1)


def _measured(kept: np.ndarray, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    return 30 - kept @ EFFECTS.T + noise * np.random.default_rng(seed).normal(size=(len(kept), 1))


# ---- what it estimates ----


@pytest.mark.parametrize("count", [4 * K, K])
@pytest.mark.parametrize("design", ["fixed", "coin flips", "mixed"])
def test_effects_of_every_design_are_unbiased_and_have_the_right_sign(count: int, design: str) -> None:
    estimates = []
    for seed in range(60):
        kept = random_subsets(count, K, seed=seed, fixed=design == "fixed")
        if design == "mixed":
            kept = np.concatenate([random_subsets(count // 2, K, share, seed=seed) for share in (0.3, 0.7)])
        whole = WHOLE if design == "fixed" else None
        estimates.append(empirical_influence(kept, _measured(kept, 0.3, seed), whole=whole).values[0].numpy())
    error = np.std(estimates, axis=0) / 60**0.5
    assert (np.abs(np.mean(estimates, axis=0) - EFFECTS[0]) < 4 * error).all()
    assert error.max() < 0.08
    assert (np.mean(estimates, axis=0) > 0).sum() == K


@pytest.mark.parametrize("fixed", [True, False])
def test_twice_as_many_subsets_as_groups_give_the_effects_exactly_where_there_is_no_noise(fixed: bool) -> None:
    kept = random_subsets(2 * K, K, seed=1, fixed=fixed)
    np.testing.assert_allclose(empirical_influence(kept, _measured(kept), whole=WHOLE).values, EFFECTS)
    found = empirical_influence(kept[:-1], _measured(kept)[:-1], whole=WHOLE)
    assert np.abs(found.values.numpy() - EFFECTS).max() > 0.01, "by means, which other groups' effects make noisy"
    assert found.provenance["estimator"].startswith("mean without - mean with")


def test_subsets_of_one_size_alone_are_refused_or_give_the_effects_less_their_mean() -> None:
    for count in (K, 4 * K):
        kept = random_subsets(count, K, seed=1)
        with pytest.raises(ScoreError, match=r"every subset keeps 10 of 20 groups.*whole=.*fixed=False.*centred=True"):
            empirical_influence(kept, _measured(kept))
    found = empirical_influence(kept, _measured(kept), centred=True)
    np.testing.assert_allclose(found.values, EFFECTS - EFFECTS.mean())
    assert found.provenance["centred"]
    assert "mean_effect_from" not in found.provenance
    both = empirical_influence(kept, _measured(kept), whole=WHOLE, centred=True)
    np.testing.assert_allclose(both.values, found.values)


def test_centred_effects_do_not_add_up_to_those_of_larger_groups() -> None:
    kept = random_subsets(4 * K, K, seed=1)
    fine, coarse = sf.Groups.singletons(K), sf.Groups.random(K, 5)
    with pytest.raises(ScoreError, match="rolled_up"):
        empirical_influence(kept, _measured(kept), fine, centred=True).rolled_up(fine, coarse)
    found = empirical_influence(kept, _measured(kept), fine, whole=WHOLE).rolled_up(fine, coarse)
    np.testing.assert_allclose(found.values[0], [EFFECTS[0, members].sum() for members in coarse.members])


def test_by_means_all_pairs_of_three_are_exact() -> None:
    kept = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=bool)
    effects = np.array([[1.0], [2.0], [4.0]])
    found = empirical_influence(kept, 5 - kept @ effects, whole=5 - effects.sum(0))
    np.testing.assert_allclose(found.values, effects.T)


def test_by_means_it_is_the_downsampling_estimator_with_the_others_allowed_for() -> None:
    kept = random_subsets(K, K, seed=3)
    measured = _measured(kept, noise=0.5)
    plain = np.array([measured[~kept[:, k]].mean() - measured[kept[:, k]].mean() for k in range(K)])
    found = empirical_influence(kept, measured, centred=True).values[0].numpy()
    np.testing.assert_allclose(found, (plain - plain.mean()) * (K - 1) / K)


@pytest.mark.parametrize(("noise", "regression_is_better"), [(0.3, True), (3.0, False)])
def test_the_variance_of_means_is_below_that_of_regression_where_noise_is_large(
    noise: float, regression_is_better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At twice as many subsets as groups, where the estimator changes; noise in units of the signal's spread."""
    spread = float(np.sqrt(EFFECTS.var() * K / 4))
    errors = {}
    for name, least in (("regression", 1.0), ("means", 9.0)):
        monkeypatch.setattr("segflow.evaluation.empirical._REGRESSION_FROM", least)
        kept = [random_subsets(2 * K, K, seed=seed) for seed in range(40)]
        found = [empirical_influence(k, _measured(k, noise * spread, n), centred=True) for n, k in enumerate(kept)]
        errors[name] = np.mean([(scores.values.numpy() - EFFECTS + EFFECTS.mean()) ** 2 for scores in found])
    assert (errors["regression"] < errors["means"]) == regression_is_better


@pytest.mark.parametrize("count", [K, 4 * K])
@pytest.mark.parametrize("fixed", [True, False])
def test_the_error_of_the_mean_effect_is_its_spread_over_draws(count: int, fixed: bool) -> None:
    means, errors = [], []
    for seed in range(80):
        kept = random_subsets(count, K, seed=seed, fixed=fixed)
        whole = WHOLE + 0.5 * np.random.default_rng([seed, 9]).normal(size=(1, 1)) if fixed else None
        found = empirical_influence(kept, _measured(kept, 0.5, seed), whole=whole)
        means.append(found.values.mean())
        errors.append(found.provenance["mean_effect_error"][0])  # type: ignore[index]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.35)
    known = {True: "retrainings on everything", False: "the sizes of the subsets"}
    assert found.provenance["mean_effect_from"] == known[fixed]


def test_whole_counts_by_its_repetitions() -> None:
    kept = random_subsets(3 * K, K, seed=1, fixed=False)
    measured, wrong = _measured(kept), WHOLE + 5.0
    once, often = (
        empirical_influence(kept, measured, whole=np.tile(wrong, (repetitions, 1))) for repetitions in (1, 50)
    )
    shift = [float((scores.values - torch.from_numpy(EFFECTS)).abs().mean()) for scores in (once, often)]
    assert 0 < 2 * shift[0] < shift[1]
    assert once.provenance["mean_effect_from"] == "the sizes of the subsets and retrainings on everything"


def test_its_predictions_are_the_changes_that_leaving_groups_out_gives(tmp_path: Path) -> None:
    effects = np.linspace(0.5, 1.5, 12)

    def loss(kept: np.ndarray, seed: int) -> list[float]:
        return [20 - effects[kept].sum() + 0.01 * np.random.default_rng(seed).normal()]

    kept = random_subsets(400, 12, 0.75, seed=1)
    measured = np.stack([loss(np.flatnonzero(row), seed) for seed, row in enumerate(kept)])
    found = empirical_influence(kept, measured, whole=loss(np.arange(12), 999))
    training = FunctionTraining(loss, {"effects": 1}, processes=1)
    groups = sf.Groups.singletons(12)
    rows = leave_one_group_out(found, groups, training, tmp_path, repetitions=2, progress=False).rows
    np.testing.assert_allclose([row.x for row in rows], [row.mean for row in rows], atol=0.06)
    centred = {"centred": empirical_influence(kept, measured, centred=True), "whole": found}
    table = leave_one_group_out(centred, groups, training, tmp_path, repetitions=2, progress=False)
    notes: dict[str, str] = table.settings["notes"]
    assert ["less their mean" in notes[name] for name in ("centred", "whole")] == [True, False]


def test_it_predicts_other_retrainings() -> None:
    values, subsets, measured = noisy_truth(M=4000, R=1, noise=0.3)
    found = empirical_influence(subsets, measured, centred=True)
    others = random_subsets(60, 20, seed=99)
    assert linear_datamodeling_score(found, others, (~others) @ values.T).mean > 0.98


# ---- what it is about, and refusals ----


def test_tensors_lists_and_repetitions_are_taken_alike() -> None:
    _, subsets, measured = noisy_truth()
    found = empirical_influence(torch.tensor(subsets), torch.tensor(measured), centred=True)
    lists = [np.flatnonzero(row).tolist() for row in subsets]
    np.testing.assert_allclose(empirical_influence(lists, measured.mean(1), centred=True).values, found.values)
    assert (found.provenance["subsets"], found.provenance["repetitions"]) == (60, 5)


def test_it_carries_labels_sizes_and_provenance() -> None:
    _, subsets, measured = noisy_truth(K=3)
    groups = sf.Groups.from_lists([[0, 1], [2], [3, 4, 5]], 6, labels=["a", "b", "c"])
    found = empirical_influence(subsets, measured, groups, centred=True)
    assert found.group_labels == ("a", "b", "c")
    assert found.group_sizes == (2, 1, 3)
    assert found.provenance["method"] == "EmpiricalInfluence"
    assert found.provenance["kept_share"] == pytest.approx(2 / 3)


def test_an_error_of_the_mean_effect_that_cannot_be_known_is_none() -> None:
    found = empirical_influence(np.array([[True], [False]]), np.array([[1.0], [2.0]]))
    assert found.provenance["mean_effect_error"] is None


def test_groups_that_are_always_kept_together_are_told_apart_or_refused() -> None:
    kept = random_subsets(200, 5, seed=0, fixed=False)
    kept[:, 4] = kept[:, 3]
    with pytest.raises(ScoreError, match="effects of 5 groups cannot be told apart by these 200 subsets"):
        empirical_influence(kept, np.zeros((200, 1)))


@pytest.mark.parametrize("other", [False, True])
def test_few_subsets_that_keep_two_groups_alike_are_refused(other: bool) -> None:
    kept = random_subsets(12, K, seed=0, fixed=False)
    kept[:, 4] = kept[:, 3] ^ other
    with pytest.raises(ScoreError, match="effects of 20 groups cannot be told apart by these 12 subsets"):
        empirical_influence(kept, _measured(kept))
    if other:  # everything keeps both
        empirical_influence(kept, _measured(kept), whole=WHOLE)
    pair = np.array([[True, False], [False, True]])
    np.testing.assert_allclose(empirical_influence(pair, [[1.0], [3.0]], centred=True).values, [[1.0, -1.0]])


def test_what_it_cannot_tell_is_refused() -> None:
    _, subsets, measured = noisy_truth(M=4)
    for group, (value, how) in enumerate([(True, "every"), (False, "no")]):
        fixed = subsets.copy()
        fixed[:, group] = value
        fixed[:, group + 1 :] = np.arange(4)[:, None] % 2
        fixed[:, :group] = np.arange(4)[:, None] % 2
        with pytest.raises(ScoreError, match=rf"group {group} is in {how} one of the 4 subsets, as 1 groups"):
            empirical_influence(fixed, measured)
    with pytest.raises(ScoreError, match=re.escape("measured (3, 5, 40)")):
        empirical_influence(subsets, measured[:3])
    with pytest.raises(ScoreError, match="booleans"):
        empirical_influence(subsets + 1, measured)
    with pytest.raises(ScoreError, match="expected 3 columns"):
        empirical_influence(subsets, measured, sf.Groups.singletons(3))
    with pytest.raises(ScoreError, match="not finite"):
        empirical_influence(random_subsets(60, 20), np.full((60, 2), np.nan))
    kept = np.arange(20)[:, None] % 2 == np.arange(20) % 2
    measured = np.zeros((20, 40))
    for whole, shape in ((np.zeros(3), "(1, 3)"), (np.zeros((2, 2, 40)), "(2, 2, 40)"), (np.zeros((0, 40)), "(0, 40)")):
        with pytest.raises(ScoreError, match=re.escape(f"whole {shape}: expected [Q] or [R, Q] of the 40 queries")):
            empirical_influence(kept, measured, whole=whole)
    with pytest.raises(ScoreError, match="centred=1: expected True or False"):
        empirical_influence(kept, measured, centred=1)  # type: ignore[arg-type]
