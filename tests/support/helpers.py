"""Small models, data and trajectories that the tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.store import files


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)).to(dtype)


class ConvNet(nn.Module):
    """A strided circular convolution, a grouped one, pooling, and a classifier."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="circular")
        self.second = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
        self.head = nn.Linear(6, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.relu(self.first(x)))).mean((2, 3)))


def vectors(n: int, dtype: torch.dtype = torch.float64, seed: int = 1, features: int = 5) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(x, torch.randint(0, 3, (n,), generator=generator))


def images(n: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(x, torch.randint(0, 3, (n,), generator=generator))


class Attention(nn.Module):
    """Tokens [B, S, 5] through two linear layers, mixed over positions, to logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.head = nn.Linear(5, 4), nn.Linear(4, 3, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x))
        return self.head((h @ h.mT).softmax(-1) @ h).mean(1)


def sequences(n: int) -> TensorDataset:
    """[n, 4, 5]: four positions of five features each."""
    flat = vectors(4 * n).tensors[0]
    return TensorDataset(flat.reshape(n, 4, 5), vectors(n).tensors[1])


def out_of_place(model: nn.Module) -> nn.Module:
    """The model with no activation in place, as peers need it."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


class FixedLabels(sf.tasks.Classification):
    """Classification whose pseudo-labels are a fixed function of the inputs, so that an oracle can draw the same."""

    draws_labels = False

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, labels = batch
        return super().compute_train_loss((inputs, pseudo_labels(inputs) if sample else labels), model)


def pseudo_labels(inputs: Tensor) -> Tensor:
    return (inputs.flatten(1).sum(1).abs() * 1000).long() % 3


def perturbed_states(model: nn.Module, count: int, scale: float = 0.1) -> list[dict[str, Tensor]]:
    """State dicts near the model's, as if training had left them behind."""
    generator = torch.Generator().manual_seed(7)
    return [
        {
            name: value + scale * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
            if value.is_floating_point()
            else value
            for name, value in model.state_dict().items()
        }
        for _ in range(count)
    ]


def trajectory_of(
    folder: Path,
    states: Sequence[dict[str, Tensor]],
    dataset_size: int,
    *,
    steps: Sequence[int] | None = None,
    lr: Any = 0.1,
    second_moments: Sequence[dict[str, Tensor]] | None = None,
    example_weights: Any = None,
    **constants: Any,
) -> sf.Trajectory:
    """A trajectory made of state dicts, ten steps apart unless told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index, state in enumerate(states):
        files.append(folder / f"state-{index}.safetensors")
        save_file({name: value.contiguous() for name, value in state.items()}, files[-1])
    moments = [folder / f"moments-{index}.safetensors" for index in range(len(second_moments or ()))]
    for path, tensors in zip(moments, second_moments or (), strict=True):
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    steps = steps or [10 * (index + 1) for index in range(len(states))]
    return sf.Trajectory(
        files,
        steps,
        lr,
        dataset_size,
        sf.OptimizerConstants(**constants),
        second_moments=moments or None,
        example_weights=example_weights,
    )


def analyzer_of(
    model: nn.Module, trajectory: sf.Trajectory, store: Path, task: Any = None, **options: Any
) -> sf.Analyzer:
    options = {"progress": False, **options}
    return sf.Analyzer(model, task or FixedLabels(), trajectory, store=store, **options)


def apart(segments: Any = 1, *, query_points: str = "final", **options: Any) -> sf.Source:
    """SOURCE as the paper's formulas have it: each layer by itself, and the final query gradient."""
    return sf.Source(segments, layers="apart", query_points=query_points, **options)


def example_loss(model: nn.Module, data: TensorDataset, task: Any, kind: str = "train") -> Callable[[int], Tensor]:
    """loss_of_example for the oracles: one example's "train", "sample" or "measurement" loss."""

    def loss(index: int) -> Tensor:
        batch = tuple(column[index : index + 1] for column in data.tensors)
        if kind == "measurement":
            return task.compute_measurement(batch, model)
        return task.compute_train_loss(batch, model, sample=kind == "sample")

    return loss


class Stopped(BaseException):
    """The user's process died here."""


@contextmanager
def stopping_at(
    call: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = Stopped
) -> Iterator[list[str]]:
    """Stop at the n-th time that the store syncs or renames (0: never); the list counts the calls."""
    calls: list[str] = []

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def run(*args: Any) -> Any:
            calls.append(name)
            if len(calls) == call:
                raise error
            return real(*args)

        return run

    with monkeypatch.context() as patched:
        for name in ("fsync", "replace"):
            patched.setattr(files.os, name, wrap(name))
        yield calls
