"""What plans need of the training data of each stage."""

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
from .names import preconditioner_from
from .saved_moments import check_saved, unsaved


class Needs(NamedTuple):
    """What plans need of one stage's data."""

    curvatures: Sequence[Curvature] = ()
    preconditioners: Sequence[Preconditioner] = ()
    kernels: Sequence[ProjectedInverse] = ()
    statistics: bool = False


def fitting_needs(plans: Iterable[Plan]) -> dict[int, Needs]:
    """What plans need of each stage's data; stages of which they need nothing are absent."""
    terms = tuple(term for plan in plans for term in plan)
    needed = (curvatures(terms), preconditioners(terms), projected(terms))
    stages = sorted({one.stage for kind in needed for one in kind})
    needs = {}
    for stage in stages:
        blocks, scales, kernels = (_of_stage(kind, stage) for kind in needed)
        needs[stage] = Needs(blocks, scales, kernels)
    return needs


def _of_stage(needed: Iterable[Any], stage: int) -> list[Any]:
    return [one for one in needed if one.stage == stage]


def check_needs(context: StageContext, needs: Needs) -> None:
    """Raise TrajectoryError if second moments can be neither read nor estimated; warn if any must be estimated."""
    missing = {index for preconditioner in needs.preconditioners for index in unsaved(context, preconditioner)}
    for preconditioner in needs.preconditioners:
        preconditioner_from(context, preconditioner)
        check_saved(context, preconditioner)
    if missing:
        warnings.warn(
            f"{context.trajectory.optimizer.name}'s second moments were not saved at {len(missing)} checkpoints, "
            "so they are estimated from gradients there (see the scores' provenance).",
            stacklevel=3,
        )
