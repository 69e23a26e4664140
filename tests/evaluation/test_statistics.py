"""Intervals against scipy."""

from __future__ import annotations

import numpy as np
import pytest

from segflow.evaluation.statistics import (
    exactly,
    quantile_interval,
    student_interval,
    unchanged_interval,
    welch_interval,
)

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
