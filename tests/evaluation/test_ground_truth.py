"""Noise ceilings, the empirical estimator and paired comparisons: against simulation and naive loops."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import segflow as sf
from segflow.errors import ScoreError
from segflow.evaluation import (
    empirical_influence,
    linear_datamodeling_difference,
    linear_datamodeling_score,
    noise_ceiling,
    random_subsets,
)


def _scores(values: np.ndarray) -> sf.Scores:
    Q, K = values.shape
    return sf.Scores(torch.tensor(values), tuple(map(str, range(Q))), tuple(map(str, range(K))), (1,) * K)


def _truth(M: int = 60, R: int = 5, Q: int = 40, K: int = 20, noise: float = 1.0, seed: int = 0):
    """values [Q, K], subsets [M, K], measured [M, R, Q]; the signal's variance is 1."""
    generator = np.random.default_rng(seed)
    values, subsets = generator.normal(size=(Q, K)), random_subsets(M, K, seed=seed)
    signal = (~subsets) @ values.T
    values, signal = values / signal.std(0)[:, None], signal / signal.std(0)
    return values, subsets, signal[:, None] + noise * generator.normal(size=(M, R, Q))


# ---- the noise ceiling ----


@pytest.mark.parametrize("R", [2, 4, 5])
@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_reliability_and_ceiling_are_those_of_the_simulation(R: int, noise: float) -> None:
    values, subsets, measured = _truth(M=400, R=R, noise=noise)
    found = noise_ceiling(measured)
    expected = 1 / (1 + noise**2 / R)
    assert found.reliability == pytest.approx(expected, abs=0.03)
    assert found.ceiling == pytest.approx(expected**0.5, abs=0.02)
    perfect = linear_datamodeling_score(_scores(values), subsets, measured.mean(1))
    assert found.ceiling == pytest.approx(perfect.mean, abs=0.02)
    assert found.per_query.shape == (40,)
    assert str(found) == f"{found.ceiling:.3f} (reliability {found.reliability:.3f})"


def test_two_repetitions_have_one_split_which_scipy_confirms() -> None:
    from scipy.stats import spearmanr

    measured = _truth(R=2, Q=3)[2]
    r = np.array([spearmanr(measured[:, 0, q], measured[:, 1, q]).statistic for q in range(3)])
    np.testing.assert_allclose(noise_ceiling(measured).per_query, 2 * r / (1 + r))


def test_all_splits_of_five_are_taken_once_and_an_odd_one_is_left_out() -> None:
    measured = _truth(R=5)[2]
    every, few = noise_ceiling(measured, seed=0), noise_ceiling(measured, splits=3, seed=0)
    assert every.reliability == noise_ceiling(measured, seed=1).reliability  # 15 ways: nothing is drawn
    assert few.reliability != noise_ceiling(measured, splits=3, seed=1).reliability
    assert few.reliability == pytest.approx(every.reliability, abs=0.1)


def test_repetitions_without_noise_are_reliable_and_mere_noise_is_not() -> None:
    measured = _truth(M=400, noise=0.0)[2]
    assert noise_ceiling(measured).ceiling == pytest.approx(1.0)
    noise = np.random.default_rng(0).normal(size=measured.shape)
    assert abs(noise_ceiling(noise).reliability) < 0.05


