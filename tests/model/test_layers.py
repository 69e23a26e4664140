"""Tokens of linear layers and convolutions make up autograd's gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import segflow as sf
from segflow.model.layers import LinearLayer, choose_layers, register
from segflow.model.layers.choice import Training

from ..support import oracles
from ..support.exactness import RANDOMISED, Along, Calls, assert_exact, assert_seen_exactly, normal, track

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
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


# ---- exact: layers whose weight is turned ----


@st.composite
def transposed_convolution_and_input(draw: st.DrawFn) -> tuple[nn.Module, Tensor, list[int] | None]:
    """Also of strides that reach over others' outputs, of dilations wider than the stride, and of a wanted size."""
    spatial = draw(st.integers(1, 3))
    groups, inputs, outputs = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 3)) for _ in range(spatial)]
    stride = [draw(st.integers(1, 3)) for _ in range(spatial)]
    dilation = [draw(st.integers(1, 3)) for _ in range(spatial)]
    more = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    sizes = [draw(st.integers(2, 3)) for _ in range(spatial)]
    reach = [d * (k - 1) + (n - 1) * s for d, k, n, s in zip(dilation, kernel, sizes, stride, strict=True)]
    padding = [draw(st.integers(0, min(2, far // 2))) for far in reach]
    layer = TRANSPOSED[spatial - 1](
        groups * inputs,
        groups * outputs,
        tuple(kernel),
        stride=tuple(stride),
        padding=tuple(padding),
        output_padding=tuple(more),
        dilation=tuple(dilation),
        groups=groups,
        bias=draw(st.booleans()),
    )
    x = normal(draw(st.integers(1, 3)), groups * inputs, *sizes)
    given = None
    if draw(st.booleans()):
        least = [far - 2 * p + 1 for far, p in zip(reach, padding, strict=True)]
        given = [size + draw(st.integers(0, s - 1)) for size, s in zip(least, stride, strict=True)]
    return layer, x, given


@settings(RANDOMISED, max_examples=80)
@given(transposed_convolution_and_input())
def test_transposed_convolution_tokens_equal_autograd_for_every_geometry(
    case: tuple[nn.Module, Tensor, list[int] | None],
) -> None:
    layer, x, size = case
    assume(torch.autograd.grad(layer(x, output_size=size).sin().sum(), layer.weight)[0].any())
    found = assert_exact(Calls(lambda m, x: m.layer(x, output_size=size), layer=layer), x)
    assert list(found) == (["layer"] if layer.bias is None else ["layer", "layer.bias"]), (
        "other positions than the bias"
    )


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 3), (2, 2, 2, 3)])
def test_transformers_transposed_linear_layer_is_exact(shape: tuple[int, ...]) -> None:
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = Conv1D(4, 3)
    nn.init.normal_(layer.bias)
    seen = assert_seen_exactly(nn.Sequential(layer, nn.Tanh(), Conv1D(2, 4)), normal(*shape))
    assert seen.shapes == {"0": (1, 4, 4), "2": (1, 2, 5)} and not seen.alone


# ---- exact: biases by themselves ----


APART: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 2), (4, 2, 3)),
    "one row": (lambda: nn.Linear(3, 2), (4, 3)),
    "convolution": (lambda: nn.Conv2d(4, 2, 2, groups=2), (3, 4, 3, 3)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(4, 2, 2, groups=2), (3, 4, 3)),
    "Conv1D": (lambda: pytest.importorskip("transformers.pytorch_utils").Conv1D(2, 3), (4, 2, 3)),
}


@pytest.mark.parametrize("case", APART)
def test_a_bias_that_was_trained_otherwise_than_its_weight_is_a_block_of_its_own(case: str) -> None:
    make, shape = APART[case]
    layer, x = make(), normal(*shape)
    ways = [
        Training(alike=lambda one, other: one == other),
        Training(alike=lambda one, other: "bias" not in (one, other)),
        Training(apart=["bias"]),
    ]
    for training in ways:
        seen = assert_seen_exactly(layer, x, training=training)
        assert seen.shapes["bias"] == (1, len(layer.bias), 1) and not seen.view.layers[""].has_bias
        assert seen.view.layers["bias"].exact_P and not seen.view.layers[""].exact_P
    with_bias = assert_seen_exactly(layer, x, training=Training(apart=["other.bias"]))
    assert list(with_bias.shapes) == (["", "bias"] if "transposed" in case else [""])


def test_a_weight_without_training_leaves_its_bias_a_block_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Conv1d(1, 2, 2))
    model[0].weight.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    seen = assert_seen_exactly(Calls(lambda m, x: m.net[2](m.net[:2](x)[:, None]), net=model), normal(4, 3))
    assert seen.shapes == {"net.0.bias": (1, 3, 1), "net.2.bias": (1, 2, 1)}


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


def test_the_layout_of_a_layers_gradient_is_the_oracles() -> None:
    for module in (nn.Conv2d(4, 6, (2, 3), groups=2), nn.Linear(3, 2), nn.Conv1d(2, 2, 2, bias=False)):
        layer = choose_layers(module).tracked[""]
        weight, bias = torch.randn_like(module.weight), None if module.bias is None else torch.randn_like(module.bias)
        tensors = [weight] if bias is None else [weight, bias]
        torch.testing.assert_close(layer.gradient_matrix(tensors), oracles.layer_matrix(module, weight, bias))
        frozen = track("", module, has_bias=False).gradient_matrix(tensors)
        assert frozen.shape[-1] == weight[0].numel()


@pytest.mark.parametrize("modules", [(), nn.Linear, (3,), [nn.Linear]])
def test_a_kind_of_layer_that_names_no_module_types_is_refused_where_it_is_registered(modules: Any) -> None:
    kind = type("Own", (LinearLayer,), {"modules": modules})
    with pytest.raises(sf.LayerError, match=r"Own: modules=.*, expected a tuple of module types"):
        register(kind)
    with pytest.raises(sf.LayerError, match=r"expected a subclass of segflow\.model\.layers\.TrackedLayer"):
        register(nn.Linear)
