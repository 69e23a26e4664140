"""Tokens of every supported layer make up autograd's gradients, and every other layer is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import segflow as sf
from segflow.model.layers import LinearLayer, register
from segflow.model.layers.choice import LayerChoice, choose_layers
from segflow.model.layers.registry import track

from ..support import oracles
from ..support.exactness import RANDOMISED, Along, Calls, assert_exact, captured, example_matrices, normal

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
DTYPE = torch.float64


# ---- exact: linear layers and convolutions ----


@RANDOMISED
@given(st.data())
def test_linear_tokens_equal_autograd_on_inputs_of_any_rank_and_example_axis(data: st.DataObject) -> None:
    rank = data.draw(st.integers(2, 4), "rank")
    axis = data.draw(st.integers(0, rank - 2), "example axis")
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=rank - 1, max_size=rank - 1), "examples and positions")
    features, outputs = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    layer = nn.Linear(features, outputs, bias=data.draw(st.booleans(), "bias"))
    assert_exact(Along(layer, axis), normal(*sizes, features))


@st.composite
def convolution_and_input(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    spatial = draw(st.integers(1, 3))
    groups, inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 3)) for _ in range(spatial)]
    dilation = [draw(st.integers(1, 2)) for _ in range(spatial)]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sizes = [r + draw(st.integers(0, 2)) for r in reach]
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    kind = draw(st.sampled_from(["ints", "same", "valid"]))
    padding: Any = kind if kind != "ints" else tuple(draw(st.integers(0, min(2, size - 1))) for size in sizes)
    stride = tuple(1 if kind == "same" else draw(st.integers(1, 2)) for _ in range(spatial))
    layer = CONVOLUTIONS[spatial - 1](
        groups * inputs,
        groups * outputs,
        tuple(kernel),
        stride=stride,
        padding=padding,
        dilation=tuple(dilation),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    return layer, normal(draw(st.integers(1, 3)), groups * inputs, *sizes)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@settings(RANDOMISED, max_examples=120)
@given(convolution_and_input())
def test_convolution_tokens_equal_autograd_for_every_geometry(case: tuple[nn.Module, Tensor]) -> None:
    assert_exact(*case)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_every_padding_mode_of_every_convolution_is_exact(mode: str, spatial: int, padding: Any) -> None:
    kernel = (2, 3, 2)[:spatial]  # even: "same" pads one side more
    layer = CONVOLUTIONS[spatial - 1](4, 4, kernel, padding=padding, padding_mode=mode, groups=2)
    assert_exact(layer, normal(2, 4, *(4, 3, 3)[:spatial]))


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolutions_in_channels_last_memory_are_exact(multiplier: int) -> None:
    layer = nn.Conv2d(3, 3 * multiplier, 3, groups=3, padding=1, stride=2).to(memory_format=torch.channels_last)
    assert assert_exact(layer, normal(4, 3, 5, 5).to(memory_format=torch.channels_last))[""].parts == 3


def test_a_padding_changed_after_construction_is_the_one_that_counts() -> None:
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    layer.padding = (2, 0)
    assert_exact(layer, normal(2, 2, 5, 6))


def test_a_convolution_whose_weight_was_cut_down_uses_the_weights_own_shape() -> None:
    layer = nn.Conv1d(2, 3, 3)
    layer.weight, layer.bias = nn.Parameter(layer.weight[:2, :, :2].detach()), nn.Parameter(layer.bias[:2].detach())
    assert_exact(layer, normal(3, 2, 5))


# ---- exact: how modules are arranged ----


class PlainLinear(nn.Linear):
    pass


class PlainConv(nn.Conv2d):
    """A subclass with more methods, but the forward that it inherits."""

    def norm(self) -> Tensor:
        return self.weight.norm()


def test_a_subclass_without_a_forward_of_its_own_is_handled_exactly() -> None:
    assert_exact(nn.Sequential(PlainConv(1, 2, 2), nn.Flatten(), PlainLinear(8, 2)), normal(3, 1, 3, 3))


@pytest.mark.parametrize("names", [None, ["first"], ["second"], ["first", "second"], ["second", "inner.layer"]])
def test_a_module_under_several_names_is_attributed_once_whichever_name_is_asked_for(names: Any) -> None:
    layer = nn.Linear(3, 3)
    model = Calls(lambda m, x: m.second(m.first(x).tanh()), first=layer, second=layer, inner=Along(layer))
    assert list(assert_exact(model, normal(4, 3), names=names)) == ["first"]


def test_a_frozen_weight_is_left_out_and_a_frozen_bias_is_no_input() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4), nn.Conv1d(4, 4, 1, groups=2), nn.Linear(1, 2, bias=False))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    choice = choose_layers(model)
    assert choice.skipped == {
        "0": "its weight was not trained: it does not require gradients",
        "1.bias": "it was not trained: it does not require gradients",
    }
    assert {name: layer.has_bias for name, layer in choice.tracked.items()} == {"1": False, "2": True, "3": False}
    assert {name: layer.shape for name, layer in choice.tracked.items()} == {
        "1": (1, 4, 3),
        "2": (2, 2, 3),
        "3": (1, 2, 1),
    }
    assert [layer.size for layer in choice.tracked.values()] == [12, 12, 2]

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m[3](m[2](m[1](m[0](x)).tanh()[..., None])).sin().sum()

    x = normal(5, 3)
    _, found = captured(model, choice.tracked, x, loss)
    (weight,) = torch.autograd.grad(loss(model, x), [model[1].weight])
    torch.testing.assert_close(example_matrices(found["1"]).sum(0)[0], weight, rtol=0, atol=1e-10)


def test_what_training_changed_outranks_the_flags() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model.requires_grad_(False)
    choice = choose_layers(model, why_untrained=lambda name: None if name == "1.weight" else "it was not")
    assert list(choice.tracked) == ["1"]
    assert not choice.tracked["1"].has_bias


def test_the_layout_of_a_layers_gradient_is_the_oracles() -> None:
    for module in (nn.Conv2d(4, 6, (2, 3), groups=2), nn.Linear(3, 2), nn.Conv1d(2, 2, 2, bias=False)):
        layer = choose_layers(module).tracked[""]
        weight, bias = torch.randn_like(module.weight), None if module.bias is None else torch.randn_like(module.bias)
        torch.testing.assert_close(layer.gradient_matrix(weight, bias), oracles.layer_matrix(module, weight, bias))
        frozen = track("", module, has_bias=False).gradient_matrix(weight, bias)
        assert frozen.shape[-1] == weight[0].numel()


# ---- refused by name ----


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, 2 * self.weight, self.bias)


class OwnConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class MoreParameters(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.scale = nn.Parameter(torch.ones(()))


def _patched() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.forward = MethodType(lambda self, x: functional.linear(x, 2 * self.weight, self.bias), layer)
    return layer


def _pruned() -> nn.Module:
    return prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5)


def _old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="deprecated"):
        return nn.utils.weight_norm(nn.Linear(3, 3))


NOT_ATTRIBUTED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "forward": (lambda: OwnLinear(3, 3), "", r"OwnLinear is a Linear with its own forward\(\)"),
    "conv_forward": (lambda: OwnConv(1, 1, 1), "", r"OwnConv is a Conv2d with its own _conv_forward\(\)"),
    "patched forward": (_patched, "", r"Linear is a Linear with its own forward\(\)"),
    "extra parameter": (MoreParameters, "", r"it has extra parameters \['scale'\]"),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "", "computed from other tensors"),
    "weight_norm, no bias": (
        lambda: parametrizations.weight_norm(nn.Linear(3, 3, bias=False)),
        "",
        "computed from other tensors",
    ),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv1d(1, 2, 2)), "", "computed from other tensors"),
    "old weight_norm": (_old_weight_norm, "", "computed from other tensors"),
    "parametrized bias": (
        lambda: parametrizations.weight_norm(nn.Linear(3, 3), "bias", dim=None),
        "",
        "computed from other tensors",
    ),
    "pruned": (_pruned, "", "computed from other tensors"),
    "lazy linear": (lambda: nn.LazyLinear(3), "", "it is lazy and not initialised yet"),
    "lazy convolution": (lambda: nn.LazyConv2d(3, 1), "", "it is lazy and not initialised yet"),
    "attention's output": (
        lambda: nn.MultiheadAttention(4, 2),
        "out_proj",
        "MultiheadAttention uses its weight without calling it",
    ),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "", "MultiheadAttention is not supported"),
    "lstm": (lambda: nn.LSTM(2, 3), "", "LSTM is not supported"),
    "batch norm": (lambda: nn.BatchNorm1d(3), "", "BatchNorm1d is not supported"),
    "embedding": (lambda: nn.Embedding(3, 2), "", "Embedding is not supported"),
    "bilinear": (lambda: nn.Bilinear(2, 2, 2), "", "Bilinear is not supported"),
    "transposed convolution": (lambda: nn.ConvTranspose1d(2, 2, 2), "", "ConvTranspose1d is not supported"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("case", NOT_ATTRIBUTED)
def test_every_other_parametrised_layer_is_reported_with_the_reason_and_refused_when_named(case: str) -> None:
    make, inside, reason = NOT_ATTRIBUTED[case]
    other = make()
    name = f"other.{inside}" if inside else "other"
    model = Calls(lambda m, x: m.fine(x), fine=nn.Linear(3, 2), other=other)
    choice = choose_layers(model)
    assert list(choice.tracked) == ["fine"]
    assert re.search(reason, choice.skipped[name])
    kind = type(model.get_submodule(name)).__name__
    with pytest.raises(sf.LayerError, match=rf"module '{name}' \({kind}\) cannot be attributed: .*{reason}"):
        choose_layers(model, ["fine", name])


def test_every_parametrised_module_is_either_tracked_or_reported() -> None:
    layers = [nn.LayerNorm(6), nn.TransformerEncoderLayer(6, 2, 8), nn.GRU(6, 2), nn.PReLU(), nn.Linear(6, 1)]
    layers += [nn.BatchNorm1d(6, affine=False), nn.ReLU(), parametrizations.orthogonal(nn.Linear(2, 2))]
    model = nn.Sequential(*layers)
    choice = choose_layers(model)
    reported = {*choice.tracked, *choice.skipped}
    holders = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert holders <= reported
    assert set(choice.tracked) == {"1.linear1", "1.linear2", "4"}
    assert choose_layers(model, ["4"]).skipped.keys() == reported - {"4"}


@pytest.mark.parametrize(
    ("twin", "tie"),
    [
        (lambda: nn.Linear(3, 3), lambda a, b: setattr(b, "weight", a.weight)),
        (lambda: nn.Linear(3, 3), lambda a, b: setattr(b, "bias", a.bias)),
        (lambda: nn.Embedding(3, 3), lambda a, b: setattr(b, "weight", a.weight)),
        (lambda: nn.Linear(3, 3), lambda a, b: setattr(b.weight, "data", a.weight.data)),
        (lambda: nn.Linear(3, 3), lambda a, b: setattr(b, "weight", nn.Parameter(a.weight.detach().T))),
    ],
    ids=["weight", "bias", "embedding", "storage", "transposed"],
)
def test_one_tensor_shared_by_two_layers_is_refused_by_the_names_of_both(twin: Any, tie: Any) -> None:
    model = Calls(lambda m, x: m.fine(m.a(x)), a=nn.Linear(3, 3), twin=twin(), fine=nn.Linear(3, 3))
    tie(model.a, model.twin)
    choice = choose_layers(model)
    assert list(choice.tracked) == ["fine"]
    assert choice.skipped["a"].startswith("it shares a tensor with 'twin'")
    with pytest.raises(sf.LayerError, match=r"module 'a' \(Linear\) cannot .* shares a tensor with 'twin'"):
        choose_layers(model, ["a", "fine"])
    assert list(choose_layers(model, ["fine"]).tracked) == ["fine"]


def test_a_tensor_that_the_model_itself_also_holds_is_refused() -> None:
    model = Calls(lambda m, x: m.fine(m.a(x)), a=nn.Linear(3, 3), fine=nn.Linear(3, 3))
    model.register_parameter("table", model.a.weight)
    assert "shares a tensor with 'the model itself'" in choose_layers(model).skipped["a"]


def test_two_empty_tensors_share_nothing() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 3))
    assert list(choose_layers(model).tracked) == ["0", "1"]


# ---- what a task may name ----


def test_an_unknown_name_is_refused_with_the_closest_ones() -> None:
    model = Calls(lambda m, x: x, encoder=nn.Linear(2, 2), decoder=nn.Linear(2, 2))
    with pytest.raises(sf.LayerError, match=r"no module 'encodr'\. Did you mean one of \['encoder', 'decoder'\]\?"):
        choose_layers(model, ["encodr"])
    with pytest.raises(sf.LayerError, match=r"no module 'zzz'\. Did you mean one of \['decoder', 'encoder'\]\?"):
        choose_layers(model, ["encoder", "zzz"])


def test_a_container_is_refused_with_the_layers_inside_it() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ReLU())
    with pytest.raises(sf.LayerError, match=r"module '0' has no parameters of its own.*\['0\.0', '0\.1'\]"):
        choose_layers(model, ["0"])
    with pytest.raises(sf.LayerError, match=r"module '1' has no parameters of its own\. There is nothing in it"):
        choose_layers(model, ["1", "0.0"])


def test_an_empty_choice_is_refused() -> None:
    with pytest.raises(sf.LayerError, match=r"returned no names\. Return None to track every layer"):
        choose_layers(nn.Linear(2, 2), [])


def test_a_model_with_nothing_to_attribute_is_refused_with_the_reasons() -> None:
    with pytest.raises(sf.LayerError, match=r"no layer can be attributed \(no module has parameters\)"):
        choose_layers(nn.Sequential(nn.ReLU()))
    with pytest.raises(sf.LayerError, match=r"no layer can be attributed \(0: GRU is not supported; 1: its weight was"):
        choose_layers(nn.Sequential(nn.GRU(2, 2), nn.Linear(2, 2).requires_grad_(False)))


def test_only_the_named_layers_are_attributed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    choice: LayerChoice = choose_layers(model, ("2", "0"))
    assert list(choice.tracked) == ["0", "2"]
    assert choice.skipped == {"1": "not among the tracked modules that the task names"}
    assert list(choose_layers(nn.Linear(2, 2), [""]).tracked) == [""]


@pytest.mark.parametrize("modules", [(), nn.Linear, (3,), [nn.Linear]])
def test_a_kind_of_layer_that_names_no_module_types_is_refused_where_it_is_registered(modules: Any) -> None:
    kind = type("Own", (LinearLayer,), {"modules": modules})
    with pytest.raises(sf.LayerError, match=r"Own: modules=.*, expected a tuple of module types"):
        register(kind)
    with pytest.raises(sf.LayerError, match=r"expected a subclass of segflow\.model\.layers\.TrackedLayer"):
        register(nn.Linear)
