"""Query gradients of properties: two passes over a property's data, whose batches the ranks share.

The first pass collects the model's outputs, in which autograd takes the property's slopes; the second sums the
gradients of <slopes, outputs> over the batches (see properties/property.py).

Axes: N examples of a property's data, P parts, O outputs, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from ..curvature.kronecker import Gradients
from ..data.batches import Batch, in_order
from ..data.readers import Reader
from ..errors import TaskError
from ..model.finite_check import FiniteCheck
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.make_view import make_loss_view
from ..model.tokens import Tokens
from ..properties.property import Property
from ..stage.context import StageContext


class _Indexed(Dataset[Any]):
    """Each example with its index."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.data[index]


class _Streamed:
    """A property as a task whose measurement of a batch is its part of the property's gradient.

    slopes_N: of the value in each example's outputs; None for ones.
    """

    def __init__(self, prop: Property, slopes_N: Tensor | None = None):
        self.prop, self.slopes_N, self.shown_as = prop, slopes_N, prop.name

    def compute_measurement(self, batch: tuple[Tensor, Any], model: nn.Module) -> Tensor:
        examples, content = batch
        if self.slopes_N is None and self.prop.needs_outputs and type(self.prop).part is Property.part:
            return self.prop.outputs_and_targets(Batch(examples.tolist(), content), model)[0].sum()  # checks the rows
        slopes_B = torch.ones((), device=examples.device) if self.slopes_N is None else self.slopes_N[examples]
        return self.prop.part(content, model, slopes_B)


def property_identity(prop: Property, context: StageContext) -> dict[str, Any]:
    """What identifies a property and its data."""
    data = _reader(context, prop).fingerprint(context.ranks, context.settings.progress)
    return prop.fingerprint(context.model) | {"data": data}


def _reader(context: StageContext, prop: Property) -> Reader:
    return context.reader(prop.data, "property's", prop.collate_fn)


def indexed(context: StageContext, prop: Property) -> Reader:
    """Reads a property's data, each batch behind its examples' indices."""
    collate = prop.collate_fn or context.collate_fn or default_collate

    def collate_indexed(items: list[tuple[int, Any]]) -> tuple[Tensor, Any]:
        return torch.tensor([index for index, _ in items]), collate([example for _, example in items])

    settings = context.settings
    data = _Indexed(prop.data)
    return Reader(data, collate_indexed, "property's", seed=settings.seed, workers=settings.num_workers)


def property_view(context: StageContext, layers: Mapping[str, TrackedLayer], prop: Property) -> LossView:
    """The model seen through the sum of a property's outputs (or parts), on the data that `indexed` reads."""
    return make_loss_view(context.model, _Streamed(prop), "measurement", layers, indexed(context, prop))


def property_gradient(
    context: StageContext, layers: Mapping[str, TrackedLayer], prop: Property, where: str, batch_size: int
) -> Gradients:
    """A property's gradient at the parameters in the model: for each layer [P, O, I], on every rank.

    Only inside `observing(model)`. where: names the parameters in errors; batch_size: examples in one forward and
    backward. Raises TaskError where the property cannot be differentiated.
    """
    data = indexed(context, prop)
    view = property_view(context, layers, prop)
    batch_rows = in_order(len(prop.data), batch_size)
    if prop.needs_outputs:
        view = replace(view, task=_Streamed(prop, _slopes(context, view, prop, batch_rows)))
    totals = {name: torch.zeros(*layer.shape, dtype=view.dtype, device=view.device) for name, layer in layers.items()}
    finite = FiniteCheck(f"{prop.name}, {where}")

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        totals[layer.name] += tokens.total()

    here = context.ranks.share(batch_rows)
    for batch in context.walk(view, data, here, f"{prop.name}, {where}"):
        view.capture(batch, consume, finite)
    finite.finish(view.layout.reached, context.ranks, every=False)
    context.ranks.sum_(list(totals.values()))
    return totals


def _slopes(context: StageContext, view: LossView, prop: Property, batch_rows: Sequence[range]) -> Tensor:
    """The property's slopes in all outputs, [N, ...]: a pass without a graph, then autograd on the outputs alone."""
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    here = context.ranks.share(batch_rows)
    with torch.no_grad():
        for batch in context.walk(view, _reader(context, prop), here, f"{prop.name}'s outputs"):
            outputs_B, targets_B = prop.outputs_and_targets(batch, context.model)
            if not batch.idle:
                outputs.append(outputs_B)
                targets.append(targets_B)
    outputs_N = _of_all_ranks(context, outputs, batch_rows)
    targets_N = _of_all_ranks(context, targets, batch_rows)
    with torch.enable_grad():
        outputs_N.requires_grad_()
        value = prop.number(outputs_N, targets_N)
        if not value.requires_grad:
            raise TaskError(f"{prop.name}: its value does not depend on the outputs. Return a differentiable number.")
        return torch.autograd.grad(value, outputs_N)[0]


def _of_all_ranks(context: StageContext, blocks: list[Tensor], batch_rows: Sequence[range]) -> Tensor:
    """[N, ...] on every rank, in the data's order; blocks: this rank's, one for each batch of its share."""
    ranks = context.ranks
    here = torch.cat(blocks) if blocks else None
    rows, values = [], []
    for rank in range(min(ranks.count, len(batch_rows))):
        rows += [row for batch in batch_rows[rank :: ranks.count] for row in batch]
        values.append(here if ranks.count == 1 else ranks.broadcast(here if rank == ranks.index else None, rank))
    order = torch.argsort(torch.tensor(rows))
    device = next(context.model.parameters()).device
    return torch.cat([of_rank.to(device) for of_rank in values if of_rank is not None])[order.to(device)]
