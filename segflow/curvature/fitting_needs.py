"""What plans need to have fitted on the training data of each stage of training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..methods.plan import (
    Curvature,
    Plan,
    Preconditioner,
    ProjectedInverse,
    curvatures,
    preconditioners,
    projected,
)
from ..stage.context import StageContext
from .saved_moments import check_saved, layer_weights, unsaved
from .unit_names import preconditioner_from


class Needs(NamedTuple):
    """What plans need to have fitted on one stage's data; statistics: what tells its checkpoints apart."""

    curvatures: Sequence[Curvature] = ()
    preconditioners: Sequence[Preconditioner] = ()
    kernels: Sequence[ProjectedInverse] = ()
    statistics: bool = False


def fitting_needs(plans: Iterable[Plan]) -> dict[int, Needs]:
    """What plans need of each stage, by its index; stages of which they need nothing are absent."""
    terms = tuple(term for plan in plans for term in plan)
    kinds: tuple[Sequence[Any], ...] = (curvatures(terms), preconditioners(terms), projected(terms))
    stages = sorted({needed.stage for kind in kinds for needed in kind})
    needs = {}
    for stage in stages:
        blocks, scales, kernels = ([needed for needed in kind if needed.stage == stage] for kind in kinds)
        needs[stage] = Needs(blocks, scales, kernels)
    return needs


def check_needs(context: StageContext, needs: Needs) -> None:
    """Warn if second moments must be estimated; raise TrajectoryError if they can be neither read nor estimated."""
    missing = {index for preconditioner in needs.preconditioners for index in unsaved(context, preconditioner)}
    for preconditioner in needs.preconditioners:
        layer_weights(context, preconditioner)
        preconditioner_from(context, preconditioner)
        check_saved(context, preconditioner)
    if missing:
        warnings.warn(
            f"{context.trajectory.optimizer.name}'s second moments were not saved at {len(missing)} checkpoints, "
            "so they are estimated from gradients there (see the scores' provenance).",
            stacklevel=3,
        )
