"""The optimizer's second moments as preconditioner blocks: recorded ones, or estimated from `fit`'s units."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..methods.plan import Point, Preconditioner
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..stage.context import StageContext
from ..store.store import MadeFrom
from .names import at_point, moments_unit, unsaved
from .preconditioner import Denominator, PreconditionerBlock, preconditioner_block


def preconditioner_blocks(
    context: StageContext, of: Preconditioner, train_from: MadeFrom, view: LossView
) -> dict[str, PreconditionerBlock]:
    """P of each layer over checkpoints, one read after the other: recorded, or estimated from `fit`'s units."""
    sums = {name: Denominator() for name in view.layers}
    missing = unsaved(context, of)
    for index, weight in of.weights:
        find = _estimates(context, index, train_from) if index in missing else _records(context, index)
        for name, layer in view.layers.items():
            eps = context.trajectory.eps[context.parameter_groups[name]]
            sums[name] = sums[name].plus(weight, find(layer).double(), eps)
    return {name: _placed(preconditioner_block(total), view) for name, total in sums.items()}


def _placed(block: PreconditionerBlock, view: LossView) -> PreconditionerBlock:
    part = type(block.part)(*(side.to(view.device, view.dtype) for side in vars(block.part).values()))
    return PreconditionerBlock(block.exact_POI.to(view.device, view.dtype), part)


def _records(context: StageContext, index: int) -> Callable[[TrackedLayer], Tensor]:
    moments = context.trajectory.second_moments(index) or {}

    def find(layer: TrackedLayer) -> Tensor:
        weight, *bias = (moments[name] for name in layer.parameter_names)
        return layer.gradient_matrix(weight, bias[0] if bias else None)

    return find


def _estimates(context: StageContext, index: int, train_from: MadeFrom) -> Callable[[TrackedLayer], Tensor]:
    """E of a batch's squared gradient: squared mean plus variance over the batch size (Adagrad: times steps)."""
    trajectory, point = context.trajectory, Point.at(context.stage, index)
    unit = context.store.open(moments_unit(context, point), at_point(train_from, context, point))
    times = trajectory.steps[index] if trajectory.optimizer.name == "Adagrad" else 1

    def find(layer: TrackedLayer) -> Tensor:
        mean, square = (unit.tensor(f"{layer.name}.{what}", layer.shape).double() for what in ("mean", "square"))
        variance = (square - mean.square()).clamp_min(0)
        return times * (mean.square() + variance / (trajectory.optimizer.batch_size or 1))

    return find