def test_a_query_that_does_not_vary_counts_as_unreliable() -> None:
    measured = _truth(Q=2, noise=0.0)[2]
    measured[:, :, 1] = 3.0
    np.testing.assert_allclose(noise_ceiling(measured).per_query, [1.0, 0.0], atol=1e-12)


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (np.zeros((4, 3)), r"Do not average"),
        (np.zeros((4, 1, 3)), r"2 repetitions"),
        (np.zeros((2, 4, 3)), r"3 subsets"),
        (np.full((4, 4, 3), np.nan), r"not finite"),
    ],
)
def test_what_has_no_reliability_is_refused(measured: np.ndarray, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        noise_ceiling(measured)


# ---- the empirical estimator ----


def test_empirical_influence_is_a_difference_of_means() -> None:
    _, subsets, measured = _truth()
    found = empirical_influence(torch.tensor(subsets), torch.tensor(measured))
    for q in range(measured.shape[2]):
        for k in range(subsets.shape[1]):
            without = [measured[m, r, q] for m in range(60) for r in range(5) if not subsets[m, k]]
            within = [measured[m, r, q] for m in range(60) for r in range(5) if subsets[m, k]]
            assert found.values[q, k] == pytest.approx(np.mean(without) - np.mean(within))
    np.testing.assert_allclose(empirical_influence(subsets, measured.mean(1)).values, found.values)


def test_empirical_influence_recovers_additive_influences_and_predicts_other_retrainings() -> None:
    values, subsets, measured = _truth(M=4000, R=1, noise=0.3)
    found = empirical_influence(subsets, measured)
    # subsets of a fixed size: leaving one out keeps another, so only differences from the mean show
    centred = values - values.mean(1, keepdims=True)
    assert np.corrcoef(found.values.numpy().ravel(), centred.ravel())[0, 1] > 0.98
    others = random_subsets(60, 20, seed=99)
    assert linear_datamodeling_score(found, others, (~others) @ values.T).mean > 0.98


def test_empirical_influence_carries_labels_sizes_and_provenance() -> None:
    _, subsets, measured = _truth(K=3)
    groups = sf.Groups.from_lists([[0, 1], [2], [3, 4, 5]], 6, labels=["a", "b", "c"])
    found = empirical_influence(subsets, measured, groups)
    assert found.group_labels == ("a", "b", "c")
    assert found.group_sizes == (2, 1, 3)
    assert found.provenance["method"] == "EmpiricalInfluence"
    assert (found.provenance["subsets"], found.provenance["repetitions"]) == (60, 5)
    assert found.provenance["kept_share"] == pytest.approx(2 / 3)


def test_empirical_influence_refuses_what_it_cannot_tell() -> None:
    _, subsets, measured = _truth(M=4)
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


# ---- paired comparison ----


def _two_methods():
    values, subsets, measured = _truth(noise=2.0)
    noise = np.random.default_rng(5).normal(size=(2, *values.shape))
    good = values + 0.3 * noise[0] * values.std()
    worse = good + 0.4 * noise[1] * values.std()  # methods err alike
    return _scores(good), _scores(worse), subsets, measured.mean(1)


def test_the_difference_is_that_of_the_two_scores_query_by_query() -> None:
    good, worse, subsets, measured = _two_methods()
    found = linear_datamodeling_difference(good, worse, subsets, measured)
    one, other = (linear_datamodeling_score(s, subsets, measured) for s in (good, worse))
    np.testing.assert_allclose(found.per_query, one.per_query - other.per_query)
    assert found.mean == pytest.approx(one.mean - other.mean)
    assert 0 < found.low < found.mean < found.high
    assert str(found) == f"+{found.mean:.3f} [+{found.low:.3f}, +{found.high:.3f}]"


def test_pairing_makes_the_interval_narrower_than_the_methods_own() -> None:
    good, worse, subsets, measured = _two_methods()
    found = linear_datamodeling_difference(good, worse, subsets, measured)
    alone = linear_datamodeling_score(good, subsets, measured)
    assert found.high - found.low < 0.7 * (alone.high - alone.low)


def test_swapping_the_methods_changes_the_sign_and_nothing_else() -> None:
    good, worse, subsets, measured = _two_methods()
    found = linear_datamodeling_difference(good, worse, subsets, measured)
    swapped = linear_datamodeling_difference(worse, good, subsets, measured)
    np.testing.assert_allclose([swapped.mean, swapped.low, swapped.high], [-found.mean, -found.high, -found.low])
    same = linear_datamodeling_difference(good, good, subsets, measured)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_each_option_of_the_interval_counts() -> None:
    arguments = _two_methods()
    plain = linear_datamodeling_difference(*arguments)
    wide = linear_datamodeling_difference(*arguments, confidence=0.99)
    assert wide.high - wide.low > plain.high - plain.low
    assert linear_datamodeling_difference(*arguments, seed=1).low != plain.low
    assert linear_datamodeling_difference(*arguments, resamples=20).low != plain.low
    with pytest.raises(ScoreError, match="confidence=2"):
        linear_datamodeling_difference(*arguments, confidence=2)


def test_both_methods_must_fit_the_retrainings() -> None:
    good, _, subsets, measured = _two_methods()
    fewer = _scores(good.values[:-1].numpy())
    with pytest.raises(ScoreError, match=r"expected .* for these scores"):
        linear_datamodeling_difference(good, fewer, subsets, measured)
