"""Labels of tokens: which of them count and how much, and the tasks in which each token has its own label.

Axes: B examples, S positions, T targets (the most that an example of the batch has), C classes or words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arguments import real_number, whole_number
from ..errors import TaskError, check_choice
from .batch_task import BatchTask
from .calling import Keys, targets_of, unwrapped
from .classification import IGNORED, SoftmaxLoss, check_labels, cross_entropies, drawn_labels, margins

OBJECTIVES = ("sequence mean", "token sum", "batch token mean")


class Targets(NamedTuple):
    """What a batch's loss is made of: logits and labels of its targets alone, each example's from the left.

    logits_BTC, labels_BT: where an example has fewer targets than T, its last labels are IGNORED.
    counted_BT: False there; weight_B1: of each target in the objective, without class weights.
    """

    logits_BTC: Tensor
    labels_BT: Tensor
    counted_BT: Tensor
    weight_B1: Tensor


def shifted(labels_BS: Tensor, fill: int) -> Tensor:
    """[B, S]: the label that comes next at each position; `fill` at the last."""
    return functional.pad(labels_BS[:, 1:], (0, 1), value=fill)


def targets_first(counted_BS: Tensor) -> tuple[Tensor | None, int]:
    """The order [B, T] of positions in which an example's targets come first, and T; None for the order as it is.

    So what is drawn for a target depends on its number among them, and not on how much padding stands before it.
    """
    counts_B = counted_BS.sum(1, keepdim=True)
    from_left = counted_BS == (torch.arange(counted_BS.shape[1], device=counted_BS.device) < counts_B)
    most, as_it_is = torch.stack([counts_B.amax(), from_left.all().to(counts_B.dtype)]).tolist()
    T = max(most, 1)
    return (None if as_it_is else (~counted_BS).to(torch.uint8).argsort(dim=1, stable=True)[:, :T]), T


class TokenTask(BatchTask):
    """A task with logits [B, S, C] and integer labels [B, S], of which some are ignored; options as for `MaskedLM`.

    A class that derives from it says by `shifts` whether a position is asked for the label that comes next.
    """

    shifts = False
    measurements: tuple[str, ...] = ("loss", "log_probability", "margin")

    def __init__(
        self,
        objective: str = "sequence mean",
        *,
        mean_tokens: float | None = None,
        measurement: str = "loss",
        label_smoothing: float = 0.0,
        ignore_index: int = IGNORED,
        labels: str | None = None,
        inputs: Keys = None,
        weights: str | None = None,
        mean_weight: float | None = None,
        class_weights: Sequence[float] | Tensor | None = None,
    ):
        name = self.__class__.__name__
        check_choice("objective", objective, OBJECTIVES, TaskError)
        check_choice("measurement", measurement, self.measurements, TaskError)
        super().__init__(inputs, labels, weights, mean_weight, class_weights)
        self.objective, self.measurement = objective, measurement
        self.mean_tokens = _mean_tokens(name, objective, mean_tokens)
        self.ignore_index = whole_number(f"{name}: ignore_index", ignore_index, TaskError, -(2**62))
        self.softmax = SoftmaxLoss(name, class_weights, label_smoothing)

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """The loss summed over the batch; with `sample`, of labels drawn from the softmax where there are targets."""
        logits, labels, counted, weight = self._targets(batch, model)
        scale = self._scale(batch, weight[:, 0])
        weight = weight * (scale[:, None] if scale.ndim else scale)
        if not sample:
            return (weight * self.softmax.losses(logits, labels)).sum()
        roots = (weight * self.softmax.bent(logits, labels)).sqrt()
        return (roots * cross_entropies(logits, drawn_labels(logits, counted))).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The chosen measurement summed over the batch."""
        logits, labels, counted, weight = self._targets(batch, model)
        if self.measurement == "margin":
            return _margins(logits, labels, counted).sum()
        losses = cross_entropies(logits, labels)
        return (weight * losses).sum() if self.measurement == "loss" else -losses.sum()

    def compute_output(self, batch: Any, model: nn.Module) -> Tensor:
        """The targets' margins log p - log(1 - p) in the objective's weight: TRAK's output function for text."""
        logits, labels, counted, weight = self._targets(batch, model)
        return (weight * _margins(logits, labels, counted)).sum()

    def _labels(self, batch: Any) -> Tensor:
        """What each position is asked for, [B, S]; `ignore_index` where it is asked for nothing."""
        labels_BS = self._given_labels(batch)
        if not isinstance(labels_BS, Tensor) or labels_BS.ndim != 2:
            found = tuple(labels_BS.shape) if isinstance(labels_BS, Tensor) else type(labels_BS).__name__
            raise TaskError(f"{self.__class__.__name__}: expected labels [B, S], one for each token, found {found}.")
        return shifted(labels_BS, self.ignore_index) if self.shifts else labels_BS

    def _given_labels(self, batch: Any) -> Any:
        """The labels as the batch holds them."""
        return targets_of(batch, self.targets)

    def _targets(self, batch: Any, model: nn.Module) -> Targets:
        """The batch's targets, and what the model says of them."""
        labels_BS = self._labels(batch)
        counted = labels_BS != self.ignore_index
        order, T = targets_first(counted)
        _check_decoder_only(self.__class__.__name__, model)
        logits = self._outputs(batch, model)
        self._check_fit(logits, labels_BS, counted)
        labels, weight_B1 = labels_BS.long().masked_fill(~counted, IGNORED), self._weight(counted, logits.dtype)
        if order is None:
            return Targets(logits[:, :T], labels[:, :T], counted[:, :T], weight_B1)
        logits_BTC = logits.gather(1, order[:, :, None].expand(-1, -1, logits.shape[-1]))
        return Targets(logits_BTC, labels.gather(1, order), counted.gather(1, order), weight_B1)

    def _check_fit(self, logits: Tensor, labels_BS: Tensor, counted_BS: Tensor) -> None:
        """Raise TaskError unless there is a label for each position of the logits, and a class for each label."""
        if logits.ndim != 3 or logits.shape[:-1] != labels_BS.shape:
            raise TaskError(
                f"{self.__class__.__name__}: expected logits [B, S, C] and labels [B, S], found "
                f"{tuple(logits.shape)} and {tuple(labels_BS.shape)}. Labels stand at the positions of the "
                "inputs; derive a Task of your own for a model with others."
            )
        check_labels(labels_BS, logits.shape[-1], self.__class__.__name__, counted_BS)

    def _weight(self, counted_BS: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight of each of an example's targets, [B, 1]."""
        counts_B1 = counted_BS.sum(1, keepdim=True).to(dtype)
        if self.objective == "sequence mean":
            return 1 / counts_B1.clamp_min(1)
        return torch.full_like(counts_B1, 1 / self.mean_tokens)


def _check_decoder_only(task: str, model: nn.Module) -> None:
    if getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False):
        raise TaskError(
            f"{task}: the model has an encoder and a decoder, whose positions have padding of their own. Derive a Task "
            "whose get_attention_mask gives each of its modules its mask."
        )


