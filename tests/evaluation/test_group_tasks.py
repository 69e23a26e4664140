"""Counterfactuals, linear datamodeling scores and leaving groups out, against a training known in closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf
from segflow.evaluation import (
    Table,
    leave_one_group_out,
    linear_datamodeling_curve,
    linear_datamodeling_score,
    noise_ceiling,
    random_subsets,
    read_bank,
    removal_counterfactual,
)
from segflow.evaluation.statistics import student_interval, unchanged_interval, welch_interval, wilson_interval

from .test_removal import EFFECTS, TRUE, Linear, N, Q, noise_of, scores_of

MARGINS = np.array([1.0, 3.0, -1.0])  # of the three queries when nothing is removed


class Margins(Linear):
    """Margins that fall by an example's effect when it is removed (scores are then minus the effects)."""

    def _measured(self, kept: np.ndarray, seed: int) -> np.ndarray:
        removed = np.setdiff1d(np.arange(N), kept)
        return MARGINS - self.effects[:, removed].sum(1) + self.noise * noise_of(seed, Q)


SUPPORT = scores_of(-EFFECTS, method="Oracle")


# ---- counterfactual ----


def _turns(order: np.ndarray, query: int, count: int) -> bool:
    return bool(MARGINS[query] - EFFECTS[query, order[:count]].sum() < 0)


def test_each_right_query_loses_its_own_supporters_and_turns_or_not(tmp_path: Path) -> None:
    counts = (1, 2, 4, 10)
    table = removal_counterfactual(SUPPORT, Margins(), tmp_path, counts=counts, progress=False)
    assert (table.settings["queries_right"], table.settings["queries_left_out"]) == (2, 1)
    assert table.settings["right"] == [0, 1]
    for count in counts:
        expected = [_turns(np.argsort(-EFFECTS[query]), query, count) for query in (0, 1)]
        row = table.value("Oracle", count)
        assert row.values == tuple(map(float, expected))
        np.testing.assert_allclose((row.mean, row.low, row.high), wilson_interval(np.mean(expected), 2))
    assert [table.value("Oracle", count).mean for count in (1, 10)] == [0.5, 1.0]
    assert table.references["nothing removed"][0] == 0
    assert "Wilson" in table.settings["interval"]


def test_random_removal_turns_queries_as_often_as_its_draws_do(tmp_path: Path) -> None:
    table = removal_counterfactual(SUPPORT, Margins(), tmp_path, counts=(8,), progress=False)
    subsets = [row for path in tmp_path.glob("bank-*") for row in read_bank(path)[0] if row.sum() == N - 8]
    orders = {q: np.argsort(-EFFECTS[q])[:8] for q in (0, 1)}
    drawn = [row for row in subsets if not any(set(np.flatnonzero(~row)) == set(order) for order in orders.values())]
    assert len(drawn) == 5
    expected = [np.mean([_turns(np.flatnonzero(~row), q, 8) for q in (0, 1)]) for row in drawn]
    row = table.value("random", 8)
    assert sorted(row.values) == pytest.approx(sorted(expected))
    mean, low, high = student_interval(expected)
    np.testing.assert_allclose((row.mean, row.low, row.high), (mean, max(0, low), min(1, high)))
    assert low < 0, "clipped"
    assert "Student's t, within 0 and 1" in table.settings["interval"]
    assert 0 < table.value("random", 8).mean < table.value("Oracle", 8).mean


def test_a_query_turns_by_its_mean_over_the_repetitions(tmp_path: Path) -> None:
    training = Margins(noise=2.0)
    table = removal_counterfactual(SUPPORT, training, tmp_path, counts=(3,), repetitions=4, progress=False)
    everything = [seed for kept, seed in training.jobs if len(kept) == N]
    assert len(everything) == 8
    first, second = (
        np.mean([MARGINS + 2 * noise_of(s, Q) for s in half], 0) for half in np.split(np.array(everything), 2)
    )
    right = np.flatnonzero(first > 0)
    assert table.settings["right"] == right.tolist()
    nothing = (second[right] < 0).mean()
    np.testing.assert_allclose(table.references["nothing removed"], wilson_interval(nothing, len(right)))
    for query, value in zip(right, table.value("Oracle", 3).values, strict=True):
        kept = tuple(np.sort(np.argsort(-EFFECTS[query])[3:]))
        seeds = [seed for own, seed in training.jobs if own == kept]
        assert len(seeds) == 4
        margin = (
            MARGINS[query] - np.sort(EFFECTS[query])[-3:].sum() + 2 * np.mean([noise_of(s, Q)[query] for s in seeds])
        )
        assert value == (margin < 0)


