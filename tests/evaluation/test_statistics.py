"""Intervals against scipy, and noise ceilings against simulation."""

from __future__ import annotations

import numpy as np
import pytest

from segflow.errors import ScoreError
from segflow.evaluation import linear_datamodeling_score, noise_ceiling
from segflow.evaluation.statistics import (
    exactly,
    quantile_interval,
    student_interval,
    unchanged_interval,
    welch_interval,
)

from .closed_form import noisy_truth, scores_of

INF = float("inf")

# ---- intervals ----

VALUES = np.random.default_rng(0).normal(3, 2, size=7)
OTHERS = np.random.default_rng(1).normal(1, 5, size=4)


def test_students_interval_is_scipys() -> None:
    from scipy import stats

    expected = stats.t.interval(0.95, 6, loc=VALUES.mean(), scale=stats.sem(VALUES))
    np.testing.assert_allclose(student_interval(VALUES), (VALUES.mean(), *expected), rtol=1e-9)
    assert student_interval([2.5]) == (2.5, -INF, INF)
    assert student_interval([2.5, 2.5]) == (2.5, 2.5, 2.5)


def test_welchs_interval_is_scipys() -> None:
    from scipy import stats

    ends = stats.ttest_ind(VALUES, OTHERS, equal_var=False).confidence_interval(0.95)
    expected = (VALUES.mean() - OTHERS.mean(), ends.low, ends.high)
    np.testing.assert_allclose(welch_interval(VALUES, OTHERS), expected, rtol=1e-9)
    first, second = VALUES.var(ddof=1) / 7, OTHERS.var(ddof=1) / 4  # Welch and Satterthwaite, written out
    degrees = (first + second) ** 2 / (first**2 / 6 + second**2 / 3)
    half = stats.t.ppf(0.975, degrees) * (first + second) ** 0.5
    np.testing.assert_allclose(expected[1:], (expected[0] - half, expected[0] + half), rtol=1e-9)
    assert welch_interval([1.0, 1.0], [0.5, 0.5]) == (0.5, 0.5, 0.5)
    assert welch_interval([1.0], OTHERS)[1:] == (-INF, INF)


def test_values_that_hardly_vary_have_a_welch_interval_and_no_warning() -> None:
    first, second = [0.1, 0.1, 0.1], [0.1, np.nextafter(0.1, 1)]
    mean, low, high = welch_interval(first, second)
    np.testing.assert_allclose((mean, low, high), 0, atol=1e-15)
    assert low <= mean <= high
    one_sided = student_interval(OTHERS)
    np.testing.assert_allclose(welch_interval(OTHERS, [2.0] * 9), np.subtract(one_sided, 2.0))


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow), 8])
def test_a_mean_that_has_not_changed_lies_within_the_interval_in_95_of_100_cases(count: int) -> None:
    generator = np.random.default_rng(count)
    first, second = generator.normal(3, 2, size=(2, 4000, count))
    changes = second.mean(1) - first.mean(1)
    held = [
        low <= change <= high for (_, low, high), change in zip(map(unchanged_interval, first), changes, strict=True)
    ]
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)
    assert unchanged_interval([1.0]) == (0, -INF, INF)


def test_quantiles_leave_out_what_is_no_number() -> None:
    draws = np.linspace(0, 1, 1001)
    np.testing.assert_allclose(quantile_interval(0.4, np.append(draws, np.nan)), (0.4, 0.025, 0.975))
    assert quantile_interval(0.4, np.full(3, np.nan)) == (0.4, -INF, INF)
    assert exactly(0.5) == (0.5, 0.5, 0.5)


# ---- the noise ceiling ----


@pytest.mark.parametrize("R", [2, 4, 5])
@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_reliability_and_ceiling_are_those_of_the_simulation(R: int, noise: float) -> None:
    values, subsets, measured = noisy_truth(M=400, R=R, noise=noise)
    found = noise_ceiling(measured)
    expected = 1 / (1 + noise**2 / R)
    assert found.reliability == pytest.approx(expected, abs=0.03)
    assert found.ceiling == pytest.approx(expected**0.5, abs=0.02)
    perfect = linear_datamodeling_score(scores_of(values), subsets, measured.mean(1))
    assert found.ceiling == pytest.approx(perfect.mean, abs=0.02)
    assert found.per_query.shape == (40,)
    assert str(found) == f"{found.ceiling:.3f} (reliability {found.reliability:.3f})"


def test_two_repetitions_have_one_split_which_scipy_confirms() -> None:
    from scipy.stats import spearmanr

    measured = noisy_truth(R=2, Q=3)[2]
    r = np.array([spearmanr(measured[:, 0, q], measured[:, 1, q]).statistic for q in range(3)])
    np.testing.assert_allclose(noise_ceiling(measured).per_query, 2 * r / (1 + r))


def test_all_splits_of_five_are_taken_once_and_an_odd_one_is_left_out() -> None:
    measured = noisy_truth(R=5)[2]
    every, few = noise_ceiling(measured, seed=0), noise_ceiling(measured, splits=3, seed=0)
    assert every.reliability == noise_ceiling(measured, seed=1).reliability  # 15 ways: nothing is drawn
    assert few.reliability != noise_ceiling(measured, splits=3, seed=1).reliability
    assert few.reliability == pytest.approx(every.reliability, abs=0.1)


def test_repetitions_without_noise_are_reliable_and_mere_noise_is_not() -> None:
    measured = noisy_truth(M=400, noise=0.0)[2]
    assert noise_ceiling(measured).ceiling == pytest.approx(1.0)
    noise = np.random.default_rng(0).normal(size=measured.shape)
    assert abs(noise_ceiling(noise).reliability) < 0.05


def test_a_query_that_does_not_vary_counts_as_unreliable() -> None:
    measured = noisy_truth(Q=2, noise=0.0)[2]
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
