"""Tasks to use as they are: classification and regression.

A batch is (inputs, targets), or a mapping that is read by the names given. What a task is, and the class that one of
your own derives from, stands in `task.py`. Axes: B examples of a batch, C classes, D outputs of one example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import TaskError, check_choice
from .task import FaultyRowError, Task


def inputs_and_targets(batch: Any, inputs: str, targets: str) -> tuple[Any, Tensor]:
    """A batch's two sides: of a pair, or of a mapping by its keys; TaskError for anything else."""
    if isinstance(batch, Mapping):
        missing = [name for name in (inputs, targets) if name not in batch]
        if missing:
            raise TaskError(f"the batch has no {missing[0]!r}, only {sorted(batch)}. Name its keys in the task.")
        return batch[inputs], batch[targets]
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise TaskError(
            f"expected a batch (inputs, targets) or a mapping, found {type(batch).__name__}. Derive a Task of your own."
        )
    return batch[0], batch[1]


def outputs_of(model: nn.Module, inputs: Any) -> Any:
    """What the model makes of a batch's inputs; TaskError where it cannot take a list, made of examples of numbers."""
    try:
        return model(inputs)
    except TypeError as problem:
        if not isinstance(inputs, list):
            raise
        raise TaskError(
            f"the batch's inputs are a list of {len(inputs)} tensors, which the model does not take ({problem}). Give "
            'examples of tensors, as dataset.with_format("torch") has them, or a collate_fn that stacks them.'
        ) from problem


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """[B]: log p - log(1 - p) of the true class, from logits [B, C] and labels [B]."""
    others = logits.scatter(-1, labels[:, None], -torch.inf).logsumexp(-1)
    return logits.gather(-1, labels[:, None]).squeeze(-1) - others


def check_labels(labels_B: Tensor, classes: int, name: str) -> None:
    """Raise TaskError unless labels are whole numbers from 0, below the number of classes.

    Their range is looked at on the CPU only: an accelerator would have to be waited for.
    """
    if labels_B.is_floating_point() or labels_B.is_complex():
        raise TaskError(f"{name}: expected integer labels, found {labels_B.dtype}. Convert them with .long().")
    if labels_B.device.type != "cpu" or not labels_B.numel():
        return
    low, high = torch.aminmax(labels_B)
    if low < 0 or high >= classes:
        row = int(((labels_B < 0) | (labels_B >= classes)).nonzero()[0])
        raise FaultyRowError(
            row,
            f"{name}: the label is {labels_B[row].item()}, but the model has the classes 0..{classes - 1}. Mend it, or "
            "leave the example out.",
        )


def _tensor(output: Any, task: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    raise TaskError(f"{task}: expected the model to return a tensor, found {type(output).__name__}. Derive a Task.")


class Classification(Task):
    """Softmax cross-entropy trained as the mean over examples; logits [B, C], integer labels [B].

    Args:
        measurement: "loss" (cross-entropy; a helpful group's removal raises it), "margin" (log-odds of the true
            class, log p - log(1 - p), as in Park et al. 2023) or "log_probability" of the true class.
        inputs, targets: the keys of a mapping batch.

    Example:
        >>> model, batch = nn.Linear(3, 2), (torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))
        >>> Classification().compute_train_loss(batch, model).shape
        torch.Size([])
    """

    measurement_options = ("measurement",)

    def __init__(self, measurement: str = "loss", *, inputs: str = "inputs", targets: str = "labels"):
        check_choice("measurement", measurement, ("loss", "margin", "log_probability"), TaskError)
        self.measurement, self.inputs, self.targets = measurement, inputs, targets

    def _logits(self, batch: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        inputs, labels = inputs_and_targets(batch, self.inputs, self.targets)
        logits = _tensor(outputs_of(model, inputs), "Classification")
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise TaskError(
                f"Classification: expected logits [B, C] and labels [B], found {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}. Derive a Task of your own for other shapes."
            )
        check_labels(labels, logits.shape[1], "Classification")
        return logits, labels.long()

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """Cross-entropy summed over the batch; with `sample`, of labels drawn from the softmax."""
        logits, labels = self._logits(batch, model)
        if sample:
            labels = torch.multinomial(logits.detach().float().softmax(-1), 1).squeeze(-1)
        return functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The chosen measurement summed over the batch."""
        if self.measurement == "margin":
            return self.compute_output(batch, model)
        logits, labels = self._logits(batch, model)
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        return loss if self.measurement == "loss" else -loss

    def compute_output(self, batch: Any, model: nn.Module) -> Tensor:
        """The margin log p - log(1 - p) of the true class summed over the batch: TRAK's output function."""
        return margins(*self._logits(batch, model)).sum()


class Regression(Task):
    """Squared error trained as the mean over examples; predictions and targets of the same shape.

    Args:
        reduction: how the training loss joins the D outputs of one example: "sum", or "mean" (what
            torch.nn.MSELoss does: weight 1/D).
        measurement: "loss" (the squared error) or "prediction" (the summed outputs).
        inputs, targets: the keys of a mapping batch.

    Example:
        >>> model, batch = nn.Linear(3, 2), (torch.ones(4, 3), torch.zeros(4, 2))
        >>> Regression().compute_train_loss(batch, model).shape
        torch.Size([])
    """

    measurement_options = ("measurement",)

    def __init__(
        self,
        reduction: str = "mean",
        measurement: str = "loss",
        *,
        inputs: str = "inputs",
        targets: str = "labels",
    ):
        check_choice("reduction", reduction, ("sum", "mean"), TaskError)
        check_choice("measurement", measurement, ("loss", "prediction"), TaskError)
        self.reduction, self.measurement = reduction, measurement
        self.inputs, self.targets = inputs, targets

    def _predictions(self, batch: Any, model: nn.Module) -> tuple[Tensor, Tensor, float]:
        inputs, targets = inputs_and_targets(batch, self.inputs, self.targets)
        predictions = _tensor(outputs_of(model, inputs), "Regression")
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
            noise = 0.5**0.5 * torch.randn_like(predictions)
            return weight**0.5 * (predictions - (predictions + noise).detach()).square().sum()
        return weight * (predictions - targets).square().sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The chosen measurement summed over the batch."""
        predictions, targets, weight = self._predictions(batch, model)
        if self.measurement == "prediction":
            return predictions.sum()
        return weight * (predictions - targets).square().sum()

    def compute_output(self, batch: Any, model: nn.Module) -> Tensor:
        """The predictions summed over the batch and their elements: TRAK's output function."""
        predictions, _, _ = self._predictions(batch, model)
        return predictions.sum()