def test_runs_count_by_the_share_of_them_in_which_a_query_turns(tmp_path: Path) -> None:
    opposite = scores_of(EFFECTS)
    table = removal_counterfactual(
        {"both": [SUPPORT, opposite], "one": SUPPORT}, Margins(), tmp_path, counts=(10,), progress=False
    )
    assert table.value("one", 10).values == (1, 1)
    assert table.value("both", 10).values == (0.5, 0.5)
    assert table.value("both", 10).low == pytest.approx(wilson_interval(0.5, 2).low)


def test_a_counterfactual_resumes_and_its_seed_draws_others(tmp_path: Path) -> None:
    first = removal_counterfactual(SUPPORT, Margins(), tmp_path / "a", counts=(2, 8), progress=False)
    again = Margins()
    assert removal_counterfactual(SUPPORT, again, tmp_path / "a", counts=(2, 8), progress=False) == first
    assert again.jobs == []
    other = removal_counterfactual(SUPPORT, Margins(), tmp_path / "b", counts=(2, 8), seed=5, progress=False)
    assert other.of("Oracle") == first.of("Oracle")
    assert other.of("random") != first.of("random")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": (0,)}, "from 1 to 19"),
        ({"counts": (2, 20)}, "from 1 to 19"),
        ({"counts": ()}, "expected some"),
        ({"counts": (0.1,)}, "expected some"),
        ({"counts": 3}, "counts=3: expected a sequence"),
        ({"counts": (2, 2)}, "each once"),
        ({"scores": SUPPORT.total()}, "1 queries, the training measures 3"),
        ({"training": Linear(np.abs(EFFECTS))}, "none of 3 queries has a measurement above 0.*margins"),
    ],
)
def test_a_counterfactual_that_makes_no_sense_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    plain = {"scores": SUPPORT, "training": Margins(), "folder": tmp_path, "counts": (2,), "progress": False}
    with pytest.raises(sf.ScoreError, match=message):
        removal_counterfactual(**(plain | change))


# ---- linear datamodeling scores ----


def _datamodeling(folder: Path, scores: Any = TRUE, noise: float = 1.0, **options: Any) -> Table:
    plain: dict[str, Any] = {"ratios": (0.25, 0.5), "subsets": 12, "resamples": 30, "progress": False}
    return linear_datamodeling_curve(scores, Linear(noise=noise), folder, **(plain | options))


