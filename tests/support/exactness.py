"""How a layer's tokens are compared with autograd, and models and tasks made of functions, for tests of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor, nn

import segflow as sf
from segflow.data.batches import in_order
from segflow.data.readers import Reader
from segflow.model.capture import capture
from segflow.model.find_layout import find_layout
from segflow.model.finite_check import FiniteCheck
from segflow.model.layers import choose_layers
from segflow.model.layers.choice import Training
from segflow.model.layers.registry import kind_of
from segflow.model.layers.sizes import BlockSizes
from segflow.model.layers.tracked import Owner, TrackedLayer
from segflow.model.loss_view import LossView
from segflow.model.make_view import make_loss_view
from segflow.model.observing import observing
from segflow.model.tokens import Tokens

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
    """The loss of the batch x, and each layer's tokens, by a layout that nothing is compared with."""
    found: dict[str, Tokens] = {}

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        assert layer.name not in found, "tokens were handed out twice"
        found[layer.name] = tokens

    with observing(model):
        layout = find_layout(layers, lambda copies: loss(model, torch.stack([x[0]] * copies)))
        total = capture(layers, layout, lambda: loss(model, x), consume, torch.float64, len(x))
    return total, found


def example_matrices(tokens: Tokens) -> Tensor:
    return torch.einsum("pbso,pbsi->bpoi", tokens.g_PBSO, tokens.dense_a)


def assert_exact(
    model: nn.Module, x: Tensor, loss: LossFunction = sines, names: Collection[str] | None = None
) -> dict[str, TrackedLayer]:
    """Every tracked layer's tokens make up autograd's gradient of each example alone, by the layout as it was found."""
    tracked = choose_layers(model, names).tracked
    total, found = captured(model, tracked, x, loss)
    torch.testing.assert_close(total, loss(model, x).detach(), rtol=1e-12, atol=0)
    assert found.keys() == tracked.keys()
    matrices = {name: example_matrices(tokens) for name, tokens in found.items()}
    alone = [parameter_gradients(model, partial(loss, model, x[i : i + 1])) for i in range(len(x))]
    assert_gradients(tracked, matrices, alone)
    return tracked


def parameter_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Autograd's gradient of every trained parameter, zeros where the loss does not depend on it."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    slopes = torch.autograd.grad(loss(), list(trained.values()), allow_unused=True)
    pairs = zip(trained.items(), slopes, strict=True)
    return {name: torch.zeros_like(p) if slope is None else slope.to_dense() for (name, p), slope in pairs}


def by_parameter(layers: Mapping[str, TrackedLayer], matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The blocks' gradients [B, P, O, I] as those of their parameters, whose parts are added up."""
    found: dict[str, Tensor] = {}
    for name, matrix in matrices.items():
        layer = layers[name]
        tensors = layer.by_parameter(matrix)
        torch.testing.assert_close(layer.gradient_matrices(tensors), matrix, rtol=0, atol=0)
        for parameter, tensor in zip(layer.parameter_names, tensors, strict=True):
            found[parameter] = found[parameter] + tensor if parameter in found else tensor
    return found


def assert_gradients(
    layers: Mapping[str, TrackedLayer],
    matrices: Mapping[str, Tensor],
    alone: Sequence[Mapping[str, Tensor]],
    tolerance: float = 1e-10,
) -> None:
    """The blocks' gradients are each example's own in every parameter that they are of."""
    for name, matrix in matrices.items():
        assert layers[name].shape == matrix.shape[1:]
        assert layers[name].size == matrix[0].numel()
    for parameter, got in by_parameter(layers, matrices).items():
        exact = torch.stack([of_example[parameter] for of_example in alone]).to(got.dtype)
        scale = max(1.0, exact.abs().max().item())
        torch.testing.assert_close(got, exact, rtol=0, atol=tolerance * scale, msg=lambda m, p=parameter: f"{p}: {m}")
        assert exact.abs().max() > 0, f"{parameter}: a gradient of zero proves nothing"


@dataclass(frozen=True)
class Seen:
    """A model as a view sees it, and what was captured of it; alone: as the view's layout has it."""

    view: LossView
    matrices: dict[str, Tensor]

    @property
    def alone(self) -> dict[str, str]:
        return self.view.layout.alone

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        return {name: layer.shape for name, layer in self.view.layers.items()}


def assert_seen_exactly(
    model: nn.Module,
    data: Sequence[Any],
    loss: LossFunction = sines,
    *,
    collate: Callable[[Sequence[Any]], Any] = torch.stack,
    training: Training | None = None,
    kind: str = "train",
    sizes: Sequence[int] = (1, 2, 3),
    tolerance: float = 1e-10,
    unseen: Collection[str] = (),
) -> Seen:
    """A view gives autograd's gradient of each example alone in every trained parameter, in batches of every size.

    unseen: parameters that are trained and not attributed.
    """
    layers = choose_layers(model, None, training).tracked
    alone = [parameter_gradients(model, partial(loss, model, collate([example]))) for example in data]
    of_kind = {
        "train": (lambda batch, m: loss(m, batch), _not_asked),
        "measurement": (_not_asked, lambda b, m: loss(m, b)),
    }
    task = Loss(*of_kind[kind])
    with observing(model):
        view = make_loss_view(model, task, kind, layers, Reader(data, collate))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        for size in sizes:
            matrices = in_batches(view, Reader(data, collate), size)
            assert_gradients(layers, matrices, alone, tolerance)
            assert {name for layer in layers.values() for name in layer.parameter_names} == {*alone[0]} - {*unseen}
    return Seen(view, matrices)


def _not_asked(_batch: Any, _model: nn.Module) -> Tensor:
    raise AssertionError("a loss of another kind")


def in_batches(view: LossView, reader: Reader, size: int) -> dict[str, Tensor]:
    """Every example's gradient in each block, [N, P, O, I], captured in batches of a size; zeros where none is."""
    shapes = {name: layer.shape for name, layer in view.layers.items()}
    found = {name: torch.zeros(len(reader), *shape, dtype=view.dtype) for name, shape in shapes.items()}
    for batch in reader.batches(in_order(len(reader), size), view.device):

        def consume(layer: TrackedLayer, tokens: Tokens, indices: Any = batch.examples) -> None:
            found[layer.name][list(indices)] += example_matrices(tokens)
            torch.testing.assert_close(tokens.total(), example_matrices(tokens).sum(0))

        view.capture(batch, consume, FiniteCheck("test"))
    return found


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
    training = Training(lambda _name: None)
    return make_loss_view(model, task, kind, choose_layers(model, None, training).tracked, Reader(data, collate))


def ignore(_layer: Any, _tokens: Any) -> None:
    pass


def track(name: str, module: nn.Module, has_bias: bool) -> TrackedLayer:
    """A module as one layer to attribute."""
    kind = kind_of(module)
    assert kind is not None
    names = ("weight", "bias") if has_bias else ("weight",)
    own = {attribute: f"{name}.{attribute}" if name else attribute for attribute in names}
    return kind.blocks(Owner(name, module, own, lambda _one, _other: True, BlockSizes()))[0]
