"""Which second moments training left, read by name only: of which checkpoints, and of which layers at each of them."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import TrajectoryError
from ..methods.plan import Preconditioner
from ..model.layers.tracked import TrackedLayer
from ..stage.context import StageContext
from ..training.segments import for_group, shares

LayerWeights = Mapping[str, Mapping[int, float]]  # of each layer, the weights of checkpoints, which add up to 1


def unsaved(context: StageContext, preconditioner: Preconditioner) -> list[int]:
    """The preconditioner's checkpoints at which no second moments at all were saved, so that they must be estimated.

    Rank 0 looks, and all ranks get its answer.
    """
    missing = [index for index, names in _saved(context, preconditioner).items() if names is None]
    return list(context.ranks.same(missing))


def layer_weights(context: StageContext, preconditioner: Preconditioner) -> LayerWeights:
    """Of each tracked layer the checkpoints whose second moments make up its P, with weights; none where P is 1.

    A checkpoint that has the moments of some parameters has none of those that had not moved by then: its weight goes
    to the layer's other checkpoints. P is 1 for layers whose optimizer keeps no second moments, and for those that have
    not moved at all. Rank 0 looks, and all ranks get its answer; TrajectoryError, naming the parameters, where some
    have moved and have no second moments at any of the checkpoints.
    """
    saved, weights, lacking = _saved(context, preconditioner), {}, []
    for name, layer in context.layers.tracked.items() if context.ranks.main else ():
        group = context.parameter_groups[name]
        weights[name] = list(_weights(context, preconditioner, saved, layer).items())
        moved = not preconditioner.moved or preconditioner.moved[group]
        if not weights[name] and moved and context.trajectory.has_moments[group]:
            lacking += layer.parameter_names
    if lacking:
        steps = [context.trajectory.steps[index] for index, _ in preconditioner.weights]
        raise TrajectoryError(
            f"no second moments of {sorted(lacking)[:4]} at the checkpoints of steps {steps}, although the segment's "
            "steps moved them: they began to move after its last checkpoint, or were saved without their state. Record "
            "a checkpoint later in the segment, move the cut (segments=[...]), or leave their layers out of "
            "get_influence_tracked_modules()."
        )
    return {name: {int(i): weight for i, weight in pairs} for name, pairs in context.ranks.same(weights).items()}


def check_saved(context: StageContext, preconditioner: Preconditioner) -> None:
    """Raise TrajectoryError if second moments that were saved are not finite numbers >= 0, before hours are spent.

    Rank 0 reads them, one checkpoint after the other.
    """
    if context.ranks.main:
        for index, _ in preconditioner.weights:
            context.trajectory.second_moments(index)


def _saved(context: StageContext, preconditioner: Preconditioner) -> dict[int, frozenset[str] | None]:
    """The names of the parameters with second moments at each checkpoint, None for no moments at all; on rank 0.

    Nothing where no tracked layer's optimizer keeps any.
    """
    keeps_any = any(context.trajectory.has_moments[group] for group in context.parameter_groups.values())
    if not keeps_any or not context.ranks.main:
        return {}
    return {index: context.trajectory.saved_moments(index) for index, _ in preconditioner.weights}


def _weights(
    context: StageContext,
    preconditioner: Preconditioner,
    saved: Mapping[int, frozenset[str] | None],
    layer: TrackedLayer,
) -> dict[int, float]:
    """The weights of those checkpoints at which the layer has second moments, saved or estimated."""
    group = context.parameter_groups[layer.name]
    if not context.trajectory.has_moments[group]:
        return {}
    own = {index: for_group((weight,), group)[0] for index, weight in preconditioner.weights}
    found = [index for index, names in saved.items() if names is None or names.issuperset(layer.parameter_names)]
    if len(found) < len(own):
        own = dict(zip(found, shares([own[index] for index in found]), strict=True))
    return {index: weight for index, weight in own.items() if weight}