def _bank_of(folder: Path, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    (found,) = [bank for bank in map(read_bank, folder.glob("bank-*")) if bank[0][0].sum() == round(ratio * N)]
    return found


def test_each_ratios_score_is_that_of_its_own_bank(tmp_path: Path) -> None:
    noisy = scores_of(EFFECTS + np.random.default_rng(1).normal(size=EFFECTS.shape))
    table = _datamodeling(tmp_path, {"true": TRUE, "noisy": noisy})
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
        np.testing.assert_allclose(row.values, np.sqrt(np.clip(ceiling.per_query, 0, None)))
        assert row.low <= row.mean <= row.high
        assert abs(table.value("random", ratio).mean) < 0.35


def test_an_oracle_reaches_one_where_there_is_no_noise(tmp_path: Path) -> None:
    table = _datamodeling(tmp_path, noise=0.0, repetitions=2)
    for ratio in (0.25, 0.5):
        assert table.value("Oracle", ratio).mean == pytest.approx(1)
        assert table.value("noise ceiling", ratio).mean == pytest.approx(1)


def test_the_interval_is_that_of_the_score_on_the_same_draws(tmp_path: Path) -> None:
    table = _datamodeling(tmp_path, ratios=(0.5,), resamples=40, seed=3)
    kept = random_subsets(12, N, 0.5, seed=3)
    subsets, measured = _bank_of(tmp_path, 0.5)
    rows = [int(np.flatnonzero((subsets == row).all(1))[0]) for row in kept]
    expected = linear_datamodeling_score(TRUE, kept, measured[rows].mean(1), resamples=40, seed=3)
    row = table.value("Oracle", 0.5)
    np.testing.assert_allclose((row.low, row.high), (expected.low, expected.high))


def test_runs_scores_are_averaged_and_not_their_predictions(tmp_path: Path) -> None:
    runs = [TRUE, scores_of(np.random.default_rng(2).normal(size=EFFECTS.shape))]
    table = _datamodeling(tmp_path, {"runs": runs, "first": runs[0], "second": runs[1]})
    alone = [np.array(table.value(name, 0.5).values) for name in ("first", "second")]
    np.testing.assert_allclose(table.value("runs", 0.5).values, np.mean(alone, axis=0))


def test_one_repetition_has_no_noise_ceiling(tmp_path: Path) -> None:
    assert _datamodeling(tmp_path, repetitions=1).series == ("Oracle", "random")


def test_options_of_linear_datamodeling_curve_change_the_result(tmp_path: Path) -> None:
    plain = _datamodeling(tmp_path / "plain")
    assert _datamodeling(tmp_path / "plain") == plain
    for name, options in enumerate(({"subsets": 9}, {"seed": 1}, {"repetitions": 2})):
        assert (
            _datamodeling(tmp_path / str(name), **options).value("Oracle", 0.5).mean != plain.value("Oracle", 0.5).mean
        )
    wider = _datamodeling(tmp_path / "plain", resamples=31)
    assert wider.value("Oracle", 0.5).mean == plain.value("Oracle", 0.5).mean
    assert wider.value("Oracle", 0.5).low != plain.value("Oracle", 0.5).low


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": ()}, "expected a ratio"),
        ({"subsets": 2}, "3 subsets"),
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
def test_linear_datamodeling_curve_that_make_no_sense_are_refused(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(sf.ScoreError, match=message):
        _datamodeling(tmp_path, **options)
    assert not list(tmp_path.iterdir()) or "scores" in options, "nothing was trained"


# ---- leave one group out ----

GROUPS = sf.Groups.random(N, 4, seed=2)


def _group_scores(effects: np.ndarray = EFFECTS) -> sf.Scores:
    values = np.stack([effects[:, members].sum(1) for members in GROUPS.members], 1)
    return replace(
        scores_of(values, method="Oracle"), group_labels=GROUPS.labels, group_sizes=tuple(GROUPS.sizes.tolist())
    )


def _left_out(folder: Path, scores: Any = None, training: Any = None, **options: Any) -> Table:
    given = _group_scores() if scores is None else scores
    return leave_one_group_out(given, GROUPS, training or Linear(), folder, **({"progress": False} | options))


def test_an_oracles_predictions_are_the_actual_changes(tmp_path: Path) -> None:
    table = _left_out(tmp_path)
    assert [row.label for row in table.rows] == list(GROUPS.labels)
    for row, members in zip(table.rows, GROUPS.members, strict=True):
        assert row.x == pytest.approx(EFFECTS[:, members].sum(1).mean())
        assert row.mean == pytest.approx(row.x)
        assert row.values == pytest.approx([row.x] * 3)
    for found in table.settings["correlations"]["Oracle"].values():
        np.testing.assert_allclose(found, 1)
    assert table.references["nothing removed"][0] == pytest.approx(0)
    assert table.value("Oracle", "group 2") is table.rows[2]


def test_a_groups_interval_is_welchs_against_the_retrainings_with_all(tmp_path: Path) -> None:
    training = Linear(noise=1.0)
    table = _left_out(tmp_path, training=training, repetitions=4)

    def measured(kept: np.ndarray) -> np.ndarray:
        seeds = [seed for own, seed in training.jobs if own == tuple(kept)]
        return np.array([-EFFECTS[:, kept].sum(1).mean() + noise_of(seed, Q).mean() for seed in seeds])

    everything = measured(np.arange(N))
    assert len(everything) == 4
    for row, members in zip(table.rows, GROUPS.members, strict=True):
        own = measured(np.setdiff1d(np.arange(N), members))
        np.testing.assert_allclose((row.mean, row.low, row.high), welch_interval(own, everything))
        np.testing.assert_allclose(row.values, own - everything.mean())
    np.testing.assert_allclose(table.references["nothing removed"], unchanged_interval(everything))
    low, high = table.references["nothing removed"][1:]
    assert low < 0 < high


def test_correlations_are_scipys_and_their_intervals_hold_them(tmp_path: Path) -> None:
    from scipy.stats import pearsonr, spearmanr

    noisy = _group_scores(EFFECTS + np.random.default_rng(1).normal(size=EFFECTS.shape))
    table = _left_out(tmp_path, {"noisy": noisy, "true": _group_scores()}, Linear(noise=0.3))
    for name in ("noisy", "true"):
        x, y = np.array([(row.x, row.mean) for row in table.of(name)]).T
        for kind, expected in (("spearman", spearmanr(x, y)), ("pearson", pearsonr(x, y))):
            value, low, high = table.settings["correlations"][name][kind]
            assert value == pytest.approx(expected.statistic)
            assert low <= value <= high
    value, low, high = table.settings["correlations"]["random"]["spearman"]
    assert low < value == 0 < high


def test_the_correlations_are_shown_below_the_table_and_in_the_legend(tmp_path: Path) -> None:
    noisy = _group_scores(EFFECTS + np.random.default_rng(1).normal(size=EFFECTS.shape))
    table = _left_out(tmp_path, {"noisy": noisy}, Linear(noise=0.3))
    both = [
        "{} {:.2f} [{:.2f}, {:.2f}]".format(kind.capitalize(), *own)
        for kind, own in table.settings["correlations"]["noisy"].items()
    ]
    assert f"noisy: {', '.join(both)}" in str(table).splitlines()
    legend = [text.get_text() for text in table.plot().axes[0].get_legend().get_texts()]
    assert f"noisy\n{', '.join(both)}" in legend
    flat = replace(_group_scores(), values=torch.full((Q, 5), 0.1, dtype=torch.float64))
    assert "Oracle: Spearman none, Pearson none" in str(_left_out(tmp_path / "flat", flat))


def test_a_group_of_all_examples_is_named(tmp_path: Path) -> None:
    groups = sf.Groups.from_lists([range(N)], N, labels=["everything"])
    scores = sf.Scores(torch.ones(Q, 1), tuple("abc"), groups.labels, (N,), {"method": "S"})
    with pytest.raises(sf.ScoreError, match="group 'everything' has all 20 examples"):
        leave_one_group_out(scores, groups, Linear(), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_predictions_for_other_queries_than_the_measured_are_refused(tmp_path: Path) -> None:
    training = Linear()
    with pytest.raises(sf.ScoreError, match="scores of 'Oracle': 1 queries, the training measures 3"):
        _left_out(tmp_path, _group_scores().total(), training)
    assert len(training.jobs) == 3, "no group was left out yet"


def test_chosen_groups_alone_are_retrained_by_place_or_label(tmp_path: Path) -> None:
    training = Linear()
    table = _left_out(tmp_path, training=training, chosen=("group 3", 1), repetitions=2)
    assert [row.label for row in table.rows] == ["group 3", "group 1"]
    assert len(training.jobs) == (2 + 1) * 2
    every = _left_out(tmp_path / "all", repetitions=2)
    assert table.rows == tuple(every.value("Oracle", label) for label in ("group 3", "group 1"))
    assert set(table.settings["correlations"]) == {"Oracle", "random"}
    for found in table.settings["correlations"].values():
        assert found == {"spearman": None, "pearson": None}, "two groups have no correlation"
    assert every.settings["correlations"]["Oracle"]["pearson"] is not None
    table.save(tmp_path / "table.json")
    assert Table.load(tmp_path / "table.json") == table


def test_predictions_that_do_not_vary_have_no_correlation(tmp_path: Path) -> None:
    flat = replace(_group_scores(), values=torch.full((Q, 5), 0.1, dtype=torch.float64))
    assert _left_out(tmp_path, flat).settings["correlations"]["Oracle"] == {"spearman": None, "pearson": None}


def test_runs_predict_by_their_mean_and_resamples_and_seed_count(tmp_path: Path) -> None:
    runs = [_group_scores(), _group_scores(3 * EFFECTS[::-1])]
    table = _left_out(tmp_path, {"runs": runs, "one": runs[0], "two": runs[1]})
    for row, one, two in zip(*(table.of(name) for name in ("runs", "one", "two")), strict=True):
        assert row.x == pytest.approx((one.x + two.x) / 2)
    noisy = {"noisy": _group_scores(EFFECTS + np.random.default_rng(1).normal(size=EFFECTS.shape))}
    plain = _left_out(tmp_path, noisy)
    other = _left_out(tmp_path, noisy, resamples=20)
    assert plain.rows == other.rows
    assert plain.settings["correlations"] != other.settings["correlations"]
    seeded = _left_out(tmp_path / "seed", noisy, Linear(noise=1.0), seed=1)
    assert seeded.rows != _left_out(tmp_path / "plain", noisy, Linear(noise=1.0)).rows


def test_examples_without_a_group_are_always_kept(tmp_path: Path) -> None:
    part = sf.Groups.from_lists([[0, 1], [5, 6, 7]], N, partial=True)
    scores = sf.Scores(torch.ones(Q, 2), tuple("abc"), part.labels, (2, 3), {"method": "S"})
    training = Linear()
    leave_one_group_out(scores, part, training, tmp_path, repetitions=1, progress=False)
    assert {len(kept) for kept, _ in training.jobs} == {N, N - 2, N - 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chosen": ["group 9"]}, r"chosen: 'group 9'; expected labels of groups, or places from 0 to 4"),
        ({"chosen": [5]}, "chosen: 5"),
        ({"chosen": []}, "chosen"),
        ({"chosen": [1, "group 1"]}, "each once"),
        ({"resamples": 0}, "resamples=0"),
        ({"resamples": 1.5}, "resamples=1.5"),
        ({"scores": TRUE}, "leave_one_group_out: groups"),
    ],
)
def test_groups_that_cannot_be_left_out_are_refused(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(sf.ScoreError, match=message):
        _left_out(tmp_path, **options)
    assert not list(tmp_path.iterdir())
