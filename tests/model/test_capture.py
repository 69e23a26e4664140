"""Tokens are exact however a model calls its layers, and refused where they cannot be."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import segflow as sf
from segflow.model.capture import capture
from segflow.model.find_layout import find_layout
from segflow.model.layers import TrackedLayer, choose_layers
from segflow.model.observing import observing
from segflow.model.tokens import Tokens

from ..support.exactness import (
    RANDOMISED,
    Along,
    Calls,
    assert_exact,
    by_parameter,
    captured,
    example_matrices,
    normal,
    parameter_gradients,
    sines,
)

DTYPE = torch.float64


# ---- exact: however the model calls its layers ----


@RANDOMISED
@given(st.data())
def test_the_tokens_of_several_calls_are_joined_whatever_their_positions(data: st.DataObject) -> None:
    """Calls with and without positions, and calls that the loss does not depend on."""
    kinds = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4), "positions of each call; 0: no such axis")
    used = data.draw(st.lists(st.booleans(), min_size=len(kinds), max_size=len(kinds)), "does the loss depend on it")
    used[data.draw(st.integers(0, len(kinds) - 1))] = True

    def run(model: Any, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for place, (positions, counts) in enumerate(zip(kinds, used, strict=True)):
            value = x * (place + 1) if positions == 0 else torch.stack([x + i * place for i in range(positions)], 1)
            answer = model.layer(value.tanh()).flatten(1).sin().sum(1)
            total = total + (answer if counts else answer.detach() * 0)
        return total

    layer = nn.Linear(2, 3, bias=data.draw(st.booleans()))
    assert_exact(Calls(run, layer=layer), normal(data.draw(st.integers(1, 3)), 2), lambda m, x: m(x).sum())


def test_a_convolution_called_at_two_resolutions_is_exact() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1, stride=2)
    model = Calls(lambda m, x: m.conv(x).mean((2, 3)) + m.conv(m.conv(x).relu()).mean((2, 3)), conv=conv)
    assert_exact(model, normal(3, 2, 7, 6))


def test_a_recurrent_use_of_one_layer_is_exact() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            hidden = torch.tanh(model.cell(torch.cat([step, hidden], 1)))
        return model.head(hidden)

    assert_exact(Calls(run, cell=nn.Linear(7, 4), head=nn.Linear(4, 2)), normal(4, 5, 3))


@pytest.mark.parametrize(("examples", "positions"), [(4, 4), (2, 2), (3, 3), (5, 1), (1, 5), (3, 2), (2, 3), (6, 4)])
def test_sequence_first_inputs_are_exact_per_example_also_when_both_axes_are_equally_long(
    examples: int, positions: int
) -> None:
    model = nn.Sequential(Along(nn.Linear(3, 4), 1), Along(nn.Linear(4, 2), 1))
    assert_exact(model, normal(examples, positions, 3))


INPLACE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2-D": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), (5, 3)),
    "3-D": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), (5, 2, 3)),
    "3-D, no bias": (lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.ELU(inplace=True)), (5, 2, 3)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.SiLU(inplace=True), nn.Conv2d(4, 2, 1)), (3, 2, 3, 3)),
    "twice": (lambda: Calls(lambda m, x: m.layer(x).mul_(2).add_(1).sigmoid_(), layer=nn.Linear(3, 4)), (5, 3)),
    "slices": (lambda: Calls(_in_slices, layer=nn.Linear(3, 4)), (5, 2, 3)),
    "residual": (lambda: Calls(_into_the_output, layer=nn.Linear(3, 3), head=nn.Linear(3, 2)), (5, 2, 3)),
}


def _in_slices(model: Any, x: Tensor) -> Tensor:
    y = model.layer(x)
    y[..., 0] *= 2
    y[..., 1:3].sigmoid_()
    return y


def _into_the_output(model: Any, x: Tensor) -> Tensor:
    y = model.layer(x)
    y += x
    return model.head(y)


@pytest.mark.parametrize("case", INPLACE)
def test_changing_a_layers_output_in_place_keeps_tokens_exact(case: str) -> None:
    make, shape = INPLACE[case]
    assert_exact(make(), normal(*shape))


@pytest.mark.parametrize("whole", [True, False])
def test_changing_a_layers_input_in_place_after_the_call_is_refused(whole: bool) -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        hidden = model.first(x)
        y = model.second(hidden)
        (hidden if whole else hidden[:, 0]).mul_(2)
        return y + hidden

    model = Calls(run, first=nn.Linear(3, 3), second=nn.Linear(3, 3))
    with pytest.raises(sf.LayerError, match=r"layer 'second': its input was changed in place after the call"):
        captured(model, choose_layers(model).tracked, normal(4, 3))


def test_an_input_given_by_keyword_is_exact() -> None:
    assert_exact(Calls(lambda m, x: m.fc(input=x).tanh(), fc=nn.Linear(3, 2)), normal(4, 3))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="reflect")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.stem(x)))
        h = h + self.conv(h)
        h = h + self.conv(torch.tanh(h))
        return self.head(h.mean((2, 3)))


def test_a_residual_net_with_batch_norm_is_exact() -> None:
    found = assert_exact(Residual().eval(), normal(3, 2, 4, 4))
    assert list(found) == ["stem", "norm.weight", "norm.bias", "conv", "head"]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers_are_exact_and_not_bypassed_by_fused_attention(batch_first: bool, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.1, batch_first=batch_first, norm_first=norm_first).eval()
    axis = 0 if batch_first else 1
    blocks = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out_proj", "linear1", "linear2"]
    norms = [f"norm{number}.{parameter}" for number in (1, 2) for parameter in ("weight", "bias")]
    assert list(assert_exact(Along(layer, axis), normal(3, 3, 4))) == [f"layer.{name}" for name in [*blocks, *norms]]


def test_a_padded_transformer_encoder_does_not_turn_to_nested_tensors() -> None:
    """With frozen parameters in eval mode, torch would."""
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.tensor([False, False, True])

    def run(model: Any, x: Tensor) -> Tensor:
        return model.encoder(x, src_key_padding_mask=padding.expand(len(x), 3))[:, :2]

    assert len(assert_exact(Calls(run, encoder=encoder), normal(3, 3, 4))) == 2 * 10


def test_activation_checkpointing_is_exact() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        h = checkpoint(lambda v: torch.tanh(model.a(torch.tanh(model.b(v)))), model.a(x), use_reentrant=False)
        return model.b(h)

    assert_exact(Calls(run, a=nn.Linear(3, 3), b=nn.Linear(3, 3)), normal(4, 3))


def test_a_users_own_hooks_that_change_input_and_output_are_part_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].register_forward_pre_hook(lambda _m, args: (args[0] * 3,))
    model[0].register_forward_hook(lambda _m, _args, output: output.tanh())
    assert_exact(model, normal(4, 3))


def test_capture_works_inside_a_callers_no_grad() -> None:
    model, x = nn.Linear(3, 2), normal(4, 3)
    tracked = choose_layers(model).tracked
    with torch.no_grad():
        _, found = captured(model, tracked, x)
    (weight,) = torch.autograd.grad(sines(model, x), [model.weight])
    torch.testing.assert_close(example_matrices(found[""]).sum(0)[0, :, :3], weight, rtol=0, atol=1e-10)


def test_a_forward_of_the_loss_under_no_grad_does_not_count() -> None:
    """As of a teacher whose output is a constant target."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = model(x + 1)
        return (model(x) - target).square().sum()

    assert_exact(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), normal(4, 3), loss)


