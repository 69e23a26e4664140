"""A linear regression on which EK-FAC is exact, with its losses, measurements and optimum as functions of theta."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf

from .helpers import vectors

N, FEATURES, QUERIES = 30, 4, 3
GROUPS = sf.Groups.from_lists([[0, 1, 2], range(3, 10), range(10, 30)], N)


class Linear(sf.tasks.Regression):
    """Squared error whose pseudo-residuals are plus or minus the standard deviation, so that EK-FAC is exact."""

    def __init__(self) -> None:
        super().__init__(reduction="sum", measurement="prediction")

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        if not sample:
            return super().compute_train_loss(batch, model)
        prediction = model(batch[0])
        sign = torch.randint(0, 2, prediction.shape).to(prediction) * 2 - 1
        return (prediction - (prediction + sign * 0.5**0.5).detach()).square().sum()


def _problem() -> tuple[TensorDataset, TensorDataset]:
    x = vectors(N, features=FEATURES).tensors[0]
    y = (x @ torch.arange(1.0, FEATURES + 1).double() + 2 * torch.sin(5 * x[:, 0]) + 0.7)[:, None]
    query = vectors(QUERIES, features=FEATURES, seed=9).tensors[0]
    return TensorDataset(x, y), TensorDataset(query, torch.zeros(QUERIES, 1).double())


TRAIN, QUERY = _problem()
DESIGN = torch.cat([TRAIN.tensors[0], torch.ones(N, 1).double()], 1)  # theta = (weight, bias)


def losses(theta: Tensor) -> Tensor:
    return (TRAIN.tensors[1][:, 0] - DESIGN @ theta).square()


def measure(theta: Tensor) -> Tensor:
    return torch.cat([QUERY.tensors[0], torch.ones(QUERIES, 1).double()], 1) @ theta


def optimum(weight_decay: float) -> Tensor:
    hessian = 2 * DESIGN.mT @ DESIGN / N + weight_decay * torch.eye(FEATURES + 1).double()
    return torch.linalg.solve(hessian, 2 * DESIGN.mT @ TRAIN.tensors[1][:, 0] / N)
