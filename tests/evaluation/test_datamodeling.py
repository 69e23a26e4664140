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
    assert found.mean == pytest.approx(sign, rel=1e-12)
    assert sorted([found.low, found.high]) == pytest.approx(sorted([sign, 0.999 * sign]), abs=1e-3)
    assert 0 < found.high - found.low < 1e-3, "even agreement without fault is not known without error"
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


def test_confidence_changes_the_interval_and_not_the_mean() -> None:
    values, subsets, measured = _case()
    plain, narrow = (
        linear_datamodeling_score(scores_of(values), subsets, measured, **options)
        for options in ({}, {"confidence": 0.5})
    )
    assert plain.low < narrow.low < narrow.high < plain.high
    assert (plain.confidence, narrow.confidence, narrow.mean) == (0.95, 0.5, plain.mean)


@pytest.mark.parametrize("M", [3, 4, 9])
def test_few_subsets_have_no_interval_and_say_so(M: int) -> None:
    values, subsets, measured = _case(M)
    found = linear_datamodeling_score(scores_of(values), subsets, measured)
    assert (found.low, found.high, found.subsets) == (-np.inf, np.inf, M)
    assert str(found) == f"{found.mean:.3f} (no interval from {M} subsets)"
    difference = linear_datamodeling_difference(scores_of(values), scores_of(values[::-1].copy()), subsets, measured)
    assert str(difference) == f"{difference.mean:+.3f} (no interval from {M} subsets)"
    values, subsets, measured = _case(10)
    enough = linear_datamodeling_score(scores_of(values), subsets, measured)
    assert -1 < enough.low < enough.mean < enough.high < 1


def test_subsets_may_be_given_as_lists_of_indices() -> None:
    values, subsets, measured = _case()
    by_index = [np.flatnonzero(row).tolist() for row in subsets]
    found = linear_datamodeling_score(scores_of(values), by_index, measured)
    assert found.mean == linear_datamodeling_score(scores_of(values), subsets, measured).mean


# ---- ties ----


def test_sums_that_are_equal_but_for_rounding_are_ties() -> None:
    from scipy.stats import spearmanr

    whole = np.arange(1, 7)
    kept = random_subsets(40, 6, seed=3)
    measured = np.random.default_rng(0).normal(size=(40, 1))
    expected = spearmanr((~kept) @ whole, measured[:, 0]).statistic
    single = torch.tensor(whole / 10, dtype=torch.float32)
    for values in (torch.tensor(whole / 10), single, single.double()):
        found = linear_datamodeling_score(scores_of(values), kept, measured).mean
        assert found == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("whole", [True, False])
def test_groups_and_their_members_have_the_same_score(dtype: torch.dtype, whole: bool) -> None:
    from scipy.stats import spearmanr

    generator = np.random.default_rng(5)
    groups = sf.Groups.from_lists(np.split(generator.permutation(300), [7, 20, 33, 80, 110, 143, 190, 220, 270]), 300)
    exact = generator.integers(1, 4, (2, 10))
    values = torch.tensor(exact if whole else exact / 7, dtype=dtype)
    of_groups = sf.Scores(values, ("q", "r"), groups.labels, tuple(groups.sizes))
    kept = random_subsets(60, 10, 0.5, seed=0)
    measured = generator.normal(size=(60, 2))
    found = linear_datamodeling_score(of_groups, kept, measured)
    spread = linear_datamodeling_score(of_groups.by_example(groups), kept[:, groups.membership()], measured)
    expected = [spearmanr((~kept) @ exact[q], measured[:, q]).statistic for q in range(2)]
    np.testing.assert_allclose(found.per_query, expected, atol=1e-13)
    np.testing.assert_allclose(spread.per_query, expected, atol=1e-13)
    assert (spread.low, spread.high) == pytest.approx((found.low, found.high), abs=1e-12)


def test_two_sources_spread_over_examples_rank_subsets_by_their_counts() -> None:
    from scipy.stats import spearmanr

    groups = sf.Groups.by(np.arange(90) % 2)
    scores = sf.Scores(torch.tensor([[0.37, -1.3]]), ("q",), groups.labels, tuple(groups.sizes)).by_example(groups)
    for seed in range(10):
        kept = random_subsets(60, 90, 0.5, seed)
        removed = (~kept) @ (np.arange(90) % 2)
        measured = np.random.default_rng(seed).normal(size=(60, 1)) + 0.3 * removed[:, None]
        expected = spearmanr(-removed, measured[:, 0]).statistic
        assert linear_datamodeling_score(scores, kept, measured).mean == pytest.approx(expected, abs=1e-13)


