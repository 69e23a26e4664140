"""Intervals of shares and correlations: against formulas written out, and how often they hold a known truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.coverage_tasks import (
    correlations_over_groups,
    counted_queries,
    means_of_retrainings,
    shares_of_queries,
)
from segflow.evaluation.intervals import (
    correlation_interval,
    counted_interval,
    over_cases_and_runs,
    share_interval,
)
from segflow.evaluation.statistics import student_interval


@pytest.mark.parametrize(("count", "share"), [(20, 0.3), (20, 0.0), (12, 1.0), (400, 0.05)])
def test_a_binomial_share_of_many_cases_has_agresti_and_coulls_interval(count: int, share: float) -> None:
    found = share_interval(share, share * (1 - share) / count, float(stats.norm.ppf(0.975)), count)
    z = stats.norm.ppf(0.975)
    centre = (count * share + z**2 / 2) / (count + z**2)
    half = z * (centre * (1 - centre) / (count + z**2)) ** 0.5
    expected = (share, max(0, centre - half), min(1, centre + half))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert 0 <= found.low <= share <= found.high <= 1


def test_a_share_whose_cases_vary_together_counts_for_fewer_cases() -> None:
    narrow, wide = (share_interval(0.3, part * 0.21 / 100, 2.0, 100) for part in (1, 4))
    few = share_interval(0.3, 0.21 / 25, 2.0, 100)
    assert wide == few
    assert wide.low < narrow.low < narrow.high < wide.high
    assert share_interval(0.3, 0.21 / 100, 2.5, 100).low < narrow.low, "a variance that is known less well"


def test_variances_of_cases_and_runs_add_up_each_with_a_quantile_of_its_own() -> None:
    by_run, of_cases, cases = np.array([0.2, 0.3, 0.5, 0.4]), 0.002, 30
    of_runs = np.var(by_run, ddof=1) / 4
    t_cases, t_runs = stats.t.ppf(0.975, [29, 3])
    t = ((of_cases * t_cases**2 + of_runs * t_runs**2) / (of_cases + of_runs)) ** 0.5
    expected = share_interval(0.35, of_cases + of_runs, t, cases)
    np.testing.assert_allclose(over_cases_and_runs(by_run, of_cases, cases), expected)
    alone = over_cases_and_runs(by_run[:1], of_cases, cases)
    np.testing.assert_allclose(alone, share_interval(0.2, of_cases, t_cases, cases))
    same = over_cases_and_runs(by_run[[0, 0, 0]], of_cases, cases)
    np.testing.assert_allclose(same, alone)
    assert over_cases_and_runs(by_run, of_cases, cases, 2).low < over_cases_and_runs(by_run, of_cases, cases).low


@pytest.mark.parametrize(
    ("by_run", "of_cases", "cases", "freedom", "given"),
    [
        ([0.5], 0.01, 8, None, True),
        ([0.5], 0.01, 7, None, False),
        ([0.5, 0.6], 0.01, 50, None, True),
        ([0.5], np.inf, 50, None, False),
        ([0.5], 0.01, 50, 0, False),
    ],
)
def test_too_few_cases_or_draws_have_no_interval(
    by_run: list[float], of_cases: float, cases: int, freedom: int | None, given: bool
) -> None:
    found = over_cases_and_runs(np.array(by_run), of_cases, cases, freedom)
    assert found.mean == pytest.approx(np.mean(by_run))
    assert np.isfinite([found.low, found.high]).all() == given


def test_counted_shares_are_students_with_half_a_step_more() -> None:
    shares = np.array([0.3, 0.4, 0.35])
    mean, low, high = student_interval(shares)
    np.testing.assert_allclose(counted_interval(shares, 20), (mean, low - 0.025, high + 0.025))
    np.testing.assert_allclose(counted_interval(np.array([0.3, 0.3, 0.3]), 10), (0.3, 0.25, 0.35))
    assert counted_interval(np.array([0.0, 0.0, 0.0]), 10) == (0, 0, 0.05)
    assert counted_interval(shares[:2], 20).low == -np.inf


@pytest.mark.parametrize("ranks", [False, True])
def test_a_correlations_interval_is_by_fishers_transformation_and_the_larger_error(ranks: bool) -> None:
    error = ((1 + 0.6**2 / 2 if ranks else 1) / 17) ** 0.5
    expected = np.tanh(np.arctanh(0.6) + 1.959964 * error * np.array([-1, 1]))
    found = correlation_interval(0.6, np.full(50, 0.6), 20, ranks)
    np.testing.assert_allclose(found, (0.6, *expected), rtol=1e-6)
    wide = correlation_interval(0.6, np.tanh(np.random.default_rng(0).normal(0.7, 0.5, 4000)), 20, ranks)
    np.testing.assert_allclose(wide[1:], np.tanh(np.arctanh(0.6) + 1.96 * 0.5 * np.array([-1, 1])), atol=0.02)


def test_perfect_ranks_of_few_groups_are_no_proof_and_three_say_nothing() -> None:
    ones = np.ones(50)
    assert correlation_interval(1.0, ones, 3, True) == (1, -1, 1)
    assert correlation_interval(1.0, ones, 5, True).low < 0.3
    assert 0.9 < correlation_interval(1.0, ones, 50, True).low < 1
    assert correlation_interval(1.0, ones, 5, False).low > 0.999, "a straight line is no accident"


# ---- how often they hold ----


@pytest.mark.parametrize("runs", [1, 5])
def test_shares_of_queries_hold_the_truth(runs: int) -> None:
    for queries, share in ((8, 0.3), (30, 0.1)):
        found = shares_of_queries(queries, share, runs, between=0.3, draws=400)
        assert found["share"] > 0.92
        assert found["none"] == 0
    assert shares_of_queries(7, 0.3, draws=20)["none"] == 1


def test_means_of_retrainings_hold_the_truth() -> None:
    for count in (3, 8):
        found = means_of_retrainings(count, draws=400)
        assert 0.92 < min(found.values()) <= max(found.values()) < 0.99


def test_counted_queries_hold_the_truth_where_students_interval_does_not() -> None:
    assert counted_queries(20, 3, 0.2, draws=300)["share"] > 0.92
    assert counted_queries(20, 2, 0.2, draws=20)["none"] == 1


def test_correlations_over_groups_hold_the_truth() -> None:
    for groups in (5, 12, 30):
        for correlation in (0.0, 0.9):
            found = correlations_over_groups(groups, correlation, draws=60)
            assert min(found.values()) > 0.88


def test_a_few_draws_of_perfect_ranks_do_not_widen_the_interval_to_nothing() -> None:
    draws = np.array([1.0] * 20 + [0.9] * 80 + [0.7] * 100)
    found = correlation_interval(0.9, draws, 10, True)
    assert found.low > 0.1, found
