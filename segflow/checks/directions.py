"""Random directions, and the slope of each example's loss along them: gradients are compared without forming them.

Axes: R directions, B examples, P parts, S positions, O outputs, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..data.batches import Batch
from ..model.finite_check import FiniteCheck
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.tokens import Tokens

DIRECTIONS = 8


def random_directions(view: LossView) -> dict[str, Tensor]:
    """Standard normal directions [R, P, O, I] for each layer, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(DIRECTIONS, *layer.shape, generator=generator, dtype=view.dtype).to(view.device)
        for name, layer in view.layers.items()
    }


def example_slopes(view: LossView, batch: Batch, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """<G_b, V> [R, B] in each layer: how the loss of example b changes along each direction V."""
    slopes: dict[str, Tensor] = {}

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        projected = torch.einsum("pbsi,rpoi->rpbso", tokens.a_PBSI, directions[layer.name])
        slopes[layer.name] = torch.einsum("rpbso,pbso->rb", projected, tokens.g_PBSO).double()

    view.capture(batch, consume, FiniteCheck("check, slopes"))
    return slopes
