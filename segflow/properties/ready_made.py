"""Properties to use as they are: mean losses, margins, soft accuracy and F-measure, fairness gaps, calibration error.

What a property is, and the class that one of your own derives from, stands in `property.py`.
Axes: N examples of the property's data, C classes, V values of an attribute, M bins.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Subset

from ..arguments import real_number, truth, whole_number
from ..data.batches import Collate, dataset_length
from ..data.code_identity import measurement_fingerprint, task_fingerprint
from ..data.indices import as_distinct_indices
from ..data.labels import distinct_labels
from ..errors import TaskError
from ..tasks.classification import margins
from ..tasks.task import check_task
from .property import Property


class _MeanOverExamples(Property):
    """The mean over the data of something that sums up over batches: one pass, without outputs."""

    needs_outputs = False
    told_apart = ("data", "name", "task")

    def __init__(self, data: Any, task: Any, *, name: str | None = None, collate_fn: Collate | None = None):
        super().__init__(data, name=name, collate_fn=collate_fn)
        check_task(task)
        self.task = task

    @abstractmethod
    def total(self, batch: Any, model: nn.Module) -> Tensor:
        """The sum over a batch, []."""

    def part(self, batch: Any, model: nn.Module, _slopes: Tensor) -> Tensor:
        """The batch's sum over the number of all examples."""
        return self.total(batch, model) / len(self.data)

    def value(self, outputs: Tensor, _targets: Tensor) -> Tensor:
        """The sum of the batches' parts."""
        return outputs.sum()

    def evaluate(self, model: nn.Module, batch_size: int = 256) -> float:
        """The mean of a model in eval mode."""
        parts = self._walk(model, batch_size, lambda batch: self.part(batch.content, model, torch.ones(())))
        return self.number(torch.stack(parts), torch.ones(())).item()

    def fingerprint(self, model: nn.Module | None = None) -> dict[str, Any]:
        """What tells this property from others, its task's fingerprints among it."""
        task = {"loss": task_fingerprint(self.task, model), "measurement": measurement_fingerprint(self.task, model)}
        return super().fingerprint(model) | {"task": task}


class MeanLoss(_MeanOverExamples):
    """The mean training loss over a set of examples.

    Example:
        >>> from segflow.tasks import Classification
        >>> data = torch.utils.data.TensorDataset(torch.zeros(4, 3), torch.tensor([0, 1, 1, 1]))
        >>> round(MeanLoss(data, Classification()).evaluate(nn.Linear(3, 2, bias=False)), 4)
        0.6931
    """

    def total(self, batch: Any, model: nn.Module) -> Tensor:
        """The task's training loss."""
        return self.task.compute_train_loss(batch, model, sample=False)


class MeanMeasurement(_MeanOverExamples):
    """The mean of the task's measurement over a set of examples: an aggregate query at the cost of one."""

    def total(self, batch: Any, model: nn.Module) -> Tensor:
        """The task's measurement."""
        return self.task.compute_measurement(batch, model)


