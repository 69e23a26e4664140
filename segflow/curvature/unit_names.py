"""What units of curvature are called, and what they are made of.

Units in the store, each below its stage's prefix if there are several stages or runs:

    covariance/step-S             sums of a a^T and g g^T at the checkpoint of step S
    eigenbasis/POOL               bases of A and S averaged over the pool's points
    eigenvalues/POOL/step-S       corrected eigenvalues in that basis at a point
    kfac/POOL                     K-FAC's eigenvalues in that basis
    diagonal/step-S               mean squared gradients at a point
    moments/step-S                mean and mean square of training gradients, where second moments were not saved
    shares/step-S                 share of the examples that reach each layer, where batches left layers out
    kernel/NAME/step-S            second moment of projected per-example gradients
    coupled/POOL                  pseudo-gradients' tokens, and the spectrum of their products
    statistics/step-S             what tells checkpoints apart, for automatic segments

POOL is `steps-S-T` for the checkpoints of steps S and T of the stage, and `at-...` for other points. `-w...` is added
where the points do not weigh the same, and `-scaled-...` for the curvature of P^1/2 H P^1/2. A point that is the mean
of several checkpoints is called `mean-...` instead of `step-S`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..data.code_identity import output_fingerprint
from ..errors import TrajectoryError
from ..methods.plan import Curvature, Point, Preconditioner, ProjectedInverse, SampledFisher
from ..model.loss_view import LossView
from ..stage.context import StageContext
from ..stage.unit_identity import checkpoint_digest, point_name, read_and_probed, rounded, short
from ..store.store import MadeFrom
from .saved_moments import unsaved


def covariance_unit(context: StageContext, point: Point) -> str:
    """The name of the unit of a point's covariances."""
    return f"{context.prefix}covariance/{point_name(context, point)}"


def basis_unit(context: StageContext, curvature: Curvature) -> str:
    """The name of the unit of a pool's eigenbasis."""
    return f"{context.prefix}eigenbasis/{_pool(context, curvature)}"


def eigenvalues_unit(context: StageContext, curvature: Curvature, point: Point) -> str:
    """The name of the unit of eigenvalues at a point, of the curvature's kind (K-FAC's: of the whole pool)."""
    if curvature.kind == "diagonal":
        return f"{context.prefix}diagonal{_batched(curvature)}/{point_name(context, point)}"
    if curvature.kind == "kfac":
        return f"{context.prefix}kfac/{_pool(context, curvature)}"
    return f"{context.prefix}eigenvalues/{_pool(context, curvature)}{_batched(curvature)}/{point_name(context, point)}"


def moments_unit(context: StageContext, point: Point) -> str:
    """The name of the unit of training gradients' moments at a point."""
    return f"{context.prefix}moments/{point_name(context, point)}"


def shares_unit(context: StageContext) -> str:
    """The name of the unit of the shares of the examples that reach each layer, at the stage's first checkpoint."""
    return f"{context.prefix}shares/{point_name(context, Point.at(context.stage, 0))}"


def statistics_unit(context: StageContext, point: Point) -> str:
    """The name of the unit of the statistics that tell a checkpoint from others."""
    return f"{context.prefix}statistics/{point_name(context, point)}"


def kernel_unit(context: StageContext, inverse: ProjectedInverse) -> str:
    """The name of the unit of a projected second moment at a point; damping is applied when it is read."""
    projection = inverse.projection
    name = f"{inverse.features}-{projection.dimension or 'all'}-{projection.seed}{_batched(inverse)}"
    return f"{context.prefix}kernel/{name}/{point_name(context, inverse.point)}"


def coupled_unit(context: StageContext, fisher: SampledFisher) -> str:
    """The name of the unit of a sampled curvature of all layers together."""
    of_rates = rounded([tuple(_rates(context, fisher))])
    return f"{context.prefix}coupled/{_pool(context, fisher)}-{fisher.most}-rates{of_rates}"


def coupled_from(context: StageContext, fisher: SampledFisher, train_from: MadeFrom, view: LossView) -> dict[str, Any]:
    """What the unit of a sampled curvature is made of."""
    return {**pool_from(context, fisher, train_from, view), "rates": _rates(context, fisher), "most": fisher.most}