def test_predictions_that_differ_by_more_than_rounding_are_no_ties() -> None:
    from scipy.stats import spearmanr

    values = 1 + 1e-2 * np.random.default_rng(0).normal(size=(1, 500))
    kept = random_subsets(40, 500, seed=1)
    measured = np.random.default_rng(1).normal(size=(40, 1))
    expected = spearmanr(((~kept) @ values.T)[:, 0], measured[:, 0]).statistic
    single = torch.tensor(values, dtype=torch.float32)
    assert linear_datamodeling_score(scores_of(values), kept, measured).mean == pytest.approx(expected, abs=1e-13)
    expected = spearmanr(((~kept) @ single.double().numpy().T)[:, 0], measured[:, 0]).statistic
    assert linear_datamodeling_score(scores_of(single), kept, measured).mean == pytest.approx(expected, abs=1e-13)


def test_means_of_repetitions_that_differ_by_rounding_are_ties() -> None:
    values, subsets, _ = _case(12, Q=1)
    each = np.tile([0.1, 0.2, 0.3], (12, 1))
    turned = np.stack([np.roll(row, m) for m, row in enumerate(each)])  # the same three numbers, summed in other orders
    means = np.array([[row[0] + row[1] + row[2]] for row in turned]) / 3
    assert len(np.unique(means)) > 1
    with pytest.raises(ScoreError, match="the measurement is the same for every subset"):
        linear_datamodeling_score(scores_of(values), subsets, means)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("examples", [100, 5000, 50000])
def test_constant_scores_have_no_rank_whatever_their_number(examples: int, dtype: torch.dtype) -> None:
    scores = scores_of(torch.full((1, examples), 0.1, dtype=dtype))
    kept = random_subsets(12, examples, 0.5, seed=1)
    with pytest.raises(ScoreError, match="query 'q0': the predicted change is the same for every subset"):
        linear_datamodeling_score(scores, kept, np.random.default_rng(0).normal(size=(12, 1)))


# ---- queries that never move ----


@pytest.mark.parametrize("what", ["scores", "measurements"])
def test_a_query_that_never_moves_is_left_out_by_name(what: str) -> None:
    values, subsets, measured = _case()
    full = linear_datamodeling_score(scores_of(values), subsets, measured)
    others = linear_datamodeling_score(scores_of(values[[0, 1, 3]]), subsets, measured[:, [0, 1, 3]])
    moves = np.array([1.0, 1.0, 0.0, 1.0])
    if what == "scores":
        found = linear_datamodeling_score(scores_of(values * moves[:, None]), subsets, measured)
    else:
        found = linear_datamodeling_score(scores_of(values), subsets, measured * moves + 0.3)
    assert full.left_out == () and found.left_out == ("q2",)
    assert np.isnan(found.per_query[2])
    np.testing.assert_allclose(found.per_query[[0, 1, 3]], others.per_query)
    assert (found.mean, found.low, found.high) == pytest.approx((others.mean, others.low, others.high))
    assert str(found).endswith("], without q2")


def test_a_query_that_one_method_does_not_move_is_left_out_of_the_difference() -> None:
    values, subsets, measured = _case()
    worse = values + np.random.default_rng(3).normal(size=values.shape)
    found = linear_datamodeling_difference(
        scores_of(values * [[1], [0], [1], [1]]), scores_of(worse * [[1], [1], [1], [0]]), subsets, measured
    )
    others = linear_datamodeling_difference(
        scores_of(values[[0, 2]]), scores_of(worse[[0, 2]]), subsets, measured[:, [0, 2]]
    )
    assert found.left_out == ("q1", "q3")
    assert (found.mean, found.low, found.high) == pytest.approx((others.mean, others.low, others.high))


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
    "few": ((VALUES, SUBSETS[:2], MEASURED[:2]), {}, "2 subsets: expected at least 3 to compare"),
    "nan": ((VALUES, SUBSETS, NAN), {}, r"not finite\. Look for a retraining that diverged"),
    "infinite": ((VALUES * np.inf, SUBSETS, MEASURED), {}, "not finite"),
    "numbers": ((VALUES, 3.0 * SUBSETS, MEASURED), {}, r"other numbers than 0 and 1.*Expected \[M, K\] booleans"),
    "flat scores": ((0 * VALUES, SUBSETS, MEASURED), {}, "query 'q0': the predicted change is the same for every"),
    "flat measurements": ((VALUES, SUBSETS, 0 * MEASURED), {}, "query 'q0': the measurement is the same for every"),
    "one or the other": (
        (VALUES * [[1], [0]], SUBSETS, MEASURED * [0, 1]),
        {},
        r"the measurement is the same for every subset.*the other queries \(1\) do not vary either",
    ),
    "same subsets": ((VALUES, SUBSETS[[0] * 6], MEASURED), {}, "the predicted change is the same for every subset"),
    "confidence": (
        (VALUES, SUBSETS, MEASURED),
        {"confidence": 95},
        "confidence=95: expected a finite number, above 0 and",
    ),
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
    assert found.high - found.low < 0.8 * (alone.high - alone.low)


