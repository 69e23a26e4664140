"""Random subsets, and retraining on them in one process or several."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import segflow as sf
from segflow.evaluation import random_subsets, retrain


def test_random_subsets_keep_the_fraction_evenly_and_repeat_with_the_seed() -> None:
    subsets = random_subsets(400, 10, 0.3, seed=4)
    assert subsets.shape == (400, 10)
    assert subsets.dtype == bool
    assert (subsets.sum(1) == 3).all()
    assert abs(subsets.mean(0) - 0.3).max() < 0.1
    assert (subsets == random_subsets(400, 10, 0.3, seed=4)).all()
    assert (subsets != random_subsets(400, 10, 0.3, seed=5)).any()
    assert (random_subsets(3, 10).sum(1) == 5).all()


def test_coin_flip_subsets_keep_each_group_by_itself_and_never_none() -> None:
    subsets = random_subsets(4000, 4, 0.25, seed=4, fixed=False)
    sizes = np.bincount(subsets.sum(1), minlength=5)
    binomial = np.array([0, 0.421875, 0.2109375, 0.046875, 0.00390625]) / (1 - 0.31640625)
    np.testing.assert_allclose(sizes / 4000, binomial, atol=0.03)
    again = np.corrcoef(random_subsets(4000, 8, 0.5, fixed=False).T)
    assert np.abs(again - np.eye(8)).max() < 0.06, "groups of fixed subsets would have -1/7"
    assert (subsets == random_subsets(4000, 4, 0.25, seed=4, fixed=False)).all()
    assert (subsets != random_subsets(4000, 4, 0.25, seed=5, fixed=False)).any()
    with pytest.raises(sf.ScoreError, match="fixed=0: expected True or False"):
        random_subsets(3, 4, fixed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((3, 10, 0.01), r"fraction=0\.01 keeps 0 of 10 groups: expected some, but not all"),
        ((3, 10, 1.0), r"fraction=1\.0 keeps 10 of 10 groups"),
        ((3, 10, -0.5), r"fraction=-0\.5 keeps -5 of 10"),
        ((0, 10), "count=0: expected a whole number, at least 1"),
    ],
)
def test_subsets_that_keep_all_or_nothing_are_refused(arguments: tuple, text: str) -> None:
    with pytest.raises(sf.ScoreError, match=text):
        random_subsets(*arguments)


def _tell(kept: np.ndarray, seed: int) -> list[float]:
    return [float(sum(2**k for k in kept)), float(seed), float(torch.get_num_threads())]


def _train(kept: np.ndarray, seed: int) -> torch.Tensor:
    """Ten steps of SGD on some examples: equal only if seeds, examples and rounding are. The result has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).split([299, 1], 1)
    weight = torch.randn(299, 1, generator=generator).requires_grad_()
    for _ in range(10):
        loss = (x[kept] @ weight - y[kept]).square().mean()
        weight = (weight - 0.001 * torch.autograd.grad(loss, weight)[0]).detach().requires_grad_()
    return (x @ weight)[:5, 0]


def _fail(kept: np.ndarray, seed: int) -> list[float]:
    raise FloatingPointError(f"diverged with {len(kept)} examples")


def _scalar(kept: np.ndarray, seed: int) -> float:
    return float(len(kept))


def test_each_subset_is_retrained_with_seeds_of_its_own_on_one_thread() -> None:
    subsets = np.array([[1, 0, 1], [0, 1, 1]], dtype=bool)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = retrain(_tell, subsets, repetitions=3, processes=1, seed=10, progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert found.shape == (2, 3, 3)
    assert found.dtype == np.float64
    assert found[..., 0].tolist() == [[5.0] * 3, [6.0] * 3]
    assert len(np.unique(found[..., 1])) == 6
    assert (found[..., 2] == 1).all()
    other = retrain(_tell, subsets, repetitions=3, processes=1, seed=11, progress=False)
    assert (found[..., 1] != other[..., 1]).all()
    assert retrain(_scalar, subsets, processes=1, progress=False).tolist() == [[[2.0]], [[2.0]]]


def test_one_and_two_processes_give_equal_results() -> None:
    subsets = random_subsets(3, 64)
    one, two = (retrain(_train, subsets, repetitions=2, processes=n, progress=False) for n in (1, 2))
    assert one.shape == (3, 2, 5)
    np.testing.assert_array_equal(one, two)
    assert len(np.unique(one[..., 0])) == 6


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_failing_retraining_is_not_passed_over(processes: int) -> None:
    with pytest.raises(FloatingPointError, match="diverged with 32 examples"):
        retrain(_fail, random_subsets(2, 64), processes=processes, progress=False)


@pytest.mark.parametrize(
    ("count", "repetitions", "text"),
    [(0, 1, "no subsets were given"), (2, 0, "repetitions=0: expected a whole number, at least 1")],
)
def test_nothing_to_retrain_is_refused(count: int, repetitions: int, text: str) -> None:
    with pytest.raises(sf.ScoreError, match=text):
        retrain(_tell, np.ones((count, 3), dtype=bool), repetitions=repetitions, processes=1)
