"""Training in one process, alone or many models at a time: stages, subsets, measuring, diverging, random state."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional

from segflow.errors import ScoreError
from segflow.evaluation import BatchedTraining, random_subsets

from ..support.plain_loop import jobs_of, losses_of, plain_loop, stage_of, training_of

adamw = partial(optim.AdamW, lr=0.02, weight_decay=0.1)
both_ways = pytest.mark.parametrize("together", [1, 64])


def _jobs(subsets: np.ndarray) -> list[tuple[np.ndarray, int]]:
    return [(np.flatnonzero(kept), 10 + number) for number, kept in enumerate(subsets)]


def _expected(training: BatchedTraining, jobs: list[tuple[np.ndarray, int]]) -> np.ndarray:
    return np.stack([plain_loop(training, *job) for job in jobs])


# ---- stages and subsets ----


@both_ways
def test_stages_follow_each_other_each_with_its_own_data_and_optimizer(together: int) -> None:
    first, second = stage_of(8), stage_of(10, 1, optimizer=adamw, epochs=2, batch_size=3)
    training = training_of(first, second, together=together)
    assert training.examples == 18
    jobs = _jobs(np.concatenate([random_subsets(4, 8), np.ones((4, 10), dtype=bool)], axis=1))
    expected = _expected(training, jobs)
    np.testing.assert_allclose(training.run(jobs), expected, rtol=1e-10)
    assert not np.allclose(training_of(second, first).run(jobs), expected)


def test_subsets_of_several_sizes_are_trained_with_their_like() -> None:
    subsets = np.concatenate([random_subsets(3, 14), random_subsets(3, 14, fraction=0.3)])[[0, 3, 1, 4, 2, 5]]
    training = training_of(together=2)
    assert training.batches(_jobs(subsets)) == [[0, 2], [4], [1, 3], [5]]
    np.testing.assert_allclose(training.run(_jobs(subsets)), _expected(training, _jobs(subsets)), rtol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: replace(t, together=0), "together=0"),
        (lambda t: replace(t, stages=[]), "there are none"),
        (lambda t: replace(t, stages=[replace(t.stages[0], batch_size=0)]), "batch_size=0"),
        (lambda t: replace(t, stages=[replace(t.stages[0], targets=torch.zeros(3))]), "14 inputs for 3 targets"),
        (lambda t: replace(t, stages=[stage_of(3), stage_of(11)]), "no example of stage 0"),
        (lambda t: replace(t, stages=[stage_of(9)]), "names example .*0..8"),
        (lambda t: replace(t, measure=lambda out, y: out), r"measure gave a Tensor \[6, 4\].*with Q = 6"),
        (lambda t: replace(t, measure=lambda out, y: 1.0), "measure gave a float"),
    ],
)
def test_arguments_that_make_no_sense_are_named(change: Any, message: str) -> None:
    subsets = np.ones((2, 14), dtype=bool)
    subsets[:, :3] = False
    with pytest.raises(ScoreError, match=message):
        change(training_of()).run(_jobs(subsets))


# ---- random state ----


def _dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4)).double()


def test_alone_dropout_is_seeded_with_the_job_and_repeats_itself() -> None:
    training = training_of(build=_dropped, together=1)
    jobs = jobs_of(training)
    found = training.run(jobs)
    assert np.array_equal(found, _expected(training, jobs))
    assert np.array_equal(found[1], training.run([jobs[1]])[0]), "whatever is trained beside it"
    assert not np.allclose(found[1], training.run([(jobs[1][0], 99)])[0])


def test_seeds_of_more_than_32_bits_are_taken() -> None:
    def noisy(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels) * (1 + np.random.rand())  # noqa: NPY002

    training = training_of(stage_of(loss=noisy), together=1)
    one, same, other = (training.run([(np.arange(9), 2**40 + 3 + more)]) for more in (0, 0, 1))
    assert np.array_equal(one, same) and not np.allclose(one, other)


@both_ways
def test_training_leaves_the_global_random_states_alone(together: int) -> None:
    def drawn() -> list[float]:
        return [float(torch.rand(())), np.random.rand(), random.random()]  # noqa: NPY002

    def seed() -> None:
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        random.seed(3)

    seed()
    expected = drawn()
    seed()
    training_of(together=together).run(jobs_of(training_of()))
    assert drawn() == expected


# ---- measuring ----


def test_several_measurements_come_from_one_training() -> None:
    def both(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([losses_of(logits, labels), -2 * losses_of(logits, labels)])

    found = training_of(measure=both).run(jobs_of(training_of()))
    assert found.shape == (3, 2, 6) and found.dtype == np.float64
    np.testing.assert_allclose(found[:, 1], -2 * found[:, 0])


@both_ways
def test_a_measure_may_branch_on_the_numbers_of_its_model(together: int) -> None:
    def branching(logits: Tensor, labels: Tensor) -> Tensor:
        losses = losses_of(logits, labels)
        return losses if losses.mean() > between else -losses

    jobs = jobs_of(training_of())
    between = np.sort(training_of().run(jobs).mean(1))[1:].mean()  # of the second and the third of three
    training = training_of(measure=branching, together=together)
    found = training.run(jobs)
    np.testing.assert_allclose(found, _expected(training, jobs), rtol=1e-10)
    assert sorted(np.sign(found[:, 0])) == [-1, -1, 1]


# ---- diverging ----


def _strict(logits: Tensor, labels: Tensor) -> Tensor:
    """Fails where sklearn or a distribution of torch would."""
    if not logits.isfinite().all():
        raise ValueError("the outputs contain NaN")
    return losses_of(logits, labels)


def _with_one_wild(
    together: int, wild: float = 1e200, **changes: Any
) -> tuple[BatchedTraining, list[tuple[np.ndarray, int]]]:
    """Three jobs, of which only the second keeps the example on which training diverges."""
    stage = stage_of(**changes)
    stage.inputs[0] = wild
    kept = [np.arange(1, 9), np.arange(8), np.arange(5, 13)]
    training = training_of(stage, together=together, build=_linear)
    return training, list(zip(kept, (10, 11, 12), strict=True))


def _linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)).double()


WILD = {
    "sgd": partial(optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "fused": partial(optim.SGD, lr=0.1, fused=True),
    "all at once": partial(optim.SGD, lr=0.1, foreach=True),
    "adamw": partial(optim.AdamW, lr=0.1, foreach=True),
    "adadelta": partial(optim.Adadelta, lr=1.0),
}


@both_ways
@pytest.mark.parametrize("wild", [1e200, np.nan])
@pytest.mark.parametrize("optimizer", WILD)
def test_a_model_that_diverges_changes_no_other(optimizer: str, wild: float, together: int) -> None:
    training, jobs = _with_one_wild(together, wild, optimizer=WILD[optimizer], epochs=8)
    found = training.run(jobs)
    adaptive = optimizer.startswith("ada") and wild == 1e200  # of infinite squares they make steps of zero
    assert np.isfinite(found).all(1).tolist() == [True, adaptive, True]
    np.testing.assert_allclose(found[[0, 2]], _expected(training, [jobs[0], jobs[2]]), rtol=1e-9)


@both_ways
def test_a_model_that_diverges_in_the_first_stage_changes_no_other_in_the_second(together: int) -> None:
    training, jobs = _with_one_wild(together)
    training = replace(training, stages=[*training.stages, stage_of(6, 3, optimizer=adamw)])
    jobs = [(np.concatenate([kept, np.arange(14, 20)]), seed) for kept, seed in jobs]
    found = training.run(jobs)
    assert np.isfinite(found).all(1).tolist() == [True, False, True]
    np.testing.assert_allclose(found[[0, 2]], _expected(training, [jobs[0], jobs[2]]), rtol=1e-9)


@both_ways
def test_a_measure_that_fails_on_a_diverged_model_gives_nan_for_it_and_numbers_for_the_others(together: int) -> None:
    training, jobs = _with_one_wild(together)
    strict = replace(training, measure=_strict)
    found = strict.run(jobs)
    assert np.isnan(found[1]).all()
    assert np.array_equal(found[[0, 2]], training.run(jobs)[[0, 2]])
    assert np.isnan(strict.run(jobs[1:2])).all() and strict.run(jobs[1:2]).shape == (1, 6)


@both_ways
def test_a_measure_that_fails_on_a_good_model_is_an_error(together: int) -> None:
    def failing(logits: Tensor, labels: Tensor) -> Tensor:
        raise ValueError("no such label")

    with pytest.raises(ValueError, match="no such label"):
        training_of(measure=failing, together=together).run(jobs_of(training_of()))


@both_ways
def test_measurements_of_several_shapes_are_refused(together: int) -> None:
    rows = iter([1, 2, 1])

    def ragged(logits: Tensor, labels: Tensor) -> Tensor:
        return losses_of(logits, labels).expand(next(rows), -1)

    with pytest.raises(ScoreError, match=r"measure gave \(1, 6\) and \(2, 6\), expected one shape"):
        training_of(measure=ragged, together=together).run(jobs_of(training_of()))