def test_swapping_the_methods_changes_the_sign_and_nothing_else() -> None:
    good, worse, subsets, measured = _two_methods()
    found = linear_datamodeling_difference(good, worse, subsets, measured)
    swapped = linear_datamodeling_difference(worse, good, subsets, measured)
    np.testing.assert_allclose([swapped.mean, swapped.low, swapped.high], [-found.mean, -found.high, -found.low])
    same = linear_datamodeling_difference(good, good, subsets, measured)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_the_differences_confidence_counts() -> None:
    arguments = _two_methods()
    plain = linear_datamodeling_difference(*arguments)
    wide = linear_datamodeling_difference(*arguments, confidence=0.99)
    assert wide.high - wide.low > plain.high - plain.low
    with pytest.raises(ScoreError, match="confidence=2"):
        linear_datamodeling_difference(*arguments, confidence=2)


def test_methods_that_happen_to_rank_alike_have_no_interval_of_width_zero() -> None:
    values, subsets, measured = _case(12, Q=1)
    other = values + 1e-9 * np.random.default_rng(0).normal(size=values.shape)
    found = linear_datamodeling_difference(scores_of(values), scores_of(other), subsets, measured)
    assert found.mean == 0 and found.low < -0.01 and found.high > 0.01


def test_both_methods_must_fit_the_retrainings() -> None:
    good, _, subsets, measured = _two_methods()
    fewer = scores_of(good.values[:-1].numpy())
    with pytest.raises(ScoreError, match=r"expected .* for these scores"):
        linear_datamodeling_difference(good, fewer, subsets, measured)


# ---- the curve ----

TOTAL = TRUE.total()


def _curve(folder: Path, scores: Any = TRUE, noise: float = 1.0, **options: Any) -> Table:
    plain: dict[str, Any] = {"ratios": (0.25, 0.5), "subsets": 12, "progress": False}
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


def test_the_interval_is_that_of_the_score(tmp_path: Path) -> None:
    table = _curve(tmp_path, ratios=(0.5,), seed=3)
    subsets, measured = _bank_of(tmp_path, 0.5)
    expected = linear_datamodeling_score(TRUE, subsets, measured.mean(1))
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


class _OneNeverMoves(Linear):
    """A training whose second query always measures the same."""

    def _measured(self, kept: np.ndarray, seed: int) -> np.ndarray:
        return np.where(np.arange(Q) == 1, 0.25, super()._measured(kept, seed))


def test_a_measurement_that_never_moves_is_left_out_of_every_series(tmp_path: Path) -> None:
    options: Any = {"ratios": (0.5,), "subsets": 12, "progress": False, "repetitions": 1}
    table = linear_datamodeling_curve(TRUE, _OneNeverMoves(noise=1.0), tmp_path / "flat", **options)
    full = linear_datamodeling_curve(TRUE, Linear(noise=1.0), tmp_path / "full", **options)
    assert table.settings["left_out"] == {name: {"0.5": ["q1"]} for name in ("Oracle", "random")}
    for name in ("Oracle", "random"):
        np.testing.assert_allclose(table.value(name).values, np.array(full.value(name).values)[[0, 2]])


def test_a_query_that_never_moves_is_left_out_of_the_rows_by_name(tmp_path: Path) -> None:
    flat = scores_of(EFFECTS * [[0.0], [1.0], [1.0]])
    table = _curve(tmp_path, {"true": TRUE, "flat": flat}, repetitions=1)
    assert table.settings["left_out"] == {"flat": {"0.25": ["q0"], "0.5": ["q0"]}}
    assert table.notes == {"flat": "without queries that never move: q0 (at 0.25); q0 (at 0.5)"}
    np.testing.assert_allclose(table.value("flat", 0.5).values, table.value("true", 0.5).values[1:])
    assert "without queries that never move" in str(table)


