"""Leaving groups out, against a training known in closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf
from segflow.evaluation import FunctionTraining, Table, leave_one_group_out
from segflow.evaluation.statistics import unchanged_interval, welch_interval

from .closed_form import EFFECTS, TRUE, Linear, N, Q, noise_of, scores_of

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
    found = table.settings["correlations"]["Oracle"]
    np.testing.assert_allclose(found["pearson"], 1)
    np.testing.assert_allclose(found["spearman"][::2], 1)
    assert found["spearman"][1] < 0.3, "five groups in the right order are no proof"
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


def test_a_correlations_interval_is_by_fishers_transformation(tmp_path: Path) -> None:
    groups = sf.Groups.singletons(N)
    scores = scores_of(EFFECTS + 0.5 * np.random.default_rng(1).normal(size=EFFECTS.shape), method="S")
    table = leave_one_group_out(scores, groups, Linear(noise=0.3), tmp_path, progress=False, resamples=2)
    for kind, extra in (("spearman", 0.5), ("pearson", 0.0)):
        value, low, high = table.settings["correlations"]["S"][kind]
        error = ((1 + extra * value**2) / (N - 3)) ** 0.5
        least = np.tanh(np.arctanh(value) + 1.96 * error * np.array([-1, 1]))
        assert low <= least[0] + 1e-4
        assert high >= least[1] - 1e-4
    three = leave_one_group_out(scores, groups, Linear(noise=0.3), tmp_path / "three", chosen=(0, 1, 2), progress=False)
    for found in three.settings["correlations"].values():
        assert found["spearman"][1:] == [-1, 1]


def test_predictions_and_changes_that_are_equal_but_for_rounding_have_no_rank(tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    groups = sf.Groups.singletons(6)
    columns = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1], [0.1, 0.3, 0.2], [0.5, 0, 0], [0, 0.9, 0]]).T
    assert len(set(columns.mean(0))) > 3
    effects = np.array([3.0, 1, 2, 6, 4, 5])

    def measured(kept: np.ndarray, _: int) -> np.ndarray:
        return 9.0 - effects[kept].sum() * np.ones(3)

    training = FunctionTraining(measured, {}, processes=1)
    table = leave_one_group_out(scores_of(columns, method="S"), groups, training, tmp_path, progress=False)
    expected = spearmanr([6, 6, 6, 6, 5, 9], effects).statistic
    assert table.settings["correlations"]["S"]["spearman"][0] == pytest.approx(expected)

    def rounded(kept: np.ndarray, _: int) -> np.ndarray:
        left_out = np.setdiff1d(np.arange(6), kept)
        return columns[:, left_out[0] % 4] if len(left_out) else columns[:, 0]

    same = FunctionTraining(rounded, {"same": 1}, processes=1)
    table = leave_one_group_out(scores_of(columns, method="S"), groups, same, tmp_path / "same", progress=False)
    assert table.settings["correlations"]["S"] == {"spearman": None, "pearson": None}
    assert table.settings["correlations"]["random"] == {"spearman": None, "pearson": None}


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
        ({"chosen": ["group 9"]}, "chosen: there is no group 'group 9'"),
        ({"chosen": [5]}, "chosen=5: expected a whole number, 0 to 4"),
        ({"chosen": []}, "chosen"),
        ({"chosen": [1, "group 1"]}, "each of them once"),
        ({"resamples": 0}, "resamples=0"),
        ({"resamples": 1.5}, "resamples=1.5"),
        ({"scores": TRUE}, "leave_one_group_out: groups"),
    ],
)
def test_groups_that_cannot_be_left_out_are_refused(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(sf.ScoreError, match=message):
        _left_out(tmp_path, **options)
    assert not list(tmp_path.iterdir())
