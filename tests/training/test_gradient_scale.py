"""Where accumulated batches are added up, not averaged, gradients are multiples of the mean loss's, and taken so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import segflow as sf

from ..support.helpers import mlp, vectors

N, STEPS = 12, 6


def recorded(folder: Path, optimizer: str, scale: float, **told: Any) -> tuple[nn.Module, sf.Trajectory]:
    """Full-batch training whose gradients are so many times the mean loss's."""
    model, data = mlp(), vectors(N)
    options = {"SGD": {"lr": 0.05}, "AdamW": {"lr": 0.01, "weight_decay": 0.1}}[optimizer]
    steps = getattr(torch.optim, optimizer)(model.parameters(), **options)
    with sf.record(model, steps, folder, dataset_size=N, total_steps=STEPS, checkpoints=2, progress=False, **told):
        for _ in range(STEPS):
            steps.zero_grad()
            (scale * functional.cross_entropy(model(data.tensors[0]), data.tensors[1])).backward()
            steps.step()
    return model, sf.Trajectory.load(folder)


class Scaled(sf.tasks.Classification):
    """The loss as training had it."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
        return (self.scale**0.5 if sample else self.scale) * super().compute_train_loss(batch, model, sample)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_the_scale_of_gradients_is_that_of_a_task_with_the_loss_multiplied(optimizer: str, tmp_path: Path) -> None:
    model, plain = recorded(tmp_path / "plain", optimizer, 3.0)
    _, told = recorded(tmp_path / "told", optimizer, 3.0, gradient_scale=3.0)
    assert told.observed["gradients"] == "3 times those of the mean loss"
    values = []
    for number, (trajectory, task) in enumerate(
        ((plain, Scaled(3.0)), (told, sf.tasks.Classification()), (plain, sf.tasks.Classification()))
    ):
        options = {"store": tmp_path / f"store-{number}", "method": sf.Source(1), "progress": False}
        analyzer = sf.Analyzer(model, task, trajectory, **options)
        analyzer.fit(vectors(N))
        values.append(analyzer.score(sf.Groups.singletons(N), vectors(N), vectors(3, seed=5)).values)
    torch.testing.assert_close(values[1], values[0], rtol=1e-9, atol=1e-13)
    assert (values[2] - values[0]).norm() > 0.2 * values[0].norm()


def test_a_scale_that_is_no_positive_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sf.TrajectoryError, match="gradient_scale"):
        recorded(tmp_path / "run", "SGD", 1.0, gradient_scale=0)


def test_a_recording_goes_on_with_the_scale_that_it_had(tmp_path: Path) -> None:
    model, data = mlp(), vectors(N)
    steps = torch.optim.SGD(model.parameters(), lr=0.05)

    def train(count: int, **told: Any) -> None:
        with sf.record(model, steps, tmp_path, dataset_size=N, checkpoints=1, progress=False, **told):
            for _ in range(count):
                steps.zero_grad()
                functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
                steps.step()

    train(2, gradient_scale=2.0)
    with pytest.raises(sf.TrajectoryError, match=r"gradient_scale was 2\.0, and is 3\.0"):
        train(2, resume=True, step=2, gradient_scale=3.0)
    train(2, resume=True, step=2)
    assert sf.Trajectory.load(tmp_path).used.gradient_scale == 2.0
