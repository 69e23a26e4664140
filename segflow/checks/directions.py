"""Random directions, and the slope of each example's loss along them: gradients are compared without forming them.

The directions have rank one in each layer, so that features along them cost as little as a forward, whatever the model.

Axes: B examples, k features (one for each direction), P parts, S positions, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..curvature.projection import Probes, probes
from ..data.batches import Batch
from ..methods.plan import Projection
from ..model.finite_check import FiniteCheck
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.masks import checked_mask, mask_of
from ..model.tokens import Tokens

DIRECTIONS = 8


class Inputs(NamedTuple):
    """A layer's inputs a at the positions that are not masked, [B] each: how many, and sums of (a . v)^2 and |a|^2.

    width: all positions; masked: whether the task has a mask of this layer, and open: one that masks nothing.
    """

    positions_B: Tensor
    along_B: Tensor
    size_B: Tensor
    width: int
    masked: bool
    open: bool


class Probed(NamedTuple):
    """What one batch's loss is, and the features [B, k] of each of its examples' gradients in the layers it reaches.

    inputs: of the same layers.
    """

    loss: Tensor
    features: dict[str, Tensor]
    inputs: dict[str, Inputs]


def random_probes(view: LossView) -> dict[str, Probes]:
    """Rank-one directions for each layer, the same in every run."""
    shapes = {name: layer.shape for name, layer in view.layers.items()}
    return probes(Projection(DIRECTIONS, 0), shapes, view.dtype, view.device)


def probed(view: LossView, batch: Batch, along: Mapping[str, Probes], where: str) -> Probed:
    """A batch's loss and its examples' features, all of them finite: TaskError or LayerError where one is not."""
    features: dict[str, Tensor] = {}
    inputs: dict[str, Inputs] = {}
    finite, mask = FiniteCheck(where), checked_mask(view, batch)

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        features[layer.name] = along[layer.name].of_tokens(tokens).double()
        if not layer.diagonal_inputs:  # what is diagonal has no covariance that padding could enter
            inputs[layer.name] = _inputs(tokens.dense_a, mask_of(view, layer, tokens.a_PBSI.shape[1:3], mask))

    loss = view.capture(batch, consume, finite)
    finite.drain()
    return Probed(loss.double(), features, inputs)


def _inputs(a_PBSI: Tensor, mask_BS: Tensor | None) -> Inputs:
    real_BS = a_PBSI.new_ones(a_PBSI.shape[1:3]) if mask_BS is None else (mask_BS != 0).to(a_PBSI)
    a_PBSI = a_PBSI * real_BS[None, :, :, None]
    generator = torch.Generator().manual_seed(0)
    v_PI = torch.randn(a_PBSI.shape[0], a_PBSI.shape[3], generator=generator).to(a_PBSI)
    along_B = torch.einsum("pbsi,pi->pbs", a_PBSI, v_PI).square().sum((0, 2))
    size_B = a_PBSI.square().sum((0, 2, 3)).double()
    masked, width = mask_BS is not None, a_PBSI.shape[2]
    return Inputs(real_BS.sum(1), along_B.double(), size_B, width, masked, masked and bool(real_BS.all()))
