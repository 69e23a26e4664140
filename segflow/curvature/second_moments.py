"""The optimizer's second moments as preconditioner blocks: recorded ones, or estimated from `fit`'s units."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..methods.plan import Point, Preconditioner
from ..model.layers import TrackedLayer
from ..model.loss_view import Lens
from ..stage.context import Workspace
from ..store.store import MadeFrom
from .names import moments_unit, unsaved
from .preconditioner import Denominator, PreconditionerBlock, preconditioner_block


def preconditioner_blocks(
    work: Workspace, of: Preconditioner, train_from: MadeFrom, lens: Lens
) -> dict[str, PreconditionerBlock]:
    """P of each layer over checkpoints, one read after the other: recorded, or estimated from `fit`'s units."""
    sums = {name: Denominator() for name in lens.layers}
    missing = unsaved(work, of)
    for index, weight in of.weights:
        find = _estimates(work, index, train_from) if index in missing else _records(work, index)
        for name, layer in lens.layers.items():
            eps = work.trajectory.eps[work.parameter_groups[name]]
            sums[name] = sums[name].plus(weight, find(layer).double(), eps)
    return {name: _placed(preconditioner_block(total), lens) for name, total in sums.items()}


def _placed(block: PreconditionerBlock, lens: Lens) -> PreconditionerBlock:
    part = type(block.part)(*(side.to(lens.device, lens.dtype) for side in vars(block.part).values()))
    return PreconditionerBlock(block.exact_POI.to(lens.device, lens.dtype), part)


def _records(work: Workspace, index: int) -> Callable[[TrackedLayer], Tensor]:
    moments = work.trajectory.second_moments(index) or {}

    def find(layer: TrackedLayer) -> Tensor:
        weight, *bias = (moments[name] for name in layer.parameter_names)
        return layer.gradient_matrix(weight, bias[0] if bias else None)

    return find


def _estimates(work: Workspace, index: int, train_from: MadeFrom) -> Callable[[TrackedLayer], Tensor]:
    """E of a batch's squared gradient: squared mean plus variance over the batch size (Adagrad: times steps)."""
    trajectory, point = work.trajectory, Point.at(work.stage, index)
    unit = work.units.open(moments_unit(work, point), {**train_from, "checkpoint": work.checkpoint_digest(point)})
    times = trajectory.steps[index] if trajectory.optimizer.name == "Adagrad" else 1

    def find(layer: TrackedLayer) -> Tensor:
        mean, square = (unit.tensor(f"{layer.name}.{what}", layer.shape).double() for what in ("mean", "square"))
        variance = (square - mean.square()).clamp_min(0)
        return times * (mean.square() + variance / (trajectory.optimizer.batch_size or 1))

    return find
