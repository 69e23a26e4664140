"""Rows that a model moves belong to whom no order tells; gradients are compared on more than the first example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from segflow.data.batches import evenly_spaced
from segflow.model.layers import choose_layers
from segflow.model.row_moves import moved_layers

from ..support.exactness import Calls, assert_seen_exactly, normal

DTYPE = torch.float64
N, S = 20, 4


def _words(marks: Callable[[int], int]) -> Tensor:
    """[N, S, 3]: the first feature is 1 at so many places of an example, 0 elsewhere."""
    x = normal(N, S, 3)
    x[:, :, 0] = 0
    for example in range(N):
        x[example, : marks(example), 0] = 1
    return x


def _unprobed() -> tuple[int, int]:
    first, second = sorted({*range(N)} - {*evenly_spaced(N, 8), N - 1})[:2]
    return first, second


def _picked(model: Any, x: Tensor) -> Tensor:
    """A head on marked words alone, as of a masked language model."""
    h = model.body(x).tanh()
    return model.head(h[x[..., 0] == 1]).sin().sum()


def _packed(model: Any, x: Tensor) -> Tensor:
    """Only marked words go through the body, and are put back into their places."""
    real = x[..., 0] == 1
    h = x.new_zeros(*real.shape, 4)
    h[real] = model.body(x[real])
    return model.head(h.tanh()).sin().sum()


def _sorted(model: Any, x: Tensor) -> Tensor:
    """Examples by their number of marked words, and back."""
    order = x[..., 0].sum(1).argsort(stable=True)
    h = model.body(x[order])
    return model.head(h[order.argsort()].tanh() * x[..., 1:2]).sin().sum()


def _pooled(model: Any, x: Tensor) -> Tensor:
    """The last marked word of every example, which moves no example."""
    h = model.body(x).tanh()
    last = h[torch.arange(len(x)), x[..., 0].sum(1).long() - 1]
    return model.head(last).sin().sum()


def _looked_up(model: Any, x: Tensor) -> Tensor:
    """Rows of a table by a fixed order, which are no example's."""
    table = torch.linspace(0, 1, S)[[2, 0, 3, 1]]
    return model.head(model.body(x * table[:, None]).tanh()).sin().sum()


@pytest.mark.parametrize(
    ("loss", "alone"),
    [
        (_picked, {"head"}),
        (_packed, {"body"}),
        (_sorted, {"body", "head"}),
        (_pooled, set()),
        (_looked_up, set()),
    ],
)
def test_moved_rows_are_run_alone_though_the_probed_examples_agree_by_chance(loss: Any, alone: set[str]) -> None:
    first, second = _unprobed()
    x = _words(lambda example: {first: 3, second: 1}.get(example, 2))
    model = Calls(loss, body=nn.Linear(3, 4), head=nn.Linear(4, 2))
    seen = assert_seen_exactly(model, list(x), lambda m, batch: m(batch), sizes=(1, 2, 7, N))
    assert set(seen.alone) == alone


def test_the_layers_that_get_moved_rows_are_named() -> None:
    model = Calls(_packed, body=nn.Linear(3, 4), head=nn.Linear(4, 2))
    layers, x = choose_layers(model).tracked, _words(lambda _: 2)
    assert moved_layers(layers, x, lambda: model(x)) == ["body"]
    assert moved_layers(layers, normal(3), lambda: model(x)) == [], "rows of what is not the batch's content"
    assert moved_layers(layers, {"no": "tensors"}, lambda: model(x)) == ["body"], "anything may be the batch's"


def test_a_weight_that_the_first_example_does_not_use_outside_of_its_module_is_exact_all_the_same() -> None:
    """Words are predicted with the embedding's weight where there are some; the first example has none."""
    x = _words(lambda example: 0 if example == 0 else 1 + example % 3)

    def loss(model: Any, batch: Tensor) -> Tensor:
        h = model.body(batch).tanh()
        words = functional.linear(h, model.body.weight.T) * batch[..., :1]
        return model.head(h.mean(1)).sin().sum() + words.sin().sum()

    model = Calls(lambda m, batch: batch, body=nn.Linear(3, 4), head=nn.Linear(4, 2))
    seen = assert_seen_exactly(model, list(x), loss, sizes=(1, 3, N))
    assert set(seen.alone) == {"body"}


def test_a_table_that_all_share_is_exact_for_texts_of_one_word() -> None:
    """x + w[:t]: an axis of length one is a word there, not the place of the examples."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(S, 3))

        def forward(self, t: int) -> Tensor:
            return self.w[:t]

    modules = {"place": Positions(), "table": nn.Embedding(S, 3), "head": nn.Linear(3, 2)}
    for marks in (lambda example: 1 if example > 1 else 3, lambda example: 3 if example > 1 else 1):
        x = _words(marks)
        model = Calls(lambda m, batch: batch, **modules)
        examples = [example[:1] if (example[:, 0] == 1).sum() == 1 else example[:3] for example in x]
        by_length = sorted(examples, key=len)

        def pad(rows: Any) -> Tensor:
            return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

        def masked(model: Any, batch: Tensor) -> Tensor:
            real = (batch != 0).any(2)
            t = batch.shape[1]
            h = (batch + model.place(t) + model.table(torch.arange(t))).tanh()
            return (model.head(h).sin().sum(2) * real).sum()

        assert_seen_exactly(model, by_length, masked, collate=pad, sizes=(1, 2, 5))
