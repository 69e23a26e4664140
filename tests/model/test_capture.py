"""Tokens are exact however a model calls its layers, refused where they cannot be, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.curvature.kronecker import Eigenbasis, eigenvectors
from segflow.curvature.passes import corrected_eigenvalues, covariances
from segflow.data.batches import Batch, batches, in_order
from segflow.model import finite as finite_module
from segflow.model.capture import capture, example_axes, observing
from segflow.model.finite import FiniteCheck
from segflow.model.layers.registry import choose_layers
from segflow.model.loss_view import LossView, make_loss_view
from segflow.runtime.ranks import Ranks

from ..support import oracles
from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors
from .test_layers import (
    RANDOMISED,
    Along,
    Calls,
    _float64,  # noqa: F401  (a fixture that every test here uses)
    assert_exact,
    captured,
    example_matrices,
    normal,
    sines,
)

CPU = torch.device("cpu")


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
    assert list(assert_exact(Residual().eval(), normal(3, 2, 4, 4))) == ["stem", "conv", "head"]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers_are_exact_and_not_bypassed_by_fused_attention(batch_first: bool, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.1, batch_first=batch_first, norm_first=norm_first).eval()
    axis = 0 if batch_first else 1
    assert list(assert_exact(Along(layer, axis), normal(3, 3, 4))) == ["layer.linear1", "layer.linear2"]


def test_a_padded_transformer_encoder_does_not_turn_to_nested_tensors() -> None:
    """With frozen parameters in eval mode, torch would."""
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.tensor([False, False, True])

    def run(model: Any, x: Tensor) -> Tensor:
        return model.encoder(x, src_key_padding_mask=padding.expand(len(x), 3))[:, :2]

    assert len(assert_exact(Calls(run, encoder=encoder), normal(3, 3, 4))) == 4


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
        axes, _, _ = example_axes(tracked, lambda copies: loss(model, x[:1].repeat(copies, 1, 1)))
        capture(tracked, axes, lambda: loss(model, x), lambda layer, t: found.update({layer.name: t}), torch.float32)
    modules = {name: layer.module for name, layer in tracked.items()}
    exact = oracles.example_gradients(model, modules, lambda i: model(x[i : i + 1]).sin().sum(), len(x))
    for name, tokens in found.items():
        assert all(side.dtype == torch.float32 and side.isfinite().all() for side in tokens)
        error = (example_matrices(tokens) - exact[name]).norm() / exact[name].norm()
        assert 1e-6 < error < 0.05, "bfloat16 rounds, but only so much"
    assert found.keys() == {"0", "3"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tokens_have_the_dtype_asked_for(dtype: torch.dtype) -> None:
    model, found = nn.Linear(3, 2, dtype=dtype), []
    tracked = choose_layers(model).tracked
    with observing(model):
        loss = lambda: model(normal(4, 3, dtype=dtype)).sum()  # noqa: E731
        capture(tracked, {"": 0}, loss, lambda _l, t: found.append(t), torch.float32)
    assert [side.dtype for side in found[0]] == [torch.float32] * 2


def test_a_layer_that_the_loss_does_not_depend_on_is_not_handed_out() -> None:
    model = Calls(lambda m, x: m.used(x) + m.idle(x).detach(), used=nn.Linear(3, 2), idle=nn.Linear(3, 2))
    _, found = captured(model, choose_layers(model).tracked, normal(4, 3))
    assert found.keys() == {"used"}


def test_a_loss_cut_off_from_every_layer_is_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(sf.TaskError, match="the loss does not depend on any tracked layer's output"):
        captured(model, choose_layers(model).tracked, normal(4, 3), lambda m, x: m(x).detach().sum())


# ---- inputs without an axis of examples ----


def _flattened(model: Any, x: Tensor) -> Tensor:
    return model.fc(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _frames(model: Any, x: Tensor) -> Tensor:
    return model.fc(x.flatten(0, 1)[:, None]).squeeze(1).unflatten(0, x.shape[:2])


def _shared_by_the_batch(model: Any, x: Tensor) -> Tensor:
    return x @ model.fc(torch.ones(2, 3)).T


def _broadcast(model: Any, x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)[:, None] * model.fc(torch.ones(1, 3))


def _one_by_one(model: Any, x: Tensor) -> Tensor:
    return torch.stack([model.fc(row) for row in x])


def _two_layouts(model: Any, x: Tensor) -> Tensor:
    return model.fc(x).sum(1) + model.fc(x.transpose(0, 1)).sum(0)


def _pairs(model: Any, x: Tensor) -> Tensor:
    return model.fc(x[:, None] + x[None, :]).sum(1)


WITHOUT_AXIS: dict[str, tuple[Callable[..., Tensor], Callable[[], nn.Module]]] = {
    "flattened": (_flattened, lambda: nn.Linear(3, 2)),
    "frames": (_frames, lambda: nn.Conv1d(1, 1, 2)),
    "shared": (_shared_by_the_batch, lambda: nn.Linear(3, 3)),
    "broadcast": (_broadcast, lambda: nn.Linear(3, 2)),
    "one by one": (_one_by_one, lambda: nn.Linear(3, 2)),
    "two layouts": (_two_layouts, lambda: nn.Linear(3, 2)),
    "pairs": (_pairs, lambda: nn.Linear(3, 2)),
    "once for each": (lambda m, x: sum(m.fc(x * row) for row in x), lambda: nn.Linear(3, 2)),
}


@pytest.mark.parametrize("case", WITHOUT_AXIS)
@pytest.mark.parametrize("positions", [2, 4])
def test_a_layer_whose_input_does_not_count_the_examples_is_refused_by_name(case: str, positions: int) -> None:
    run, layer = WITHOUT_AXIS[case]
    model = Calls(run, fc=layer())
    with pytest.raises(sf.LayerError, match=r"layer 'fc': its input has shape \(.*\) for 2 .* so no axis of it counts"):
        captured(model, choose_layers(model).tracked, normal(4, positions, 3))


def test_a_sequence_first_convolution_is_refused() -> None:
    layers = choose_layers(nn.Conv2d(1, 1, 1)).tracked
    conv = layers[""].module
    for shape in ((5, 1, -1, 4), (5, 1, 4, -1)):
        with pytest.raises(sf.LayerError, match=r"layer '': its input has shape \(5, 1, .* no axis of it counts"):
            example_axes(layers, lambda n, shape=shape: conv(torch.ones([n if size < 0 else size for size in shape])))


class Loss(sf.Task):
    """A task made of one function of (batch, model)."""

    def __init__(self, loss: Callable[[Any, nn.Module], Tensor], measure: Callable[..., Tensor] | None = None):
        self.loss, self.measure = loss, measure or loss

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return self.loss(batch, model)

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.measure(batch, model)


def _lens(model: nn.Module, task: sf.Task, data: Any, kind: str = "train", collate: Any = None) -> LossView:
    return make_loss_view(model, task, kind, choose_layers(model, None, lambda _name: True).tracked, data, collate)


def _ignore(_layer: Any, _tokens: Any) -> None:
    pass


def test_examples_of_several_lengths_flattened_together_are_refused_though_the_first_has_one_position() -> None:
    data = [normal(length, 3, seed=length) for length in (1, 2, 3)]
    model = nn.Linear(3, 2)
    with observing(model):
        view = _lens(model, Loss(lambda x, m: m(x).sin().sum()), data, collate=torch.cat)
        [batch] = batches(data, [[0, 1, 2]], torch.cat, CPU)
        with pytest.raises(
            sf.LayerError,
            match=r"layer '': its input has 6 rows in the batch of 3 examples from 0 to 2, expected one for each",
        ):
            view.capture(batch, _ignore, FiniteCheck("pass"))


def test_examples_routed_to_different_layers_are_refused() -> None:
    def routed(model: Any, x: Tensor) -> Tensor:
        left = x[:, 0] > 0
        return torch.cat([model.left(x[left]), model.right(x[~left])])

    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [2.0, 1.0]])
    model = Calls(routed, left=nn.Linear(2, 2), right=nn.Linear(2, 2))
    with observing(model):
        with pytest.raises(sf.LayerError, match=r"layer 'right': its input has shape \(0, 2\) for 2 examples"):
            _lens(model, Loss(lambda b, m: m(b[0]).sum()), TensorDataset(x))
        model.run = lambda m, x: m.left(x[x[:, 0] > 0])
        tracked = choose_layers(model, ["left"], is_trained=lambda _name: True).tracked
        view = make_loss_view(model, Loss(lambda b, m: m(b[0]).sum()), "train", tracked, TensorDataset(x), None)
        [batch] = batches(TensorDataset(x), [[0, 1, 2]], None, CPU)
        with pytest.raises(sf.LayerError, match=r"layer 'left': its input has 2 rows in the batch of 3 examples from"):
            view.capture(batch, _ignore, FiniteCheck("pass"))


def test_calls_that_see_different_numbers_of_examples_are_refused() -> None:
    model = Calls(lambda m, x: torch.cat([m.fc(x), m.fc(x[x[:, 0] > 0])]), fc=nn.Linear(2, 2))
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    with pytest.raises(sf.LayerError, match=r"layer 'fc': its calls saw \[1, 2\] examples, expected one number"):
        captured(model, choose_layers(model).tracked, x)


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
            _lens(model, task, data, kind)
        _lens(model, task, data, "measurement" if kind == "train" else "train")
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_lens_takes_layers_with_and_without_a_trained_bias() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    tracked = choose_layers(model, None, lambda name: name != "2.bias").tracked
    assert [layer.has_bias for layer in tracked.values()] == [False, False, True]
    with observing(model):
        loss = Loss(lambda batch, m: m(batch[0]).sin().sum())
        view = make_loss_view(model, loss, "train", tracked, TensorDataset(normal(4, 3)), None)
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
        _lens(model, Loss(loss), data)
        model.bfloat16()
        half = Loss(lambda batch, m: m(batch[0].bfloat16()).float().sin().sum())
        assert _lens(model, half, data).dtype == torch.float32


# ---- layers that are never reached, and numbers that are not finite ----


def test_a_layer_that_no_forward_reaches_is_refused_by_name() -> None:
    model = Calls(lambda m, x: m.a(x), a=nn.Linear(3, 2), b=nn.Linear(3, 2), c=nn.Linear(3, 2))
    with observing(model), pytest.raises(sf.LayerError, match=r"layer 'b': never reached by the sample .*nor \['c'\]"):
        _lens(model, Loss(lambda batch, m: m(batch[0]).sum()), TensorDataset(normal(4, 3)), "sample")


def test_a_layer_that_no_loss_depends_on_is_refused_by_name_and_pass() -> None:
    model = Calls(lambda m, x: m.a(x) + m.b(x).detach(), a=nn.Linear(3, 2), b=nn.Linear(3, 2))
    data = TensorDataset(normal(4, 3))
    with observing(model):
        view = _lens(model, Loss(lambda batch, m: m(batch[0]).sum()), data, "sample")
        with pytest.raises(
            sf.LayerError, match=r"covariance pass, checkpoint at step 7: layer 'b' was never reached: no batch's loss"
        ):
            covariances(view, batches(data, in_order(4, 2), None, CPU), Ranks(), "checkpoint at step 7")


def test_a_layer_that_only_some_batches_reach_is_fine() -> None:
    model = Calls(lambda m, x: m.a(x) + (m.b(x) if x[0, 0] > 0 else 0), a=nn.Linear(1, 2), b=nn.Linear(1, 2))
    data, finite = TensorDataset(torch.tensor([[1.0], [-1.0]])), FiniteCheck("pass")
    with observing(model):
        view = _lens(model, Loss(lambda batch, m: m(batch[0]).sum()), data)
        for batch in batches(data, [[1], [0]], None, CPU):
            view.capture(batch, _ignore, finite)
    finite.finish(view.layers, Ranks())


def _spoilt_pass(dtype: torch.dtype, loss: Callable[[Tensor, nn.Module], Tensor], bad: float, at: int = 5) -> None:
    """A covariance pass over 8 examples in batches of 2, one of whose inputs is `bad`."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 2)).to(dtype)
    x = normal(8, 2, dtype=dtype)
    x[at] = bad
    data = TensorDataset(x)
    with observing(model):
        view = _lens(model, Loss(lambda batch, m: loss(batch[0], m)), data, "sample")
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
        view = _lens(model, Loss(loss), data, "sample")
        walk = lambda: batches(data, in_order(12, 5), None, CPU)  # noqa: E731
        leaves.clear()
        sums = covariances(view, walk(), Ranks(), "here")
        bases = {n: Eigenbasis(eigenvectors(s.a_PII, n), eigenvectors(s.g_POO, n)) for n, s in sums.items()}
        corrected_eigenvalues(view, walk(), bases, Ranks(), "here", 1 << 20)
    assert leaves == [[torch.Size([])]] * 6
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- the model is left as it was ----


