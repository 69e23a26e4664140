"""Convolutions in one, two or three dimensions, with every stride, dilation, padding mode and number of groups.

Axes: P parts (the convolution's groups), R rows, S positions, C channels, O outputs and I inputs of a part, Q
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from .registry import register
from .tracked import Modules, Owner, TrackedLayer


@register
class ConvolutionLayer(TrackedLayer):
    """nn.Conv1d, nn.Conv2d and nn.Conv3d: a token for each output position, whose input is its receptive field."""

    modules: ClassVar[Modules] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    methods: ClassVar = ("forward", "_conv_forward", "__call__")
    examples_first: ClassVar = True
    features: ClassVar = 1

    def sides(self, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The receptive fields, and the gradients of the outputs."""
        return _patches(self.module, _padded(self.module, value)), _channels(self.module, gradient)

    def positions(self, shape: torch.Size) -> int:
        """How many positions the input has; the output may have fewer."""
        return max(1, shape.numel() // (2 * shape[1]))

    @property
    def parts(self) -> int:
        """P: the number of the convolution's groups."""
        return int(self.module.groups)  # type: ignore[arg-type]


@register
class TransposedConvolutionLayer(ConvolutionLayer):
    """nn.ConvTranspose1d, 2d and 3d: a token for each input position; its output gradient is that of all it reaches.

    The weight is [P * I, O / taps, taps ...], its gradient [P, O, I]. A bias has other positions: a block of its own.
    """

    modules: ClassVar[Modules] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    methods: ClassVar = ("forward", "_output_padding", "__call__")

    @classmethod
    def _folds(cls, _owner: Owner) -> bool:
        return False

    def sides(self, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs, and the gradients of the outputs that each of them reaches."""
        sides = [side for size in reversed(self.module.padding) for side in (size, size)]  # type: ignore[arg-type]
        reached = _patches(self.module, functional.pad(gradient, sides), value.shape[2:])
        return _channels(self.module, value), reached

    @property
    def shape(self) -> tuple[int, int, int]:
        """[P, O, I]."""
        weight = self.parameters[0]
        return self.parts, weight.shape[1:].numel(), weight.shape[0] // self.parts

    def gradient_matrices(self, tensors_Q: Sequence[Tensor]) -> Tensor:
        """[Q, P, O, I]."""
        return rearrange(tensors_Q[0], "q (p i) ... -> q p (...) i", p=self.parts)

    def by_parameter(self, gradient_QPOI: Tensor) -> list[Tensor]:
        """[Q, P * I, ...], shaped as the weight."""
        weight = rearrange(gradient_QPOI, "q p o i -> q (p i) o")
        return [weight.reshape(len(weight), *self.parameters[0].shape)]


def _padded(convolution: nn.Module, value_RC: Tensor) -> Tensor:
    """The input with what the convolution pads it with."""
    padding: Any = convolution._reversed_padding_repeated_twice
    if convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str):
        padding = [side for sides in reversed(convolution.padding) for side in (sides, sides)]  # type: ignore[arg-type]
    mode = "constant" if convolution.padding_mode == "zeros" else str(convolution.padding_mode)
    return functional.pad(value_RC, tuple(padding), mode=mode)


def _patches(convolution: nn.Module, padded: Tensor, most: Sequence[int] | None = None) -> Tensor:
    """The field [P, R, S, C/P * taps] that the kernel sees at every position; most: of them along each axis."""
    kernel = convolution.get_parameter("weight").shape[2:]
    geometry: Any = zip(kernel, convolution.dilation, convolution.stride, strict=True)  # type: ignore[arg-type]
    for axis, (size, dilation, stride) in enumerate(geometry, start=2):
        padded = padded.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        padded = padded if most is None else padded.narrow(axis, 0, most[axis - 2])
    positions, taps = {1: ("x", "u"), 2: ("x y", "u v"), 3: ("x y z", "u v w")}[len(kernel)]
    return rearrange(padded, f"b (p c) {positions} {taps} -> p b ({positions}) (c {taps})", p=convolution.groups)


def _channels(convolution: nn.Module, values_RC: Tensor) -> Tensor:
    """Channels as [P, R, S, C/P]."""
    return rearrange(values_RC, "b (p o) ... -> p b (...) o", p=convolution.groups)
