"""The empirical estimator of influence, against means that are computed one by one."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import segflow as sf
from segflow.errors import ScoreError
from segflow.evaluation import empirical_influence, linear_datamodeling_score, random_subsets

from .closed_form import noisy_truth


def test_empirical_influence_is_a_difference_of_means() -> None:
    _, subsets, measured = noisy_truth()
    found = empirical_influence(torch.tensor(subsets), torch.tensor(measured))
    for q in range(measured.shape[2]):
        for k in range(subsets.shape[1]):
            without = [measured[m, r, q] for m in range(60) for r in range(5) if not subsets[m, k]]
            within = [measured[m, r, q] for m in range(60) for r in range(5) if subsets[m, k]]
            assert found.values[q, k] == pytest.approx(np.mean(without) - np.mean(within))
    np.testing.assert_allclose(empirical_influence(subsets, measured.mean(1)).values, found.values)


def test_empirical_influence_recovers_additive_influences_and_predicts_other_retrainings() -> None:
    values, subsets, measured = noisy_truth(M=4000, R=1, noise=0.3)
    found = empirical_influence(subsets, measured)
    # subsets of a fixed size: leaving one out keeps another, so only differences from the mean show
    centred = values - values.mean(1, keepdims=True)
    assert np.corrcoef(found.values.numpy().ravel(), centred.ravel())[0, 1] > 0.98
    others = random_subsets(60, 20, seed=99)
    assert linear_datamodeling_score(found, others, (~others) @ values.T).mean > 0.98


def test_empirical_influence_carries_labels_sizes_and_provenance() -> None:
    _, subsets, measured = noisy_truth(K=3)
    groups = sf.Groups.from_lists([[0, 1], [2], [3, 4, 5]], 6, labels=["a", "b", "c"])
    found = empirical_influence(subsets, measured, groups)
    assert found.group_labels == ("a", "b", "c")
    assert found.group_sizes == (2, 1, 3)
    assert found.provenance["method"] == "EmpiricalInfluence"
    assert (found.provenance["subsets"], found.provenance["repetitions"]) == (60, 5)
    assert found.provenance["kept_share"] == pytest.approx(2 / 3)


def test_empirical_influence_refuses_what_it_cannot_tell() -> None:
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
    with pytest.raises(ScoreError, match="3 groups for subsets of 20"):
        empirical_influence(subsets, measured, sf.Groups.singletons(3))
    with pytest.raises(ScoreError, match="not finite"):
        empirical_influence(random_subsets(60, 20), np.full((60, 2), np.nan))
