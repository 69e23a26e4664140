"""Yes or no, by a logistic function: one label an example, or several. Axes: B examples, L labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import TaskError, check_choice
from .batch_task import BatchTask, number_or_numbers
from .calling import Keys
from .task import FaultyRowError

MEASUREMENTS = ("loss", "margin", "log_probability")


def check_zero_or_one(targets_BL: Tensor, name: str) -> None:
    """Raise TaskError unless all targets are 0 or 1; looked at on the CPU only: an accelerator has to be waited for."""
    if targets_BL.device.type != "cpu":
        return
    off_BL = (targets_BL != 0) & (targets_BL != 1)
    if off_BL.any():
        place = tuple(off_BL.nonzero()[0].tolist())
        raise FaultyRowError(place[0], f"{name}: a label is {targets_BL[place].item()}, expected 0 or 1.")


def binary_losses(logits: Tensor, targets: Tensor, pos_weight: Tensor | None = None, drawn: bool = False) -> Tensor:
    """The logistic loss of each target, as torch's binary_cross_entropy_with_logits has it; shape of the logits.

    drawn: of labels drawn from the model, times the root of the true one's weight (pos_weight for a 1): its gradients
    have the second moment (pos_weight y + 1 - y) p (1 - p) that the loss has as its second derivative.
    """
    if not drawn:
        return functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight, reduction="none")
    labels = torch.bernoulli(logits.detach().sigmoid())
    losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return losses if pos_weight is None else (pos_weight * targets + 1 - targets).sqrt() * losses


def binary_measurement(measurement: str, logits: Tensor, targets: Tensor) -> Tensor:
    """The "loss", "log_probability" or "margin" (log p - log(1 - p) of the true label), of the logits' shape."""
    if measurement == "margin":
        return (2 * targets - 1) * logits
    losses = binary_losses(logits, targets)
    return losses if measurement == "loss" else -losses


class MultiLabel(BatchTask):
    """Binary cross-entropy of L labels, trained as the mean over examples; logits [B, L], targets [B, L] of 0 and 1.

    Args:
        reduction: how the training loss joins the L labels of an example: "mean", as torch.nn.BCEWithLogitsLoss and
            transformers do (weight 1/L), or "sum".
        measurement: "loss" (without weights), "margin" (each logit with the sign of its label) or "log_probability",
            joined as the training loss is.
        pos_weight: of labels that are 1: a number, or [L]. torch divides by no mean of it, so nor is it done here.
        weights: the key of the examples' weights in a mapping batch.
        mean_weight: what the training loss was divided by besides the number of examples; needed with `weights`. It is
            1 for (weights * losses).mean().
        inputs, targets: keys of a mapping batch, as for `Classification`.

    Example:
        >>> model, batch = nn.Linear(3, 2), (torch.ones(4, 3), torch.tensor([[0, 1]] * 4))
        >>> MultiLabel(pos_weight=3.0).compute_train_loss(batch, model).shape
        torch.Size([])
    """

    def __init__(
        self,
        reduction: str = "mean",
        measurement: str = "loss",
        *,
        pos_weight: float | Sequence[float] | Tensor | None = None,
        weights: str | None = None,
        mean_weight: float | None = None,
        inputs: Keys = None,
        targets: str | None = None,
    ):
        check_choice("reduction", reduction, ("sum", "mean"), TaskError)
        check_choice("measurement", measurement, MEASUREMENTS, TaskError)
        super().__init__(inputs, targets, weights, mean_weight)
        self.reduction, self.measurement = reduction, measurement
        name = f"{self.__class__.__name__}: pos_weight"
        self.pos_weight = None if pos_weight is None else number_or_numbers(name, pos_weight)

    def _logits(self, batch: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits and targets, [B, L] each."""
        logits, targets = self._read(batch, model)
        if logits.ndim != 2 or targets.shape != logits.shape:
            raise TaskError(
                f"{self.__class__.__name__}: expected logits and targets [B, L] alike, found {tuple(logits.shape)} and "
                f"{tuple(targets.shape)}. Take Classification for one label of several classes, Binary for one of two."
            )
        check_zero_or_one(targets, self.__class__.__name__)
        return logits, targets.to(logits.dtype)

    def _weight(self, logits: Tensor) -> float:
        return 1.0 / logits.shape[1] if self.reduction == "mean" else 1.0

    def _pos_weight(self, logits: Tensor) -> Tensor | None:
        if self.pos_weight is None:
            return None
        given = logits.new_tensor(self.pos_weight)
        if given.ndim and given.shape != logits.shape[1:]:
            raise TaskError(
                f"{self.__class__.__name__}: pos_weight holds {len(given)} numbers, but the model has "
                f"{logits.shape[1]} outputs. Give one number, or one for each."
            )
        return given

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """The loss summed over the batch; with `sample`, of labels drawn from the model."""
        logits, targets = self._logits(batch, model)
        losses_B = binary_losses(logits, targets, self._pos_weight(logits), drawn=sample).sum(1)
        scale = self._scale(batch, logits) * self._weight(logits)
        return ((scale.sqrt() if sample else scale) * losses_B).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The chosen measurement summed over the batch."""
        logits, targets = self._logits(batch, model)
        return self._weight(logits) * binary_measurement(self.measurement, logits, targets).sum()

    def compute_output(self, batch: Any, model: nn.Module) -> Tensor:
        """The margins summed over the batch, joined as the training loss is: TRAK's output function."""
        logits, targets = self._logits(batch, model)
        return self._weight(logits) * binary_measurement("margin", logits, targets).sum()


class Binary(MultiLabel):
    """Binary cross-entropy with one logit, trained as the mean over examples; logits [B] or [B, 1], labels alike.

    Args:
        measurement: "loss" (without weights), "margin" (the logit with the sign of the label) or "log_probability".
        pos_weight: of labels that are 1.
        options: `weights`, `mean_weight`, `inputs` and `targets`, as for `MultiLabel`.

    Example:
        >>> model, batch = nn.Linear(3, 1), (torch.ones(4, 3), torch.tensor([0, 1, 1, 0]))
        >>> Binary().compute_train_loss(batch, model).shape
        torch.Size([])
    """

    def __init__(self, measurement: str = "loss", *, pos_weight: float | None = None, **options: Any):
        super().__init__("mean", measurement, pos_weight=pos_weight, **options)

    def _logits(self, batch: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits and labels, [B, 1] each."""
        logits, labels = self._read(batch, model)
        ones = [side[:, None] if side.ndim == 1 else side for side in (logits, labels)]
        if any(side.ndim != 2 or side.shape != (len(logits), 1) for side in ones):
            raise TaskError(
                f"Binary: expected one logit and one label of each example, found {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}. Take Classification for several classes, MultiLabel for several labels."
            )
        check_zero_or_one(ones[1], "Binary")
        return ones[0], ones[1].to(logits.dtype)
