"""The slope of real changes on predicted ones is that of least squares, and its interval counts subsets and queries."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import segflow as sf
from segflow.evaluation import Bank, FunctionTraining, random_subsets, read_bank, slope_of_change
from segflow.evaluation.magnitude import pooled_slope
from segflow.evaluation.rank_agreement import FEWEST_QUERIES

M, R, Q, K = 12, 3, 4, 9
GENERATOR = np.random.default_rng(0)
VALUES = GENERATOR.normal(size=(Q, K))
SUBSETS = random_subsets(M, K, 0.6, seed=0)
PREDICTED = ~SUBSETS @ VALUES.T
MEASURED = 0.4 * PREDICTED[:, None] + GENERATOR.normal(size=(M, R, Q)) + GENERATOR.normal(size=Q)


def _scores(values: Any = VALUES, **changes: Any) -> sf.Scores:
    values = torch.as_tensor(values)
    queries, groups = values.shape
    labels = tuple(f"q{q}" for q in range(queries)), tuple(map(str, range(groups)))
    return sf.Scores(values, *labels, (1,) * groups, **changes)


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean(0)


# ---- the slope ----


def test_the_slope_is_that_of_least_squares_with_a_level_for_each_query() -> None:
    levels = np.tile(np.eye(Q), (M, 1))
    design = np.column_stack([PREDICTED.reshape(-1), levels])
    expected = np.linalg.lstsq(design, MEASURED.mean(1).reshape(-1), rcond=None)[0][0]
    assert slope_of_change(_scores(), SUBSETS, MEASURED).value == pytest.approx(expected, abs=1e-12)


def test_measurements_that_are_some_times_what_is_predicted_have_that_slope_exactly() -> None:
    found = slope_of_change(_scores(), SUBSETS, 3 * PREDICTED + [5, -1, 0, 2])
    np.testing.assert_allclose([found.value, found.low, found.high], 3, rtol=1e-9)


@pytest.mark.parametrize("factor", [0.25, 1000.0])
def test_scores_times_a_factor_have_a_slope_and_an_interval_divided_by_it(factor: float) -> None:
    one, other = (slope_of_change(_scores(VALUES * by), SUBSETS, MEASURED) for by in (1, factor))
    np.testing.assert_allclose([other.value, other.low, other.high], np.divide([one.value, one.low, one.high], factor))


def test_calibrated_scores_have_slope_one_on_what_they_were_fitted_to() -> None:
    calibrated = _scores().calibrated(replace(slope_of_change(_scores(), SUBSETS, MEASURED), low=1e-3))
    assert slope_of_change(calibrated, SUBSETS, MEASURED).value == pytest.approx(1)


def test_repetitions_are_averaged_and_counted() -> None:
    found = slope_of_change(_scores(), SUBSETS, MEASURED)
    averaged = slope_of_change(_scores(), SUBSETS, MEASURED.mean(1))
    assert (found.subsets, found.repetitions, found.queries) == (M, R, Q)
    assert averaged == replace(found, repetitions=1)


def test_a_query_whose_prediction_never_varies_does_not_count() -> None:
    constant = np.vstack([VALUES, np.zeros(K)])
    measured = np.concatenate([MEASURED, GENERATOR.normal(size=(M, R, 1))], axis=2)
    assert slope_of_change(_scores(constant), SUBSETS, measured) == slope_of_change(_scores(), SUBSETS, MEASURED)


def test_a_query_that_never_moves_though_it_is_predicted_to_counts() -> None:
    still = MEASURED * [1, 1, 1, 0]
    assert slope_of_change(_scores(), SUBSETS, still).queries == Q
    others = slope_of_change(_scores(VALUES[:3]), SUBSETS, MEASURED[:, :, :3])
    assert slope_of_change(_scores(), SUBSETS, still).value < others.value


def test_the_share_left_out_counts_examples_and_not_groups() -> None:
    sizes = (10, *(1,) * (K - 1))
    found = slope_of_change(replace(_scores(), group_sizes=sizes), SUBSETS, MEASURED)
    assert found.left_out == pytest.approx(np.mean((~SUBSETS) @ sizes) / sum(sizes))


def test_subsets_may_be_lists_of_the_groups_kept() -> None:
    lists = [np.flatnonzero(kept) for kept in SUBSETS]
    assert slope_of_change(_scores(), lists, MEASURED) == slope_of_change(_scores(), SUBSETS, MEASURED)


@pytest.mark.parametrize(
    ("scores", "subsets", "measured", "message"),
    [
        (_scores(provenance={"additive": False}), SUBSETS, MEASURED, "slope_of_change: scores of None do not add up"),
        (_scores(), SUBSETS[:2], MEASURED[:2], "2 subsets: expected at least 3"),
        (_scores(), SUBSETS, MEASURED[:, :, :3], r"measurements \(12, 3\): expected \[M, 9\] and \[M, 4\]"),
        (_scores(), SUBSETS, MEASURED[None], "measurements .*: expected"),
        (_scores(), SUBSETS, MEASURED * np.nan, "measurements are not finite"),
        (_scores(0 * VALUES), SUBSETS, MEASURED, "the predicted change is the same for every subset"),
    ],
)
def test_what_has_no_slope_is_refused(scores: sf.Scores, subsets: Any, measured: Any, message: str) -> None:
    with pytest.raises(sf.ScoreError, match=message):
        slope_of_change(scores, subsets, measured)


# ---- its interval ----


def test_the_interval_is_that_of_refits_without_each_subset_in_turn() -> None:
    x, y = PREDICTED[:, :1], MEASURED[:, 0, :1]
    without = [np.arange(M) != m for m in range(M)]
    refits = np.array([np.polyfit(x[kept, 0], y[kept, 0], 1)[0] for kept in without])
    variance = (M - 1) ** 2 / M * refits.var(ddof=1)
    weights = _centred(x)[:, 0] ** 2 / (_centred(x) ** 2).sum()
    found = pooled_slope(x, y)
    half = stats.t.ppf(0.975, 1 / (weights**2).sum() - 1) * variance**0.5
    np.testing.assert_allclose([found.low, found.high], [found.mean - half, found.mean + half], rtol=1e-9)


def test_many_queries_that_share_their_errors_do_not_make_the_interval_narrower() -> None:
    one = pooled_slope(PREDICTED[:, :1], MEASURED[:, 0, :1])
    many = pooled_slope(np.tile(PREDICTED[:, :1], 30), np.tile(MEASURED[:, 0, :1], 30))
    np.testing.assert_allclose(many, one, rtol=1e-9)


def test_queries_of_other_slopes_count_from_ten_on() -> None:
    few, enough = FEWEST_QUERIES - 1, FEWEST_QUERIES
    x = np.random.default_rng(1).normal(size=(200, enough))
    slopes = np.linspace(0, 2, enough)  # which differ, without any noise
    same_queries, other_queries = (pooled_slope(x[:, :count], (slopes * x)[:, :count]) for count in (few, enough))
    error = slopes.std(ddof=1) / enough**0.5
    assert other_queries.high - other_queries.mean == pytest.approx(stats.t.ppf(0.975, enough - 1) * error, rel=0.15)
    assert same_queries.high - same_queries.mean < 0.25 * error


def test_the_queries_part_of_the_interval_is_that_of_refits_without_each_query_in_turn() -> None:
    generator, count = np.random.default_rng(3), FEWEST_QUERIES
    sizes, slopes = np.exp(0.3 * generator.normal(size=count)), generator.normal(size=count)
    x = np.array([1, -1] * 4)[:, None] * sizes  # subsets that are all alike, and no noise: queries alone differ
    found = pooled_slope(x, slopes * x)
    others = [np.arange(count) != query for query in range(count)]
    refits = np.array([np.average(slopes[kept], weights=sizes[kept] ** 2) for kept in others])
    weights = sizes**2 / (sizes**2).sum()
    variance = (count - 1) ** 2 / count * refits.var(ddof=1)
    half = stats.t.ppf(0.975, 1 / (weights**2).sum() - 1) * variance**0.5
    np.testing.assert_allclose([found.mean, found.high - found.mean], [(weights * slopes).sum(), half], rtol=1e-9)


def test_one_large_prediction_that_decides_alone_makes_the_interval_wide() -> None:
    x, noise = np.random.default_rng(2).normal(size=(2, 20, 1))
    spiked = x.copy()
    spiked[0] = 100
    even, uneven = pooled_slope(x, noise), pooled_slope(spiked, spiked[:1] * [[1.0]] * (spiked == 100) + noise)
    classical = (noise.std() / np.sqrt((_centred(spiked) ** 2).sum())) * stats.t.ppf(0.975, 18)
    assert (uneven.high - uneven.low) / 2 > 3 * classical
    assert even.low < 0 < even.high


# ---- of a bank ----


class _Measured:
    """What a retraining measures: sums over what is kept, noise, and a second row that is minus the first."""

    def __init__(self, rows: int):
        self.rows = rows

    def __call__(self, kept: np.ndarray, seed: int) -> np.ndarray:
        measured = -0.5 * VALUES[:, kept].sum(1) + np.random.default_rng(seed).normal(size=Q)
        return np.stack([measured, -measured]) if self.rows == 2 else measured


def _bank(folder: Path, rows: int = 1, **changes: Any) -> Bank:
    training = FunctionTraining(_Measured(rows), {"rows": rows}, processes=1)
    return Bank(folder, training, SUBSETS, **({"repetitions": 2} | changes))


def test_a_banks_slope_is_that_of_its_measurements(tmp_path: Path) -> None:
    bank = _bank(tmp_path)
    bank.run(progress=False)
    found = bank.slope(_scores())
    assert found == slope_of_change(_scores(), *read_bank(tmp_path))
    assert (found.subsets, found.repetitions) == (M, 2)


def test_only_the_complete_subsets_of_a_bank_count_and_nothing_is_trained(tmp_path: Path) -> None:
    _bank(tmp_path).run(progress=False, rows=[1, 4, 6, 7])
    _bank(tmp_path, repetitions=1).run(progress=False)
    files = set(tmp_path.iterdir())
    measured = _bank(tmp_path).run(progress=False, rows=[1, 4, 6, 7])
    assert _bank(tmp_path).slope(_scores()) == slope_of_change(_scores(), SUBSETS[[1, 4, 6, 7]], measured)
    assert _bank(tmp_path, repetitions=1).slope(_scores()).subsets == M
    assert set(tmp_path.iterdir()) == files


def test_a_bank_of_several_measurements_needs_one_of_them_chosen(tmp_path: Path) -> None:
    bank = _bank(tmp_path, rows=2)
    bank.run(progress=False)
    first, second = (bank.slope(_scores(), measurement) for measurement in (0, 1))
    assert second.value == pytest.approx(-first.value)
    with pytest.raises(sf.ScoreError, match="measurement=None: the training has 2 for each query"):
        bank.slope(_scores())
    with pytest.raises(sf.ScoreError, match="measurement=2: the training has 2 for each query"):
        bank.slope(_scores(), 2)


def test_a_bank_that_is_hardly_begun_says_how_many_subsets_are_complete(tmp_path: Path) -> None:
    bank = _bank(tmp_path)
    with pytest.raises(sf.ScoreError, match="0 of 12 subsets have all 2 repetitions"):
        bank.slope(_scores())
    bank.run(progress=False, rows=[0, 1])
    with pytest.raises(
        sf.ScoreError, match=r"2 of 12 subsets have all 2 repetitions, expected 3 or more\. Run the bank"
    ):
        bank.slope(_scores())


def test_a_folder_of_another_bank_is_refused(tmp_path: Path) -> None:
    _bank(tmp_path).run(progress=False)
    with pytest.raises(sf.ScoreError, match="made with something else"):
        _bank(tmp_path, seed=1).slope(_scores())


def test_a_bank_of_examples_takes_scores_of_single_examples_alone(tmp_path: Path) -> None:
    bank = _bank(tmp_path)
    bank.run(progress=False)
    object.__setattr__(bank.training, "examples", K)
    with pytest.raises(sf.ScoreError, match=re.escape("9 groups of 1 to 2 examples, expected single examples")):
        bank.slope(replace(_scores(), group_sizes=(2, *(1,) * (K - 1))))


def test_scores_are_calibrated_by_a_bank(tmp_path: Path) -> None:
    bank = _bank(tmp_path, repetitions=8)
    bank.run(progress=False)
    slope = bank.slope(_scores())
    assert 0 < slope.low < 0.5 < slope.high
    assert torch.equal(_scores().calibrated(bank).values, _scores().values * slope.value)
