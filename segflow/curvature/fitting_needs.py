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
    SampledFisher,
    curvatures,
    fishers,
    preconditioners,
    projected,
    spectral,
)
from ..stage.context import StageContext
from .layer_shares import capped_layers
from .saved_moments import check_saved, layer_weights, unsaved
from .unit_names import preconditioner_from


class Needs(NamedTuple):
    """What plans need to have fitted on one stage's data.

    capped: the layers of which the share of the examples that reach them must be known. statistics: what tells its
    checkpoints apart.
    """

    curvatures: Sequence[Curvature] = ()
    preconditioners: Sequence[Preconditioner] = ()
    kernels: Sequence[ProjectedInverse] = ()
    fishers: Sequence[SampledFisher] = ()
    capped: Sequence[str] = ()
    statistics: bool = False


def fitting_needs(contexts: Sequence[StageContext], plans: Iterable[Plan]) -> dict[int, Needs]:
    """What plans need of each stage, by its index; stages of which they need nothing are absent.

    contexts: of all stages.
    """
    terms = tuple(term for plan in plans for term in plan)
    kinds: tuple[Sequence[Any], ...] = (curvatures(terms), preconditioners(terms), projected(terms), fishers(terms))
    needs = {}
    for stage, context in enumerate(contexts):
        blocks, scales, kernels, coupled = ([needed for needed in kind if needed.stage == stage] for kind in kinds)
        of_stage = Needs(blocks, scales, kernels, coupled, sorted(capped_layers(context, spectral(terms))))
        if any(of_stage):
            needs[stage] = of_stage
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
