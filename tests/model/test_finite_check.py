"""Layers that are never reached, and numbers that are not finite, are refused with their batch and pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.curvature.passes import covariances
from segflow.data.batches import Batch, in_order
from segflow.data.readers import batches
from segflow.model import finite_check as finite_module
from segflow.model.finite_check import FiniteCheck
from segflow.model.observing import observing
from segflow.runtime.ranks import Ranks

from ..support.exactness import (
    Calls,
    Loss,
    ignore,
    normal,
    view_of,
)

CPU = torch.device("cpu")
DTYPE = torch.float64


def test_a_layer_that_no_forward_reaches_is_refused_by_name() -> None:
    model = Calls(lambda m, x: m.a(x), a=nn.Linear(3, 2), b=nn.Linear(3, 2), c=nn.Linear(3, 2))
    with observing(model), pytest.raises(sf.LayerError, match=r"layer 'b': never reached by the sample .*nor \['c'\]"):
        view_of(model, Loss(lambda batch, m: m(batch[0]).sum()), TensorDataset(normal(4, 3)), "sample")


def test_a_layer_that_no_loss_depends_on_is_refused_by_name_and_pass() -> None:
    model = Calls(lambda m, x: m.a(x) + m.b(x).detach(), a=nn.Linear(3, 2), b=nn.Linear(3, 2))
    data = TensorDataset(normal(4, 3))
    with observing(model):
        view = view_of(model, Loss(lambda batch, m: m(batch[0]).sum()), data, "sample")
        with pytest.raises(
            sf.LayerError, match=r"covariance pass, checkpoint at step 7: layer 'b' was never reached: no batch's loss"
        ):
            covariances(view, batches(data, in_order(4, 2), None, CPU), Ranks(), "checkpoint at step 7")


def test_a_layer_that_only_some_batches_reach_is_fine() -> None:
    model = Calls(lambda m, x: m.a(x) + (m.b(x) if x[0, 0] > 0 else 0), a=nn.Linear(1, 2), b=nn.Linear(1, 2))
    data, finite = TensorDataset(torch.tensor([[1.0], [-1.0]])), FiniteCheck("pass")
    with observing(model):
        view = view_of(model, Loss(lambda batch, m: m(batch[0]).sum()), data)
        for batch in batches(data, [[1], [0]], None, CPU):
            view.capture(batch, ignore, finite)
    finite.finish(view.layers, Ranks())


def _spoilt_pass(dtype: torch.dtype, loss: Callable[[Tensor, nn.Module], Tensor], bad: float, at: int = 5) -> None:
    """A covariance pass over 8 examples in batches of 2, one of whose inputs is `bad`."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 2)).to(dtype)
    x = normal(8, 2, dtype=dtype)
    x[at] = bad
    data = TensorDataset(x)
    with observing(model):
        view = view_of(model, Loss(lambda batch, m: loss(batch[0], m)), data, "sample")
        covariances(view, batches(data, in_order(8, 2), None, CPU), Ranks(), "checkpoint at step 7")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_with_its_batch_and_pass(bad: float) -> None:
    with pytest.raises(
        sf.TaskError,
        match=r"covariance pass, checkpoint at step 7: the loss of the batch of 2 examples from 4 to 5 is not finite",
    ):
        _spoilt_pass(torch.float64, lambda x, m: m(x).square().sum(), bad)


def test_a_gradient_that_is_not_finite_is_refused_with_its_layer_batch_and_pass() -> None:
    """The loss is finite: the square root's slope at 0 is not."""
    with pytest.raises(
        sf.LayerError,
        match=r"checkpoint at step 7: the gradient or input of layer '2' of the batch of 2 examples from 4 to 5 is",
    ):
        _spoilt_pass(torch.float64, lambda x, m: (m(x) * x).square().sum(1).sqrt().sum(), 0.0)


def test_tokens_whose_squares_overflow_are_refused() -> None:
    with pytest.raises(
        sf.LayerError, match=r"input of layer '\d' of the batch of 2 examples from 4 to 5 is not finite"
    ):
        _spoilt_pass(torch.float32, lambda x, m: 1e10 * m(x).sum(), 1e12)


def test_the_first_bad_batch_is_named() -> None:
    finite = FiniteCheck("some pass")
    for batch in range(5):
        finite.see("a", torch.tensor(1.0))
        finite.see("b", torch.tensor(float("nan") if batch >= 2 else 1.0))
        finite.see_loss(Batch([batch], None), torch.tensor(1.0))
    with pytest.raises(
        sf.LayerError, match=r"some pass: the gradient or input of layer 'b' of example 2 is not finite"
    ):
        finite.finish(["a", "b"], Ranks())


def test_a_long_pass_stops_soon_after_a_bad_number_not_at_its_end() -> None:
    finite = FiniteCheck("some pass")
    with pytest.raises(sf.TaskError, match="loss of example 3 is not finite"):
        for batch in range(1000):
            finite.see_loss(Batch([batch], None), torch.tensor(float("inf") if batch == 3 else 1.0))
    assert batch == finite_module._DRAIN_EVERY - 1