def test_each_ratio_has_its_own_subsets_which_other_ratios_do_not_move(tmp_path: Path) -> None:
    one, two = _curve(tmp_path / "one", ratios=(0.5,)), _curve(tmp_path / "two", ratios=(0.25, 0.5))
    assert one.value("Oracle", 0.5).mean == two.value("Oracle", 0.5).mean
    subsets, other = _bank_of(tmp_path / "two", 0.5)[0], random_subsets(12, N, 0.5, seed=0)
    assert not (np.unique(subsets, axis=0) == np.unique(other, axis=0)).all(), "not those that users draw"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": ()}, "expected a ratio"),
        ({"scores": scores_of(np.ones((Q, N)))}, "query 'q0': the predicted change is the same for every subset"),
        ({"subsets": 2}, "subsets=2: expected a whole number, at least 3"),
        ({"ratios": (0.5, 0.51)}, "no two of them as many"),
        ({"ratios": (0.5, np.nan)}, "finite"),
        ({"ratios": 0.5}, "ratios=0.5: expected a sequence"),
        ({"subsets": 3.5}, "subsets=3.5"),
        ({"scores": {np.int64(64): TRUE}}, "Name series by a str"),
        ({"ratios": (0.5, 1.0)}, r"keep \[10, 20\] of 20"),
        ({"ratios": (1.0,)}, r"keep \[20\] of 20"),
        ({"scores": {"noise ceiling": TRUE}}, "'noise ceiling'"),
        ({"scores": TOTAL}, r"expected \[M, 20\] and \[M, 1\]"),
    ],
)
def test_a_curve_that_makes_no_sense_is_refused(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(sf.ScoreError, match=message):
        _curve(tmp_path, **options)
    assert not list(tmp_path.iterdir()) or options.get("scores") is TOTAL, "nothing was trained"


def test_a_large_score_in_single_precision_makes_no_ties_among_the_others() -> None:
    """Two subsets that both leave it out, or both keep it, differ by the small ones alone."""
    from scipy.stats import spearmanr

    generator = np.random.default_rng(0)
    values = (1e-3 * generator.normal(size=(1, 300))).astype(np.float32)
    values[0, 7] = 1e4
    subsets, measured = random_subsets(60, 300, seed=1), generator.normal(size=(60, 1))
    predicted = (~subsets).astype(float) @ values.astype(float).T
    found = linear_datamodeling_score(scores_of(torch.from_numpy(values)), subsets, measured)
    assert len(np.unique(predicted)) == 60
    assert found.mean == pytest.approx(spearmanr(predicted[:, 0], measured[:, 0]).statistic, abs=1e-12)


class _FewNeverMove(Linear):
    """Measures nothing where few examples are kept."""

    def _measured(self, kept: np.ndarray, seed: int) -> np.ndarray:
        return np.zeros(Q) if len(kept) < N // 2 else super()._measured(kept, seed)


def test_a_ratio_at_which_nothing_moves_has_no_row_and_the_others_have(tmp_path: Path) -> None:
    options: Any = {"subsets": 12, "progress": False, "repetitions": 2}
    table = linear_datamodeling_curve(TRUE, _FewNeverMove(noise=1.0), tmp_path, ratios=(0.25, 0.5), **options)
    names = ("Oracle", "random", "noise ceiling")
    assert {name: [row.x for row in table.of(name)] for name in names} == {name: [0.5] for name in names}
    assert table.settings["left_out"] == {name: {"0.25": ["q0", "q1", "q2"]} for name in names}
    assert "without queries that never move: q0, q1, q2 (at 0.25)" in str(table)
    table.plot()
    with pytest.raises(sf.ScoreError, match="query 'q0': at none of the ratios"):
        linear_datamodeling_curve(TRUE, _FewNeverMove(noise=1.0), tmp_path, ratios=(0.25,), **options)


def test_the_ceiling_notes_the_queries_that_never_move(tmp_path: Path) -> None:
    options: Any = {"ratios": (0.5,), "subsets": 12, "progress": False, "repetitions": 2}
    table = linear_datamodeling_curve(TRUE, _OneNeverMoves(noise=1.0), tmp_path, **options)
    assert table.settings["left_out"]["noise ceiling"] == {"0.5": ["q1"]}


@pytest.mark.parametrize(
    ("measured", "text"), [([[1.0], [1.0, 2.0]], "inhomogeneous"), ([["a"]] * 4, "<U1"), ([[1j]] * 4, "complex128")]
)
def test_measurements_that_are_no_numbers_are_refused(measured: Any, text: str) -> None:
    scores = sf.Scores(torch.tensor([[1.0, 2.0, 4.0]]), ("q",), ("a", "b", "c"), (1, 1, 1))
    kept = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0]], dtype=bool)
    with pytest.raises(sf.ScoreError, match=f"measurements: .*{text}"):
        linear_datamodeling_score(scores, kept, measured)
    found = linear_datamodeling_score(scores, kept, torch.tensor([[4.0], [2.0], [1.0], [6.0]], dtype=torch.bfloat16))
    assert found.mean == 1.0
