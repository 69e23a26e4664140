"""A view refuses a model whose layers do not make up their weights' gradients, and walks without weight gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.curvature.kronecker import Eigenbasis, eigenvectors
from segflow.curvature.passes import corrected_eigenvalues, covariances
from segflow.data.batches import in_order
from segflow.data.readers import Reader, batches
from segflow.model.finite_check import FiniteCheck
from segflow.model.layers.choice import Training, choose_layers
from segflow.model.layout import CallLayout
from segflow.model.make_view import make_loss_view
from segflow.model.observing import observing
from segflow.runtime.ranks import Ranks

from ..support.exactness import (
    Calls,
    Loss,
    assert_seen_exactly,
    ignore,
    in_batches,
    normal,
    view_of,
)
from ..support.helpers import mlp, vectors

CPU = torch.device("cpu")
DTYPE = torch.float64


# ---- examples that do not stand in a layer's input one by one ----


def test_examples_of_more_rows_than_those_that_the_view_was_made_with_are_refused() -> None:
    data = [normal(length, 3, seed=length) for length in (1, 1, 2, 3)]
    model = nn.Linear(3, 2)
    with observing(model):
        view = view_of(model, Loss(lambda x, m: m(x).sin().sum()), data[:2], collate=torch.cat)
        [batch] = batches(data, [[0, 2, 3]], torch.cat, CPU)
        with pytest.raises(
            sf.LayerError,
            match=r"layer '': its input has 6 rows in the batch of 3 examples from 0 to 3, expected one for each",
        ):
            view.capture(batch, ignore, FiniteCheck("pass"))


# ---- which layers a loss reaches ----


def _by_sign(model: Any, x: Tensor) -> Tensor:
    """Another layer where an example's first number is positive; the whole batch is alike."""
    return model.first(x) + (model.second(x) if x[0, 0] > 0 else 0)


def test_a_later_example_that_reaches_a_layer_which_the_first_does_not_is_refused_and_never_zero() -> None:
    x = torch.tensor([[-1.0, 1.0], [1.0, 1.0]])
    model = Calls(_by_sign, first=nn.Linear(2, 2), second=nn.Linear(2, 2))
    loss = Loss(lambda batch, m: m(batch[0]).sum())
    with observing(model):
        view = view_of(model, loss, TensorDataset(x[:1]), "measurement")
        [batch] = batches(TensorDataset(x), [[1]], None, CPU)
        with pytest.raises(sf.LayerError, match=r"layer 'second': not reached by the first example, but by another"):
            view.capture(batch, ignore, FiniteCheck("pass"))


def test_a_layer_that_only_some_of_the_examples_reach_is_exact() -> None:
    x = torch.tensor([[-1.0, 1.0], [1.0, 1.0], [-2.0, 0.5], [2.0, 0.5]])
    model = Calls(_by_sign, first=nn.Linear(2, 2), second=nn.Linear(2, 2))
    assert assert_seen_exactly(model, x, sizes=(1,), kind="measurement").alone["second"]


