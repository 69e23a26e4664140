"""Noise ceilings: against an analysis of variance, exact expectations, and simulations whose truth is known."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import f_oneway, rankdata, spearmanr

from segflow.data.streams import stream
from segflow.errors import ScoreError
from segflow.evaluation import linear_datamodeling_score, noise_ceiling
from segflow.evaluation.noise import (
    FEWEST_SUBSETS,
    _chance,
    _corrected,
    _estimates,
    _noise_to_signal,
    _pseudo_values,
    _share_of_ranks,
    _theory,
    _variance,
    perfect_score,
)
from segflow.evaluation.statistics import spearman

from .closed_form import noisy_truth, scores_of

MEASURED = noisy_truth(M=12, R=3, Q=4)[2]


def _world(M: int, R: int, Q: int, signal: float, draw: int, common: float = 0.0) -> np.ndarray:
    """Normal measurements; `signal` is the part of their variance that is between subsets."""
    generator = stream(draw, "noise ceiling test", M, R, Q)

    def normal(repetitions: int) -> np.ndarray:
        shared, own = generator.normal(size=(M, repetitions, 1)), generator.normal(size=(M, repetitions, Q))
        return common**0.5 * shared + (1 - common) ** 0.5 * own

    return signal**0.5 * normal(1) + (1 - signal) ** 0.5 * normal(R)


def _reliability(values: np.ndarray) -> float:
    """That of `noise_ceiling`, without its interval."""
    return float(_corrected(_estimates(values).mean(), *values.shape[:2]))


# ---- the estimate ----


@pytest.mark.parametrize("R", [2, 4, 5])
@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_a_perfect_predictor_scores_what_the_ceiling_says(R: int, noise: float) -> None:
    values, subsets, measured = noisy_truth(M=400, R=R, noise=noise)
    found = noise_ceiling(measured)
    assert found.reliability == pytest.approx(1 / (1 + noise**2 / R), abs=0.02)
    perfect = linear_datamodeling_score(scores_of(values), subsets, measured.mean(1))
    assert found.ceiling == pytest.approx(perfect.mean, abs=0.015)


@pytest.mark.parametrize("M", [5, 10, 40])
@pytest.mark.parametrize("signal", [0.1, 0.5, 0.9])
def test_few_subsets_lower_a_perfect_score_as_spearmans_expectation_says(M: int, signal: float) -> None:
    generator = stream(0, "perfect scores", M)
    truth = generator.normal(size=(M, 800))
    seen = signal**0.5 * truth + (1 - signal) ** 0.5 * generator.normal(size=(M, 800))
    scores = [spearmanr(truth[:, q], seen[:, q]).statistic for q in range(800)]
    assert np.mean(scores) == pytest.approx(float(perfect_score(signal, M)), abs=4 * np.std(scores) / 800**0.5)


@pytest.mark.parametrize("common", [0.0, 0.5])
@pytest.mark.parametrize(("M", "R"), [(3, 2), (3, 5), (5, 3), (10, 2), (40, 5)])
def test_the_reliability_of_mere_noise_is_zero_on_average(M: int, R: int, common: float) -> None:
    found = [_reliability(_world(M, R, 20, 0.0, draw, common)) for draw in range(60)]
    assert abs(np.mean(found)) < 3.5 * np.std(found) / 60**0.5
    assert np.std(found) < 1


@pytest.mark.parametrize(("M", "R"), [(5, 3), (8, 2), (10, 5)])
def test_the_reliability_of_a_single_query_of_mere_noise_is_zero_on_average(M: int, R: int) -> None:
    found = _corrected(_estimates(_world(M, R, 4000, 0.0, 0)), M, R)
    assert abs(found.mean()) < 3.5 * found.std() / 4000**0.5


@pytest.mark.parametrize("signal", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("M", "R"), [(5, 2), (10, 5), (40, 3)])
def test_the_reliability_is_that_of_the_simulation(M: int, R: int, signal: float) -> None:
    found = [_reliability(_world(M, R, 50, signal, draw)) for draw in range(20)]
    expected = R * signal / (1 + (R - 1) * signal)
    assert np.mean(found) == pytest.approx(expected, abs=3.5 * np.std(found) / 20**0.5 + 0.008)


@pytest.mark.parametrize("M", [3, 4, 6, 10])
@pytest.mark.parametrize("R", [2, 3, 7])
def test_no_data_make_the_reliability_infinite(M: int, R: int) -> None:
    opposed = np.tile(np.arange(float(R)), (M, 1))[:, :, None]  # subsets do not differ at all, repetitions do
    worst = noise_ceiling(opposed)
    assert -20 * R < worst.reliability < 0
    assert worst.ceiling == 0
    for draw in range(40):
        found = noise_ceiling(_world(M, R, 1, 0.0, draw))
        assert worst.reliability <= found.reliability <= 1
        assert 0 <= found.ceiling <= 1


def test_the_estimate_is_of_the_f_ratio_of_the_ranks() -> None:
    values, theory = _world(12, 3, 30, 0.5, 0), _theory(12, 3)
    ranks = rankdata(values.reshape(36, 30), axis=0).reshape(values.shape)
    F = np.array([f_oneway(*ranks[:, :, q]).statistic for q in range(30)])
    share = np.interp(11 * F / (11 * F + 24), theory.ranks_G, theory.values_G)  # as of numbers that are no ranks
    assert (F > 1).all()
    np.testing.assert_allclose(_estimates(values), 1 - theory.factor * (1 - share) / share)


def test_below_chance_the_curve_goes_on_as_its_tangent() -> None:
    chance = _chance(12, 3)
    assert chance == pytest.approx(11 / 35)
    low, at, high = _noise_to_signal(chance + np.array([-1e-6, 0.0, 1e-6]), 12, 3)
    assert at == pytest.approx((1 - chance) / chance)
    assert (high - at) / 1e-6 == pytest.approx((at - low) / 1e-6, rel=1e-4) == pytest.approx(-1 / chance**2, rel=1e-4)
    assert _noise_to_signal(np.array(0.0), 12, 3) == pytest.approx(at + 1 / chance)


def test_the_mean_share_of_ranks_is_exact_without_signal_and_that_of_simulation_with_it() -> None:
    ranks = np.array(list(permutations(range(6))), dtype=float).reshape(-1, 3, 2) - 2.5  # all orders of 3 by 2
    shares = 2 * (ranks.mean(2) ** 2).sum(1) / (ranks**2).sum((1, 2))
    assert shares.mean() == pytest.approx(_chance(3, 2)) == pytest.approx(float(_share_of_ranks(np.array(0.0), 3, 2)))
    assert shares.max() == pytest.approx(float(_share_of_ranks(np.array(1.0), 3, 2)))
    values = _world(5, 3, 4000, 0.6, 0)
    ranks = rankdata(values.reshape(15, -1), axis=0).reshape(values.shape) - 8
    shares = 3 * (ranks.mean(1) ** 2).sum(0) / (ranks**2).sum((0, 1))
    assert shares.mean() == pytest.approx(float(_share_of_ranks(np.array(0.6), 5, 3)), abs=0.006)


def test_repetitions_without_noise_are_wholly_reliable() -> None:
    found = noise_ceiling(np.repeat(MEASURED[:, :1], 3, axis=1))
    assert (found.reliability, found.ceiling, found.high) == pytest.approx((1, 1, 1))
    assert 0.9 < found.low < 1, "a few repetitions may be alike by chance"


def test_an_interval_has_a_width_where_repetitions_are_alike_by_chance_or_differ_more_than_subsets() -> None:
    generator = np.random.default_rng(2)
    flipped = (np.arange(8) % 2)[:, None] ^ (generator.random((8, 2)) < 0.05)
    noise = np.random.default_rng(14).normal(size=(20, 3, 10)) - np.arange(3)[None, :, None] * 0.0
    opposed = noise - noise.mean(1, keepdims=True)  # the averages of subsets are all alike
    for measured in (flipped.astype(float)[:, :, None], opposed):
        found = noise_ceiling(measured)
        assert found.low < found.high, found


def test_each_querys_unit_and_offset_do_not_matter() -> None:
    found = noise_ceiling(MEASURED)
    other = noise_ceiling(MEASURED * np.array([1e-6, 1.0, 3.0, 1e6]) + np.array([0.0, 5.0, -2.0, 1e3]))
    np.testing.assert_allclose(other.per_query, found.per_query)
    assert (other.ceiling, other.low, other.high) == pytest.approx((found.ceiling, found.low, found.high))


# ---- several queries ----


def test_queries_are_pooled_before_the_root() -> None:
    noise = [_world(20, 2, 30, 0.0, draw) for draw in range(20)]
    found = [noise_ceiling(values) for values in noise]
    one_by_one = [perfect_score(ceiling.per_query, 20).mean() for ceiling in found]
    assert [ceiling.ceiling for ceiling in found] == [perfect_score(ceiling.reliability, 20) for ceiling in found]
    assert np.mean([ceiling.ceiling for ceiling in found]) < 0.6 * np.mean(one_by_one)


def test_per_query_is_what_each_query_gives_alone_also_below_zero() -> None:
    noise = _world(10, 3, 6, 0.0, 1)
    found = noise_ceiling(noise).per_query
    alone = [noise_ceiling(noise[:, :, [q]]).reliability for q in range(6)]
    np.testing.assert_allclose(found, alone)
    assert found.min() < 0


def test_a_query_that_never_varies_is_left_out_and_counted() -> None:
    measured = MEASURED.copy()
    measured[:, :, 1] = 3.3
    found, without = noise_ceiling(measured), noise_ceiling(np.delete(MEASURED, 1, axis=2))
    assert (found.left_out, without.left_out) == (1, 0)
    assert np.isnan(found.per_query).tolist() == [False, True, False, False]
    assert (found.reliability, found.low, found.high) == (without.reliability, without.low, without.high)


# ---- the interval ----


@pytest.mark.parametrize(("R", "Q"), [(2, 1), (4, 30)])
def test_the_interval_of_mere_noise_begins_at_zero(R: int, Q: int) -> None:
    lows = [noise_ceiling(_world(16, R, Q, 0.0, draw)).low for draw in range(25)]
    assert np.mean(np.array(lows) == 0) >= 0.9


@pytest.mark.parametrize(
    ("M", "R", "Q", "signal", "common"), [(8, 2, 5, 0.5, 0.5), (10, 3, 20, 0.9, 0.3), (12, 2, 1, 0.5, 0.0)]
)
def test_the_interval_holds_the_truth_as_often_as_it_says(M: int, R: int, Q: int, signal: float, common: float) -> None:
    truth = float(perfect_score(R * signal / (1 + (R - 1) * signal), M))
    for confidence, fewest, most in ((0.8, 0.7, 0.95), (0.95, 0.88, 1.0)):
        found = [noise_ceiling(_world(M, R, Q, signal, draw, common), confidence=confidence) for draw in range(60)]
        assert fewest <= np.mean([c.low <= truth <= c.high for c in found]) <= most


def test_few_subsets_have_no_interval_and_it_says_so() -> None:
    few, enough = (noise_ceiling(_world(M, 3, 4, 0.5, 0)) for M in (FEWEST_SUBSETS - 1, FEWEST_SUBSETS))
    assert (few.low, few.high) == (-np.inf, np.inf)
    assert str(few) == f"{few.ceiling:.3f} (no interval below 8 subsets), reliability {few.reliability:.3f}"
    assert 0 <= enough.low < enough.ceiling < enough.high <= 1
    assert str(enough) == (
        f"{enough.ceiling:.3f} [{enough.low:.3f}, {enough.high:.3f}], reliability {enough.reliability:.3f}"
    )


def test_more_confidence_is_a_wider_interval() -> None:
    narrow, wide = noise_ceiling(MEASURED, confidence=0.5), noise_ceiling(MEASURED, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert (narrow.confidence, wide.confidence) == (0.5, 0.99)


def test_what_subsets_and_queries_vary_together_counts_once() -> None:
    generator = stream(0, "two ways")
    found, means = [], []
    for _ in range(300):
        rows, columns, both = (generator.normal(size=size) for size in ((12, 1), (1, 30), (12, 30)))
        values = 0.5 * rows + 0.7 * columns + 3 * both
        found.append(_variance(values))
        means.append(values.mean())
    assert np.mean(found) == pytest.approx(np.var(means), rel=0.25)  # the exact one is .062
    assert np.mean(found) == pytest.approx(0.25 / 12 + 0.49 / 30 + 9 / 360, rel=0.08)


def test_blocks_of_subsets_are_left_out_once_each() -> None:
    values = _world(85, 2, 3, 0.5, 0)
    pseudo = _pseudo_values(values)
    assert pseudo.shape == (40, 3)
    without = _estimates(np.delete(values, [7, 47], axis=0))
    np.testing.assert_allclose(pseudo[7], 40 * _estimates(values) - 39 * without)


# ---- refusals ----


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (np.zeros((4, 3)), r"Do not average"),
        (np.zeros((4, 1, 3)), r"2 repetitions"),
        (np.zeros((2, 4, 3)), r"3 subsets"),
        (np.full((4, 4, 3), np.nan), r"not finite"),
        (np.full((4, 4, 3), 0.1), r"each of the 3 queries has one measurement"),
    ],
)
def test_what_has_no_reliability_is_refused(measured: np.ndarray, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        noise_ceiling(measured)


def test_skewed_measurements_are_overrated_by_as_much_as_the_docstring_says() -> None:
    """A known fault: no formula for normal numbers tells it from signal."""
    generator, above = np.random.default_rng(0), []
    for _ in range(5):
        signal, noise = np.exp(generator.normal(size=(50, 1, 20))), np.exp(generator.normal(size=(50, 4, 20)))
        reached = spearman(signal[:, 0], (signal + noise).mean(1)).mean()
        above.append(noise_ceiling(signal + noise).ceiling - reached)
    assert 0.1 < np.mean(above) < 0.2
