"""Convolutions in one, two or three dimensions, with every stride, dilation, padding mode and number of groups.

Axes: P parts (the convolution's groups), B examples, S output positions, C channels, O outputs of a part.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from .registry import register
from .tracked import TrackedLayer


@register
class ConvolutionLayer(TrackedLayer):
    """nn.Conv1d, nn.Conv2d and nn.Conv3d: a token for each output position, whose input is its receptive field."""

    modules: ClassVar = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    methods: ClassVar = ("forward", "_conv_forward", "__call__")
    examples_first: ClassVar = True

    def sides(self, value: Tensor, gradient: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """The receptive fields, and the gradients of the outputs; the examples are always on the first axis."""
        return _patches(self.module, value), _channels(self.module, gradient)

    def positions(self, shape: torch.Size) -> int:
        """How many positions the input has; the output may have fewer."""
        return max(1, shape.numel() // (2 * shape[1]))

    @property
    def parts(self) -> int:
        """P: the number of the convolution's groups."""
        return int(self.module.groups)  # type: ignore[arg-type]


def _patches(convolution: nn.Module, value_BC: Tensor) -> Tensor:
    """The receptive field of every output position, [P, B, S, C/P * kernel]."""
    padding: Any = convolution._reversed_padding_repeated_twice
    if convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str):
        padding = [side for sides in reversed(convolution.padding) for side in (sides, sides)]  # type: ignore[arg-type]
    mode = "constant" if convolution.padding_mode == "zeros" else str(convolution.padding_mode)
    padded = functional.pad(value_BC, tuple(padding), mode=mode)
    kernel = convolution.get_parameter("weight").shape[2:]
    geometry: Any = zip(kernel, convolution.dilation, convolution.stride, strict=True)  # type: ignore[arg-type]
    for axis, (size, dilation, stride) in enumerate(geometry, start=2):
        padded = padded.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    positions, taps = {1: ("x", "u"), 2: ("x y", "u v"), 3: ("x y z", "u v w")}[len(kernel)]
    return rearrange(padded, f"b (p c) {positions} {taps} -> p b ({positions}) (c {taps})", p=convolution.groups)


def _channels(convolution: nn.Module, gradient_BC: Tensor) -> Tensor:
    """Output gradients as [P, B, S, O]."""
    return rearrange(gradient_BC, "b (p o) ... -> p b (...) o", p=convolution.groups)
