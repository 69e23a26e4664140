"""Tasks made of functions, right ones and faulty ones, and models that faults show in, for tests of checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import segflow as sf

from .helpers import analyzer_of, mlp, trajectory_of, vectors

N = 48


class TaskOf(sf.Task):
    """Classification with any part replaced."""

    def __init__(
        self, train: Any = None, sample: Any = None, measurement: Any = None, tracked: list[str] | None = None
    ):
        self.train, self.sample, self.measurement, self.tracked = train, sample, measurement, tracked

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        loss = self.sample if sample else self.train
        return loss(batch, model) if loss else sf.tasks.Classification().compute_train_loss(batch, model, sample)

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return (self.measurement or sf.tasks.Classification().compute_measurement)(batch, model)

    def get_influence_tracked_modules(self) -> list[str] | None:
        return self.tracked


def check(
    folder: Path, task: Any, model: nn.Module | None = None, train: Any = None, query: Any = None, **options: Any
) -> sf.analyzer.checks.CheckReport:
    model = mlp() if model is None else model
    train = vectors(N) if train is None else train
    trajectory = trajectory_of(folder / "run", [model.state_dict()], len(train))
    return analyzer_of(model, trajectory, folder / "store", task, method=sf.TracIn()).check(train, query, **options)


def summed(batch: Any, model: nn.Module, reduction: str = "sum") -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction=reduction)


def mean_loss(batch: Any, model: nn.Module) -> Tensor:
    return summed(batch, model, "mean")


def noisy(batch: Any, model: nn.Module) -> Tensor:
    return summed((batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]), model)


def functional_dropout(batch: Any, model: nn.Module) -> Tensor:
    return summed((functional.dropout(batch[0], 0.5, training=True), batch[1]), model)


def squared_sum(batch: Any, model: nn.Module) -> Tensor:
    return summed(batch, model) ** 2


def not_a_number(batch: Any, model: nn.Module) -> Tensor:
    return summed(batch, model) * torch.nan


def detached(batch: Any, model: nn.Module) -> Tensor:
    return summed(batch, model).detach()


def raising(batch: Any, model: nn.Module) -> Tensor:
    summed(batch, model)
    raise KeyError("user code")


class Regularised(nn.Module):
    """Linear layers around a module whose mode matters."""

    def __init__(self, middle: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.head = nn.Linear(5, 6), middle, nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(self.first(x))))


def in_train_mode(batch: Any, model: nn.Module) -> Tensor:
    model.train()
    return summed(batch, model)


class Branches(nn.Module):
    def __init__(self, used: str):
        super().__init__()
        torch.manual_seed(0)
        self.main, self.side, self.used = nn.Linear(5, 3), nn.Linear(5, 3), used
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        side = self.side(x) if self.used != "no" else None
        return self.main(x) + 0 * side.detach() if self.used == "detached" else self.main(x)
