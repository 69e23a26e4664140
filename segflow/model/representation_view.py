"""A model seen through one layer's input: an example's representation takes the place of its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batches import Batch
from ..errors import LayerError
from .capture import Consumer
from .finite_check import FiniteCheck
from .layers.tracked import TrackedLayer, VectorLayer
from .layout import Layout
from .loss_view import LossView
from .masks import checked_mask, mask_of
from .tokens import Tokens


@dataclass(frozen=True)
class FeatureLayer:
    """A layer whose input takes the place of a gradient, of shape [1, 1, I]."""

    name: str
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class RepresentationView:
    """As a LossView, but what it hands on are tokens whose gradient is the example's representation h.

    h is the layer's input, averaged over the positions that the task does not mask.

    Args:
        view: of a loss that depends on the layer, with that layer alone.
        normalized: brings each h to norm 1.
    """

    view: LossView
    normalized: bool

    @property
    def layer(self) -> TrackedLayer:
        """The layer whose input is the representation."""
        return next(iter(self.view.layers.values()))

    @property
    def layers(self) -> Mapping[str, FeatureLayer]:
        """The layer, by its name."""
        parts, _, inputs = self.layer.shape
        width = parts * (inputs - int(self.layer.has_bias))
        return {self.layer.name: FeatureLayer(self.layer.name, (1, 1, width))}

    @property
    def layout(self) -> Layout:
        """As the view's."""
        return self.view.layout

    @property
    def dtype(self) -> torch.dtype:
        """As the view's."""
        return self.view.dtype

    @property
    def device(self) -> torch.device:
        """As the view's."""
        return self.view.device

    def positions(self, _name: str) -> int:
        """A representation is one token."""
        return 1

    def capture(self, batch: Batch, consume: Consumer, finite: FiniteCheck) -> Tensor:
        """Run one batch forward and back, handing each example's representation to `consume`; returns the loss."""
        feature, mask = self.layers[self.layer.name], checked_mask(self.view, batch)

        def represent(layer: TrackedLayer, tokens: Tokens) -> None:
            a_PBSI = tokens.dense_a[..., : tokens.a_PBSI.shape[-1] - int(layer.has_bias)]
            alone = layer.name in self.layout.alone
            mask_BS = tokens.filled() if alone else mask_of(self.view, layer, a_PBSI.shape[1:3], mask)
            h_BI = _mean(a_PBSI, mask_BS).movedim(0, 1).flatten(1)
            if self.normalized:
                h_BI = torch.nn.functional.normalize(h_BI, dim=1)
            ones = h_BI.new_ones(1, len(h_BI), 1, 1)
            consume(feature, Tokens(h_BI[None, :, None, :], ones))  # type: ignore[arg-type]

        return self.view.capture(batch, represent, finite)


def _mean(a_PBSI: Tensor, mask_BS: Tensor | None) -> Tensor:
    """[P, B, I]: over the positions that are not masked, of examples that have some."""
    if mask_BS is None:
        return a_PBSI.mean(2)
    real_BS = (mask_BS != 0).to(a_PBSI)
    return torch.einsum("pbsi,bs->pbi", a_PBSI, real_BS) / real_BS.sum(1).clamp_min(1)[:, None]


def representation_view(view: LossView, name: str | None, normalized: bool) -> RepresentationView:
    """A view of one tracked layer's input (None: the last layer's); LayerError if it is not reached."""
    chosen = last_matrix(view.layers) if name is None else name
    if chosen not in view.layout.reached or not _has_inputs(view, chosen):
        others = [other for other in view.layout.reached if _has_inputs(view, other)]
        reached = chosen in view.layout.reached
        why = "its inputs are no features" if reached else f"the {view.kind} loss does not reach it"
        raise LayerError(
            f"layer {chosen!r}: {why}, so it has no representation there. Name another one with layer=: {others[:8]}."
        )
    return RepresentationView(view.only([chosen]), normalized)


def _has_inputs(view: LossView, name: str) -> bool:
    """Whether what a layer hands on as inputs is what it was given."""
    return not isinstance(view.layers[name], VectorLayer) and view.layout.alone.get(name) != "gradient"


def last_matrix(layers: Mapping[str, TrackedLayer]) -> str:
    """The name of the last layer that has inputs of features; of the last one where there is none."""
    matrices = [n for n, layer in layers.items() if not isinstance(layer, VectorLayer) and not layer.diagonal_inputs]
    return (matrices or list(layers))[-1]
