"""Query gradients of properties: two passes over each one's data, shared out to the ranks and summed.

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
from ..data.batches import in_order
from ..data.fingerprints import dataset_fingerprint
from ..errors import TaskError
from ..model.finite import FiniteCheck
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView, make_loss_view
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

    def __init__(self, of: Property, slopes_N: Tensor | None = None):
        self.of, self.slopes_N = of, slopes_N

    def compute_measurement(self, batch: tuple[Tensor, Any], model: nn.Module) -> Tensor:
        examples, content = batch
        slopes_B = torch.ones((), device=examples.device) if self.slopes_N is None else self.slopes_N[examples]
        return self.of.part(content, model, slopes_B)


def property_identity(of: Property, context: StageContext) -> dict[str, Any]:
    """What identifies a property and its data; TaskError where reading the data is random."""
    data = dataset_fingerprint(of.data, "property's", context.ranks, context.settings.progress)
    if data["examples"] == "random" and of.needs_outputs:
        raise TaskError(
            f"{of.name}: reading its data twice gives different examples (augmentation?), but a property is "
            "differentiated in two passes that must see the same. Give data that is read alike each time."
        )
    return of.fingerprint() | {"data": data}


def property_gradient(
    context: StageContext, layers: Mapping[str, TrackedLayer], of: Property, where: str, batch_size: int
) -> Gradients:
    """A property's gradient at the parameters that are loaded, for each layer [P, O, I], the same on every rank.

    Only inside `observing(model)`. where: names the parameters in errors.
    """
    collate = of.collate_fn or context.collate_fn or default_collate
    data = _Indexed(of.data)

    def joined(items: list[tuple[int, Any]]) -> tuple[Tensor, Any]:
        return torch.tensor([index for index, _ in items]), collate([example for _, example in items])

    view = make_loss_view(context.model, _Streamed(of), "measurement", layers, data, joined)
    every = in_order(len(of.data), batch_size)
    if of.needs_outputs:
        view = replace(view, task=_Streamed(of, _slopes(context, view, of, every)))
    totals = {name: torch.zeros(*layer.shape, dtype=view.dtype, device=view.device) for name, layer in layers.items()}
    finite = FiniteCheck(f"{of.name}, {where}")

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        a, g = (side.flatten(1, 2) for side in tokens)
        totals[layer.name].baddbmm_(g.mT, a)

    for batch in context.walk(view, data, context.ranks.share(every), f"{of.name}, {where}", joined):
        view.capture(batch, consume, finite)
    finite.finish(view.layout.axes, context.ranks, every=False)
    context.ranks.sum_(list(totals.values()))
    return totals


def _slopes(context: StageContext, view: LossView, of: Property, every: Sequence[range]) -> Tensor:
    """The property's slopes in all outputs, [N, ...]: a pass without a graph, then autograd on the outputs alone."""
    own: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for batch in context.walk(view, of.data, context.ranks.share(every), f"{of.name}'s outputs", of.collate_fn):
            outputs_B, targets_B = of.outputs(batch.content, context.model), of.targets_of(batch.content)
            if {outputs_B.shape[:1], targets_B.shape[:1]} != {(batch.size,)} and not batch.idle:
                raise TaskError(
                    f"{of.name}: outputs {tuple(outputs_B.shape)} and targets {tuple(targets_B.shape)} of {batch}: "
                    f"expected {batch.size} rows, one for each example."
                )
            if not batch.idle:
                own.append((outputs_B, targets_B))
    outputs_N = _of_all_ranks(context, [outputs_B for outputs_B, _ in own], every)
    targets_N = _of_all_ranks(context, [targets_B for _, targets_B in own], every)
    with torch.enable_grad():
        outputs_N.requires_grad_()
        value = of.number(outputs_N, targets_N)
        if not value.requires_grad:
            raise TaskError(f"{of.name}: its value does not depend on the outputs. Return a differentiable number.")
        return torch.autograd.grad(value, outputs_N)[0]


def _of_all_ranks(context: StageContext, own: list[Tensor], every: Sequence[range]) -> Tensor:
    """Rows of all ranks in the data's order; each rank gives those of its share of `every`."""
    ranks = context.ranks
    mine = torch.cat(own) if own else None
    parts = []
    for rank in range(min(ranks.count, len(every))):
        rows = [row for part in every[rank :: ranks.count] for row in part]
        found = mine if ranks.count == 1 else ranks.broadcast(mine if rank == ranks.index else None, rank)
        parts.append((torch.tensor(rows), found))
    order = torch.argsort(torch.cat([rows for rows, _ in parts]))
    device = next(context.model.parameters()).device
    return torch.cat([found.to(device) for _, found in parts if found is not None])[order.to(device)]