def _margins(logits_BTC: Tensor, labels_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """[B, T]: the margins of what counts, 0 elsewhere."""
    return torch.where(counted_BT, margins(logits_BTC, labels_BT.clamp_min(0)), 0.0)


def _mean_tokens(task: str, objective: str, given: float | None) -> float:
    """What a token's loss is divided by, the same for all sequences."""
    if objective == "batch token mean":
        if given is None:
            raise TaskError(
                f"{task}: objective='batch token mean' without mean_tokens=, the mean number of targets of an "
                "example. segflow.tasks.mean_tokens(train) counts them."
            )
        return real_number(f"{task}: mean_tokens", given, TaskError, above=0)
    if given is not None:
        raise TaskError(
            f"{task}: mean_tokens={given} with objective={objective!r}, which does not use it. Leave it out, or take "
            "objective='batch token mean'."
        )
    return 1.0


class MaskedLM(TokenTask):
    """Cross-entropy of the words that were hidden: logits [B, S, C], labels [B, S], ignored where nothing was hidden.

    Args:
        objective: "sequence mean" (the mean over each sequence's targets), "token sum" (their sum), or "batch token
            mean" (all targets of a batch are averaged together, as transformers' Trainer does).
        mean_tokens: how many targets an example has on average, which "batch token mean" needs.
        measurement: "loss" (in the objective's weight), "log_probability" of all targets or their "margin", log p -
            log(1 - p); these are sums over targets.
        label_smoothing, weights, inputs: as for `Classification`; a weight multiplies all of an example's targets.
        class_weights: as for `TokenClassification`. mean_weight: needed with either kind of weights.
        ignore_index: the label of what is no target.
        labels: the key of the labels.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        >>> batch = {"input": torch.tensor([[1, 4, 2]]), "labels": torch.tensor([[-100, 3, -100]])}
        >>> MaskedLM().compute_train_loss(batch, model).shape
        torch.Size([])
    """


class TokenClassification(TokenTask):
    """Cross-entropy of each token's class: logits [B, S, C], labels [B, S], some of them ignored.

    Args:
        objective, mean_tokens, measurement, label_smoothing, weights, ignore_index, labels, inputs: as for `MaskedLM`.
        class_weights: [C], each class's, by which a target's loss is multiplied.
        mean_weight: what the training loss was divided by besides the number of targets; needed with `class_weights`.
            torch's cross_entropy(weight=w) divides by the summed weights of the batch's targets: the mean of w[labels]
            over those of the training data, with objective="batch token mean".

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
        >>> batch = {"input": torch.tensor([[1, 4, 2]]), "labels": torch.tensor([[0, 2, -100]])}
        >>> TokenClassification("token sum").compute_train_loss(batch, model).shape
        torch.Size([])
    """
