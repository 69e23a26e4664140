"""Orders and baselines are drawn from streams of their own, and ties within rounding are ties."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf
from segflow.evaluation import FunctionTraining, random_subsets, removal_order, retraining_score
from segflow.evaluation.series import ordered, random_order, summed_over_queries

from .closed_form import scores_of

N = 200


def _corrupted(seed: int) -> np.ndarray:
    """The tenth of the examples that users, and the benchmarks, would corrupt with a seed."""
    return np.random.default_rng(seed).permutation(N)[: N // 10]


_ORDERS: dict[str, Callable[[int], np.ndarray]] = {
    "random order 0": lambda seed: random_order(N, seed, 0),
    "random order 1": lambda seed: random_order(N, seed, 1),
    "ties": lambda seed: removal_order(scores_of(np.zeros((1, N))), seed=seed),
    "coin flips": lambda seed: np.argsort(random_subsets(1, N, 0.1, seed, fixed=False)[0])[::-1],
}


@pytest.mark.parametrize("name", _ORDERS)
def test_orders_are_independent_of_labels_that_numpy_corrupted_with_any_seed(name: str) -> None:
    found = [
        np.isin(_ORDERS[name](seed)[: N // 10], _corrupted(corrupted)).mean()
        for seed in range(12)
        for corrupted in range(4)
    ]
    assert max(found) < 0.4, "of 20 places, by chance 2 and hardly ever 8"
    assert np.mean(found) == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_random_removal_leaves_nine_tenths_of_the_wrong_labels_whatever_corrupted_them(
    seed: int, tmp_path: Path
) -> None:
    wrong = np.isin(np.arange(N), _corrupted(seed))

    def share_left(kept: np.ndarray, _: int) -> list[float]:
        return [wrong[kept].sum() / wrong.sum()]

    training = FunctionTraining(share_left, {"corrupted": seed}, processes=1)
    scores = scores_of(np.random.default_rng(5).normal(size=(1, N)), method="useless")
    options: dict[str, Any] = {"shares": (0.1,), "largest": False, "repetitions": 12, "progress": False}
    row = retraining_score(scores, training, tmp_path, seed=seed, **options).value("random", 0.1)
    assert min(row.values) > 0.6
    assert row.mean == pytest.approx(0.9, abs=0.05)


def test_no_two_orders_are_the_same_or_those_of_another_seed() -> None:
    orders = {tuple(random_order(N, seed, number)) for seed in range(6) for number in range(6)}
    assert len(orders) == 36
    assert random_order(N, 3, 1).tolist() == random_order(N, 3, 1).tolist()
    flat = scores_of(np.zeros((1, N)), method="flat")
    ties = {tuple(removal_order(flat, seed=seed)) for seed in range(6)}
    assert not ties & orders
    of_numpy = {tuple(ordered(np.zeros(N), np.zeros((1, N)), np.random.default_rng(seed))) for seed in range(6)}
    assert not ties & of_numpy


@pytest.mark.parametrize("seed", range(4))
def test_a_random_order_does_not_remove_random_groups_one_after_the_other(seed: int) -> None:
    groups = sf.Groups.random(N, 20, seed=seed).membership()
    met = [len(np.unique(groups[random_order(N, seed, number)[:20]])) for number in range(4)]
    assert min(met) > 4, "of 10 groups, by chance about 9"


def test_the_runs_of_a_series_break_ties_in_orders_of_their_own(tmp_path: Path) -> None:
    flat = scores_of(np.zeros((1, N)), method="flat")
    jobs: dict[int, set[tuple[int, ...]]] = {}
    for seed in range(3):
        removed: set[tuple[int, ...]] = set()

        def note(kept: np.ndarray, _: int, removed: set[tuple[int, ...]] = removed) -> list[float]:
            removed.add(tuple(np.setdiff1d(np.arange(N), kept)))
            return [0.0]

        training = FunctionTraining(note, {"seed": seed}, processes=1)
        options: dict[str, Any] = {"shares": (0.1,), "repetitions": 1, "seed": seed, "progress": False}
        retraining_score({"runs": [flat] * 3}, training, tmp_path / str(seed), **options)
        jobs[seed] = removed - {()}
        assert len(jobs[seed]) == 3 + 3, "three runs and as many random orders"
    assert not (jobs[0] & jobs[1]) | (jobs[1] & jobs[2]), "run 1 of seed 0 is not run 0 of seed 1"


# ---- ties ----


def test_sums_over_queries_that_differ_by_rounding_are_one_number() -> None:
    columns = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1], [1.0, 0.0, 0.0]]).T
    assert len(set(columns.sum(0))) == 3
    found = summed_over_queries(scores_of(columns))
    assert found[0] == found[1] == found[2] < found[3]


def test_ties_within_rounding_are_removed_in_random_order() -> None:
    columns = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]).T
    scores = scores_of(np.tile(columns, 20))
    first = [removal_order(scores, seed=seed)[0] % 2 for seed in range(200)]
    assert 60 < sum(first) < 140
    sizes = np.arange(1, 41, dtype=np.float32)
    shares = scores_of(torch.from_numpy(np.float32(0.1) * sizes / sizes)[None])
    assert len(shares.values.unique()) > 1
    for options in ({}, {"largest": False}, {"absolute": True}):
        met = {int(removal_order(shares, seed=seed, **options)[0]) for seed in range(200)}
        assert len(met) > 35


def test_what_is_larger_by_more_than_rounding_comes_first() -> None:
    values = 1 + 1e-9 * np.random.default_rng(0).permutation(50)
    assert removal_order(scores_of(values)).tolist() == np.argsort(-values).tolist()
