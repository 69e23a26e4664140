"""What units of curvature are called, and what binds them.

Units in the store, each below its stage's prefix if there are several stages or runs:

    covariance/step-S             sums of a a^T and g g^T at the checkpoint of step S
    eigenbasis/POOL               bases of A and S averaged over the pool's points
    eigenvalues/POOL/step-S       corrected eigenvalues in that basis at a point
    kfac/POOL                     K-FAC's eigenvalues in that basis
    diagonal/step-S               mean squared gradients at a point
    moments/step-S                mean and mean square of training gradients, where second moments were not saved
    kernel/NAME/step-S            second moment of projected per-example gradients
    statistics/step-S             what tells checkpoints apart, for automatic segments

POOL is `steps-S-T` for the checkpoints of steps S and T, `at-...` elsewhere; `-w...` where they do not weigh the same,
`-scaled-...` for the curvature of P^1/2 H P^1/2. The mean of several checkpoints is `mean-...` instead of `step-S`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from ..data.fingerprints import output_fingerprint
from ..errors import TrajectoryError
from ..methods.plan import Curvature, Point, Preconditioner, ProjectedInverse
from ..model.loss_view import Lens
from ..stage.context import Workspace
from ..stage.identity import rounded, short
from ..store.store import MadeFrom
from ..training.trajectory import Trajectory

# The parameters whose second moments each checkpoint holds, by the digest of its file; None where it holds none.
_SAVED: WeakKeyDictionary[Trajectory, dict[str, frozenset[str] | None]] = WeakKeyDictionary()


def covariance_unit(work: Workspace, point: Point) -> str:
    """A point's covariances."""
    return f"{work.prefix}covariance/{work.name(point)}"


def basis_unit(work: Workspace, curvature: Curvature) -> str:
    """A pool's eigenbasis."""
    return f"{work.prefix}eigenbasis/{_pool(work, curvature)}"


def eigenvalues_unit(work: Workspace, curvature: Curvature, point: Point) -> str:
    """Eigenvalues at a point, of the curvature's kind (K-FAC's: of all points)."""
    if curvature.kind == "diagonal":
        return f"{work.prefix}diagonal{_batched(curvature)}/{work.name(point)}"
    if curvature.kind == "kfac":
        return f"{work.prefix}kfac/{_pool(work, curvature)}"
    return f"{work.prefix}eigenvalues/{_pool(work, curvature)}{_batched(curvature)}/{work.name(point)}"


def moments_unit(work: Workspace, point: Point) -> str:
    """Moments of training gradients at a point."""
    return f"{work.prefix}moments/{work.name(point)}"


def statistics_unit(work: Workspace, point: Point) -> str:
    """What tells a checkpoint from others."""
    return f"{work.prefix}statistics/{work.name(point)}"


def kernel_unit(work: Workspace, inverse: ProjectedInverse) -> str:
    """A projected second moment at a point; damping is applied when it is read."""
    of = inverse.projection
    name = f"{inverse.features}-{of.dimension or 'all'}-{of.seed}{_batched(inverse)}"
    return f"{work.prefix}kernel/{name}/{work.name(inverse.point)}"


def kernel_from(work: Workspace, inverse: ProjectedInverse, train_from: MadeFrom, own: Lens, train: Any) -> MadeFrom:
    """What binds a kernel's unit; own: the lens of the training loss. As a loss is, an output is told by its values."""
    made = {**train_from, "dtype": str(own.dtype), "checkpoint": work.checkpoint_digest(inverse.point)}
    if inverse.features == "output":
        made |= {
            "output": output_fingerprint(work.task),
            "outputs": work.steady_losses(train, replace(own, kind="output")),
        }
    return made


def pool_from(work: Workspace, curvature: Curvature, train_from: MadeFrom, lens: Lens) -> dict[str, Any]:
    """What binds a pool's units."""
    made: dict[str, Any] = {**train_from, "dtype": str(lens.dtype)}
    made["checkpoints"] = [work.checkpoint_digest(point) for point in curvature.points]
    if len(set(curvature.weights)) > 1:
        made["weights"] = list(curvature.weights)
    if curvature.scaled is not None and curvature.kind != "diagonal":
        made["preconditioner"] = preconditioner_from(work, curvature.scaled)
    return made


def preconditioner_from(work: Workspace, of: Preconditioner) -> dict[str, Any]:
    """What a preconditioner is made of; TrajectoryError if it was not saved and cannot be estimated either."""
    trajectory, missing = work.run.stages[of.stage], unsaved(work, of)
    if missing and trajectory.optimizer.batch_size is None:
        raise TrajectoryError(
            f"{trajectory.optimizer.name}'s second moments were not saved at the checkpoints of steps "
            f"{[trajectory.steps[index] for index in missing]}. Train inside segflow.record(), or give "
            "OptimizerConstants(batch_size=...) to have them estimated from gradients."
        )
    return {
        "checkpoints": [work.checkpoint_digest(Point.at(of.stage, index)) for index, _ in of.weights],
        "weights": [weight for _, weight in of.weights],
        "eps": list(trajectory.eps),
        "moments": f"estimated for batches of {trajectory.optimizer.batch_size}" if missing else "recorded",
    }


def unsaved(work: Workspace, of: Preconditioner) -> list[int]:
    """The checkpoints whose second moments must be estimated.

    TrajectoryError where a checkpoint has those of some tracked parameters only.
    """
    found = [index for index, _ in of.weights if not _saved(work, index)] if work.ranks.main else None
    return list(work.ranks.same(found))


def _saved(work: Workspace, index: int) -> bool:
    """Whether second moments were saved at a checkpoint, looked up once for each content of its file."""
    known = _SAVED.setdefault(work.trajectory, {})
    digest = work.trajectory.digest(index)
    if digest not in known:
        known[digest] = None if (found := work.trajectory.second_moments(index)) is None else frozenset(found)
    names = known[digest]
    if names is None:
        return False
    needed = {name for layer in work.layers.tracked.values() for name in layer.parameter_names}
    if needed - names:
        raise TrajectoryError(
            f"{work.where(Point.at(work.stage, index))}: no second moments of {sorted(needed - names)[:4]}, which "
            "other parameters have. Were they frozen or unused until then? Leave their layers out of "
            "get_influence_tracked_modules()."
        )
    return True


def _batched(of: Curvature | ProjectedInverse) -> str:
    """In a unit's name, the examples that second moments are batched by."""
    return f"-batches-of-{of.batch}" if of.batch > 1 else ""


def _pool(work: Workspace, curvature: Curvature) -> str:
    points = curvature.points
    if all(len(point.weights) == 1 and point.stage == work.stage for point in points):
        steps = [str(work.trajectory.steps[point.weights[0][0]]) for point in points]
        name = "steps-" + short(steps)
    else:
        name = "at-" + "-".join(work.name(point) for point in points)
    if len(set(curvature.weights)) > 1:
        name += f"-w{rounded(curvature.weights)}"
    if curvature.scaled is not None:
        name += f"-scaled-{rounded(curvature.scaled.weights)}"
    return name
