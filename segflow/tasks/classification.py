"""Classification by a softmax: its losses, labels that are drawn from it, and the tasks for one label an example.

Axes: B examples of a batch, T tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arguments import real_number
from ..errors import TaskError, check_choice
from .batch_task import BatchTask, positive_numbers
from .calling import Keys
from .task import FaultyRowError

IGNORED = -100  # the label of what is no target, inside of these tasks
_DRAWN_AT_ONCE = 128  # tokens of each example: their probabilities over the vocabulary are in memory together


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """[...]: log p - log(1 - p) of the true class, from logits [..., C] and labels [...]."""
    others = logits.scatter(-1, labels[..., None], -torch.inf).logsumexp(-1)
    return logits.gather(-1, labels[..., None]).squeeze(-1) - others


def check_labels(labels: Tensor, classes: int, name: str, counted: Tensor | None = None) -> None:
    """Raise TaskError unless labels [B, ...] are whole numbers from 0, below the number of classes.

    Their range is looked at on the CPU only: an accelerator would have to be waited for. counted: which of them count.
    """
    if labels.is_floating_point() or labels.is_complex():
        raise TaskError(
            f"{name}: expected integer labels, found {labels.dtype}. Convert them with .long(), or take Regression for "
            "numbers, and Binary or MultiLabel for what is 0 or 1."
        )
    if labels.device.type != "cpu" or not labels.numel():
        return
    outside = (labels < 0) | (labels >= classes)
    outside = outside if counted is None else outside & counted
    if outside.any():
        place = tuple(outside.nonzero()[0].tolist())
        raise FaultyRowError(
            place[0],
            f"{name}: the label is {labels[place].item()}, but the model has the classes 0..{classes - 1}. Mend it, or "
            "leave the example out.",
        )


class SoftmaxLoss:
    """Cross-entropy with weights of the classes and smoothed labels, as torch.nn.functional.cross_entropy has them.

    Args:
        class_weights: [C], each class's; None: all 1.
        label_smoothing: the share of a label that all C classes divide equally.
    """

    def __init__(self, task: str, class_weights: Sequence[float] | Tensor | None, label_smoothing: float):
        self.class_weights = (
            None if class_weights is None else positive_numbers(f"{task}: class_weights", class_weights)
        )
        self.label_smoothing = real_number(f"{task}: label_smoothing", label_smoothing, TaskError, least=0, below=1)
        self.task = task

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[...]: each label's loss, of logits [..., C]; 0 for what is IGNORED."""
        return cross_entropies(logits, labels, self._weights_C(logits), self.label_smoothing)

    def bent(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[...]: how many times the curvature of a plain cross-entropy each label's loss has.

        That is the sum over classes of the weights t in the loss sum_c t_c (-log p_c), whose second derivative in the
        logits is that sum times diag(p) - p p^T.
        """
        weights_C = self._weights_C(logits)
        if weights_C is None:
            return torch.ones_like(labels, dtype=logits.dtype)
        of_label = weights_C[labels.clamp_min(0)]
        return (1 - self.label_smoothing) * of_label + self.label_smoothing * weights_C.mean()

    def _weights_C(self, logits: Tensor) -> Tensor | None:
        if self.class_weights is None:
            return None
        if len(self.class_weights) != logits.shape[-1]:
            raise TaskError(
                f"{self.task}: class_weights holds {len(self.class_weights)} numbers, but the model has "
                f"{logits.shape[-1]} classes. Give one for each class."
            )
        return logits.new_tensor(self.class_weights)


def cross_entropies(
    logits: Tensor, labels: Tensor, weights_C: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """[...]: the cross-entropy of each label, from logits [..., C] and labels [...]; 0 for what is IGNORED."""
    flat = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        weights_C,
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return flat.reshape(labels.shape)


def drawn_labels(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """Labels [B] or [B, T] drawn from the softmax of logits [..., C]; what `counted` leaves out is IGNORED."""
    if logits.ndim == 2:
        return torch.multinomial(logits.detach().softmax(-1), 1).squeeze(-1)
    pieces = [_drawn(piece) for piece in logits.detach().split(_DRAWN_AT_ONCE, 1)]
    drawn = torch.cat(pieces, 1)
    return drawn if counted is None else drawn.masked_fill(~counted, IGNORED)


def _drawn(logits_BTC: Tensor) -> Tensor:
    B, T, C = logits_BTC.shape
    return torch.multinomial(logits_BTC.softmax(-1).reshape(B * T, C), 1).reshape(B, T)


class Classification(BatchTask):
    """Softmax cross-entropy trained as the mean over examples; logits [B, C], integer labels [B].

    With `class_weights`, `label_smoothing` and `weights`, an example's training loss is its weight times
    sum_c t_c (-log p_c) over `mean_weight`, where t_c = (1 - s) w_c for the label c and s w_c / C more for every class.
    Pseudo-labels are drawn from the softmax, unsmoothed, and their losses have the weight of the true label.

    Args:
        measurement: "loss" (cross-entropy, without weights and smoothing; a helpful group's removal raises it),
            "margin" (log-odds of the true class, log p - log(1 - p), as in Park et al. 2023) or "log_probability".
        class_weights: [C], the w_c.
        label_smoothing: s, as in torch's cross_entropy.
        weights: the key of the examples' weights in a mapping batch.
        mean_weight: what the training loss was divided by besides the number of examples; needed with either kind of
            weights. torch's cross_entropy(weight=w) divides by the batch's summed weights: the mean of w[labels] over
            the training data. (weights * losses).mean() divides by 1.
        inputs: the key of the model's one argument, or the keys of several that it takes by these names; by default
            its forward says what it takes.
        targets: the key of the labels; by default "labels", "label" or "targets".

    Example:
        >>> model, batch = nn.Linear(3, 2), (torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))
        >>> Classification().compute_train_loss(batch, model).shape
        torch.Size([])
    """

    def __init__(
        self,
        measurement: str = "loss",
        *,
        class_weights: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        weights: str | None = None,
        mean_weight: float | None = None,
        inputs: Keys = None,
        targets: str | None = None,
    ):
        check_choice("measurement", measurement, ("loss", "margin", "log_probability"), TaskError)
        super().__init__(inputs, targets, weights, mean_weight, class_weights)
        self.measurement = measurement
        self.softmax = SoftmaxLoss(self.__class__.__name__, class_weights, label_smoothing)

    def _logits(self, batch: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        logits, labels = self._read(batch, model)
        name = self.__class__.__name__
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise TaskError(
                f"{name}: expected logits [B, C] and labels [B], found {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}. Take MultiLabel for several labels of an example, TokenClassification for "
                "those of tokens, or derive a Task of your own."
            )
        if logits.shape[1] == 1:
            raise TaskError(f"{name}: the model has one output, whose softmax is always 1. Take Binary or Regression.")
        check_labels(labels, logits.shape[1], name)
        return logits, labels.long()

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """The loss summed over the batch; with `sample`, of labels drawn from the softmax."""
        logits, labels = self._logits(batch, model)
        scale = self._scale(batch, logits)
        if not sample:
            return (scale * self.softmax.losses(logits, labels)).sum()
        roots = (scale * self.softmax.bent(logits, labels)).sqrt()
        return (roots * cross_entropies(logits, drawn_labels(logits))).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The chosen measurement summed over the batch."""
        if self.measurement == "margin":
            return self.compute_output(batch, model)
        loss = cross_entropies(*self._logits(batch, model)).sum()
        return loss if self.measurement == "loss" else -loss

    def compute_output(self, batch: Any, model: nn.Module) -> Tensor:
        """The margin log p - log(1 - p) of the true class summed over the batch: TRAK's output function."""
        return margins(*self._logits(batch, model)).sum()


class SequenceClassification(Classification):
    """`Classification` of whole sequences, as of transformers' `...ForSequenceClassification`; options as there.

    A batch is what the model takes with "labels"; "attention_mask" keeps its padding out of the curvature. Of models
    whose `problem_type` is another one, take Regression or MultiLabel.
    """
