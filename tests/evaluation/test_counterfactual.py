"""Counterfactuals, against a training known in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf
from segflow.evaluation import FunctionTraining, read_bank, removal_counterfactual
from segflow.evaluation.intervals import over_cases_and_runs
from segflow.evaluation.series import random_order

from .closed_form import EFFECTS, MARGINS, SUPPORT, Linear, Margins, N, Q, noise_of, scores_of


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
        assert (row.mean, row.low, row.high) == (np.mean(expected), -np.inf, np.inf), "of two queries"
    assert [table.value("Oracle", count).mean for count in (1, 10)] == [0.5, 1.0]
    assert table.references["nothing removed"][0] == 0
    assert "Agresti" in table.settings["interval"]


def test_intervals_are_over_the_queries_and_where_there_are_runs_over_those_as_well(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    effects, margins = np.abs(generator.normal(size=(30, N))), generator.uniform(0.5, 6, 30)

    def measured(kept: np.ndarray, seed: int) -> np.ndarray:
        return margins - np.delete(effects, kept, axis=1).sum(1)

    noisy = [scores_of(-effects + generator.normal(size=effects.shape)) for _ in range(3)]
    series = {"true": scores_of(-effects), "three": noisy, "two": noisy[:2]}
    training = FunctionTraining(measured, {}, processes=1)
    table = removal_counterfactual(series, training, tmp_path, counts=(3,), repetitions=1, progress=False)
    turned = margins < np.sort(effects, axis=1)[:, -3:].sum(1)
    row = table.value("true", 3)
    assert 0 < row.mean == turned.mean() < 1
    expected = over_cases_and_runs(np.array([turned.mean()]), np.var(turned, ddof=1) / 30, 30)
    np.testing.assert_allclose((row.low, row.high), expected[1:])
    values = [-scores.values.numpy() for scores in noisy]
    runs = np.stack([margins < np.take_along_axis(effects, np.argsort(-v, axis=1)[:, :3], 1).sum(1) for v in values])
    row = table.value("three", 3)
    np.testing.assert_allclose(row.values, runs.mean(0))
    expected = over_cases_and_runs(runs.mean(1), np.var(runs.mean(0), ddof=1) / 30, 30)
    np.testing.assert_allclose((row.mean, row.low, row.high), expected)
    expected = over_cases_and_runs(runs[:2].mean(1), np.var(runs[:2].mean(0), ddof=1) / 30, 30)
    np.testing.assert_allclose(table.value("two", 3).low, expected.low)
    row = table.value("random", 3)
    assert len(row.values) == 5
    assert 0 <= row.low <= row.mean <= row.high < table.value("true", 3).high
    nothing = table.references["nothing removed"]
    np.testing.assert_allclose(nothing, over_cases_and_runs(np.zeros(1), 0.0, 30))


def test_effects_that_are_equal_but_for_rounding_are_ties_and_the_seed_says_which_are_removed(tmp_path: Path) -> None:
    values = np.float32([[0.1], [0.3], [0.2]]) * np.ones(N, dtype=np.float32)
    values[:, ::5] = np.nextafter(values[:, ::5], np.float32(1))
    removed: set[int] = set()
    for seed in range(10):
        training = Margins()
        flat = scores_of(torch.from_numpy(-values))
        removal_counterfactual(flat, training, tmp_path / str(seed), counts=(2,), seed=seed, progress=False)
        pairs = {frozenset(set(range(N)) - set(kept)) for kept, _ in training.jobs if len(kept) == N - 2}
        by_query = pairs - {frozenset(random_order(N, seed, draw)[:2].tolist()) for draw in range(5)}
        removed |= {place for pair in by_query for place in pair}
    assert len(removed) > 8, "not only the four that are larger by a rounding"


def test_random_removal_turns_queries_as_often_as_its_draws_do(tmp_path: Path) -> None:
    table = removal_counterfactual(SUPPORT, Margins(), tmp_path, counts=(12,), progress=False)
    subsets = [row for path in tmp_path.glob("bank-*") for row in read_bank(path)[0] if row.sum() == N - 12]
    orders = {q: np.argsort(-EFFECTS[q])[:12] for q in (0, 1)}
    drawn = [row for row in subsets if not any(set(np.flatnonzero(~row)) == set(order) for order in orders.values())]
    assert len(drawn) == 5
    expected = [np.mean([_turns(np.flatnonzero(~row), q, 12) for q in (0, 1)]) for row in drawn]
    row = table.value("random", 12)
    assert sorted(row.values) == pytest.approx(sorted(expected))
    assert 0 < table.value("random", 12).mean < table.value("Oracle", 12).mean


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
    assert table.references["nothing removed"][0] == nothing
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


def test_a_counterfactual_resumes_and_its_seed_draws_others(tmp_path: Path) -> None:
    first = removal_counterfactual(SUPPORT, Margins(), tmp_path / "a", counts=(2, 12), progress=False)
    again = Margins()
    assert removal_counterfactual(SUPPORT, again, tmp_path / "a", counts=(2, 12), progress=False) == first
    assert again.jobs == []
    other = removal_counterfactual(SUPPORT, Margins(), tmp_path / "b", counts=(2, 12), seed=5, progress=False)
    assert other.of("Oracle") == first.of("Oracle")
    assert other.of("random") != first.of("random")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": (0,)}, r"counts\[0\]=0: expected a whole number, 1 to 19"),
        ({"counts": (2, 20)}, r"counts\[1\]=20: expected a whole number, 1 to 19"),
        ({"counts": ()}, "expected one or more"),
        ({"counts": (0.1,)}, r"counts\[0\]=0.1: expected a whole number"),
        ({"counts": 3}, "counts=3: expected a sequence"),
        ({"counts": (2, 2)}, "each of them once"),
        ({"scores": SUPPORT.total()}, "1 queries, the training measures 3"),
        ({"training": Linear(np.abs(EFFECTS))}, "none of 3 queries has a measurement above 0.*margins"),
    ],
)
def test_a_counterfactual_that_makes_no_sense_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    plain = {"scores": SUPPORT, "training": Margins(), "folder": tmp_path, "counts": (2,), "progress": False}
    with pytest.raises(sf.ScoreError, match=message):
        removal_counterfactual(**(plain | change))
