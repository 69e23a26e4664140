"""Regression: squared error. Axes: B examples of a batch, D outputs of one example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TaskError, check_choice
from .batch_task import BatchTask
from .calling import Keys


class Regression(BatchTask):
    """Squared error trained as the mean over examples; predictions and targets of the same shape.

    Predictions are a tensor or an output's `logits` (as of transformers' models with one label); one prediction [B, 1]
    of an example may have targets [B].

    Args:
        reduction: how the training loss joins the D outputs of one example: "sum", or "mean" (what
            torch.nn.MSELoss does: weight 1/D).
        measurement: "loss" (the squared error, without examples' weights) or "prediction" (the summed outputs).
        weights: the key of the examples' weights in a mapping batch.
        mean_weight: what the training loss was divided by besides the number of examples; needed with `weights`. It is
            1 for (weights * losses).mean().
        inputs, targets: keys of a mapping batch, as for `Classification`.

    Example:
        >>> model, batch = nn.Linear(3, 2), (torch.ones(4, 3), torch.zeros(4, 2))
        >>> Regression().compute_train_loss(batch, model).shape
        torch.Size([])
    """

    def __init__(
        self,
        reduction: str = "mean",
        measurement: str = "loss",
        *,
        weights: str | None = None,
        mean_weight: float | None = None,
        inputs: Keys = None,
        targets: str | None = None,
    ):
        check_choice("reduction", reduction, ("sum", "mean"), TaskError)
        check_choice("measurement", measurement, ("loss", "prediction"), TaskError)
        super().__init__(inputs, targets, weights, mean_weight)
        self.reduction, self.measurement = reduction, measurement

    def _predictions(self, batch: Any, model: nn.Module) -> tuple[Tensor, Tensor, float]:
        """Predictions and targets, [B, ...] each, and the weight of one output."""
        predictions, targets = self._read(batch, model)
        if predictions.shape == (*targets.shape, 1):
            targets = targets[..., None]
        if predictions.shape != targets.shape:
            raise TaskError(
                f"Regression: expected predictions and targets of one shape, found {tuple(predictions.shape)} and "
                f"{tuple(targets.shape)}."
            )
        outputs = predictions[0].numel()
        return predictions, targets.to(predictions.dtype), 1.0 / outputs if self.reduction == "mean" else 1.0

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """Squared error summed over the batch; with `sample`, of the model's own outputs plus noise of variance 1/2."""
        predictions, targets, weight = self._predictions(batch, model)
        if sample:
            targets = (predictions + 0.5**0.5 * torch.randn_like(predictions)).detach()
        scale = weight * self._scale(batch, predictions)
        return ((scale.sqrt() if sample else scale) * _squares(predictions, targets)).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The chosen measurement summed over the batch."""
        predictions, targets, weight = self._predictions(batch, model)
        if self.measurement == "prediction":
            return predictions.sum()
        return weight * _squares(predictions, targets).sum()

    def compute_output(self, batch: Any, model: nn.Module) -> Tensor:
        """The predictions summed over the batch and their elements: TRAK's output function."""
        predictions, _, _ = self._predictions(batch, model)
        return predictions.sum()


def _squares(predictions: Tensor, targets: Tensor) -> Tensor:
    """[B]: each example's squared error, summed over its outputs."""
    return (predictions - targets).square().reshape(len(predictions), -1).sum(1)