class Gated(nn.Module):
    """A bare parameter that no module is called with, of which only some examples' loss depends."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.gates = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.gates[int(x[0, 0] > 0)]


def test_a_bare_parameter_that_the_first_example_does_not_reach_is_refused_and_never_zero() -> None:
    x = torch.tensor([[-1.0, 1.0], [1.0, 1.0]])
    model, loss = Gated(), Loss(lambda batch, m: m(batch[0]).sum())
    with observing(model):
        view = view_of(model, loss, TensorDataset(x[:1]), "measurement")
        assert "gates.1" not in view.layout.reached
        [batch] = batches(TensorDataset(x), [[1]], None, CPU)
        with pytest.raises(sf.LayerError, match=r"layer 'gates\.1': not reached by the first example, but by another"):
            view.capture(batch, ignore, FiniteCheck("pass"))
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_measurement_may_reach_fewer_layers_than_the_loss() -> None:
    model = Calls(lambda m, x: m.b(m.a(x)), a=nn.Linear(3, 3), b=nn.Linear(3, 2))
    loss = Loss(lambda batch, m: m(batch[0]).sin().sum(), lambda batch, m: m.a(batch[0]).sin().sum())
    data = TensorDataset(normal(4, 3))
    with observing(model):
        view = view_of(model, loss, data, "measurement")
        found = in_batches(view, Reader(data), 2)
    assert not found["b"].any() and found["a"].any(dim=(1, 2, 3)).all()


# ---- pseudo-labels are seen as the loss is ----


def test_the_curvature_s_loss_is_compared_with_autograd_as_well() -> None:
    """A weight used outside of its layer's calls, and rows position by position, where labels are drawn."""

    def turned(model: Any, x: Tensor) -> Tensor:
        rows = model.fc(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)
        return torch.tanh(rows) @ model.head.weight

    def loss(batch: Any, m: nn.Module) -> Tensor:
        logits = m(batch[0])
        drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
        return functional.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="sum")

    model = Calls(turned, fc=nn.Linear(3, 4), head=nn.Linear(3, 4, bias=False))
    data = TensorDataset(normal(4, 2, 3))
    with observing(model):
        view = view_of(model, Loss(loss), data, "sample")
        assert view.layout.alone == {"fc": "tokens", "head": "gradient"}
        assert in_batches(view, Reader(data), 1)["fc"].equal(in_batches(view, Reader(data), 4)["fc"])


# ---- what a view is made of ----


def test_a_view_takes_layers_with_and_without_a_trained_bias() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    training = Training(lambda name: "it was not" if name == "2.bias" else None)
    tracked = choose_layers(model, None, training).tracked
    assert [layer.has_bias for layer in tracked.values()] == [False, False, True]
    with observing(model):
        loss = Loss(lambda batch, m: m(batch[0]).sin().sum())
        view = make_loss_view(model, loss, "train", tracked, Reader(TensorDataset(normal(4, 3))))
    assert view.layout.calls == dict.fromkeys(tracked, CallLayout(0))
    assert view.layout.shapes["4"] == (2, 3)


def test_a_half_precision_model_is_not_taken_for_one_that_uses_weights_elsewhere() -> None:
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 3))
    data = TensorDataset(normal(4, 9, 20, dtype=torch.float32))

    def loss(batch: Any, m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(batch[0]).float().sin().sum()

    with observing(model):
        assert not view_of(model, Loss(loss), data).layout.alone
        model.bfloat16()
        half = Loss(lambda batch, m: m(batch[0].bfloat16()).float().sin().sum())
        view = view_of(model, half, data)
    assert view.dtype == torch.float32 and not view.layout.alone


# ---- factor passes compute no weight gradients ----


def test_factor_passes_compute_no_weight_gradients() -> None:
    """No parameter is a leaf of the loss's graph: the one leaf that a backward ends in is a scalar of our own."""
    model, data = mlp(), vectors(12)
    leaves: list[list[torch.Size]] = []
    trained: list[bool] = []

    def leaves_of(node: Any, seen: set[Any]) -> Iterator[Tensor]:
        if node is None or node in seen:
            return
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            yield from leaves_of(following, seen)

    def loss(batch: Any, m: nn.Module) -> Tensor:
        trained.append(any(parameter.requires_grad for parameter in m.parameters()))
        total = functional.cross_entropy(m(batch[0]), batch[1], reduction="sum")
        leaves.append([leaf.shape for leaf in leaves_of(total.grad_fn, set())])
        return total

    with observing(model):
        view = view_of(model, Loss(loss), data, "sample")
        walk = lambda: batches(data, in_order(12, 5), None, CPU)  # noqa: E731
        leaves.clear()
        trained.clear()
        sums = covariances(view, walk(), Ranks(), "here")
        bases = {n: Eigenbasis(eigenvectors(s.a_PII, n), eigenvectors(s.g_POO, n)) for n, s in sums.items()}
        corrected_eigenvalues(view, walk(), bases, Ranks(), "here", 1 << 20)
    assert leaves == [[torch.Size([])]] * 6 and not any(trained)
    assert all(parameter.grad is None for parameter in model.parameters())
