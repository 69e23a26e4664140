"""What a property is, a query that is one differentiable number of the model, and the class that one derives from.

Properties to use as they are stand in `ready_made.py`. A property is written as if its data were one batch. It is
differentiated on streamed data, exactly: a first pass collects the model's outputs without a graph, autograd takes the
property's slopes in them, and a second pass walks back from <slopes, outputs> batch by batch. Property functions as
queries: Ley et al. 2024, arXiv 2410.09940.
Axes: N examples of the property's data, B of a batch.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..arguments import shown
from ..data.batch_faults import naming
from ..data.batches import Batch, Collate, dataset_length, in_order
from ..data.code_identity import reached
from ..data.readers import batches
from ..errors import TaskError
from ..tasks.calling import Keys, as_key, as_keys, logits_in, outputs_of, targets_of

Seen = TypeVar("Seen")


class Property(ABC):
    """One differentiable number of the model, with data of its own; give one, or a list, as `query` to `score`.

    Args:
        data: a map-style dataset.
        name: the query's label; by default the class's name, and the built-in ones' options that are not the defaults.
        inputs, targets: the keys of a mapping batch, as for `segflow.tasks.Classification`.
        collate_fn: joins examples into a batch, as for a DataLoader; by default the analyzer's.

    Example:
        >>> class WorstLoss(Property):  # a smooth maximum of the losses: no sum over examples
        ...     def value(self, outputs, targets):
        ...         return torch.nn.functional.cross_entropy(outputs, targets, reduction="none").logsumexp(0)
        >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> WorstLoss(data).evaluate(torch.nn.Linear(3, 2)) > 0
        True
    """

    needs_outputs = True  # of all examples, before it can be differentiated
    told_apart: tuple[str, ...] = ("data", "name")  # attributes that its fingerprint leaves to others

    def __init__(
        self,
        data: Any,
        *,
        name: str | None = None,
        inputs: Keys = None,
        targets: str | None = None,
        collate_fn: Collate | None = None,
    ):
        dataset_length(data, f"{type(self).__name__}'s")
        if name is not None and not isinstance(name, str):
            raise TaskError(f"{type(self).__name__}: name={shown(name)}: expected text.")
        self.data, self.name = data, name or type(self).__name__
        self.inputs, self.targets = as_keys("inputs", inputs), as_key("targets", targets)
        self.collate_fn = collate_fn

    def _named_by(self, name: str | None, **options: object) -> None:
        """Tell this property by its options where it has no name of its own: "SoftF1(positive=0)".

        options: the values that are given, of which those that are the defaults are left out.
        """
        defaults = inspect.signature(type(self)).parameters
        unusual = [f"{k}={v}" for k, v in options.items() if k in defaults and v != defaults[k].default]
        if not name and unusual:
            self.name = f"{type(self).__name__}({', '.join(unusual)})"

    def outputs(self, batch: Any, model: nn.Module) -> Tensor:
        """What the model says of each example, [B, ...]: by default its logits."""
        returned = outputs_of(model, batch, self.inputs, (self.targets,))
        return logits_in(returned, self.name, "Define outputs(batch, model).")

    def targets_of(self, batch: Any) -> Tensor:
        """What `value` needs to know of each example, [B, ...]: by default its labels."""
        return targets_of(batch, self.targets)

    def outputs_and_targets(self, batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor]:
        """A batch's outputs and targets, [B, ...] each; TaskError unless both have one row for each example."""
        with naming(f"{self.name}: what the model says", batch, model):
            outputs_B, targets_B = self.outputs(batch.content, model), self.targets_of(batch.content)
        if {outputs_B.shape[:1], targets_B.shape[:1]} != {(batch.size,)}:
            raise TaskError(
                f"{self.name}: outputs {tuple(outputs_B.shape)} and targets {tuple(targets_B.shape)} of {batch}: "
                f"expected {batch.size} rows, one for each example."
            )
        return outputs_B, targets_B

    @abstractmethod
    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The number, [], from the outputs [N, ...] and targets [N, ...] of all of the data, in order."""

    def part(self, batch: Any, model: nn.Module, slopes: Tensor) -> Tensor:
        """A batch's part of a sum whose gradient is the property's; slopes: of the value in the batch's outputs."""
        return (slopes * self.outputs(batch, model)).sum()

    def number(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`value`, checked to be one finite number; raises TaskError."""
        data = Batch(range(len(outputs)), {"outputs": outputs, "targets": targets})
        with naming(f"{self.name}.value", data):
            value = self.value(outputs, targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TaskError(f"{self.name}.value: expected one number, found {shape}. Return a tensor of shape [].")
        if not torch.isfinite(value).all():
            raise TaskError(
                f"{self.name}: its value is {value.item()}, expected a finite number. Look at the model's outputs and "
                "at the property's data."
            )
        return value.reshape(())

    def evaluate(self, model: nn.Module, batch_size: int = 256) -> float:
        """The property's value of a model in eval mode, as after retraining."""
        sides = self._walk(model, batch_size, lambda batch: self.outputs_and_targets(batch, model))
        return self.number(*(torch.cat(side) for side in zip(*sides, strict=True))).item()

    @torch.no_grad()
    def _walk(self, model: nn.Module, batch_size: int, see: Callable[[Batch], Seen]) -> list[Seen]:
        """What is seen in each batch of the data, the model being in eval mode meanwhile."""
        lists, device = in_order(len(self.data), batch_size), next(model.parameters()).device
        training = model.training
        model.eval()
        try:
            return [see(batch) for batch in batches(self.data, lists, self.collate_fn, device)]
        finally:
            model.train(training)

    def fingerprint(self, model: nn.Module | None = None) -> dict[str, Any]:
        """What tells this property from others, besides its data: its class, and what its functions reach.

        model: the analysed one, whose parameters do not count.
        """
        methods = ("outputs", "targets_of", "value", "number", "part", "collate_fn")
        return {"property": type(self).__qualname__, "reaches": reached(self, methods, model, self.told_apart)}
