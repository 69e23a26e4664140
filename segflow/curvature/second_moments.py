"""The optimizer's preconditioner of a stage: second moments, recorded or estimated, brought into each layer's shape.

Which checkpoints have recorded ones is known to `saved_moments`; how P is made of them is known to `preconditioner`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..methods.plan import Point, Preconditioner
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..stage.context import StageContext
from ..store.store import MadeFrom
from ..training.segments import for_group
from .preconditioner import MeanDenominator, PreconditionerBlock, RankOne, preconditioner_block
from .saved_moments import unsaved
from .unit_names import at_point, moments_unit


def preconditioner_blocks(
    context: StageContext, preconditioner: Preconditioner, train_from: MadeFrom, view: LossView
) -> dict[str, PreconditionerBlock]:
    """P of each layer, [P, O, I], over the preconditioner's checkpoints, of which one is held at a time.

    train_from: `StageContext.made_from` of the stage's training data, to which estimated moments are bound.
    """
    denominators = {name: MeanDenominator() for name in view.layers}
    missing = unsaved(context, preconditioner)
    for index, weight in preconditioner.weights:
        moments_of = _estimates(context, index, train_from) if index in missing else _records(context, index)
        for name, layer in view.layers.items():
            group = context.parameter_groups[name]
            [of_group], eps = for_group((weight,), group), context.trajectory.eps[group]
            denominators[name] = denominators[name].plus(of_group, moments_of(layer).double(), eps)
    return {name: _placed(preconditioner_block(denominator), view) for name, denominator in denominators.items()}


def _placed(block: PreconditionerBlock, view: LossView) -> PreconditionerBlock:
    """The block on the view's device, in its precision."""
    part = RankOne(*(side.to(view.device, view.dtype) for side in (block.part.inputs_PI, block.part.outputs_PO)))
    return PreconditionerBlock(block.exact_POI.to(view.device, view.dtype), part)


def _records(context: StageContext, index: int) -> Callable[[TrackedLayer], Tensor]:
    """Gives a layer's second moments [P, O, I] as training left them at a checkpoint."""
    moments = context.trajectory.second_moments(index) or {}

    def moments_of(layer: TrackedLayer) -> Tensor:
        weight, *bias = (moments[name] for name in layer.parameter_names)
        return layer.gradient_matrix(weight, bias[0] if bias else None)

    return moments_of


def _estimates(context: StageContext, index: int, train_from: MadeFrom) -> Callable[[TrackedLayer], Tensor]:
    """Gives a layer's second moments [P, O, I] as `fit` estimated them at a checkpoint.

    The expected square of a batch's mean gradient is the mean gradient's square plus the variance over the batch size;
    Adagrad's sum of squares is that times the steps taken.
    """
    trajectory, point = context.trajectory, Point.at(context.stage, index)
    unit = context.store.open(moments_unit(context, point), at_point(train_from, context, point))
    times = trajectory.steps[index] if trajectory.optimizer.name == "Adagrad" else 1

    def moments_of(layer: TrackedLayer) -> Tensor:
        mean, square = (unit.tensor(f"{layer.name}.{what}", layer.shape).double() for what in ("mean", "square"))
        variance = (square - mean.square()).clamp_min(0)
        return times * (mean.square() + variance / (trajectory.optimizer.batch_size or 1))

    return moments_of
