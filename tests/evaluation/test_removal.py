"""Removal, retraining and pruning against a training whose measurements are known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import segflow as sf
from segflow.evaluation import (
    Bank,
    BatchedTraining,
    FunctionTraining,
    Stage,
    Table,
    dataset_pruning,
    removal_order,
    retraining_score,
)
from segflow.evaluation.statistics import student_interval

from .closed_form import EFFECTS, TRUE, Linear, N, Q, noise_of, scores_of


def _expected(removed: np.ndarray) -> float:
    """The mean measurement without noise."""
    return float((-EFFECTS.sum(1) + EFFECTS[:, removed].sum(1)).mean())


# ---- the order ----


def test_examples_are_removed_by_their_summed_scores() -> None:
    summed = EFFECTS.sum(0)
    assert removal_order(TRUE).tolist() == np.argsort(-summed).tolist()
    assert removal_order(TRUE, largest=False).tolist() == np.argsort(summed).tolist()
    assert removal_order(TRUE, absolute=True).tolist() == np.argsort(-np.abs(summed)).tolist()
    assert removal_order(TRUE, largest=False, absolute=True).tolist() == np.argsort(np.abs(summed)).tolist()


def test_members_of_a_group_stay_together_in_random_order_also_where_groups_have_equal_sums() -> None:
    groups = sf.Groups.random(60, 6, seed=1)
    values = torch.tensor([[1.0, 0.0, 2.0, 3.0] + [1.0] * 6, [2.0, 3.0, 1.0, 0.0] + [2.0] * 6])  # all sums are 3
    values[:, 4:] += (0.125 + torch.arange(6) / 4) * torch.tensor([[1.0], [-1.0]])
    scores = sf.Scores(values, ("p", "q"), groups.labels, tuple(groups.sizes)).by_example(groups)
    of = groups.membership()
    orders = [removal_order(scores, seed=seed) for seed in range(8)]
    for order in orders:
        assert sorted(order) == list(range(60))
        assert (np.diff(of[order]) != 0).sum() == len(groups) - 1, "each group is one run of the order"
    assert len({tuple(of[order][::6]) for order in orders}) > 4, "groups in random order"
    assert len({tuple(order[np.isin(order, groups.members[0])]) for order in orders}) > 4, "members in random order"
    assert np.array_equal(orders[0], removal_order(scores))


def test_ties_of_everything_are_broken_evenly() -> None:
    scores = scores_of(np.zeros((1, 4)))
    first = [removal_order(scores, seed=seed)[0] for seed in range(400)]
    assert (np.bincount(first, minlength=4) > 70).all()


# ---- retraining score and pruning ----


@pytest.mark.parametrize(
    ("task", "largest", "falling"),
    [
        (retraining_score, True, True),
        (retraining_score, False, False),
        (dataset_pruning, True, False),
        (dataset_pruning, False, True),
    ],
)
def test_a_share_of_the_ranking_is_removed_from_its_end(
    tmp_path: Path, task: Callable[..., Table], largest: bool, falling: bool
) -> None:
    summed = EFFECTS.sum(0)
    order = np.argsort(-summed if falling else summed)
    table = task(TRUE, Linear(), tmp_path, shares=(0.1, 0.25), largest=largest, progress=False)
    assert table.series == ("Oracle", "random")
    for share, count in ((0.1, 2), (0.25, 5)):
        row = table.value("Oracle", share)
        assert row.mean == pytest.approx(_expected(order[:count]))
        assert row.low == pytest.approx(row.mean) == pytest.approx(row.high)
        assert len(row.values) == 3
    assert table.references["nothing removed"][0] == pytest.approx(_expected(order[:0]))
    assert table.settings["removed"] == [2, 5]
    assert table.settings["largest"] == largest


def test_the_oracles_curve_is_beyond_that_of_random_removal(tmp_path: Path) -> None:
    options: dict[str, Any] = {"shares": (0.25, 0.5), "repetitions": 8, "progress": False}
    up = retraining_score(TRUE, Linear(noise=0.1), tmp_path, **options)
    down = dataset_pruning(TRUE, Linear(noise=0.1), tmp_path, **options)
    for share in (0.25, 0.5):
        assert up.value("Oracle", share).low > up.value("random", share).high
        assert down.value("Oracle", share).high < down.value("random", share).low


def test_a_rows_interval_is_students_over_its_retrainings(tmp_path: Path) -> None:
    training = Linear(noise=1.0)
    table = retraining_score(TRUE, training, tmp_path, shares=(0.1,), repetitions=4, progress=False)
    kept = tuple(sorted(set(range(N)) - set(np.argsort(-EFFECTS.sum(0))[:2])))
    values = [-EFFECTS[:, kept].sum(1).mean() + noise_of(seed, Q).mean() for own, seed in training.jobs if own == kept]
    row = table.value("Oracle", 0.1)
    np.testing.assert_allclose(row.values, values)
    np.testing.assert_allclose((row.mean, row.low, row.high), student_interval(values))
    assert len(set(values)) == 4, "each retraining has a seed of its own"
    everything = [seed for own, seed in training.jobs if own == tuple(range(N))]
    nothing = student_interval([-EFFECTS.sum(1).mean() + noise_of(seed, Q).mean() for seed in everything])
    np.testing.assert_allclose(table.references["nothing removed"], nothing)
    assert "Student's t, of the mean over the retrainings" in table.settings["interval"]


def test_several_runs_are_averaged_and_the_interval_is_over_the_runs(tmp_path: Path) -> None:
    runs = [scores_of(EFFECTS + np.random.default_rng(seed).normal(size=EFFECTS.shape)) for seed in range(3)]
    scores = {"ensemble": runs, "true": TRUE}
    table = retraining_score(scores, Linear(), tmp_path, shares=(0.25,), repetitions=2, progress=False)
    expected = [_expected(removal_order(run)[:5]) for run in runs]
    row = table.value("ensemble", 0.25)
    np.testing.assert_allclose(row.values, expected)
    np.testing.assert_allclose((row.mean, row.low, row.high), student_interval(expected))
    assert len(table.value("true", 0.25).values) == 2
    assert len(table.value("random", 0.25).values) == 6, "as many orders as the series has retrainings"
    assert table.settings["runs"] == {"ensemble": 3, "true": 1}


def test_random_orders_are_retrained_once_each_and_differ(tmp_path: Path) -> None:
    table = retraining_score(TRUE, Linear(), tmp_path, shares=(0.25,), repetitions=5, progress=False)
    assert len(set(table.value("random", 0.25).values)) == 5
    everything = Linear()
    many = retraining_score(TRUE, everything, tmp_path / "many", shares=(0.25,), repetitions=300, progress=False)
    row = many.value("random", 0.25)
    assert row.low < -EFFECTS.sum(1).mean() * 0.75 < row.high, "in expectation random removal scales the sum"


def test_one_retraining_has_no_interval(tmp_path: Path) -> None:
    table = retraining_score(TRUE, Linear(noise=1.0), tmp_path, shares=(0.1,), repetitions=1, progress=False)
    row = table.value("Oracle", 0.1)
    assert (row.low, row.high) == (-np.inf, np.inf)
    table.save(tmp_path / "table.json")
    assert Table.load(tmp_path / "table.json") == table


def test_positive_counts_queries_above_zero(tmp_path: Path) -> None:
    training = Linear(offset=EFFECTS.sum(1).mean())
    options: dict[str, Any] = {"shares": (0.3,), "progress": False}
    accuracy = retraining_score(TRUE, training, tmp_path, summary="positive", **options)
    kept = np.argsort(-EFFECTS.sum(0))[6:]
    measured = EFFECTS.sum(1).mean() - EFFECTS[:, kept].sum(1)
    assert accuracy.value("Oracle", 0.3).mean == pytest.approx((measured > 0).mean())
    assert 0 < accuracy.references["nothing removed"][0] < 1
    assert accuracy.y != retraining_score(TRUE, training, tmp_path, **options).y
    with pytest.raises(sf.ScoreError, match="summary='median' is not known"):
        retraining_score(TRUE, training, tmp_path, summary="median", **options)


def test_a_share_of_queries_has_students_interval_with_half_a_query_more(tmp_path: Path) -> None:
    training = Linear(noise=1.0, offset=EFFECTS.sum(1).mean())
    options: dict[str, Any] = {"shares": (0.3,), "summary": "positive", "repetitions": 4, "progress": False}
    table = retraining_score(TRUE, training, tmp_path, **options)
    for row in table.rows:
        _, low, high = student_interval(row.values)
        np.testing.assert_allclose((row.low, row.high), (max(0, low - 0.5 / Q), min(1, high + 0.5 / Q)))
    low, high = table.references["nothing removed"][1:]
    assert 1 / Q <= high - low <= 1
    assert "half a query" in table.settings["interval"]
    two = retraining_score(TRUE, training, tmp_path / "two", **(options | {"repetitions": 2}))
    assert {row.low for row in two.rows} == {-np.inf}


def test_seed_moves_noise_random_orders_and_ties(tmp_path: Path) -> None:
    ties = scores_of(np.zeros((1, N)), method="Ties")
    tables = [
        retraining_score(ties, Linear(noise=1.0), tmp_path / str(seed), shares=(0.5,), seed=seed, progress=False)
        for seed in range(2)
    ]
    for series in ("Ties", "random"):
        assert not set(tables[0].value(series, 0.5).values) & set(tables[1].value(series, 0.5).values)
    assert tables[0].references != tables[1].references


def test_a_training_on_tensors_takes_the_scores_of_its_examples(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(12, 2, generator=generator), torch.randn(12, 1, generator=generator)

    def errors(outputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return torch.stack([(outputs - wanted).square().squeeze(1), (wanted - outputs).abs().squeeze(1)])

    stage = Stage(inputs, targets, nn.functional.mse_loss, lambda p: torch.optim.SGD(p, lr=0.1), 2, 4)
    training = BatchedTraining(lambda: nn.Linear(2, 1), (stage,), inputs[:3], targets[:3], errors)
    scores = scores_of(np.random.default_rng(0).normal(size=(3, 12)), method="Some")
    options: dict[str, Any] = {"shares": (0.25,), "repetitions": 2, "progress": False}
    squared, absolute = (
        retraining_score(scores, training, tmp_path, measurement=number, **options) for number in range(2)
    )
    kept = np.sort(removal_order(scores)[3:])
    assert any(_holds(path, kept) for path in tmp_path.glob("bank-*"))
    assert squared.value("Some", 0.25).mean != absolute.value("Some", 0.25).mean
    with pytest.raises(sf.ScoreError, match="measurement=2: the training has 2 for each query"):
        retraining_score(scores, training, tmp_path, measurement=2, **options)
    with pytest.raises(sf.ScoreError, match="the training has 12 examples, the scores are about 20"):
        retraining_score(TRUE, training, tmp_path, **options)


def test_measurement_chooses_among_those_of_a_function(tmp_path: Path) -> None:
    def both(kept: np.ndarray, seed: int) -> np.ndarray:
        return np.stack([-EFFECTS[:, kept].sum(1), np.full(Q, 7.0)])

    training = FunctionTraining(both, {}, processes=1)
    options: dict[str, Any] = {"shares": (0.25,), "progress": False}
    first, second = (retraining_score(TRUE, training, tmp_path, measurement=m, **options) for m in range(2))
    assert first.value("Oracle", 0.25) == retraining_score(TRUE, Linear(), tmp_path / "one", **options).rows[0]
    assert {row.mean for row in second.rows} == {7.0}
    assert first.settings["queries"] == Q


def _holds(path: Path, kept: np.ndarray) -> bool:
    subsets, _ = sf.evaluation.read_bank(path)
    return any(np.array_equal(np.flatnonzero(row), kept) for row in subsets)


# ---- refusals ----


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "with nothing to compare"),
        ([TRUE], "expected segflow.Scores or a mapping"),
        ({"a": []}, "expected segflow.Scores, or a sequence of at least one"),
        ({"a": EFFECTS}, "expected segflow.Scores, or a sequence"),
        ({"random": TRUE}, "called 'random'"),
        ({np.int64(64): TRUE}, "a int64. Name series by a str"),
        ({"a": TRUE, "b": scores_of(EFFECTS[:, :5])}, "'b': 5 columns, those of 'a' have 20"),
        (replace(TRUE, group_sizes=(2,) * N), "expected single examples. Use scores.by_example"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(tmp_path: Path, scores: Any, message: str) -> None:
    with pytest.raises(sf.ScoreError, match=message):
        retraining_score(scores, Linear(), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_plain_function_is_no_training(tmp_path: Path) -> None:
    def train(kept: np.ndarray, seed: int) -> list[float]:
        return [0.0] * Q

    with pytest.raises(sf.ScoreError, match=r"training: function, expected.*Wrap a function in FunctionTraining"):
        retraining_score(TRUE, train, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(sf.ScoreError, match="Wrap a function in FunctionTraining"):
        Bank(tmp_path, train, np.ones((1, 2), dtype=bool))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (0.1, "shares=0.1: expected a seq"),
        ((np.nan,), "finite"),
        (("a",), "finite"),
        ((0.01,), "removes 0"),
        ((0.5, 1.0), "removes 20"),
        ((), "expected some"),
        ((0.5, 0.51), "of another number"),
    ],
)
def test_shares_must_remove_some_and_differ(tmp_path: Path, shares: Any, message: str) -> None:
    with pytest.raises(sf.ScoreError, match=message):
        dataset_pruning(TRUE, Linear(), tmp_path, shares=shares, progress=False)
