"""Retrainings are reused: nothing is trained twice, and numbers do not depend on what was asked for before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import segflow as sf
from segflow.evaluation import Bank, dataset_pruning, retraining_score
from segflow.evaluation.retraining.reuse import Retrainings
from segflow.evaluation.retraining.seeds import training_seeds

from .closed_form import EFFECTS, TRUE, Linear, N, Q, noise_of, scores_of


def test_what_was_trained_is_not_trained_again_by_series_shares_or_tasks(tmp_path: Path) -> None:
    options: dict[str, Any] = {"shares": (0.1, 0.25), "repetitions": 2, "progress": False}
    first = Linear(noise=1.0)
    table = retraining_score({"one": TRUE, "same": TRUE}, first, tmp_path, **options)
    assert len(first.jobs) == len(set(first.jobs)) == (2 + 1) * 2 + 2 * 2, "two shares and everything; random ones"
    assert table.of("one") == tuple(replace(row, series="one") for row in table.of("same"))

    again = Linear(noise=1.0)
    assert retraining_score({"one": TRUE, "same": TRUE}, again, tmp_path, **options) == table
    assert again.jobs == []

    other = scores_of(EFFECTS[:, ::-1].copy(), method="Other")
    more = retraining_score({"one": TRUE, "same": TRUE, "more": other}, again, tmp_path, **options)
    assert len(again.jobs) == 2 * 2, "the added series only"
    assert set(table.rows) < set(more.rows)
    pruned = dataset_pruning({"one": TRUE}, again, tmp_path, **options)
    assert len(again.jobs) == 2 * 2 + 2 * 2, "the other end of the ranking; random orders and everything are there"
    assert pruned.references == table.references


def test_numbers_do_not_depend_on_what_was_trained_before(tmp_path: Path) -> None:
    options: dict[str, Any] = {"shares": (0.1, 0.25), "repetitions": 2, "progress": False}
    other = scores_of(-EFFECTS[::-1])
    retraining_score({"other": other}, Linear(noise=1.0), tmp_path / "a", **options)
    after = retraining_score({"one": TRUE, "other": other}, Linear(noise=1.0), tmp_path / "a", **options)
    assert after == retraining_score({"one": TRUE, "other": other}, Linear(noise=1.0), tmp_path / "b", **options)


def test_more_repetitions_train_only_the_rest_of_what_is_asked_for(tmp_path: Path) -> None:
    options: dict[str, Any] = {"shares": (0.1,), "progress": False}
    few = retraining_score({"one": TRUE}, Linear(noise=1.0), tmp_path, repetitions=2, **options)
    training = Linear(noise=1.0)
    more = retraining_score({"one": TRUE}, training, tmp_path, repetitions=3, **options)
    assert len(training.jobs) == 2 + 1, "one more of each of two subsets, and one more random order"
    assert more.value("one", 0.1).values[:2] == few.value("one", 0.1).values
    assert more.value("random", 0.1).values[:2] == few.value("random", 0.1).values


def test_a_stopped_task_goes_on_where_it_was(tmp_path: Path) -> None:
    class Stopping(Linear):
        def run(self, jobs: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
            if len(self.jobs) >= 8:
                raise KeyboardInterrupt
            return super().run(jobs)

    options: dict[str, Any] = {"shares": (0.1, 0.2, 0.3), "progress": False}
    stopping = Stopping(noise=1.0)
    with pytest.raises(KeyboardInterrupt):
        retraining_score(TRUE, stopping, tmp_path / "stopped", **options)
    rest, whole = Linear(noise=1.0), Linear(noise=1.0)
    assert retraining_score(TRUE, rest, tmp_path / "stopped", **options) == retraining_score(
        TRUE, whole, tmp_path / "whole", **options
    )
    assert 0 < len(stopping.jobs) < len(whole.jobs)
    assert sorted(stopping.jobs + rest.jobs) == sorted(whole.jobs)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda options: options | {"training": Linear(recipe=1)}, "recipe"),
        (lambda options: options | {"seed": 1}, "seed"),
    ],
)
def test_retrainings_of_another_recipe_are_refused(tmp_path: Path, change: Any, key: str) -> None:
    options: dict[str, Any] = {"training": Linear(), "folder": tmp_path, "shares": (0.1,), "progress": False}
    retraining_score(TRUE, **options)
    with pytest.raises(
        sf.ScoreError, match=rf"made with something else \(.*{key}: stored 0, now 1.*Use another folder"
    ):
        dataset_pruning(TRUE, **change(options))


def test_retrainings_about_other_examples_are_refused(tmp_path: Path) -> None:
    retraining_score(TRUE, Linear(), tmp_path, shares=(0.1,), progress=False)
    fewer = scores_of(EFFECTS[:, :10])
    with pytest.raises(sf.ScoreError, match="about 20 examples, now there are 10"):
        retraining_score(fewer, Linear(EFFECTS[:, :10]), tmp_path, shares=(0.1,), progress=False)


def test_the_pool_gives_each_subset_its_own_numbers_in_the_order_that_was_asked(tmp_path: Path) -> None:
    subsets = np.random.default_rng(0).random((6, N)) < 0.5
    pool = Retrainings(Linear(), tmp_path, repetitions=2, progress=False)
    pool.measured(subsets[[4, 1]])
    asked = [0, 4, 1, 0, 5, 4]
    expected = np.repeat(-(subsets[asked] @ EFFECTS.T)[:, None], 2, 1)
    np.testing.assert_allclose(pool.measured(subsets[asked]), expected)
    assert pool.nothing_removed(N).shape == (2, Q)
    with pytest.raises(sf.ScoreError, match="keeps none of 20 examples"):
        pool.measured(np.zeros((1, N), dtype=bool))
    with pytest.raises(sf.ScoreError, match="repetitions=0: expected a whole number, at least 1"):
        Retrainings(Linear(), tmp_path, repetitions=0)
    for name, wrong in (("repetitions", 2.5), ("seed", 1.5), ("seed", -1), ("measurement", 0.5)):
        with pytest.raises(sf.ScoreError, match=f"{name}={wrong}"):
            Retrainings(Linear(), tmp_path, **{name: wrong})
    whole = np.int64(2)
    table = retraining_score(TRUE, Linear(), tmp_path, shares=(0.1,), repetitions=whole, seed=whole - 2, progress=False)
    assert table.settings["repetitions"] == 2
    with pytest.raises(TypeError, match="epochs"):
        retraining_score(TRUE, Linear(), tmp_path, epochs=3)


def test_a_bank_runs_the_rows_that_are_wanted(tmp_path: Path) -> None:
    subsets = np.random.default_rng(0).random((3, N)) < 0.5
    training = Linear(noise=1.0)
    bank = Bank(tmp_path, training, subsets, 2, seed=3)
    found = bank.run(progress=False, rows=[2, 0])
    seeds = training_seeds(subsets, 2, 3)
    assert {seed for _, seed in training.jobs} == set(seeds[[2, 0]].ravel().tolist())
    expected = [[-EFFECTS[:, subsets[m]].sum(1) + noise_of(s, Q) for s in seeds[m]] for m in (2, 0)]
    np.testing.assert_allclose(found, expected)
    assert bank.missing == [(0, 1), (1, 1)]
