"""Linear datamodeling scores, their differences and their curve: against scipy and a training in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf
from segflow.errors import ScoreError
from segflow.evaluation import (
    Table,
    linear_datamodeling_curve,
    linear_datamodeling_difference,
    linear_datamodeling_score,
    noise_ceiling,
    random_subsets,
    read_bank,
)
from segflow.evaluation.noise import perfect_score

from .closed_form import EFFECTS, TRUE, Linear, N, Q, noisy_truth, scores_of

# ---- the score ----


def _case(M: int = 30, K: int = 12, Q: int = 4, noise: float = 1.0, ties: bool = False):
    generator = np.random.default_rng(0)
    values = generator.normal(size=(Q, K))
    if ties:
        values = np.round(values)
    subsets = random_subsets(M, K, seed=1)
    measured = (~subsets) @ values.T + noise * generator.normal(size=(M, Q))
    return values, subsets, np.round(measured) if ties else measured


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_scipys_spearman(ties: bool) -> None:
    from scipy.stats import spearmanr

    values, subsets, measured = _case(ties=ties)
    found = linear_datamodeling_score(scores_of(values), subsets, measured)
    predicted = (~subsets) @ values.T
    expected = [spearmanr(predicted[:, q], measured[:, q]).statistic for q in range(4)]
    np.testing.assert_allclose(found.per_query, expected, rtol=1e-12)
    assert found.mean == pytest.approx(np.mean(expected))
    assert not ties or len(np.unique(measured[:, 0])) < len(measured)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_perfect_predictor_of_the_change_on_removal_has_score_one(sign: int) -> None:
    values, subsets, _ = _case()
    measured = 5.0 - subsets @ values.T  # what is kept lowers the measurement by its score: removal raises it
    found = linear_datamodeling_score(scores_of(sign * values), subsets, measured)
    np.testing.assert_allclose([found.mean, found.low, found.high], sign, rtol=1e-12)
    assert str(found) == ("1.000 [1.000, 1.000]" if sign > 0 else "-1.000 [-1.000, -1.000]")


def test_only_the_ranks_of_the_predictions_count() -> None:
    values, subsets, measured = _case()
    plain = linear_datamodeling_score(scores_of(values), subsets, measured)
    scaled = linear_datamodeling_score(scores_of(1e-6 * values), subsets, np.exp(measured))
    np.testing.assert_allclose(scaled.per_query, plain.per_query)
    assert linear_datamodeling_score(scores_of(values), subsets, measured[:, ::-1]).mean != plain.mean


def test_tensors_and_whole_numbers_are_taken_as_arrays_are() -> None:
    values, subsets, measured = _case()
    plain = linear_datamodeling_score(scores_of(values), subsets, measured)
    for kept in (torch.from_numpy(subsets), subsets.astype(int), subsets.astype(float)):
        other = linear_datamodeling_score(scores_of(values), kept, torch.from_numpy(measured))
        assert (other.mean, other.low, other.high) == (plain.mean, plain.low, plain.high)


def test_the_interval_contains_the_mean_and_shrinks_with_more_subsets() -> None:
    widths = []
    for M in (15, 60, 240):
        values, subsets, measured = _case(M, Q=1)
        found = linear_datamodeling_score(scores_of(values), subsets, measured)
        assert -1 <= found.low < found.mean < found.high <= 1
        widths.append(found.high - found.low)
    assert widths[0] > 1.4 * widths[1] > 1.4**2 * widths[2]


def test_confidence_resamples_and_seed_change_the_interval_and_not_the_mean() -> None:
    values, subsets, measured = _case()

    def score(**options: Any) -> sf.evaluation.LinearDatamodelingScore:
        return linear_datamodeling_score(scores_of(values), subsets, measured, **options)

    plain = score()
    assert (plain.confidence, score().low, score().high) == (0.95, plain.low, plain.high)
    narrow = score(confidence=0.5)
    assert plain.low < narrow.low < narrow.high < plain.high
    assert (narrow.confidence, narrow.mean) == (0.5, plain.mean)
    for options in ({"resamples": 50}, {"seed": 1}):
        other = score(**options)
        assert other.mean == plain.mean
        assert (other.low, other.high) != (plain.low, plain.high)


def test_few_subsets_of_one_query_still_have_an_interval() -> None:
    """Some draws repeat one subset; they have no ranks and must not spoil the others."""
    found = linear_datamodeling_score(scores_of([[1.0, 2.0, 4.0]]), 1 - np.eye(3), np.array([[1.0], [2.0], [1.5]]))
    assert found.mean == pytest.approx(0.5)
    assert -1 <= found.low <= 0.5 <= found.high <= 1


VALUES, SUBSETS, MEASURED = _case(6, 4, 2)
NAN = np.where(np.arange(12).reshape(6, 2) == 5, np.nan, MEASURED)
LDS_FAULTS: dict[str, tuple[tuple[Any, Any, Any], dict[str, Any], str]] = {
    "columns": (
        (VALUES, SUBSETS[:, :3], MEASURED),
        {},
        r"masks of \[3\], expected 4 columns",
    ),
    "rows": ((VALUES, SUBSETS, MEASURED[:5]), {}, r"measurements \(5, 2\): expected \[M, 4\] and \[M, 2\]"),
    "repetitions": ((VALUES, SUBSETS, MEASURED[:, None]), {}, r"measurements \(6, 1, 2\)"),
    "few": ((VALUES, SUBSETS[:2], MEASURED[:2]), {}, "2 subsets: expected at least 3 to rank"),
    "nan": ((VALUES, SUBSETS, NAN), {}, r"not finite\. Look for a retraining that diverged"),
    "infinite": ((VALUES * np.inf, SUBSETS, MEASURED), {}, "not finite"),
    "numbers": ((VALUES, 3.0 * SUBSETS, MEASURED), {}, r"other numbers than 0 and 1.*Expected \[M, K\] booleans"),
    "flat scores": (
        (VALUES * [[1], [0]], SUBSETS, MEASURED),
        {},
        "query 1: the predicted change is the same for every",
    ),
    "flat measurements": ((VALUES, SUBSETS, MEASURED * [0, 1]), {}, "query 0: the measurement is the same for every"),
    "same subsets": ((VALUES, SUBSETS[[0] * 6], MEASURED), {}, "the predicted change is the same for every subset"),
    "confidence": (
        (VALUES, SUBSETS, MEASURED),
        {"confidence": 95},
        "confidence=95: expected a finite number, above 0 and",
    ),
    "resamples": ((VALUES, SUBSETS, MEASURED), {"resamples": 0}, "resamples=0: expected"),
}


@pytest.mark.parametrize("fault", LDS_FAULTS)
def test_what_cannot_be_ranked_is_refused(fault: str) -> None:
    (values, subsets, measured), options, text = LDS_FAULTS[fault]
    with np.errstate(invalid="ignore"), pytest.raises(sf.ScoreError, match=text):
        linear_datamodeling_score(scores_of(values), subsets, measured, **options)


# ---- the difference of two scores ----


def _two_methods():
    values, subsets, measured = noisy_truth(noise=2.0)
    noise = np.random.default_rng(5).normal(size=(2, *values.shape))
    good = values + 0.3 * noise[0] * values.std()
    worse = good + 0.4 * noise[1] * values.std()  # methods err alike
    return scores_of(good), scores_of(worse), subsets, measured.mean(1)


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
    fewer = scores_of(good.values[:-1].numpy())
    with pytest.raises(ScoreError, match=r"expected .* for these scores"):
        linear_datamodeling_difference(good, fewer, subsets, measured)


# ---- the curve ----


def _curve(folder: Path, scores: Any = TRUE, noise: float = 1.0, **options: Any) -> Table:
    plain: dict[str, Any] = {"ratios": (0.25, 0.5), "subsets": 12, "resamples": 30, "progress": False}
    return linear_datamodeling_curve(scores, Linear(noise=noise), folder, **(plain | options))


def _bank_of(folder: Path, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    (found,) = [bank for bank in map(read_bank, folder.glob("bank-*")) if bank[0][0].sum() == round(ratio * N)]
    return found


def test_each_ratios_score_is_that_of_its_own_bank(tmp_path: Path) -> None:
    noisy = scores_of(EFFECTS + np.random.default_rng(1).normal(size=EFFECTS.shape))
    table = _curve(tmp_path, {"true": TRUE, "noisy": noisy})
    assert table.series == ("true", "noisy", "random", "noise ceiling")
    for ratio in (0.25, 0.5):
        subsets, measured = _bank_of(tmp_path, ratio)
        assert measured.shape == (12, 3, Q)
        for name, scores in (("true", TRUE), ("noisy", noisy)):
            expected = linear_datamodeling_score(scores, subsets, measured.mean(1))
            row = table.value(name, ratio)
            np.testing.assert_allclose(row.values, expected.per_query)
            assert row.mean == pytest.approx(expected.mean)
            assert row.low < row.mean < row.high
        ceiling = noise_ceiling(measured)
        row = table.value("noise ceiling", ratio)
        assert row.mean == pytest.approx(ceiling.ceiling)
        np.testing.assert_allclose(row.values, perfect_score(ceiling.per_query, 12))
        assert (row.low, row.high) == pytest.approx((ceiling.low, ceiling.high))
        assert row.low <= row.mean <= row.high
        assert abs(table.value("random", ratio).mean) < 0.35


def test_an_oracle_reaches_one_where_there_is_no_noise(tmp_path: Path) -> None:
    table = _curve(tmp_path, noise=0.0, repetitions=2)
    for ratio in (0.25, 0.5):
        assert table.value("Oracle", ratio).mean == pytest.approx(1)
        assert table.value("noise ceiling", ratio).mean == pytest.approx(1)


def test_the_interval_is_that_of_the_score_on_the_same_draws(tmp_path: Path) -> None:
    table = _curve(tmp_path, ratios=(0.5,), resamples=40, seed=3)
    kept = random_subsets(12, N, 0.5, seed=3)
    subsets, measured = _bank_of(tmp_path, 0.5)
    rows = [int(np.flatnonzero((subsets == row).all(1))[0]) for row in kept]
    expected = linear_datamodeling_score(TRUE, kept, measured[rows].mean(1), resamples=40, seed=3)
    row = table.value("Oracle", 0.5)
    np.testing.assert_allclose((row.low, row.high), (expected.low, expected.high))


def test_runs_scores_are_averaged_and_not_their_predictions(tmp_path: Path) -> None:
    runs = [TRUE, scores_of(np.random.default_rng(2).normal(size=EFFECTS.shape))]
    table = _curve(tmp_path, {"runs": runs, "first": runs[0], "second": runs[1]})
    alone = [np.array(table.value(name, 0.5).values) for name in ("first", "second")]
    np.testing.assert_allclose(table.value("runs", 0.5).values, np.mean(alone, axis=0))


def test_one_repetition_has_no_noise_ceiling(tmp_path: Path) -> None:
    assert _curve(tmp_path, repetitions=1).series == ("Oracle", "random")


def test_each_option_of_the_curve_changes_the_result(tmp_path: Path) -> None:
    plain = _curve(tmp_path / "plain")
    assert _curve(tmp_path / "plain") == plain
    for name, options in enumerate(({"subsets": 9}, {"seed": 1}, {"repetitions": 2})):
        assert _curve(tmp_path / str(name), **options).value("Oracle", 0.5).mean != plain.value("Oracle", 0.5).mean
    wider = _curve(tmp_path / "plain", resamples=31)
    assert wider.value("Oracle", 0.5).mean == plain.value("Oracle", 0.5).mean
    assert wider.value("Oracle", 0.5).low != plain.value("Oracle", 0.5).low


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": ()}, "expected a ratio"),
        ({"subsets": 2}, "subsets=2: expected a whole number, at least 3"),
        ({"resamples": 0}, "resamples=0"),
        ({"ratios": (0.5, 0.51)}, "no two of them as many"),
        ({"ratios": (0.5, np.nan)}, "finite"),
        ({"ratios": 0.5}, "ratios=0.5: expected a sequence"),
        ({"subsets": 3.5}, "subsets=3.5"),
        ({"scores": {np.int64(64): TRUE}}, "Name series by a str"),
        ({"ratios": (0.5, 1.0)}, r"keep \[10, 20\] of 20"),
        ({"ratios": (1.0,)}, r"keep \[20\] of 20"),
        ({"scores": {"noise ceiling": TRUE}}, "'noise ceiling'"),
        ({"scores": TRUE.total()}, r"expected \[M, 20\] and \[M, 1\]"),
    ],
)
def test_a_curve_that_makes_no_sense_is_refused(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(sf.ScoreError, match=message):
        _curve(tmp_path, **options)
    assert not list(tmp_path.iterdir()) or "scores" in options, "nothing was trained"
