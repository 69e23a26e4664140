"""Which positions a task masks as padding, in the positions that each layer sees. Axes: B examples, S positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..data.batches import Batch
from ..errors import TaskError
from ..tasks.task import attention_mask
from .layers.tracked import TrackedLayer, VectorLayer
from .layout import Layout
from .tokens import Tokens, masked_inputs

Mask = Tensor | Mapping[str, Tensor] | None  # of all layers, or for layers by name


class Masked(Protocol):
    """What is looked at of a `LossView`."""

    @property
    def task(self) -> Any:
        """Whose `get_attention_mask` it is."""

    @property
    def layers(self) -> Mapping[str, TrackedLayer]:
        """The tracked layers by name."""

    @property
    def layout(self) -> Layout:
        """How they see a batch."""


def checked_mask(view: Masked, batch: Batch) -> Mask:
    """The task's mask; TaskError unless it is None, a tensor, or a mapping from tracked layers' names to tensors."""
    mask = attention_mask(view.task, batch.content)
    masks = mask if isinstance(mask, Mapping) else {} if mask is None else {next(iter(view.layers)): mask}
    unknown = sorted(set(masks) - set(view.layers))
    if unknown or not all(isinstance(given, Tensor) for given in masks.values()):
        raise TaskError(
            f"get_attention_mask(): expected a tensor [examples, positions], or a mapping to such tensors from names "
            f"of {list(view.layers)[:8]}, found {f'names {unknown[:4]}' if unknown else type(mask).__name__}."
        )
    return mask


def takes_masks(view: Masked) -> bool:
    """Whether some layer has positions that a mask could be of: vectors and layers run alone need none."""
    return any(
        not isinstance(layer, VectorLayer) and name not in view.layout.alone for name, layer in view.layers.items()
    )


def mask_of(view: Masked, layer: TrackedLayer, shape_BS: Sequence[int], mask: Mask) -> Tensor | None:
    """The mask [B, S] of a layer's tokens; None where it has another shape, as that of other positions.

    Examples that are run alone have masks of their own; see `masked_alone`.
    """
    return None if layer.name in view.layout.alone else _fitting(view, layer, shape_BS, mask)


def masked_alone(view: Masked, layer: TrackedLayer, tokens: Tokens, mask: Mask) -> Tokens:
    """The tokens of an example that is run alone, with inputs of zero where its own mask is 0."""
    mask_BS = _fitting(view, layer, tokens.a_PBSI.shape[1:3], mask)
    return tokens if mask_BS is None else masked_inputs(tokens, mask_BS)


def _fitting(view: Masked, layer: TrackedLayer, shape_BS: Sequence[int], mask: Mask) -> Tensor | None:
    """Where a layer is called several times, or a tensor is tied, the calls' positions follow one another.

    Each has the mask's.
    """
    if isinstance(layer, VectorLayer):
        return None
    if isinstance(mask, Mapping):
        mask = mask.get(layer.name)
    times = view.layout.times.get(layer.name, 1)
    if mask is not None and mask.ndim == 2 and shape_BS[1] == times * mask.shape[1]:
        mask = mask.repeat(1, times)
    return mask if mask is not None and tuple(mask.shape) == tuple(shape_BS) else None
