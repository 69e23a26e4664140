"""Probes: losses at the last checkpoint and near it, which tell functions apart, and leave everything as it was."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import segflow as sf
from segflow.stage.probes import perturb
from segflow.store.comparison import agree

from ..support.helpers import FixedLabels, analyzer_of, mlp, perturbed_states, trajectory_of, vectors

N = 20


def test_perturbed_parameters_keep_their_signs_and_their_scale_and_depend_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(300, 200), nn.Conv2d(2, 3, 3), nn.LayerNorm(500)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    before = {name: value.clone() for name, value in models[0].state_dict().items()}
    perturb(models[0], 5)
    torch.manual_seed(9)
    perturb(models[1], 5)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name])
        assert torch.equal(value.sign(), before[name].sign())
        assert not torch.allclose(value, before[name]) or not before[name].any()
    large = models[0][0].weight.square().mean() / before["0.weight"].square().mean()
    assert 0.5 < large < 2


class Drawing(FixedLabels):
    """A loss of three or more examples draws random numbers in some way."""

    def __init__(self, draw: Any):
        super().__init__()
        self.draw = draw

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        drawn = 1 if sample or len(batch[1]) < 3 else self.draw()
        return super().compute_train_loss(batch, model, sample) * drawn


def _fit(tmp_path: Path, task: Any, store: str = "store") -> None:
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 2, 0.3), N)
    analyzer_of(mlp(), trajectory, tmp_path / store, task, method=sf.InfluenceFunction(0.01)).fit(vectors(N))


def test_a_loss_that_does_not_repeat_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sf.TaskError, match=r"the train loss of one batch was .*Something is random"):
        _fit(tmp_path, Drawing(np.random.default_rng(0).random))


def test_fitting_leaves_random_states_of_numpy_and_python_as_they_were(tmp_path: Path) -> None:
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    expected = np.random.rand(), random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    _fit(tmp_path, FixedLabels())
    assert (np.random.rand(), random.random()) == expected  # noqa: NPY002


class Guarded(FixedLabels):
    """Takes losses of ordinary size only."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        if not torch.equal(model[0].weight, self.expected):
            raise ValueError("other parameters than those of training")
        return super().compute_train_loss(batch, model, sample)


def test_a_loss_that_refuses_perturbed_parameters_is_told_by_its_values_at_the_checkpoint(tmp_path: Path) -> None:
    task = Guarded()
    [state] = perturbed_states(mlp(), 1, 0.3)
    task.expected = state["0.weight"]
    trajectory = trajectory_of(tmp_path / "run", [state], N)
    for _ in range(2):
        analyzer_of(mlp(), trajectory, tmp_path / "store", task, method=sf.InfluenceFunction(0.01)).fit(vectors(N))


@pytest.mark.parametrize(
    ("stored", "now", "expected"),
    [
        ({"probes": [[2.0, 1e-7], [3.0]]}, {"probes": [[2.00001, 3e-7], [3.0]]}, True),  # rounded as the others are
        ({"probes": [[1e-7, 2e-7]]}, {"probes": [[1e-7, 4e-7]]}, False),  # relative to their own scale
        ({"probes": [[1.0, 1.0], [500.0]]}, {"probes": [[1.1, 1.0], [500.0]]}, False),
        ({"probes": [[1.0], ["nan"]]}, {"probes": [[1.0], ["nan"]]}, True),
        ({"probes": [[1.0], ["nan"]]}, {"probes": [[1.0], [2.0]]}, False),
        ({"probes": [[1.0]]}, {"probes": [[1.0, 1.0]]}, False),
        ("random", {"probes": [[1.0]]}, False),
        ([1e-8], [3e-8], False),  # a setting, not a probe
        ([0.1 + 0.2], [0.3], True),
        ([math.nan], [math.nan], True),  # a rate that is not known
        ({"self.a": "1"}, {"self.a": "1", "self.b": "None"}, False),
        ({"self.a": "1", "self.b": None}, {"self.a": "1"}, False),
    ],
)
def test_probes_are_compared_relative_to_their_scale_and_settings_to_the_last_digits(
    stored: Any, now: Any, expected: bool
) -> None:
    assert agree(stored, now) is expected
    assert agree(now, stored) is expected


class Noting(FixedLabels):
    """Notes once that it met an example that no probe reads."""

    def __init__(self, rare: Tensor):
        super().__init__()
        self.rare, self.notes = rare, []

    def _note(self, batch: Any) -> None:
        if (batch[0] == self.rare).all(1).any():
            notes = self.notes
            notes.append("rare")

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        self._note(batch)
        return super().compute_train_loss(batch, model, sample)


def test_a_note_of_an_example_that_no_probe_reads_stops_no_call_and_an_edit_between_calls_does(tmp_path: Path) -> None:
    data, queries = vectors(N), vectors(3, seed=9)
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 2, 0.3), N)
    scores, noted = [], []
    for _ in range(2):  # the second time another process's
        task = Noting(data.tensors[0][12])
        analyzer = analyzer_of(mlp(), trajectory, tmp_path / "store", task, method=sf.InfluenceFunction(0.01))
        for _ in range(2):
            analyzer.fit(data)
            scores.append(analyzer.score(sf.Groups.random(N, 5), data, queries).values)
        noted.append(len(task.notes))
    assert noted[0]
    assert all(torch.equal(one, scores[0]) for one in scores)
    task.rare = task.rare + 1
    with pytest.raises(sf.StoreError, match="rare"):
        analyzer.fit(data)
