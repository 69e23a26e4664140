"""What ready-made tasks share: how a batch is read, and how much each of its examples counts. Axes: B examples."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..arguments import plain, real_number, real_numbers
from ..errors import TaskError
from .calling import Keys, as_key, as_keys, attention_mask_of, entry, logits_in, outputs_of, targets_of
from .task import FaultyRowError, Task


class BatchTask(Task):
    """A task that reads its batches by keys, and the model's outputs whatever they are called.

    Args:
        inputs: None gives the model the entries that its forward takes by name; a key, one argument; several keys,
            these by name.
        targets: the key of the targets; None for the first of "labels", "label" and "targets".
        weights: the key of the examples' weights.
        mean_weight: what the training loss was divided by besides the number of examples.
        class_weights: whether classes have weights too.
    """

    measurement_options: tuple[str, ...] = ("measurement",)

    def __init__(
        self,
        inputs: Keys,
        targets: str | None,
        weights: str | None = None,
        mean_weight: float | None = None,
        class_weights: object = None,
    ):
        self.inputs, self.targets = as_keys("inputs", inputs), as_key("targets", targets)
        self.weights = as_key("weights", weights)
        name = self.__class__.__name__
        self.mean_weight = checked_mean_weight(name, mean_weight, class_weights=class_weights, weights=weights)

    def get_attention_mask(self, batch: Any) -> Tensor | None:
        """The batch's own `attention_mask` [B, S], so that padding does not enter the curvature; None without one."""
        return attention_mask_of(batch)

    def _read(self, batch: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        """The model's logits, and the targets."""
        targets = targets_of(batch, self.targets)
        if not isinstance(targets, Tensor):
            raise TaskError(
                f"{self.__class__.__name__}: expected a tensor of targets, found {type(targets).__name__}. Give "
                "examples of tensors or numbers, or a collate_fn that stacks them."
            )
        return self._outputs(batch, model), targets

    def _outputs(self, batch: Any, model: nn.Module) -> Tensor:
        """The model's logits."""
        returned = outputs_of(model, batch, self.inputs, (self.targets, self.weights))
        return logits_in(returned, self.__class__.__name__)

    def _scale(self, batch: Any, like: Tensor) -> Tensor:
        """What examples' losses are multiplied by: their weights over the mean one, [B], or the same for all, []."""
        if self.weights is None:
            return like.new_tensor(1 / self.mean_weight)
        weights_B = entry(batch, self.weights, "weights")
        if not isinstance(weights_B, Tensor) or weights_B.shape != like.shape[:1]:
            found = tuple(weights_B.shape) if isinstance(weights_B, Tensor) else type(weights_B).__name__
            raise TaskError(
                f"{self.__class__.__name__}: weights={self.weights!r}: expected a tensor of one number for each of "
                f"{len(like)} examples, found {found}."
            )
        if weights_B.device.type == "cpu" and bool((off_B := ~(weights_B >= 0)).any()):
            row = int(off_B.nonzero()[0])
            raise FaultyRowError(
                row, f"{self.__class__.__name__}: its weight is {weights_B[row].item()}, expected a number from 0."
            )
        return weights_B.to(like) / self.mean_weight


def checked_mean_weight(task: str, given: float | None, **weights: object) -> float:
    """What weighted losses are divided by, 1 where nothing has weights; TaskError where it is missing or of no use."""
    weighted_by = [name for name, value in weights.items() if value is not None]
    if not weighted_by:
        if given is not None:
            raise TaskError(f"{task}: mean_weight={given} without weights, which it would divide. Leave it out.")
        return 1.0
    if given is None:
        raise TaskError(
            f"{task}: {' and '.join(weighted_by)} without mean_weight=, what the training loss was divided by besides "
            "the number of examples. It is 1 for (weights * losses).mean(). torch's cross_entropy(weight=) divides by "
            "the batch's summed weights: give class_weights[labels].mean() over the training data (of tokens, over all "
            "labels that are not ignored)."
        )
    return real_number(f"{task}: mean_weight", given, TaskError, above=0)


def positive_numbers(name: str, given: Any) -> tuple[float, ...]:
    """Weights, of which none is below 0; TaskError for others."""
    numbers = real_numbers(name, given.tolist() if isinstance(given, Tensor) else given, TaskError)
    for place, number in enumerate(numbers):
        real_number(f"{name}[{place}]", number, TaskError, least=0)
    return numbers


def number_or_numbers(name: str, given: Any) -> float | tuple[float, ...]:
    """One weight, or several; TaskError for others."""
    single = plain(given)
    if isinstance(single, float | int):
        return real_number(name, single, TaskError, least=0)
    return positive_numbers(name, given)
