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
from .preconditioner import (
    MeanDenominator,
    PreconditionerBlock,
    RankOne,
    no_preconditioner,
    preconditioner_block,
)
from .saved_moments import layer_weights, unsaved
from .unit_names import at_point, moments_unit


def preconditioner_blocks(
    context: StageContext, preconditioner: Preconditioner, train_from: MadeFrom, view: LossView
) -> dict[str, PreconditionerBlock]:
    """P of each layer, [P, O, I], over the preconditioner's checkpoints, of which one is held at a time.

    train_from: `StageContext.made_from` of the stage's training data, to which estimated moments are bound.
    """
    weights, missing = layer_weights(context, preconditioner), unsaved(context, preconditioner)
    denominators = {name: MeanDenominator() for name in view.layers if weights[name]}
    for index, _ in preconditioner.weights:
        layers = [layer for name, layer in view.layers.items() if index in weights[name]]
        if not layers:
            continue
        moments_of = _estimates(context, index, train_from) if index in missing else _records(context, index)
        for layer in layers:
            weight, eps = weights[layer.name][index], context.trajectory.eps[context.parameter_groups[layer.name]]
            denominators[layer.name] = denominators[layer.name].plus(weight, moments_of(layer).double(), eps)
    blocks = {name: no_preconditioner(layer.shape) for name, layer in view.layers.items()}
    blocks |= {name: preconditioner_block(denominator) for name, denominator in denominators.items()}
    return {name: _placed(block, view) for name, block in blocks.items()}


def _placed(block: PreconditionerBlock, view: LossView) -> PreconditionerBlock:
    """The block on the view's device, in its precision."""
    part = RankOne(*(side.to(view.device, view.dtype) for side in (block.part.inputs_PI, block.part.outputs_PO)))
    return PreconditionerBlock(block.exact_POI.to(view.device, view.dtype), part)


def _records(context: StageContext, index: int) -> Callable[[TrackedLayer], Tensor]:
    """Gives a layer's second moments [P, O, I] as training left them at a checkpoint."""
    moments = context.trajectory.second_moments(index) or {}

    def moments_of(layer: TrackedLayer) -> Tensor:
        return layer.gradient_matrix([moments[name] for name in layer.parameter_names])

    return moments_of


def _estimates(context: StageContext, index: int, train_from: MadeFrom) -> Callable[[TrackedLayer], Tensor]:
    """Gives a layer's second moments [P, O, I] as `fit` estimated them at a checkpoint.

    The expected square of a batch's mean gradient is the mean gradient's square plus the variance over the batch size,
    times the mean square of the factors that clipped it; Adagrad's sum of squares is that times its steps.
    """
    trajectory, point = context.trajectory, Point.at(context.stage, index)
    unit = context.store.open(moments_unit(context, point), at_point(train_from, context, point))
    clip_squares, moves = trajectory.clip_squares(index), trajectory.moves_until(index)

    def moments_of(layer: TrackedLayer) -> Tensor:
        group = context.parameter_groups[layer.name]
        times = clip_squares[group] * (moves[group] if trajectory.kinds[group] == "Adagrad" else 1)
        mean = unit.tensor(f"{layer.name}.mean", layer.shape).double()
        square = unit.tensor(f"{layer.name}.square", layer.shape, kind="nonnegative").double()
        variance = (square - mean.square()).clamp_min(0)
        return times * (mean.square() + variance / (trajectory.optimizer.batch_size or 1))

    return moments_of
