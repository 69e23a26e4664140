"""One small problem and the naive gradients, sums and inverses that methods are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf

from . import oracles
from .helpers import (
    ConvNet,
    FixedLabels,
    analyzer_of,
    example_loss,
    images,
    mlp,
    perturbed_states,
    trajectory_of,
    vectors,
)

N, QUERIES, LR = 20, 4, 0.3
GROUPS = sf.Groups.from_lists([[0, 3, 5], range(6, 20), [1], [2, 4]], N)


class Margins(FixedLabels):
    """Fixed pseudo-labels, margins as measurements."""

    def __init__(self) -> None:
        super().__init__("margin")


def scored(folder: Path, method: Any, net: str = "mlp", groups: sf.Groups = GROUPS, **options: Any) -> sf.Scores:
    model, train, query = problem(net)
    trajectory = trajectory_of(folder / "run", perturbed_states(model, 3), N, lr=LR, weight_decay=0.01)
    analyzer = analyzer_of(model, trajectory, folder / "store", task=Margins(), method=method, **options)
    analyzer.fit(train, batch_size=7)
    return analyzer.score(groups, train, query, batch_size=6, keep=("layer",))


def problem(net: str) -> tuple[nn.Module, TensorDataset, TensorDataset]:
    make_model, make = (mlp, vectors) if net == "mlp" else (ConvNet, images)
    return make_model(), make(N), make(QUERIES, seed=5)


def tracked_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


@cache
def naive_gradients(net: str, kind: str, state: int = 2) -> dict[str, Tensor]:
    """Naive per-example gradients by layer [n, P, O, I]; kind: "train", "sample", "measurement" or "output"."""
    model, train, query = problem(net)
    model.load_state_dict(perturbed_states(model, 3)[state])
    data = query if kind == "measurement" else train
    loss = example_loss(model, data, Margins(), "measurement" if kind == "output" else kind)
    return oracles.example_gradients(model, tracked_modules(model), loss, len(data))


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


def grouped_rows(rows: Tensor, groups: sf.Groups = GROUPS) -> Tensor:
    return torch.stack([rows[list(m)].sum(0) for m in groups.members])


def assert_near(found: Tensor, expected: Tensor, rtol: float = 1e-8) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-10 * expected.abs().max().item())


def projected_scores(features: Tensor, asked: Tensor, grouped: Tensor, damping: float) -> Tensor:
    kernel = features.mT @ features / N
    damped = kernel + damping * torch.eye(len(kernel)).double()
    return asked @ torch.linalg.pinv(damped, hermitian=True, rtol=1e-13) @ grouped.mT / N


def exact_hessian(drawn: Sequence[int] = range(N)) -> tuple[Tensor, Tensor, Tensor]:
    """The exact Hessian of the mean training loss of the drawn examples; each query's and training example's gradient.

    All flattened by parameter.
    """
    drawn = list(drawn)
    model, (x, y), query = mlp(), vectors(N).tensors, vectors(QUERIES, seed=5)
    model.load_state_dict(perturbed_states(model, 3)[2])
    names, task = [name for name, _ in model.named_parameters()], Margins()
    shapes = [p.shape for p in model.parameters()]

    def loss(flat: Tensor, inputs: Tensor, labels: Tensor, kind: str) -> Tensor:
        parts = [p.reshape(s) for p, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]

        def run(values: Tensor) -> Tensor:
            return torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (values,))

        if kind == "measurement":
            return task.compute_measurement((inputs, labels), run)
        return task.compute_train_loss((inputs, labels), run)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(lambda v: loss(v, x[drawn], y[drawn], "train") / len(drawn), flat)
    grad = torch.func.grad(loss)
    asked = torch.stack([grad(flat, a[None], b[None], "measurement") for a, b in query])
    rows = torch.stack([grad(flat, a[None], b[None], "train") for a, b in zip(x, y, strict=True)])
    return hessian, asked, rows
