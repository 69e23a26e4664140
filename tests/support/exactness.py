"""How a layer's tokens are compared with autograd, and models and tasks made of functions, for tests of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor, nn

import segflow as sf
from segflow.data.readers import Reader
from segflow.model.capture import capture
from segflow.model.find_layout import find_layout
from segflow.model.layers.choice import Training, choose_layers
from segflow.model.layers.tracked import TrackedLayer
from segflow.model.loss_view import LossView
from segflow.model.make_view import make_loss_view
from segflow.model.observing import observing
from segflow.model.tokens import Tokens

from . import oracles

LossFunction = Callable[[nn.Module, Tensor], Tensor]
RANDOMISED = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def sines(model: nn.Module, x: Tensor) -> Tensor:
    """A loss that is a sum over examples and bends."""
    return model(x).sin().sum()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def captured(
    model: nn.Module, layers: Mapping[str, TrackedLayer], x: Tensor, loss: LossFunction = sines
) -> tuple[Tensor, dict[str, Tokens]]:
    """The loss of the batch x, and each layer's tokens."""
    found: dict[str, Tokens] = {}

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        assert layer.name not in found, "tokens were handed out twice"
        found[layer.name] = tokens

    with observing(model):
        layout = find_layout(layers, lambda copies: loss(model, torch.stack([x[0]] * copies)))
        total = capture(layers, layout, lambda: loss(model, x), consume, torch.float64, len(x))
    return total, found


def example_matrices(tokens: Tokens) -> Tensor:
    return torch.einsum("pbso,pbsi->bpoi", tokens.g_PBSO, tokens.a_PBSI)


def assert_exact(
    model: nn.Module, x: Tensor, loss: LossFunction = sines, names: Collection[str] | None = None
) -> dict[str, TrackedLayer]:
    """Every tracked layer's tokens make up autograd's gradient: summed, and of each example alone."""
    tracked = choose_layers(model, names).tracked
    modules = {name: layer.module for name, layer in tracked.items()}
    total, found = captured(model, tracked, x, loss)
    torch.testing.assert_close(total, loss(model, x).detach(), rtol=1e-12, atol=0)
    alone = oracles.example_gradients(model, modules, lambda i: loss(model, x[i : i + 1]), len(x))
    summed = oracles.example_gradients(model, modules, lambda _i: loss(model, x), 1)
    assert found.keys() == tracked.keys()
    for name, layer in tracked.items():
        got = example_matrices(found[name])
        assert layer.shape == got.shape[1:]
        scale = max(1.0, summed[name].abs().max().item())
        torch.testing.assert_close(got, alone[name], rtol=0, atol=1e-10 * scale)
        torch.testing.assert_close(got.sum(0), summed[name][0], rtol=0, atol=1e-10 * scale)
        assert summed[name].abs().max() > 0, "a gradient of zero proves nothing"
    return tracked


class Along(nn.Module):
    """Runs a layer with the examples on another axis of its input than the first."""

    def __init__(self, layer: nn.Module, axis: int = 0):
        super().__init__()
        self.layer, self.axis = layer, axis

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(0, self.axis).tanh()).movedim(self.axis, 0)


class Calls(nn.Module):
    """Modules, and a function of them and the input."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Loss(sf.Task):
    """A task made of one function of (batch, model)."""

    def __init__(self, loss: Callable[[Any, nn.Module], Tensor], measure: Callable[..., Tensor] | None = None):
        self.loss, self.measure = loss, measure or loss

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return self.loss(batch, model)

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.measure(batch, model)


def view_of(model: nn.Module, task: sf.Task, data: Any, kind: str = "train", collate: Any = None) -> LossView:
    return make_loss_view(
        model, task, kind, choose_layers(model, None, Training(lambda _name: None)).tracked, Reader(data, collate)
    )


def ignore(_layer: Any, _tokens: Any) -> None:
    pass
