"""The bank of retrained models: what is on disk."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from segflow.errors import ScoreError
from segflow.evaluation import Bank, BatchedTraining, FunctionTraining, Stage, random_subsets, read_bank, retrain
from segflow.evaluation.retraining.seeds import training_seeds

from ..support.plain_loop import plain_loop

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.02)


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None]).squeeze(1) - logits.logsumexp(1)


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="sum")


def _stage(N: int, seed: int, optimizer: Any = SGD, epochs: int = 3, batch_size: int = 4) -> Stage:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 4, (N,), generator=generator)
    return Stage(inputs, targets, functional.cross_entropy, optimizer, epochs, batch_size)


def _training(*stages: Stage, together: int = 64, measure: Any = _margin) -> BatchedTraining:
    query = _stage(6, seed=9)
    return BatchedTraining(_net, stages or (_stage(14, 0),), query.inputs, query.targets, measure, together)


# ---- the bank on disk ----


def _bank(folder: Path, **changes: Any) -> Bank:
    plain: dict[str, Any] = {"training": _training(together=3), "subsets": random_subsets(4, 14), "repetitions": 2}
    return Bank(folder, **(plain | changes))


def test_a_bank_holds_what_its_training_gives_and_is_read_back(tmp_path: Path) -> None:
    bank = _bank(tmp_path)
    found = bank.run(progress=False)
    assert found.shape == (4, 2, 6)
    for (m, r), seed in np.ndenumerate(training_seeds(bank.subsets, 2, 0)):
        expected = plain_loop(_training(), np.flatnonzero(bank.subsets[m]), int(seed))
        np.testing.assert_allclose(found[m, r], expected, rtol=1e-10)
    subsets, again = read_bank(tmp_path)
    assert np.array_equal(subsets, bank.subsets)
    assert np.array_equal(again, found)


class _Counting:
    """A training that counts, and stops after some batches."""

    def __init__(self, inner: BatchedTraining, stop_after: int = 10**9):
        self.inner, self.left, self.trained = inner, stop_after, 0
        self.settings, self.batches = inner.settings, inner.batches

    def run(self, jobs: Any) -> np.ndarray:
        if not self.left:
            raise KeyboardInterrupt
        self.left, self.trained = self.left - 1, self.trained + len(jobs)
        return self.inner.run(jobs)


def test_a_stopped_bank_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = _bank(tmp_path / "whole").run(progress=False)
    with pytest.raises(KeyboardInterrupt):
        _bank(tmp_path / "stopped", training=_Counting(_training(together=3), stop_after=2)).run(progress=False)
    rest = _Counting(_training(together=5))  # another number at a time
    bank = _bank(tmp_path / "stopped", training=rest)
    assert bank.missing == [(1, 2), (1, 3)]
    assert read_bank(tmp_path / "stopped")[1].shape == (4, 1, 6)  # the one repetition that is whole
    np.testing.assert_allclose(bank.run(progress=False), whole, rtol=1e-12)
    assert rest.trained == 2


def test_repetitions_can_be_added_later(tmp_path: Path) -> None:
    few = _bank(tmp_path, repetitions=1).run(progress=False)
    counting = _Counting(_training(together=3))
    more = _bank(tmp_path, repetitions=3, training=counting).run(progress=False)
    assert counting.trained == 8
    assert np.array_equal(more[:, :1], few)
    np.testing.assert_allclose(more[:, :2], _bank(tmp_path / "anew").run(progress=False), rtol=1e-12)


@pytest.mark.parametrize("changes", [{"subsets": random_subsets(4, 14, seed=5)}, {"seed": 1}])
def test_a_bank_of_something_else_is_refused_and_stays_as_it_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    bank = _bank(tmp_path)
    bank.run(progress=False)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (key,) = changes
    with pytest.raises(ScoreError, match=rf"made with something else \({key}: stored .*, now .*Use another folder"):
        _bank(tmp_path, **changes).run(progress=False)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_of_another_bank_is_refused_also_without_the_note_that_says_what_the_bank_is(tmp_path: Path) -> None:
    _bank(tmp_path / "a").run(progress=False)
    other = _bank(tmp_path / "b", training=_training(_stage(14, 0, epochs=4)))
    other.run(progress=False)
    (tmp_path / "b" / "bank.json").unlink()
    assert other.missing == [], "the same bank goes on without it"
    with pytest.raises(ScoreError, match="were made for another bank"):
        _bank(tmp_path / "b").run(progress=False)
    for file in (tmp_path / "a").glob("measured-*"):
        file.unlink()
    (tmp_path / "b" / "measured-000-000000.safetensors").rename(tmp_path / "a" / "measured-000-000000.safetensors")
    for read in (lambda: read_bank(tmp_path / "a"), _bank(tmp_path / "a").run, lambda: _bank(tmp_path / "a").missing):
        with pytest.raises(ScoreError, match="were made for another bank"):
            read()


def test_what_changes_no_number_is_no_other_bank(tmp_path: Path) -> None:
    _bank(tmp_path).run(progress=False)
    same = _bank(tmp_path, training=_training(_stage(14, 0, partial(SGD)), together=1))
    assert same.missing == []


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    _bank(tmp_path).run(progress=False)
    file = sorted(tmp_path.glob("measured-*"))[1]
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    with pytest.raises(ScoreError, match=rf"{re.escape(str(file))}.*(damaged|whole)"):
        read_bank(tmp_path)
    file.unlink()
    assert len(_bank(tmp_path).missing) == 3


def test_a_file_that_was_being_written_is_not_read(tmp_path: Path) -> None:
    expected = _bank(tmp_path).run(progress=False)
    (tmp_path / "measured-000-000000.safetensors.ab12.partial").write_bytes(b"half")
    assert np.array_equal(read_bank(tmp_path)[1], expected)


def test_an_incomplete_bank_and_no_bank_say_so(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match=r"bank\.json: no such file"):
        read_bank(tmp_path)
    _bank(tmp_path).run(progress=False)
    sorted(tmp_path.glob("measured-*"))[0].unlink()
    with pytest.raises(ScoreError, match="3 of 4 trainings are missing"):
        read_bank(tmp_path)


def test_trainings_that_diverge_are_named_and_all_others_kept(tmp_path: Path) -> None:
    subsets = random_subsets(4, 14)
    bad = int(training_seeds(subsets, 2, 0)[1, 0])
    wild = FunctionTraining(_diverging_at(bad), {}, processes=1, each=3)
    bank = Bank(tmp_path, wild, subsets, 2)
    with pytest.raises(
        ScoreError, match=rf"1 of 8 trainings diverged.* subset 1, repetition 0, seed {bad}: .*learning rate"
    ):
        bank.run(progress=False)
    assert bank.missing == [(0, 1)]
    with pytest.raises(ScoreError, match="1 of 1 trainings diverged"):
        bank.run(progress=False)


def test_a_bank_whose_every_training_diverges_ends_after_its_first_batch(tmp_path: Path) -> None:
    calls: list[int] = []

    def diverging(kept: np.ndarray, seed: int) -> list[float]:
        calls.append(seed)
        return [np.nan]

    with pytest.raises(ScoreError, match="3 of 8 trainings diverged"):
        Bank(tmp_path, FunctionTraining(diverging, {}, processes=1, each=3), random_subsets(4, 14), 2).run()
    assert len(calls) == 3


def _diverging_at(bad: int) -> Any:
    return lambda kept, seed: [1.0, np.inf if seed == bad else 0.0]


def test_a_model_that_diverges_leaves_those_beside_it_as_they_are(tmp_path: Path) -> None:
    """Its data are large, so that its weights are not finite after a few steps."""
    stage = _stage(14, 0, partial(torch.optim.SGD, lr=0.1), epochs=20)
    inputs = stage.inputs.clone()
    inputs[0] = 1e200
    stage = replace(stage, inputs=inputs, targets=torch.randn(14, 4, dtype=torch.float64), loss=functional.mse_loss)
    training = replace(_training(stage, measure=lambda o, y: o[:, 0]), build=lambda: nn.Linear(3, 4).double())
    subsets = random_subsets(4, 14, seed=1)
    assert 0 < subsets[:, 0].sum() < 4
    bank = Bank(tmp_path, training, subsets, 1)
    with pytest.raises(ScoreError, match=f"{subsets[:, 0].sum()} of 4 trainings diverged"):
        bank.run(progress=False)
    assert bank.missing == [(0, m) for m in np.flatnonzero(subsets[:, 0])]
    fine = np.flatnonzero(~subsets[:, 0])
    seeds = training_seeds(subsets, 1, 0)
    expected = [plain_loop(training, np.flatnonzero(subsets[m]), int(seeds[m, 0])) for m in fine]
    np.testing.assert_allclose(bank.run(progress=False, rows=fine.tolist())[:, 0], expected, rtol=1e-9)


@pytest.mark.parametrize("subsets", [2 * np.ones((2, 3)), np.ones(3, dtype=bool), np.ones((0, 3), dtype=bool)])
def test_subsets_must_be_rows_of_booleans(tmp_path: Path, subsets: np.ndarray) -> None:
    with pytest.raises(ScoreError, match="Expected \\[M, K\\] booleans"):
        _bank(tmp_path, subsets=subsets)


# ---- any training function ----


def _sums(kept: np.ndarray, seed: int) -> list[float]:
    return [float(kept.sum()), float(seed), float(os.getpid())]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bank_of_any_function_runs_in_processes(tmp_path: Path, processes: int) -> None:
    training = FunctionTraining(_sums, {"recipe": 1}, processes, each=4 // processes)
    bank = Bank(tmp_path, training, random_subsets(3, 6), repetitions=2, seed=7)
    found = bank.run(progress=False)
    assert len(list(tmp_path.glob("measured-*"))) == 2
    assert ((found[:, :, 2] != os.getpid()) == (processes > 1)).all()
    assert np.array_equal(found[:, :, 1], training_seeds(bank.subsets, 2, 7))
    assert np.array_equal(found[:, 0, 0], retrain(_sums, bank.subsets, processes=1, progress=False)[:, 0, 0])
    with pytest.raises(ScoreError, match="recipe"):
        Bank(tmp_path, replace(training, fingerprint={"recipe": 2}), bank.subsets, 2, 7).run()


def test_a_retraining_that_fails_is_named_by_its_subset_repetition_and_seed(tmp_path: Path) -> None:
    subsets = random_subsets(3, 6)
    bad = int(training_seeds(subsets, 2, 0)[2, 1])

    def failing(kept: np.ndarray, seed: int) -> list[float]:
        if seed == bad:
            raise ValueError("bad data in row 3")
        return [1.0]

    with pytest.raises(
        ScoreError, match=f"subset 2, repetition 1, 3 kept, seed {bad}: ValueError: bad data in row 3"
    ) as caught:
        Bank(tmp_path, FunctionTraining(failing, {}, processes=1, each=1), subsets, 2).run(progress=False)
    assert isinstance(caught.value.__cause__, ValueError)
    assert read_bank(tmp_path)[1].shape == (3, 1, 1)


def test_lists_of_indices_need_a_training_that_says_how_many_there_are(tmp_path: Path) -> None:
    lists = [[0, 3, 5], [1, 2]]
    bank = Bank(tmp_path / "a", _training(), lists, 1)
    assert bank.subsets.shape == (2, 14)
    assert [np.flatnonzero(row).tolist() for row in bank.subsets] == lists
    with pytest.raises(ScoreError, match="lists of indices, of an unknown number"):
        Bank(tmp_path / "b", FunctionTraining(_sums, {}), lists, 1)


def _rows(kept: np.ndarray, seed: int) -> Tensor:
    return torch.tensor([[kept.sum(), 1.0, 2.0], [seed % 7, 3.0, 4.0]], requires_grad=True) * 1.0


@pytest.mark.parametrize("processes", [1, 2])
def test_several_measurements_of_a_function_keep_their_shape(tmp_path: Path, processes: int) -> None:
    training = FunctionTraining(_rows, {}, processes=processes)
    found = Bank(tmp_path, training, subsets := random_subsets(2, 6), repetitions=2).run(progress=False)
    assert found.shape == (2, 2, 2, 3)
    assert np.array_equal(found[:, :, 1, 0], training_seeds(subsets, 2, 0) % 7)
    assert (found[:, :, 0, 1:] == [1, 2]).all()
    single = FunctionTraining(lambda kept, seed: torch.tensor(2.0, requires_grad=True), {}, processes=1)
    assert single.run([(np.arange(2), 0)]).tolist() == [[2.0]]
    parts = FunctionTraining(lambda kept, seed: list(torch.ones(3, requires_grad=True)), {}, processes=1)
    assert parts.run([(np.arange(2), 0)]).tolist() == [[1.0] * 3]


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda kept, seed: [[1.0], [1.0, 2.0]], r"rows of equal length \[P, Q\]"),
        (lambda kept, seed: None, "gave NoneType"),
        (lambda kept, seed: ["high"], r"numbers \[Q\]"),
        (lambda kept, seed: [1.0] * (1 + seed % 2), r"shapes \[\(1,\), \(2,\)"),
        (lambda kept, seed: np.ones((1, 2, 3)), r"shapes \[\(1, 2, 3\)\]: expected \[Q\] or \[P, Q\]"),
    ],
)
def test_measurements_that_are_no_rows_are_refused(tmp_path: Path, measure: Any, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        _bank(tmp_path, training=FunctionTraining(measure, {}, processes=1)).run(progress=False)


def test_a_bank_whose_batches_have_other_shapes_is_refused(tmp_path: Path) -> None:
    training = FunctionTraining(lambda kept, seed: [1.0] * (1 + (0 in kept)), {}, processes=1, each=1)
    with pytest.raises(ScoreError, match=r"measurements of shapes \[\(1,\), \(2,\)"):
        Bank(tmp_path, training, np.eye(2, dtype=bool), repetitions=1).run(progress=False)
    assert FunctionTraining(lambda kept, seed: 2.5, {}, processes=1).run([(np.arange(2), 0)]).tolist() == [[2.5]]
