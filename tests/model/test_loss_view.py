"""A view refuses a model whose layers do not make up their weights' gradients, and walks without weight gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from segflow.model.layers.choice import choose_layers
from segflow.model.make_view import make_loss_view
from segflow.model.observing import observing
from segflow.runtime.ranks import Ranks

from ..support.exactness import (
    Calls,
    Loss,
    ignore,
    normal,
    view_of,
)
from ..support.helpers import mlp, vectors

CPU = torch.device("cpu")
DTYPE = torch.float64


# ---- examples that do not stand in a layer's input one by one ----


def test_examples_of_several_lengths_flattened_together_are_refused_though_the_first_has_one_position() -> None:
    data = [normal(length, 3, seed=length) for length in (1, 2, 3)]
    model = nn.Linear(3, 2)
    with observing(model):
        view = view_of(model, Loss(lambda x, m: m(x).sin().sum()), data, collate=torch.cat)
        [batch] = batches(data, [[0, 1, 2]], torch.cat, CPU)
        with pytest.raises(
            sf.LayerError,
            match=r"layer '': its input has 6 rows in the batch of 3 examples from 0 to 2, expected one for each",
        ):
            view.capture(batch, ignore, FiniteCheck("pass"))


def test_examples_routed_to_different_layers_are_refused() -> None:
    def routed(model: Any, x: Tensor) -> Tensor:
        left = x[:, 0] > 0
        return torch.cat([model.left(x[left]), model.right(x[~left])])

    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [2.0, 1.0]])
    model = Calls(routed, left=nn.Linear(2, 2), right=nn.Linear(2, 2))
    with observing(model):
        with pytest.raises(sf.LayerError, match=r"layer 'right': its input has shape \(0, 2\) for 2 examples"):
            view_of(model, Loss(lambda b, m: m(b[0]).sum()), TensorDataset(x))
        model.run = lambda m, x: m.left(x[x[:, 0] > 0])
        tracked = choose_layers(model, ["left"], why_untrained=lambda _name: None).tracked
        view = make_loss_view(model, Loss(lambda b, m: m(b[0]).sum()), "train", tracked, Reader(TensorDataset(x)))
        [batch] = batches(TensorDataset(x), [[0, 1, 2]], None, CPU)
        with pytest.raises(sf.LayerError, match=r"layer 'left': its input has 2 rows in the batch of 3 examples from"):
            view.capture(batch, ignore, FiniteCheck("pass"))


# ---- weights used outside their layer's calls ----


OUTSIDE: dict[str, Callable[..., Tensor]] = {
    "tied head": lambda m, x: functional.linear(torch.tanh(m.fc(x)), m.fc.weight),
    "transposed": lambda m, x: torch.tanh(m.fc(x)) @ m.fc.weight,
    "only bias": lambda m, x: torch.tanh(m.fc(x)) * m.fc.bias,
    "called for nothing": lambda m, x: functional.linear(x, m.fc.weight) + m.fc(x).detach() + m.other(x),
    "penalty": lambda m, x: m.fc(x) + m.fc.weight.norm(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["train", "measurement"])
@pytest.mark.parametrize("case", OUTSIDE)
def test_a_weight_used_outside_its_layers_calls_is_refused(case: str, kind: str, dtype: torch.dtype) -> None:
    model = Calls(OUTSIDE[case], fc=nn.Linear(3, 3), other=nn.Linear(3, 3)).to(dtype)
    plain = lambda batch, m: m.fc(batch[0]).sum() + m.other(batch[0]).sum()  # noqa: E731
    odd = lambda batch, m: m(batch[0]).sin().sum() + m.other(batch[0]).sum()  # noqa: E731
    task = Loss(odd, plain) if kind == "train" else Loss(plain, odd)
    data = TensorDataset(normal(4, 3, dtype=dtype))
    with observing(model):
        with pytest.raises(sf.LayerError, match=rf"layer 'fc': its calls do not make up its gradient of the {kind}"):
            view_of(model, task, data, kind)
        view_of(model, task, data, "measurement" if kind == "train" else "train")
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_view_takes_layers_with_and_without_a_trained_bias() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    tracked = choose_layers(model, None, lambda name: "it was not" if name == "2.bias" else None).tracked
    assert [layer.has_bias for layer in tracked.values()] == [False, False, True]
    with observing(model):
        loss = Loss(lambda batch, m: m(batch[0]).sin().sum())
        view = make_loss_view(model, loss, "train", tracked, Reader(TensorDataset(normal(4, 3))))
    assert view.layout.axes == {"0": 0, "2": 0, "4": 0}
    assert view.layout.shapes["4"] == (2, 3)


def test_a_half_precision_model_is_not_taken_for_one_that_uses_weights_elsewhere() -> None:
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 3))
    data = TensorDataset(normal(4, 9, 20, dtype=torch.float32))

    def loss(batch: Any, m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(batch[0]).float().sin().sum()

    with observing(model):
        view_of(model, Loss(loss), data)
        model.bfloat16()
        half = Loss(lambda batch, m: m(batch[0].bfloat16()).float().sin().sum())
        assert view_of(model, half, data).dtype == torch.float32


# ---- factor passes compute no weight gradients ----


def test_factor_passes_compute_no_weight_gradients() -> None:
    """No parameter is a leaf of the loss's graph: the one leaf that a backward ends in is a scalar of our own."""
    model, data, leaves = mlp(), vectors(12), []

    def leaves_of(node: Any, seen: set[Any]) -> Iterator[Tensor]:
        if node is None or node in seen:
            return
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            yield from leaves_of(following, seen)

    def loss(batch: Any, m: nn.Module) -> Tensor:
        assert not any(parameter.requires_grad for parameter in m.parameters())
        total = functional.cross_entropy(m(batch[0]), batch[1], reduction="sum")
        leaves.append([leaf.shape for leaf in leaves_of(total.grad_fn, set())])
        return total

    with observing(model):
        view = view_of(model, Loss(loss), data, "sample")
        walk = lambda: batches(data, in_order(12, 5), None, CPU)  # noqa: E731
        leaves.clear()
        sums = covariances(view, walk(), Ranks(), "here")
        bases = {n: Eigenbasis(eigenvectors(s.a_PII, n), eigenvectors(s.g_POO, n)) for n, s in sums.items()}
        corrected_eigenvalues(view, walk(), bases, Ranks(), "here", 1 << 20)
    assert leaves == [[torch.Size([])]] * 6
    assert all(parameter.grad is None for parameter in model.parameters())
