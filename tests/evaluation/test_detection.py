"""Detection of wrong labels against hand-computed curves, brute force over orders, and scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf
from benchmarks.coverage_tasks import detection_of_examples, detection_of_groups
from segflow.evaluation import Detection, detection_auc, found_among_lowest, noisy_label_detection
from segflow.evaluation.intervals import share_interval

from .closed_form import scores_of

N = 40
GENERATOR = np.random.default_rng(0)
WRONG = GENERATOR.random(N) < 0.3
VALUES = GENERATOR.normal(size=(3, N)) - 0.5 * WRONG


SCORES = scores_of(VALUES, method="Source")


def _found(order: Any, wrong: np.ndarray, count: int) -> float:
    return float(np.asarray(wrong)[list(order[:count])].sum() / np.sum(wrong))


# ---- the curve ----


def test_the_curve_is_the_share_of_the_wrong_among_the_lowest_sums() -> None:
    found = noisy_label_detection(SCORES, WRONG).curve
    order = np.argsort(VALUES.sum(0))
    assert [row.x for row in found.of("Source")] == pytest.approx(np.arange(1, 21) / 20)
    for row in found.of("Source"):
        assert row.mean == pytest.approx(_found(order, WRONG, round(row.x * N)))
    assert found.value("Source", 1.0).mean == 1.0


def test_largest_inspects_from_the_other_end() -> None:
    up, down = (noisy_label_detection(s, WRONG, largest=large) for s, large in ((SCORES, True), (SCORES, False)))
    order = np.argsort(-VALUES.sum(0))
    assert up.curve.value("Source", 0.25).mean == pytest.approx(_found(order, WRONG, 10))
    assert up.roc_auc.value("Source").mean == pytest.approx(1 - down.roc_auc.value("Source").mean)
    assert up.curve.settings["largest"]


def test_ties_are_expected_over_every_order_of_their_members() -> None:
    values, wrong = np.array([0, 0, 0, -1, 2, 2]), np.array([1, 0, 0, 0, 1, 0], dtype=bool)
    orders = [o for o in permutations(range(6)) if (np.diff(values[list(o)]) >= 0).all()]
    assert len(orders) == 6 * 2
    found = noisy_label_detection(scores_of(1.0 * values, method="S"), wrong, shares=np.arange(1, 7) / 6)
    curve = [np.mean([_found(order, wrong, count) for order in orders]) for count in range(7)]
    np.testing.assert_allclose([row.mean for row in found.curve.of("S")], curve[1:])
    assert found.auc.value("S").mean == pytest.approx((np.array(curve[1:]) + curve[:-1]).mean() / 2)


def test_members_of_a_group_are_tied() -> None:
    groups = sf.Groups.random(N, 7, seed=0)
    scores = scores_of(np.arange(6.0), method="S")
    shared = sf.Scores(scores.values, ("q",), groups.labels, tuple(groups.sizes), {"method": "S"}).by_example(groups)
    found = noisy_label_detection(shared, WRONG, shares=(3.5 / N, 7 / N))
    each = shared.values[0, [members[0] for members in groups.members]].numpy()
    first = groups.members[int(np.argmin(each))]
    assert found.curve.value("S", 7 / N).mean == pytest.approx(WRONG[first].sum() / WRONG.sum())
    assert found.curve.value("S", 3.5 / N).mean == pytest.approx(WRONG[first].sum() / WRONG.sum() / 2)


# ---- the areas ----


@pytest.mark.parametrize("ties", [False, True])
def test_the_areas_are_those_of_the_curve_and_of_scikit_learn(ties: bool) -> None:
    from sklearn.metrics import roc_auc_score

    values = np.round(VALUES) if ties else VALUES
    found = noisy_label_detection(scores_of(values, method="S"), WRONG, shares=np.arange(1, N + 1) / N)
    summed = values.sum(0)
    assert found.roc_auc.value("S").mean == pytest.approx(roc_auc_score(WRONG, -summed))
    assert found.roc_auc.value("S").mean == pytest.approx(detection_auc(summed, WRONG))
    curve = np.array([0.0] + [row.mean for row in found.curve.of("S")])
    assert found.auc.value("S").mean == pytest.approx((curve[1:] + curve[:-1]).mean() / 2)


def test_random_finds_what_it_inspects_and_the_perfect_ranking_is_the_ceiling() -> None:
    found = noisy_label_detection({"perfect": scores_of(-1.0 * WRONG), "worst": scores_of(1.0 * WRONG)}, WRONG)
    part = WRONG.mean()
    for row in found.curve.of("random"):
        assert row.mean == row.low == row.high == row.x
    for row in found.curve.of("perfect"):
        assert row.mean == pytest.approx(min(1, row.x / part))
        assert found.curve.value("perfect ranking", row.x).mean == pytest.approx(row.mean)
    assert (found.auc.value("random").mean, found.roc_auc.value("random").mean) == (0.5, 0.5)
    assert found.auc.value("perfect").mean == pytest.approx(1 - part / 2)
    assert found.auc.references["perfect ranking"][0] == pytest.approx(1 - part / 2)
    assert found.auc.value("worst").mean == pytest.approx(part / 2)
    assert (found.roc_auc.value("perfect").mean, found.roc_auc.value("worst").mean) == (1, 0)
    assert found.roc_auc.references["perfect ranking"][0] == 1


# ---- runs and intervals ----


def test_runs_are_averaged_and_kept() -> None:
    runs = [scores_of(VALUES + 2 * np.random.default_rng(seed).normal(size=VALUES.shape)) for seed in range(3)]
    alone = [noisy_label_detection({"S": run}, WRONG) for run in runs]
    found = noisy_label_detection({"S": runs, "T": SCORES}, WRONG)
    for name in ("auc", "roc_auc"):
        row = getattr(found, name).value("S")
        assert row.values == tuple(getattr(one, name).value("S").mean for one in alone)
        assert row.mean == pytest.approx(np.mean(row.values))
    values = found.curve.value("S", 0.25).values
    assert values == tuple(one.curve.value("S", 0.25).mean for one in alone)
    assert found.curve.settings["runs"] == {"S": 3, "T": 1}


def test_the_interval_is_agresti_and_coulls_of_as_many_cases_as_a_bootstrap_over_the_examples_is_worth() -> None:
    found = noisy_label_detection(SCORES, WRONG, resamples=4000).roc_auc.value("Source")
    generator = np.random.default_rng(99)
    drawn = [
        detection_auc(VALUES.sum(0)[rows], WRONG[rows]) for rows in (generator.integers(0, N, N) for _ in range(4000))
    ]
    from scipy.stats import t

    cases = int(WRONG.sum())
    variance = np.var(drawn, ddof=1) * cases / (cases - 1)
    expected = share_interval(detection_auc(VALUES.sum(0), WRONG), variance, float(t.ppf(0.975, cases - 1)), cases)
    np.testing.assert_allclose([found.low, found.high], expected[1:], atol=0.01)
    assert found.low < found.mean < found.high


def test_the_area_under_the_detection_curve_has_the_interval_of_that_under_the_roc_curve() -> None:
    found, share = noisy_label_detection(SCORES, WRONG), WRONG.mean()
    area, roc = found.auc.value("Source"), found.roc_auc.value("Source")
    for end in ("low", "mean", "high"):
        assert getattr(area, end) == pytest.approx((1 - share) * getattr(roc, end) + share / 2)


def test_intervals_of_group_scores_that_are_noise_hold_chance() -> None:
    groups = sf.Groups.random(1024, 64, seed=0)
    excluded = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        wrong = generator.random(1024) < generator.beta(0.5, 2, 16)[groups.membership()]
        noise = torch.from_numpy(generator.normal(size=(1, 16)))
        scores = sf.Scores(noise, ("q",), groups.labels, tuple(groups.sizes), {"method": "S"}).by_example(groups)
        row = noisy_label_detection(scores, wrong, resamples=100, shares=(0.5,)).roc_auc.value("S")
        excluded += not row.low <= 0.5 <= row.high
    assert excluded / 100 < 0.1


def test_members_of_a_group_are_one_case_and_each_series_has_its_own_cases() -> None:
    groups = sf.Groups.random(N, 2, seed=1)
    values = torch.arange(20.0).repeat(2, 1)
    values[:, 1:3] = torch.tensor([[4.0, 5.0], [5.0, 4.0]])  # equal sums, but other columns: cases of their own
    values[:, 9] = -0.0
    shared = sf.Scores(values, ("p", "q"), groups.labels, tuple(groups.sizes)).by_example(groups)
    broken = scores_of(shared.values.numpy() + 1e-7 * np.arange(N))  # the same order, but every example by itself
    wrong = np.isin(groups.membership(), range(0, 20, 2))
    found = noisy_label_detection({"groups": shared, "examples": broken}, wrong).roc_auc
    grouped, single = found.value("groups"), found.value("examples")
    assert grouped.mean == pytest.approx(single.mean, abs=0.03)
    assert (grouped.high - grouped.low) / (single.high - single.low) == pytest.approx(2**0.5, rel=0.25)
    alone = noisy_label_detection({"examples": broken}, wrong).roc_auc
    assert replace(alone.value("examples"), x=1) == single
    runs = noisy_label_detection({"runs": [shared, broken, shared]}, wrong).roc_auc.value("runs")
    assert runs.low > grouped.low, "a block's scores are identical in each run"


@pytest.mark.parametrize("wrongs", [7, 8])
def test_few_wrong_labels_few_right_ones_and_few_groups_have_no_interval(wrongs: int) -> None:
    wrong = np.arange(N) < wrongs
    groups = sf.Groups.random(N, 2, seed=0)
    by_group = sf.Scores(torch.arange(20.0)[None], ("q",), groups.labels, tuple(groups.sizes)).by_example(groups)
    of_groups = np.isin(groups.membership(), range(wrongs))
    pairs = [(SCORES, wrong), (SCORES, ~wrong), (by_group, of_groups), ([SCORES] * 3, wrong)]
    for scores, labels in pairs:
        found = noisy_label_detection({"S": scores}, labels, shares=(0.5, 1.0))
        for row in (found.auc.value("S"), found.roc_auc.value("S"), found.curve.value("S", 0.5)):
            assert np.isfinite([row.low, row.high]).all() == (wrongs == 8)
        assert found.curve.value("S", 1.0).low == 1, "everything was inspected"
    assert "fewer than 8 blocks" in found.auc.settings["interval"]


def test_runs_that_differ_widen_the_interval() -> None:
    runs = [scores_of(VALUES - sign * WRONG) for sign in (1, 0, -0.5)]
    widths = []
    for scores in ([scores_of(VALUES)] * 3, runs):
        row = noisy_label_detection({"S": scores}, WRONG).roc_auc.value("S")
        widths.append(row.high - row.low)
    assert widths[1] > widths[0]


def test_more_examples_narrow_the_interval_and_options_of_the_bootstrap_leave_the_mean() -> None:
    plain = noisy_label_detection(SCORES, WRONG).auc.value("Source")
    near = np.tile(VALUES, 9) + 1e-9 * np.arange(9 * N)
    many = noisy_label_detection(scores_of(near, method="Source"), np.tile(WRONG, 9)).auc.value("Source")
    assert many.mean == pytest.approx(plain.mean)
    assert many.high - many.low < 0.5 * (plain.high - plain.low)
    for options in ({"resamples": 20}, {"seed": 1}):
        other = noisy_label_detection(SCORES, WRONG, **options).auc.value("Source")
        assert other.mean == plain.mean
        assert (other.low, other.high) != (plain.low, plain.high)


def test_a_resample_without_right_labels_does_not_spoil_the_interval() -> None:
    wrong = np.arange(9) != 2
    found = noisy_label_detection(scores_of(np.arange(9.0), method="S"), wrong, resamples=1000)
    assert (found.auc.value("S").low, found.auc.value("S").high) == (-np.inf, np.inf)
    many = noisy_label_detection(scores_of(np.arange(16.0), method="S"), np.arange(16) % 2 == 0, resamples=1000)
    assert 0 <= many.roc_auc.value("S").low < many.roc_auc.value("S").high <= 1


@pytest.mark.parametrize("case", ["a few wrong labels", "groups", "runs that differ"])
def test_intervals_hold_the_truth_in_95_of_100_draws(case: str) -> None:
    options = {
        "a few wrong labels": {"wrongs": 8, "right": 72, "shift": 1.0},
        "groups": {"groups": 16, "size": 16, "shift": 4.0},
        "runs that differ": {"wrongs": 20, "right": 60, "shift": 1.0, "runs": 3, "spread": 0.5},
    }[case]
    task = detection_of_groups if case == "groups" else detection_of_examples
    coverage = task(**options, draws=60, seed=2)
    assert coverage["roc"] > 0.9, coverage
    assert coverage["curve"] > 0.9, coverage


# ---- one ranking, one number ----


@pytest.mark.parametrize("ties", [False, True])
def test_detection_auc_is_scikit_learns(ties: bool) -> None:
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(2)
    wrong = generator.random(50) < 0.3
    ranking = generator.normal(size=50) - wrong
    ranking = np.round(ranking) if ties else ranking
    assert detection_auc(ranking, wrong) == pytest.approx(roc_auc_score(wrong, -ranking), rel=1e-12)
    assert detection_auc(torch.tensor(ranking), torch.tensor(wrong)) == detection_auc(ranking, wrong)
    assert detection_auc(-ranking, wrong) == pytest.approx(1 - detection_auc(ranking, wrong))
    assert detection_auc(np.zeros(50), wrong) == 0.5


def test_found_among_lowest_counts_wrong_examples_at_the_bottom() -> None:
    ranking = np.array([5.0, -1.0, 0.5, -3.0, 2.0, 0.0])
    wrong = np.array([True, True, False, True, False, False])
    assert found_among_lowest(ranking, wrong) == 2  # of the lowest three: 3, 1, 5
    assert [found_among_lowest(ranking, wrong, count) for count in range(8)] == [0, 1, 2, 2, 2, 2, 3, 3]
    assert found_among_lowest(torch.tensor(ranking), torch.tensor(wrong), 1) == 1


def test_found_among_lowest_is_the_mean_over_all_orders_of_ties() -> None:
    wrong = np.zeros(100, dtype=bool)
    wrong[:15] = True
    for order in (wrong, wrong[::-1]):
        assert found_among_lowest(np.zeros(100), order) == pytest.approx(15 * 15 / 100)
    values, few = np.array([0, 0, 0, -1, 2, 2]), np.array([1, 0, 0, 0, 1, 0], dtype=bool)
    orders = [o for o in permutations(range(6)) if (np.diff(values[list(o)]) >= 0).all()]
    for count in range(8):
        expected = np.mean([few[list(order[:count])].sum() for order in orders])
        assert found_among_lowest(1.0 * values, few, count) == pytest.approx(expected)


def test_a_group_that_holds_the_wrong_labels_and_as_many_right_ones_finds_half_of_them() -> None:
    groups = sf.Groups.from_lists([range(30), range(30, 60), range(60, 100)], 100)
    scores = sf.Scores(torch.tensor([[-30.0, 5.0, 10.0]]), ("q",), groups.labels, tuple(groups.sizes))
    wrong = np.arange(100) < 15
    spread = scores.by_example(groups)
    assert found_among_lowest(spread.values[0], wrong) == pytest.approx(7.5)
    curve = noisy_label_detection({"S": spread}, wrong, shares=(0.15,)).curve
    assert 15 * curve.value("S", 0.15).mean == pytest.approx(7.5)


def test_sums_that_tie_within_rounding_are_ties_in_every_measure() -> None:
    columns = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1], [0.3, 0.1, 0.2]] * 10).T
    assert len(set(columns.sum(0))) > 1
    wrong = np.arange(40) % 4 == int(np.argmin(columns.sum(0)[:4]))
    found = noisy_label_detection(scores_of(columns, method="S"), wrong)
    assert found.roc_auc.value("S").mean == 0.5
    assert found.curve.value("S", 0.25).mean == pytest.approx(0.25)
    sizes = np.arange(1, 41, dtype=np.float32)
    shares = torch.from_numpy(np.float32(0.1) * sizes / sizes)[None]
    assert len(shares.unique()) > 1
    assert noisy_label_detection(scores_of(shares, method="S"), wrong).roc_auc.value("S").mean == 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_only_equal_numbers_of_a_ranking_that_is_given_tie(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    ranking = 1 + step * torch.tensor([2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    wrong = np.array([False, True, True, False])
    assert detection_auc(ranking.to(dtype), wrong) == 1.0
    assert found_among_lowest(ranking.to(dtype), wrong) == 2.0
    assert detection_auc(torch.ones(4, dtype=dtype), wrong) == 0.5


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: detection_auc([[1.0], [1.0, 2.0]], [True, False]), "ranking: .*inhomogeneous"),
        (lambda: detection_auc(["a", "b"], [True, False]), "ranking: expected real numbers, found .*U1"),
        (lambda: detection_auc([1j, 2.0], [True, False]), "ranking: expected real numbers, found complex128"),
        (lambda: detection_auc([None, 2.0], [True, False]), "ranking: expected real numbers, found object"),
        (lambda: detection_auc([1.0, 2.0], [[True], [True, False]]), "wrong: .*inhomogeneous"),
        (lambda: detection_auc(np.zeros(3), np.zeros(4, bool)), r"ranking \(3,\) and wrong \(4,\): expected \[N\] and"),
        (lambda: found_among_lowest(np.zeros((2, 2)), np.zeros((2, 2), bool)), r"ranking \(2, 2\)"),
        (lambda: detection_auc(np.zeros(3), np.zeros(3, bool)), "needs both wrong and right examples"),
        (lambda: detection_auc(np.zeros(3), np.ones(3, bool)), "needs both wrong and right examples"),
        (lambda: detection_auc(np.array([0, np.nan]), np.array([True, False])), "ranking: example 1 .* not finite"),
        (
            lambda: found_among_lowest(np.zeros(2), np.ones(2, bool), -1),
            "count=-1: expected a whole number, at least 0",
        ),
    ],
)
def test_rankings_that_do_not_fit_are_refused(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(sf.ScoreError, match=text):
        call()


# ---- results and refusals ----


def test_the_tables_are_drawn_and_printed() -> None:
    found = noisy_label_detection(SCORES, torch.from_numpy(WRONG), shares=(0.5, 1))
    assert isinstance(found, Detection)
    text = str(found)
    assert all(str(table) in text for table in (found.curve, found.auc, found.roc_auc))
    assert "bootstrap" in found.auc.settings["interval"]
    assert (found.auc.settings["examples"], found.auc.settings["wrong"]) == (N, int(WRONG.sum()))
    legend = [entry.get_text() for entry in found.curve.plot().axes[0].get_legend().get_texts()]
    assert legend == ["Source", "random", "perfect ranking"]
    assert len(found.auc.plot().axes[0].patches) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wrong": WRONG[:-1]}, r"wrong \(39,\): expected \[N\] and \[N\]"),
        ({"wrong": np.zeros(N, dtype=bool)}, "0 of 40 labels are wrong"),
        ({"wrong": np.ones(N, dtype=bool)}, "40 of 40 labels are wrong"),
        ({"wrong": np.arange(N)}, "booleans"),
        ({"shares": (0.0, 0.5)}, "expected 0 < share <= 1"),
        ({"shares": (1.5,)}, "expected 0 < share <= 1"),
        ({"shares": ()}, "expected 0 < share <= 1"),
        ({"shares": 0.5}, "shares=0.5: expected a sequence of finite numbers"),
        ({"shares": (np.nan,)}, r"shares\[0\]=nan: expected a finite number"),
        ({"resamples": 0}, "resamples=0"),
        ({"resamples": 2.5}, "resamples=2.5"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"scores": {3: SCORES}}, "called 3, a int. Name series by a str"),
        ({"scores": {"perfect ranking": SCORES}}, "'perfect ranking'"),
        ({"scores": {"random": SCORES}}, "'random'"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(sf.ScoreError, match=message):
        noisy_label_detection(**({"scores": SCORES, "wrong": WRONG} | change))
