"""Linear layers, on inputs of any rank.

Axes: B examples, S positions, I inputs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from .registry import register
from .tracked import TrackedLayer


@register
class LinearLayer(TrackedLayer):
    """nn.Linear: a token for each position, with the features on the last axis."""

    modules: ClassVar = (nn.Linear,)

    def sides(self, value: Tensor, gradient: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Inputs and output gradients as rows of features, in one part."""
        return _rows(value, axis).unsqueeze(0), _rows(gradient, axis).unsqueeze(0)

    def positions(self, shape: torch.Size) -> int:
        """The product of all axes but those of the examples and the features."""
        return max(1, shape.numel() // (2 * shape[-1]))


def _rows(tensor: Tensor, axis: int) -> Tensor:
    """[B, S, I] from a tensor whose examples are on `axis`, whose features on the last one, positions elsewhere."""
    return rearrange(tensor.movedim(axis, 0), "b ... i -> b (...) i")
