"""Whether layers' inputs are those of the examples alone, as their covariances must be: padding is to be masked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..curvature.passes import ignored_mask
from ..data.batches import Batch
from ..errors import TaskError
from ..model.loss_view import LossView
from ..model.masks import checked_mask, takes_masks
from ..tasks.task import task_name
from .directions import Inputs, Probed

_DO = (
    "Define get_attention_mask, 0 where a position is padding (a mapping by module names where layers see other "
    "positions; a mask of ones accepts padding as it is), or fit with batch_size=1."
)


def require_mask_used(view: LossView, batch: Batch, seen: Probed, where: str) -> None:
    """Raise TaskError if the task masks positions of a batch, and not those of any layer; seen: of that batch."""
    mask = checked_mask(view, batch)
    if mask is not None and takes_masks(view) and not any(inputs.masked for inputs in seen.inputs.values()):
        raise ignored_mask(where)


def require_same_inputs(view: LossView, batch: Batch, draws: Sequence[Probed], alone: Sequence[Probed]) -> None:
    """Raise TaskError if examples have other inputs in a batch than alone, at the positions that the task leaves.

    Inputs that differ between the two draws are random, so that of those only the number of positions is compared.

    Args:
        draws: what was seen of the batch in two draws.
        alone: of its examples, in the first draw.
    """
    for name in (name for name in view.layers if name in draws[0].inputs and name not in view.layout.alone):
        together = draws[0].inputs[name]
        if together.open:  # padding is accepted
            continue
        masks = "leaves these to be counted" if together.masked else "gives no mask of these"
        singles = [single.inputs.get(name) for single in alone]
        for number, one in enumerate(singles):
            if one is not None and int(one.positions_B[0]) != int(together.positions_B[number]):
                raise TaskError(
                    f"{task_name(view.task)}: layer {name!r} sees {int(one.positions_B[0])} positions of example "
                    f"{batch.examples[number]} alone and {int(together.positions_B[number])} in a batch of "
                    f"{batch.size}, and get_attention_mask() {masks}, so that padding would enter the curvature. " + _DO
                )
        if _moved(together, singles, view.tolerance) and not _random(name, draws, view.tolerance):
            raise TaskError(
                f"{task_name(view.task)}: layer {name!r} has other inputs of an example alone and in a batch, at as "
                f"many positions either way, and get_attention_mask() {masks}. " + _DO
            )


def _moved(together: Inputs, singles: Sequence[Inputs | None], tolerance: float) -> bool:
    """Whether an example's second moment along a random direction is another one alone."""
    return any(
        one is not None and _off(together.along_B[number], one.along_B[0], one.size_B[0], tolerance)
        for number, one in enumerate(singles)
    )


def _random(name: str, draws: Sequence[Probed], tolerance: float) -> bool:
    first, second = (draw.inputs.get(name) for draw in draws)
    if first is None or second is None or not torch.equal(first.positions_B, second.positions_B):
        return True
    return _off(first.along_B, second.along_B, first.size_B, tolerance)


def _off(one: Tensor, other: Tensor, size: Tensor, tolerance: float) -> bool:
    return bool(((one - other).abs() > tolerance * size).any())
