"""Whether training left the optimizer's second moments: which checkpoints have them, read by name only."""

from __future__ import annotations

from ..errors import TrajectoryError
from ..methods.plan import Point, Preconditioner
from ..stage.context import StageContext


def unsaved(context: StageContext, preconditioner: Preconditioner) -> list[int]:
    """The preconditioner's checkpoints at which second moments were not saved, so that they must be estimated.

    Rank 0 looks, and all ranks get its answer. TrajectoryError where a checkpoint has the second moments of some
    tracked parameters only.
    """
    checkpoints = [index for index, _ in preconditioner.weights]
    missing = [index for index in checkpoints if not _saved(context, index)] if context.ranks.main else None
    return list(context.ranks.same(missing))


def check_saved(context: StageContext, preconditioner: Preconditioner) -> None:
    """Raise TrajectoryError if second moments that were saved are not finite numbers >= 0, before hours are spent.

    Rank 0 reads them, one checkpoint after the other.
    """
    if context.ranks.main:
        for index, _ in preconditioner.weights:
            context.trajectory.second_moments(index)


def _saved(context: StageContext, index: int) -> bool:
    names = context.trajectory.saved_moments(index)
    if names is None:
        return False
    needed = {name for layer in context.layers.tracked.values() for name in layer.parameter_names}
    if needed - names:
        raise TrajectoryError(
            f"{context.where(Point.at(context.stage, index))}: no second moments of {sorted(needed - names)[:4]}, "
            "which other parameters have. Were they frozen or unused until then? Leave their layers out of "
            "get_influence_tracked_modules()."
        )
    return True
