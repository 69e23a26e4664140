"""What every loss of a task must fulfil: it sums over examples, repeats itself, is finite, and reaches the layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..data.batches import Batch
from ..errors import LayerError, TaskError
from ..model.finite_check import FiniteCheck
from ..model.loss_view import LossView
from ..runtime.ranks import Ranks
from .directions import example_slopes, random_directions


def check_sum(view: LossView, whole: Batch, halves: Iterable[Batch]) -> None:
    """Raise TaskError unless the loss repeats itself, leaves buffers alone, is finite, and is a sum over a batch.

    halves: two batches, or one, whose examples are those of `whole`.
    """
    name = type(view.task).__name__
    before = {key: buffer.clone() for key, buffer in view.model.named_buffers()}
    with torch.enable_grad():  # parameters are frozen; a task may differentiate by itself
        first, second = (view.loss(whole).detach().double() for _ in range(2))
        of_halves = torch.stack([view.loss(half).detach().double() for half in halves])
    total, size = of_halves.sum(), torch.maximum(first.abs(), of_halves.abs().sum()).clamp_min(1e-12)
    moved = [key for key, buffer in view.model.named_buffers() if not torch.equal(before[key], buffer)]
    if moved:
        raise TaskError(
            f"{name}: the forward changes the buffer {moved[0]!r} although the model is in eval mode. A module runs in "
            "train mode (batch norm?) or keeps state; leave the mode alone inside the task."
        )
    if not torch.isfinite(first):
        raise TaskError(f"{name}: the {view.kind} loss of the first batch is {first.item()}, not finite.")
    tolerance = 1e-2 if view.layout.coarse else 1e-9 if view.dtype == torch.float64 else 1e-4
    if (first - second).abs() > tolerance * size:
        raise TaskError(
            f"{name}: the {view.kind} loss of one batch was {first.item():.6g}, then {second.item():.6g}. Something is "
            "random: dropout left on, or noise in the task. Make compute_train_loss(sample=False) repeat itself."
        )
    if (first - total).abs() <= 10 * tolerance * size:
        return
    ratio = (first / total).item()
    if abs(ratio - 0.5) < 0.05:
        raise TaskError(
            f"{name}: the {view.kind} loss is a mean over the batch: a batch has {ratio:.3g} times the sum of its "
            "halves' losses. Return the sum over the batch (reduction='sum')."
        )
    raise TaskError(
        f"{name}: the {view.kind} loss of a batch is {first.item():.6g}, but its halves' losses add up to "
        f"{total.item():.6g}. The loss must be a sum over examples that do not interact (no batch statistics)."
    )


def check_reached(view: LossView, data: Iterable[Batch], where: str) -> None:
    """Raise unless all numbers are finite, and a training loss reaches every tracked layer (other losses one or more).

    where: names the checkpoint in errors. Raises LayerError, and TaskError for a loss that is not finite.
    """
    finite = FiniteCheck(f"check, {view.kind} loss, {where}")
    for batch in data:
        view.capture(batch, lambda _layer, _tokens: None, finite)
    finite.finish(view.layout.axes, Ranks(), every=view.kind == "train")


def check_examples(view: LossView, batch: Batch, alone: Iterable[Batch]) -> None:
    """Raise LayerError unless each example's gradient is the same alone and in a batch.

    It is not where a layer's rows do not stand in the order of the batch. alone: a batch for each example of `batch`.
    """
    directions = random_directions(view)
    together = example_slopes(view, batch, directions)
    singles = [example_slopes(view, single, directions) for single in alone]
    for name, together_RB in together.items():
        zero = torch.zeros_like(together_RB[:, :1])
        expected_RB = torch.cat([single.get(name, zero) for single in singles], 1)
        off = torch.linalg.vector_norm(together_RB - expected_RB)
        if off > view.tolerance * torch.linalg.vector_norm(expected_RB):
            raise LayerError(
                f"layer {name!r}: an example's gradient of the {view.kind} loss differs alone and in a batch, as where "
                "the model sorts or mixes the examples of a batch, or padding is not masked. Keep examples in order "
                "in front of the layer and mask what pads them, or leave it out of get_influence_tracked_modules()."
            )
