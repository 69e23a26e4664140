"""What was fitted, as the query side reads it: curvature blocks, preconditioners and kernels; and the units' names.

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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .errors import TrajectoryError
from .kronecker import (
    Denominator,
    Eigenbasis,
    KroneckerBlock,
    PreconditionerBlock,
    preconditioner_block,
    weighted_mean,
)
from .layers import TrackedLayer
from .lens import Lens
from .plans import Curvature, Point, Preconditioner, ProjectedInverse
from .store import MadeFrom
from .task import output_fingerprint
from .trajectory import Trajectory
from .units import Unit
from .workspace import Workspace, rounded, short

_KEPT_SHARE = 8  # of the memory budget, for a pool's blocks
_STATISTICS = ("gradients", "curvature")
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


class StoredCurvature(Mapping[str, KroneckerBlock]):
    """The fitted blocks of a curvature, averaged over its points, read layer by layer when asked for.

    eigenvalue_units: of each point. fits: whether all blocks together take no more than their share of the memory
    budget; if so they are kept. Every rank must ask for the same layers in the same order. Raises StoreError where they
    were not fitted, or from something else.

    Args:
        work: the workspace of the curvature's stage.
        train_from: `Workspace.made_from` of the stage's training data.
        blocks: the preconditioner that the curvature is scaled with, of each layer.
    """

    def __init__(
        self,
        work: Workspace,
        curvature: Curvature,
        train_from: MadeFrom,
        lens: Lens,
        blocks: Mapping[str, PreconditionerBlock] | None = None,
    ):
        self.lens, self.curvature, self._scaled = lens, curvature, blocks
        made_from = pool_from(work, curvature, train_from, lens)
        points = curvature.points[:1] if curvature.kind == "kfac" else curvature.points
        values = [eigenvalues_unit(work, curvature, point) for point in points]
        bases = [] if curvature.kind == "diagonal" else [basis_unit(work, curvature)]
        if curvature.kind == "diagonal":
            of_points = [{**train_from, "checkpoint": work.checkpoint_digest(point)} for point in points]
        else:
            of_points = [made_from] * len(points)
        self.units = [*bases, *values]
        self._basis = work.units.open(bases[0], made_from) if bases else None
        self.eigenvalue_units = [work.units.open(unit, of) for unit, of in zip(values, of_points, strict=True)]
        self._weights = (1.0,) if curvature.kind == "kfac" else curvature.weights
        numbers = sum(P * (O * O + I * I + O * I) for P, O, I in (layer.shape for layer in lens.layers.values()))
        self.fits = numbers * lens.dtype.itemsize <= work.memory // _KEPT_SHARE
        self._kept: dict[str, KroneckerBlock] = {}

    def __getitem__(self, name: str) -> KroneckerBlock:
        if name in self._kept:
            return self._kept[name]
        if name not in self.lens.layers:
            raise KeyError(name)
        shape, device = self.lens.layers[name].shape, self.lens.device
        total = weighted_mean([unit.tensor(name, shape, device) for unit in self.eigenvalue_units], self._weights)
        if self._scaled is not None and self._basis is None:
            total = total * self._scaled[name].exact_POI
        basis = None if self._basis is None else stored_basis(self._basis, name, self.lens)
        block = KroneckerBlock(basis, total)
        if self.fits:
            self._kept[name] = block
        return block

    def __contains__(self, name: object) -> bool:
        return name in self.lens.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.lens.layers)

    def __len__(self) -> int:
        return len(self.lens.layers)


def stored_basis(unit: Unit, name: str, lens: Lens) -> Eigenbasis:
    """One layer's eigenbasis, in the lens's precision."""
    P, O, I = lens.layers[name].shape
    inputs = unit.tensor(f"{name}.inputs", (P, I, I), lens.device)
    return Eigenbasis(inputs.to(lens.dtype), unit.tensor(f"{name}.outputs", (P, O, O), lens.device).to(lens.dtype))


def checkpoint_statistics(work: Workspace, train_from: MadeFrom) -> Tensor:
    """[C, F]: what tells a stage's checkpoints apart, from the units that `fit` made.

    Half of it are training gradients of the same examples, half the curvature's second moments, both sketched and
    brought to a mean square norm of 1 over the checkpoints, so that squared distances are relative changes.
    """
    gradients, second_moments = [], []
    for index in range(len(work.trajectory)):
        point = Point.at(work.stage, index)
        made_from = {**train_from, "checkpoint": work.checkpoint_digest(point)}
        unit = work.units.open(statistics_unit(work, point), made_from)
        rows = {kind: [unit.tensor(f"{n}.{kind}", None) for n in work.layers.tracked] for kind in _STATISTICS}
        gradients.append(torch.cat([part.flatten() for part in rows["gradients"]]))
        second_moments.append(torch.cat([(part.mT @ part).flatten() for part in rows["curvature"]]))
    halves = (torch.stack(part) for part in (gradients, second_moments))
    return torch.cat([half / half.square().sum(1).mean().sqrt().clamp_min(1e-300) for half in halves], 1) / 2**0.5