def at_point(identity: MadeFrom, context: StageContext, point: Point) -> dict[str, Any]:
    """What a unit of one point is made of, given what the stage's units (or a pool's) are made of."""
    return {**identity, "checkpoint": checkpoint_digest(context, point)}


def kernel_from(
    context: StageContext, inverse: ProjectedInverse, train_from: MadeFrom, view: LossView, train: Any
) -> MadeFrom:
    """What a kernel's unit is made of; view: of the training loss.

    The task's output is identified by its values on some examples, as the training loss is.
    """
    made = {**at_point(train_from, context, inverse.point), "dtype": str(view.dtype)}
    if inverse.features == "output":
        made["output"], made["outputs"] = read_and_probed(
            context, train, replace(view, kind="output"), output_fingerprint
        )
    return made


def pool_from(
    context: StageContext, curvature: Curvature | SampledFisher, train_from: MadeFrom, view: LossView
) -> dict[str, Any]:
    """What a pool's units are made of."""
    made: dict[str, Any] = {**train_from, "dtype": str(view.dtype)}
    made["checkpoints"] = [checkpoint_digest(context, point) for point in curvature.points]
    if len(set(curvature.weights)) > 1:
        made["weights"] = list(curvature.weights)
    if curvature.scaled is not None and not (isinstance(curvature, Curvature) and curvature.kind == "diagonal"):
        made["preconditioner"] = preconditioner_from(context, curvature.scaled)
    return made


def preconditioner_from(context: StageContext, preconditioner: Preconditioner) -> dict[str, Any]:
    """What a preconditioner is made of; TrajectoryError if moments were not saved and cannot be estimated either.

    Which checkpoints lack the moments of some parameters only is known by the checkpoints' contents.
    """
    trajectory, missing = context.run.stages[preconditioner.stage], unsaved(context, preconditioner)
    if missing and trajectory.optimizer.batch_size is None:
        raise TrajectoryError(
            f"{trajectory.optimizer.name}'s second moments were not saved at the checkpoints of steps "
            f"{[trajectory.steps[index] for index in missing]}. Train inside segflow.record(), or give "
            "OptimizerConstants(batch_size=...) to have them estimated from gradients."
        )
    clip_squares = [list(trajectory.clip_squares(index)) for index in missing]
    made: dict[str, Any] = {}
    if any(square != 1 for squares in clip_squares for square in squares):
        made["clip_squares"] = clip_squares
    if not all(trajectory.has_moments):
        made["has_moments"] = list(trajectory.has_moments)
    return made | {
        "checkpoints": [
            checkpoint_digest(context, Point.at(preconditioner.stage, index)) for index, _ in preconditioner.weights
        ],
        "weights": [weight for _, weight in preconditioner.weights],
        "eps": list(trajectory.eps),
        "moments": f"estimated for batches of {trajectory.optimizer.batch_size}" if missing else "recorded",
    }


def _rates(context: StageContext, fisher: SampledFisher) -> list[float]:
    """The rates of the parameter groups that hold tracked layers, in order; those of others may be unknown."""
    return [fisher.rates[group] for group in sorted(set(context.parameter_groups.values()))]


def _batched(second_moment: Curvature | ProjectedInverse) -> str:
    """In a unit's name, the examples that second moments are batched by."""
    return f"-batches-of-{second_moment.batch}" if second_moment.batch > 1 else ""


def _pool(context: StageContext, curvature: Curvature | SampledFisher) -> str:
    points = curvature.points
    if all(len(point.weights) == 1 and point.stage == context.stage for point in points):
        steps = [str(context.trajectory.steps[point.weights[0][0]]) for point in points]
        name = "steps-" + short(steps)
    else:
        name = "at-" + "-".join(point_name(context, point) for point in points)
    if len(set(curvature.weights)) > 1:
        name += f"-w{rounded(curvature.weights)}"
    if curvature.scaled is not None:
        name += f"-scaled-{rounded(curvature.scaled.weights)}"
    return name