class Kept(nn.Module):
    """Everything that could be left changed: modes, flags, buffers of both kinds, gradients, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("last", None)
        self.first.bias.requires_grad_(False)
        self.norm.eval()
        self.second.weight.grad = torch.ones_like(self.second.weight)
        self.first.register_forward_hook(lambda _m, _a, output: output + 1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1  # another tensor in its place
        self.norm.running_mean += 1
        self.last = x
        return self.second(self.drop(self.norm(self.first(x))))


def _snapshot(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {
        "modes": [module.training for module in model.modules()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "identities": {name: id(tensor) for name, tensor in tensors.items()},
        "registers": [(list(m._parameters), list(m._buffers)) for m in model.modules()],
        "values": {name: tensor.detach().clone().numpy().tobytes() for name, tensor in tensors.items()},
        "gradients": {name: None if p.grad is None else (id(p.grad), p.grad.tolist()) for name, p in tensors.items()},
        "hooks": [[list(getattr(module, kind)) for kind in hooks] for module in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "fused attention": torch.backends.mha.get_fastpath_enabled(),
        "gradients on": torch.is_grad_enabled(),
    }


def _observe(model: Kept, fault: str | None) -> None:
    """Capture within `observing`, doing all the damage that a session may do; `fault` says where to stop."""
    tracked = choose_layers(model).tracked
    x = normal(4, 3)

    def loss() -> Tensor:
        model.drop.train()
        output = model(x)
        torch.randn(3)
        if fault == "loss":
            raise KeyError("the user's loss")
        return output.sum()

    def consume(_layer: Any, _tokens: Any) -> None:
        if fault == "consumer":
            raise ZeroDivisionError("the consumer")

    with observing(model):
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
        if fault == "before":
            raise OSError("loading")
        assert not any(module.training for module in model.modules())
        capture(tracked, dict.fromkeys(tracked, 0), loss, consume, torch.float64)
        model.train().requires_grad_(True)
        model.first.weight = nn.Parameter(torch.zeros(3, 3))
        if fault == "after":
            raise KeyboardInterrupt


FAULTS: dict[str | None, type[BaseException] | None] = {
    None: None,
    "before": OSError,
    "loss": KeyError,
    "consumer": ZeroDivisionError,
    "after": KeyboardInterrupt,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("fused", [True, False])
def test_observing_leaves_no_trace_whatever_is_thrown(fault: str | None, fused: bool) -> None:
    model = Kept()
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        before = _snapshot(model)
        if fault is None:
            _observe(model, fault)
        else:
            with pytest.raises(FAULTS[fault]):
                _observe(model, fault)
        assert _snapshot(model) == before
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def test_hooks_are_gone_when_finding_the_axes_fails() -> None:
    model = Kept()
    before = _snapshot(model)

    def run(_copies: int) -> None:
        raise ValueError("the user's collate")

    tracked = choose_layers(model).tracked
    with pytest.raises(ValueError, match="collate"), observing(model):
        example_axes(tracked, run)
    assert _snapshot(model) == before


def test_hooks_are_gone_before_observing_ends() -> None:
    model = mlp()
    tracked = choose_layers(model).tracked
    with observing(model):
        with pytest.raises(ZeroDivisionError):
            capture(
                tracked, dict.fromkeys(tracked, 0), lambda: sines(model, normal(4, 5)), lambda *_: 1 / 0, torch.float64
            )
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("stage", ["check", "fit", "score"])
@pytest.mark.parametrize("at", [1, 3, 6, 9])
def test_an_exception_in_the_users_loss_leaves_the_model_as_it_was(tmp_path: Path, stage: str, at: int) -> None:
    model, data, calls = mlp(), vectors(10), []
    model[2].eval()
    model[0].bias.requires_grad_(False)

    class Failing(sf.tasks.Classification):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            calls.append(sample)
            loss = super().compute_train_loss(batch, model, sample)
            if armed and len(calls) == at:
                raise ArithmeticError("the user's own")
            return loss

    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 2), len(data))
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", Failing(), method=sf.Source(segments=1))
    armed = False
    if stage == "score":
        analyzer.fit(data, batch_size=4)
    calls.clear()
    before, armed = _snapshot(model), True
    with pytest.raises(ArithmeticError, match="the user's own"):
        if stage == "check":
            analyzer.check(data)
        elif stage == "fit":
            analyzer.fit(data, batch_size=2)
        else:
            analyzer.score(sf.Groups.singletons(len(data)), data, vectors(3, seed=5), batch_size=2)
    assert _snapshot(model) == before


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_model_with_uninitialised_parameters_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with (
        pytest.raises(sf.LayerError, match=r"parameter '1\.weight' is lazy .*Run the model on one batch"),
        observing(model),
    ):
        pass
    model(torch.ones(1, 2))
    with observing(model):
        pass