class _ClassificationProperty(Property):
    """A property of logits [N, C] (or [N], [N, 1]: of class 1) and labels [N]."""

    def number(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """With outputs brought to [N, C] and labels checked; raises TaskError."""
        logits_NC = class_logits(outputs)
        labels_N = targets.squeeze(1) if targets.ndim == 2 and targets.shape[1] == 1 else targets
        if labels_N.shape != logits_NC.shape[:1] or (labels_N != labels_N.long()).any():
            raise TaskError(
                f"{self.name}: expected one whole number, a class, for each of {len(logits_NC)} examples, found labels "
                f"of {targets.dtype} and shape {tuple(targets.shape)}. Define targets_of(batch)."
            )
        outside = (labels_N < 0) | (labels_N >= logits_NC.shape[1])
        if outside.any():
            raise TaskError(
                f"{self.name}: example {int(outside.long().argmax())} has the label {labels_N[outside][0].item():g}, "
                f"but the model has the classes 0..{logits_NC.shape[1] - 1}."
            )
        return super().number(logits_NC, labels_N.long())

    def _class_number(self, positive: object) -> int:
        """The number of a class that is given as an option."""
        return whole_number(f"{self.name}: positive", positive, TaskError, advice="It is the number of a class.")

    def _known_class(self, positive: int, p_NC: Tensor) -> int:
        """The same, checked to be one of the model's classes."""
        if not 0 <= positive < p_NC.shape[1]:
            raise TaskError(f"{self.name}: positive={positive}, but the model has the classes 0..{p_NC.shape[1] - 1}.")
        return positive


class SliceMargin(_ClassificationProperty):
    """The mean margin, log p - log(1 - p) of the true class, over a slice of the data.

    Args:
        data: a map-style dataset.
        slice_of: the slice's examples, by index or as a mask with a boolean for each example; None takes all.
        options: as for `Property`.
    """

    def __init__(self, data: Any, slice_of: Sequence[int] | np.ndarray | None = None, **options: Any):
        length = dataset_length(data, "SliceMargin's")
        chosen = None if slice_of is None else as_distinct_indices("slice_of", slice_of, length, TaskError)
        super().__init__(data if chosen is None else Subset(data, chosen.tolist()), **options)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean margin."""
        return margins(outputs, targets).mean()


class SoftAccuracy(_ClassificationProperty):
    """The mean probability of the true class: accuracy with the hard decision made soft."""

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean probability."""
        return outputs.softmax(1).gather(1, targets[:, None]).mean()


class SoftF1(_ClassificationProperty):
    """The F-measure with probabilities for counts: 2 TP / (2 TP + FP + FN).

    Args:
        data: a map-style dataset.
        positive: the class it is about; None: the mean over all classes (macro).
        options: as for `Property`.
    """

    def __init__(self, data: Any, positive: int | None = 1, **options: Any):
        super().__init__(data, **options)
        self.positive = None if positive is None else self._class_number(positive)
        self._named_by(options.get("name"), positive=self.positive)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """2 sum p y / (sum p + sum y), of one class or averaged over all."""
        p_NC = outputs.softmax(1)
        y_NC = functional.one_hot(targets, p_NC.shape[1]).to(p_NC.dtype)
        f_C = 2 * (p_NC * y_NC).sum(0) / (p_NC.sum(0) + y_NC.sum(0))
        return f_C.mean() if self.positive is None else f_C[self._known_class(self.positive, p_NC)]


class _RateGap(_ClassificationProperty):
    """How much the rate at which a class is awarded differs between the values of an attribute of the examples."""

    def __init__(self, data: Any, attribute: Sequence[Any] | np.ndarray | Tensor, positive: int = 1, **options: Any):
        super().__init__(data, **options)
        labels, codes = distinct_labels(f"{self.name}: attribute", attribute, TaskError)
        if len(codes) != len(self.data):
            raise TaskError(f"{self.name}: attribute: {len(codes)} values, expected one for each of {len(self.data)}.")
        values = [label.text for label in labels]
        if len(values) < 2:
            raise TaskError(f"{self.name}: the attribute is {values} for every example: expected two or more.")
        self.positive, self.attribute = self._class_number(positive), torch.from_numpy(codes)
        self.values = values
        self._named_by(options.get("name"), positive=self.positive)

    def _rates(self, outputs: Tensor, chosen_N: Tensor, what: str) -> Tensor:
        """[V]: the mean probability of the positive class over the chosen examples with each value."""
        p_NC = outputs.softmax(1)
        has_value_NV = functional.one_hot(self.attribute.to(outputs.device)).to(p_NC.dtype) * chosen_N[:, None]
        count_V = has_value_NV.sum(0)
        if not bool((count_V > 0).all()):
            raise TaskError(
                f"{self.name}: no example of value {self.values[int(count_V.argmin())]} {what}, so it has no rate. "
                "Add examples, or leave the value out."
            )
        return (p_NC[:, self._known_class(self.positive, p_NC)] @ has_value_NV) / count_V


class DemographicParityGap(_RateGap):
    """The gap between the attribute's values in the mean probability of the positive class: largest minus smallest.

    Args:
        data: a map-style dataset.
        attribute: [N], each example's (a sex, a region, ...).
        positive: the class that is awarded.
        options: as for `Property`.
    """

    def value(self, outputs: Tensor, _targets: Tensor) -> Tensor:
        """The gap, 0 or more."""
        rates_V = self._rates(outputs, torch.ones_like(outputs[:, 0]), "in the data")
        return rates_V.max() - rates_V.min()


class EqualisedOddsGap(_RateGap):
    """Two gaps in the mean probability of the positive class: among the truly positive, and among the others.

    Source: Hardt et al. 2016, arXiv 1610.02413.

    Args:
        data: a map-style dataset.
        attribute: [N], each example's.
        positive: the class that is awarded.
        worst: the larger of the two gaps instead of their mean.
        options: as for `Property`.
    """

    def __init__(self, data: Any, attribute: Any, positive: int = 1, worst: bool = False, **options: Any):
        super().__init__(data, attribute, positive, **options)
        self.worst = truth(f"{self.name}: worst", worst, TaskError)
        self._named_by(options.get("name"), positive=self.positive, worst=self.worst)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The gap, 0 or more."""
        truly_N = (targets == self.positive).to(outputs.dtype)
        sides = [(truly_N, "is truly positive"), (1 - truly_N, "is truly negative")]
        rates = [self._rates(outputs, chosen_N, what) for chosen_N, what in sides]
        gaps = torch.stack([rates_V.max() - rates_V.min() for rates_V in rates])
        return gaps.max() if self.worst else gaps.mean()


class CalibrationError(_ClassificationProperty):
    """Soft-binned expected calibration error (Karandikar et al. 2021, arXiv 2108.00106), L1.

    Each example's confidence, the probability of the predicted class, belongs to every bin by a softmax of its squared
    distance to the bin's centre; a bin's error is |accuracy - confidence| weighed by what belongs to it.

    Args:
        data: a map-style dataset.
        bins: M, equally wide.
        temperature: of the softmax; towards 0 the bins become hard.
        options: as for `Property`.
    """

    def __init__(self, data: Any, bins: int = 15, temperature: float = 0.01, **options: Any):
        super().__init__(data, **options)
        self.bins = whole_number(f"{self.name}: bins", bins, TaskError, 1)
        self.temperature = real_number(f"{self.name}: temperature", temperature, TaskError, above=0)
        self._named_by(options.get("name"), bins=self.bins, temperature=self.temperature)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The error, 0 or more."""
        confidence_N, predicted_N = outputs.softmax(1).max(1)
        right_N = (predicted_N == targets).to(confidence_N.dtype)
        centres_M = (torch.arange(self.bins).to(confidence_N) + 0.5) / self.bins
        distance_NM = (confidence_N[:, None] - centres_M).square()
        belongs_NM = (-distance_NM / self.temperature).softmax(1)
        return ((right_N - confidence_N) @ belongs_NM).abs().sum() / len(confidence_N)


def class_logits(outputs: Tensor) -> Tensor:
    """[N, C]; one logit an example ([N] or [N, 1]) is that of class 1 against class 0. TaskError for other shapes."""
    if outputs.ndim == 1 or (outputs.ndim == 2 and outputs.shape[1] == 1):
        half_N = outputs.reshape(-1) / 2
        return torch.stack([-half_N, half_N], 1)
    if outputs.ndim != 2:
        raise TaskError(f"expected logits [N, C] or [N], found {tuple(outputs.shape)}. Define outputs(batch, model).")
    return outputs


def probabilities(outputs: Tensor) -> Tensor:
    """[N, C] from logits, or from one logit an example.

    Example:
        >>> probabilities(torch.zeros(1, 4))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return class_logits(outputs).softmax(1)