def _adversarial(model: nn.Module, x: Tensor) -> Tensor:
    moved = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(model(moved).sin().sum(), moved)
    return model(x + 0.1 * slope.sign()).sin().sum()


def test_a_backward_inside_the_loss_does_not_mix_into_the_tokens() -> None:
    assert_exact(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), normal(4, 3), _adversarial)


def test_a_loss_that_differentiates_through_a_gradient_is_refused() -> None:
    def penalised(model: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_()
        value = model(x).sin().sum()
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        return value + slope.square().sum()

    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(sf.LayerError, match=r"layer '2': the loss differentiates through its gradient"):
        captured(model, choose_layers(model).tracked, normal(4, 3), penalised)


@pytest.mark.parametrize("inside", [True, False])
def test_under_autocast_tokens_are_float32_finite_and_close(inside: bool) -> None:
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 3))
    x = normal(6, 2, 5, dtype=torch.float32)

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if inside else nullcontext():
            output = m(x)
        return output.float().sin().sum()

    tracked, found = choose_layers(model).tracked, {}
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside), observing(model):
        layout = find_layout(tracked, lambda copies: loss(model, x[:1].repeat(copies, 1, 1)))

        def consume(layer: TrackedLayer, tokens: Tokens) -> None:
            found[layer.name] = tokens

        capture(tracked, layout, lambda: loss(model, x), consume, torch.float32, len(x))
    alone = [parameter_gradients(model, partial(sines, model, x[i : i + 1])) for i in range(len(x))]
    assert all(side.dtype == torch.float32 and side.isfinite().all() for tokens in found.values() for side in tokens)
    for name, got in by_parameter(tracked, {n: example_matrices(tokens) for n, tokens in found.items()}).items():
        exact = torch.stack([of_example[name] for of_example in alone])
        assert 1e-6 < (got - exact).norm() / exact.norm() < 0.05, "bfloat16 rounds, but only so much"
    assert found.keys() == {"0", "3"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tokens_have_the_dtype_asked_for(dtype: torch.dtype) -> None:
    model, found = nn.Linear(3, 2, dtype=dtype), []
    tracked = choose_layers(model).tracked
    with observing(model):
        loss = lambda copies=4: model(normal(copies, 3, dtype=dtype)).sum()  # noqa: E731
        capture(tracked, find_layout(tracked, loss), loss, lambda _l, t: found.append(t), torch.float32, 4)
    assert [side.dtype for side in found[0]] == [torch.float32] * 2


def test_a_layer_that_the_loss_does_not_depend_on_is_not_handed_out() -> None:
    model = Calls(lambda m, x: m.used(x) + m.idle(x).detach(), used=nn.Linear(3, 2), idle=nn.Linear(3, 2))
    _, found = captured(model, choose_layers(model).tracked, normal(4, 3))
    assert found.keys() == {"used"}


def test_a_loss_cut_off_from_every_layer_is_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(sf.TaskError, match="the loss does not depend on any tracked layer's output"):
        captured(model, choose_layers(model).tracked, normal(4, 3), lambda m, x: m(x).detach().sum())


# ---- refused ----


def test_calls_that_see_different_numbers_of_examples_are_refused() -> None:
    model = Calls(lambda m, x: torch.cat([m.fc(x), m.fc(x[x[:, 0] > 0])]), fc=nn.Linear(2, 2))
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    with pytest.raises(sf.LayerError, match=r"layer 'fc': its calls saw \[1, 2\] examples, expected one number"):
        captured(model, choose_layers(model).tracked, x)
