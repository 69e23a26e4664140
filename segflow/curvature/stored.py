"""What was fitted, as the query side reads it: curvature blocks, kernels, and checkpoints' statistics.

Axes: k features of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..methods.plan import (
    HEURISTIC_SHARE,
    Curvature,
    IterativeInverse,
    Operator,
    Plan,
    Point,
    Preconditioner,
    ProjectedInverse,
    Term,
    curvatures,
    projected,
)
from ..methods.spectra import damped_inverse
from ..model.loss_view import LossView
from ..stage.context import StageContext
from ..stage.identity import SAMPLING_KEYS, checkpoint_digest, training_identity
from ..store.shared import StoredUnit
from ..store.store import MadeFrom
from .kronecker import Eigenbasis, Gradients, KroneckerBlock, weighted_mean
from .lissa import lissa
from .names import (
    at_point,
    basis_unit,
    eigenvalues_unit,
    kernel_from,
    kernel_unit,
    pool_from,
    preconditioner_from,
    statistics_unit,
)
from .passes import BATCHING_ERROR
from .preconditioner import PreconditionerBlock
from .projection import joined, parted, probes
from .second_moments import preconditioner_blocks

_KEPT_SHARE = 8  # of the memory budget, for a pool's blocks
_STATISTICS = ("gradients", "curvature")


class StoredCurvature(Mapping[str, KroneckerBlock]):
    """The fitted blocks of a curvature, averaged over its points, read layer by layer when asked for.

    eigenvalue_units: of each point. fits: whether all blocks together take no more than their share of the memory
    budget; if so they are kept. Every rank must ask for the same layers in the same order. Raises StoreError where they
    were not fitted, or from something else.

    Args:
        context: that of the curvature's stage.
        train_from: `training_identity` of the stage's training data.
        blocks: the preconditioner that the curvature is scaled with, of each layer.
    """

    def __init__(
        self,
        context: StageContext,
        curvature: Curvature,
        train_from: MadeFrom,
        view: LossView,
        blocks: Mapping[str, PreconditionerBlock] | None = None,
    ):
        self.view, self.curvature, self._scaled = view, curvature, blocks
        made_from = pool_from(context, curvature, train_from, view)
        points = curvature.points[:1] if curvature.kind == "kfac" else curvature.points
        values = [eigenvalues_unit(context, curvature, point) for point in points]
        bases = [] if curvature.kind == "diagonal" else [basis_unit(context, curvature)]
        if curvature.kind == "diagonal":
            made_from = {**train_from, "dtype": str(view.dtype)}
        of_points = [made_from if curvature.kind == "kfac" else at_point(made_from, context, point) for point in points]
        self.unit_names = [*bases, *values]
        self._basis = context.store.open(bases[0], made_from, SAMPLING_KEYS) if bases else None
        self.eigenvalue_units = [
            context.store.open(unit, of_point, SAMPLING_KEYS) for unit, of_point in zip(values, of_points, strict=True)
        ]
        self._weights = (1.0,) if curvature.kind == "kfac" else curvature.weights
        numbers = sum(P * (O * O + I * I + O * I) for P, O, I in (layer.shape for layer in view.layers.values()))
        self.fits = numbers * view.dtype.itemsize <= context.memory // _KEPT_SHARE
        self._kept: dict[str, KroneckerBlock] = {}

    def __getitem__(self, name: str) -> KroneckerBlock:
        if name in self._kept:
            return self._kept[name]
        if name not in self.view.layers:
            raise KeyError(name)
        shape, device = self.view.layers[name].shape, self.view.device
        total = weighted_mean([unit.tensor(name, shape, device) for unit in self.eigenvalue_units], self._weights)
        if self._scaled is not None and self._basis is None:
            total = total * self._scaled[name].exact_POI
        basis = None if self._basis is None else stored_basis(self._basis, name, self.view)
        block = KroneckerBlock(basis, total)
        if self.fits:
            self._kept[name] = block
        return block

    def __contains__(self, name: object) -> bool:
        return name in self.view.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.view.layers)

    def __len__(self) -> int:
        return len(self.view.layers)


def stored_basis(unit: StoredUnit, name: str, view: LossView) -> Eigenbasis:
    """One layer's eigenbasis, in the view's precision."""
    P, O, I = view.layers[name].shape
    inputs = unit.tensor(f"{name}.inputs", (P, I, I), view.device)
    return Eigenbasis(inputs.to(view.dtype), unit.tensor(f"{name}.outputs", (P, O, O), view.device).to(view.dtype))


def checkpoint_statistics(context: StageContext, train_from: MadeFrom) -> Tensor:
    """[C, F]: what tells a stage's checkpoints apart, from the units that `fit` made.

    Half of it are training gradients of the same examples, half the curvature's second moments, both sketched and
    brought to a mean square norm of 1 over the checkpoints, so that squared distances are relative changes.
    """
    gradients, second_moments = [], []
    for index in range(len(context.trajectory)):
        point = Point.at(context.stage, index)
        made_from = at_point(train_from, context, point)
        unit = context.store.open(statistics_unit(context, point), made_from, (*SAMPLING_KEYS, "dtype"))
        rows = {kind: [unit.tensor(f"{n}.{kind}", None) for n in context.layers.tracked] for kind in _STATISTICS}
        gradients.append(torch.cat([part.flatten() for part in rows["gradients"]]))
        second_moments.append(torch.cat([(part.mT @ part).flatten() for part in rows["curvature"]]))
    halves = (torch.stack(part) for part in (gradients, second_moments))
    return torch.cat([half / half.square().sum(1).mean().sqrt().clamp_min(1e-300) for half in halves], 1) / 2**0.5


class FittedFactors:
    """What `fit` left in the store for every stage, read when asked for; only inside `observing(model)`.

    Args:
        contexts: one for each stage; trains: their training data.
    """

    def __init__(self, contexts: Sequence[StageContext], trains: Sequence[Any]):
        self.contexts, self.trains = contexts, trains
        self.loss_view = lru_cache(None)(self._loss_view)
        self.train_from = lru_cache(None)(self._train_from)
        self.curvature = lru_cache(2)(self._curvature)
        self.preconditioner = lru_cache(4)(self._preconditioner)
        self.kernel = lru_cache(1)(self._kernel)

    def _loss_view(self, stage: int) -> LossView:
        """A stage's model seen through its training loss."""
        self.contexts[stage].load(self.contexts[stage].last)
        return self.contexts[stage].loss_view("train", self.trains[stage])

    def _train_from(self, stage: int) -> dict[str, Any]:
        """What binds a stage's units."""
        return training_identity(self.contexts[stage], self.trains[stage], self.loss_view(stage))

    def _curvature(self, of: Curvature) -> StoredCurvature:
        blocks = self.preconditioner(of.scaled) if of.scaled is not None else None
        return StoredCurvature(self.contexts[of.stage], of, self.train_from(of.stage), self.loss_view(of.stage), blocks)

    def _preconditioner(self, of: Preconditioner) -> Mapping[str, PreconditionerBlock]:
        return preconditioner_blocks(self.contexts[of.stage], of, self.train_from(of.stage), self.loss_view(of.stage))

    def _kernel_unit(self, of: ProjectedInverse) -> StoredUnit:
        context, view = self.contexts[of.stage], self.loss_view(of.stage)
        made_from = kernel_from(context, of, self.train_from(of.stage), view, self.trains[of.stage])
        return context.store.open(kernel_unit(context, of), made_from)

    def _kernel(self, of: ProjectedInverse) -> tuple[Tensor, Tensor]:
        """The eigenvectors of a projected second moment [k, k], and the damped inverse of its eigenvalues [k]."""
        kernel = self._kernel_unit(of).tensor("kernel", None, self.loss_view(of.stage).device)
        sigma, vectors = torch.linalg.eigh(kernel.double())
        damping = HEURISTIC_SHARE * sigma.mean() if of.damping is None else of.damping
        rounding = len(sigma) * torch.finfo(kernel.dtype).eps  # of a sum of outer products in the kernel's precision
        return vectors, damped_inverse(sigma.clamp_min(0), damping, rounding)

    def batching_error(self, plan: Plan) -> float | None:
        """The largest relative error of the plan's batched second moments, as `fit` measured it; None without any."""
        units = [unit for of in curvatures(plan) if of.batch > 1 for unit in self.curvature(of).eigenvalue_units]
        units += [self._kernel_unit(of) for of in projected(plan) if of.batch > 1]
        return max((unit.tensor(BATCHING_ERROR, ()).item() for unit in units), default=None)

    def described(self, operator: Operator) -> dict[str, Any]:
        """What an operator does, without reference to where its checkpoints stand in a trajectory."""
        described = {"operator": type(operator).__name__, **asdict(operator)}  # type: ignore[call-overload]
        context = self.contexts[getattr(operator, "stage", -1)]
        for name, value in vars(operator).items():
            if isinstance(value, Curvature):
                described[name] |= {"points": [checkpoint_digest(context, point) for point in value.points]}
                if value.scaled is not None:
                    described[name]["scaled"] = preconditioner_from(self.contexts[value.stage], value.scaled)
            elif isinstance(value, Preconditioner):
                described[name] = preconditioner_from(self.contexts[value.stage], value)
            elif isinstance(value, Point):
                described[name] = checkpoint_digest(context, value)
        return described

    def parameter_group(self, stage: int, layer: str) -> int | None:
        """The layer's parameter group in a stage; None if the stage did not train it."""
        return self.contexts[stage].parameter_groups.get(layer)

    def inverse(self, of: ProjectedInverse | IterativeInverse, values: Gradients) -> Gradients:
        """An inverse that mixes the layers, applied to gradients."""
        view = self.loss_view(of.stage)
        if isinstance(of, ProjectedInverse):
            return self._projected(of, view, values)
        context = self.contexts[of.stage]
        context.load(of.point)
        return lissa(view, self.trains[of.stage], context.collate_fn, of, values)

    def _projected(self, of: ProjectedInverse, view: LossView, values: Gradients) -> Gradients:
        """R (R^T F R + damping)^-1 R^T of each query."""
        probes_of = probes(of.projection, {n: layer.shape for n, layer in view.layers.items()}, view.dtype, view.device)
        features_Qk = joined({n: probes_of[n].of_gradients(v) for n, v in values.items()}, of.projection)
        vectors, inverse = self.kernel(of)
        solved = (features_Qk.double() @ vectors * inverse) @ vectors.mT
        by_layer = parted(solved.to(view.dtype), probes_of, of.projection)
        return {name: probe.gradients(by_layer[name]) for name, probe in probes_of.items()}

    def unit_names(self, term: Term) -> tuple[str, ...]:
        """The names of the units that a term's operators are made of."""
        pools = dict.fromkeys(unit for of in curvatures((term,)) for unit in self.curvature(of).unit_names)
        return (*pools, *(kernel_unit(self.contexts[of.stage], of) for of in projected((term,))))
