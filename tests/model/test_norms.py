"""Norms: their weights and biases are vectors, whose gradients equal autograd's for every example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from segflow.model.layers import ChannelNorm, LastAxesNorm, choose_layers
from segflow.model.layers.norm import ScaleLayer
from segflow.model.layers.registry import kind_of

from ..support.exactness import RANDOMISED, Along, Calls, assert_seen_exactly, normal

DTYPE = torch.float64


def _filled(module: nn.Module) -> nn.Module:
    """With weights and statistics that are not those of the beginning."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return module.eval()


def _turned(norm: nn.Module) -> nn.Module:
    """After a bend, and before one that tells the features apart."""
    return Calls(lambda m, x: m.norm(x.exp()).cumsum(-1).sin(), norm=_filled(norm))


@settings(RANDOMISED, max_examples=25)
@given(st.data())
def test_norms_of_the_last_axes_equal_autograd(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(2, 3), min_size=2, max_size=4), "examples, positions, features")
    axes = data.draw(st.integers(1, len(shape) - 1), "how many axes are normalised")
    kind = data.draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm]))
    options = {"bias": data.draw(st.booleans(), "bias")} if kind is nn.LayerNorm else {}
    norm = kind(tuple(shape[-axes:]), eps=0.1, **options)
    seen = assert_seen_exactly(_turned(norm), normal(*shape))
    assert not seen.alone and seen.shapes["norm.weight"] == (1, norm.weight.numel(), 1)


CHANNELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch norm of vectors": (lambda: nn.BatchNorm1d(3), (5, 3)),
    "batch norm of sequences": (lambda: nn.BatchNorm1d(3), (4, 3, 3)),
    "batch norm of images": (lambda: nn.BatchNorm2d(3, eps=0.1), (4, 3, 2, 3)),
    "batch norm of clips": (lambda: nn.BatchNorm3d(2), (2, 2, 2, 3, 2)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 4, 3)),
    "group norm of images": (lambda: nn.GroupNorm(1, 4, eps=0.1), (3, 4, 4, 4)),
    "instance norm": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 3, 4)),
}


@pytest.mark.parametrize("case", CHANNELS)
def test_norms_of_channels_equal_autograd(case: str) -> None:
    make, shape = CHANNELS[case]
    seen = assert_seen_exactly(_turned(make()), normal(*shape))
    assert not seen.alone and set(seen.shapes) == {"norm.weight", "norm.bias"}


def test_norms_along_another_axis_than_the_first_are_exact() -> None:
    assert not assert_seen_exactly(Along(_filled(nn.LayerNorm(3)), 1), normal(4, 2, 3)).alone


def test_folded_norms_are_exact() -> None:
    """Frames of clips, flattened into one axis."""

    def run(model: Any, x: Tensor) -> Tensor:
        frames = model.channels(x.flatten(0, 1).exp())
        return model.last(frames).cumsum(-1).unflatten(0, x.shape[:2])

    model = Calls(run, channels=_filled(nn.BatchNorm1d(3)), last=_filled(nn.LayerNorm(4)))
    assert not assert_seen_exactly(model, normal(3, 2, 3, 4)).alone


# ---- the transformers families' own ----


def _transformers(family: str, name: str, *sizes: Any, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
        return getattr(module, name)(*sizes, **options)

    return make


FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Llama": (_transformers("llama", "LlamaRMSNorm", 4), (3, 2, 4)),
    "Gemma, 1 + weight": (_transformers("gemma", "GemmaRMSNorm", 4), (3, 2, 4)),
    "T5": (_transformers("t5", "T5LayerNorm", 4), (3, 2, 4)),
    "ConvNext, channels last": (_transformers("convnext", "ConvNextLayerNorm", 4), (3, 2, 2, 4)),
    "ConvNext, channels first": (
        _transformers("convnext", "ConvNextLayerNorm", 4, data_format="channels_first"),
        (3, 4, 2, 3),
    ),
    "ConvNext, as wide as it has channels": (
        _transformers("convnext", "ConvNextLayerNorm", 4, data_format="channels_first"),
        (3, 4, 4, 4),
    ),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_norms_of_the_transformers_families_equal_autograd(case: str) -> None:
    """Some of them compute in single precision whatever they are given."""
    make, shape = FAMILIES[case]
    norm = make()
    seen = assert_seen_exactly(_turned(norm), normal(*shape), tolerance=1e-6)
    assert not seen.alone and kind_of(norm) is LastAxesNorm
    assert isinstance(seen.view.layers["norm.weight"], ScaleLayer)


class OwnLayerNorm(nn.Module):
    """Called as the families' are, with channels on axis 1 and no word of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
        return self.weight[:, None] * x + self.bias[:, None]


class GatedRMSNorm(nn.Module):
    """Called as the families' are, with an argument more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = x if gate is None else x * gate
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True))


@pytest.mark.parametrize("width", [3, 4])
def test_a_norm_that_only_its_name_takes_for_a_known_one_is_exact_all_the_same(width: int) -> None:
    assert assert_seen_exactly(_turned(OwnLayerNorm()), normal(3, 4, width)).alone
    gated = Calls(lambda m, x: m.norm(x, gate=x.tanh() + 2).cumsum(-1), norm=_filled(GatedRMSNorm()))
    assert assert_seen_exactly(gated, normal(3, width, 4)).alone


class ChannelsFirst(nn.LayerNorm):
    """As torchvision's LayerNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def test_a_subclass_with_its_own_forward_is_differentiated_as_a_whole() -> None:
    norm = ChannelsFirst(4)
    assert kind_of(norm) is None and kind_of(nn.BatchNorm2d(4)) is ChannelNorm
    assert not assert_seen_exactly(_turned(norm), normal(3, 4, 4)).alone


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_norm_of_which_one_parameter_was_trained_has_one_block(frozen: str) -> None:
    norm = _filled(nn.LayerNorm(3))
    norm.get_parameter(frozen).requires_grad_(False)
    seen = assert_seen_exactly(_turned(norm), normal(4, 3))
    assert list(seen.shapes) == [f"norm.{'bias' if frozen == 'weight' else 'weight'}"]


def test_a_norm_without_parameters_has_no_block() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3, elementwise_affine=False), nn.BatchNorm1d(3, affine=False))
    assert list(choose_layers(model).tracked) == ["0"]


class AdaptiveRMSNorm(nn.Module):
    """Called as the families' norms, but with a condition as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (4,)) * self.weight * condition


class FusedLayerNorm(nn.Module):
    """Called as torch's, and gives back its input too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.layer_norm(x, (4,), self.weight), x


def test_norms_that_take_or_give_more_than_one_tensor_are_exact_though_their_names_are_those_of_norms() -> None:
    adaptive = Calls(lambda m, x: m.norm(x.exp(), x.cos()).cumsum(-1), norm=AdaptiveRMSNorm())
    assert_seen_exactly(adaptive, list(normal(5, 3, 4)))
    fused = Calls(lambda m, x: sum(m.norm(x.exp())).cumsum(-1), norm=FusedLayerNorm())
    assert_seen_exactly(fused, list(normal(5, 3, 4)))
