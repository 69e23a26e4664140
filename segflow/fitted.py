"""What the query side needs of the stages: fitted curvature, preconditioners, kernels, and the query gradients.

Axes: Q queries, k features of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .curvature import StoredCurvature, kernel_from, kernel_unit, preconditioner_blocks, preconditioner_from
from .data import in_order
from .errors import MethodError
from .iteration import lissa
from .kronecker import PreconditionerBlock
from .layers import TrackedLayer
from .lens import Lens
from .passes import BATCHING_ERROR
from .plans import (
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
from .projection import joined, parted, probes
from .property import Property, as_properties
from .propertyside import property_gradient
from .queries import Gradients, Queries, query_gradients
from .representation import representation_lens
from .spectra import damped_inverse
from .units import Unit
from .workspace import Workspace


class Fitted:
    """What `fit` left in the store for every stage, read when asked for; only inside `observing(model)`.

    Args:
        works: the workspace of each stage; trains: their training data.
    """

    def __init__(self, works: Sequence[Workspace], trains: Sequence[Any]):
        self.works, self.trains = works, trains
        self.lens = lru_cache(None)(self._lens)
        self.train_from = lru_cache(None)(self._train_from)
        self.curvature = lru_cache(2)(self._curvature)
        self.preconditioner = lru_cache(4)(self._preconditioner)
        self.kernel = lru_cache(1)(self._kernel)

    def _lens(self, stage: int) -> Lens:
        """A stage's model seen through its training loss."""
        self.works[stage].load(self.works[stage].last)
        return self.works[stage].lens("train", self.trains[stage])

    def _train_from(self, stage: int) -> dict[str, Any]:
        """What binds a stage's units."""
        return self.works[stage].made_from(self.trains[stage], self.lens(stage))

    def _curvature(self, of: Curvature) -> StoredCurvature:
        blocks = self.preconditioner(of.scaled) if of.scaled is not None else None
        return StoredCurvature(self.works[of.stage], of, self.train_from(of.stage), self.lens(of.stage), blocks)

    def _preconditioner(self, of: Preconditioner) -> Mapping[str, PreconditionerBlock]:
        return preconditioner_blocks(self.works[of.stage], of, self.train_from(of.stage), self.lens(of.stage))

    def _kernel_unit(self, of: ProjectedInverse) -> Unit:
        work, lens = self.works[of.stage], self.lens(of.stage)
        made_from = kernel_from(work, of, self.train_from(of.stage), lens, self.trains[of.stage])
        return work.units.open(kernel_unit(work, of), made_from)

    def _kernel(self, of: ProjectedInverse) -> tuple[Tensor, Tensor]:
        """The eigenvectors of a projected second moment [k, k], and the damped inverse of its eigenvalues [k]."""
        kernel = self._kernel_unit(of).tensor("kernel", None, self.lens(of.stage).device)
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
        work = self.works[getattr(operator, "stage", -1)]
        for name, value in vars(operator).items():
            if isinstance(value, Curvature):
                described[name] |= {"points": [work.checkpoint_digest(point) for point in value.points]}
                if value.scaled is not None:
                    described[name]["scaled"] = preconditioner_from(self.works[value.stage], value.scaled)
            elif isinstance(value, Preconditioner):
                described[name] = preconditioner_from(self.works[value.stage], value)
            elif isinstance(value, Point):
                described[name] = work.checkpoint_digest(value)
        return described


class AskedQueries:
    """The resources of one query side: what was fitted, and this rank's queries (see `queries.Resources`).

    query: a dataset, or properties; whole: which of them are asked for on all ranks, own: on this one; term: any of the
    plan's; layers: those that are scored.
    """

    def __init__(
        self,
        fitted: Fitted,
        query: Any,
        whole: range,
        own: range,
        batch_size: int,
        term: Term,
        layers: Mapping[str, TrackedLayer],
    ):
        self.fitted, self.query, self.term, self.layers = fitted, query, term, layers
        self.whole, self.own, self.batch_size = whole, own, batch_size
        self.curvature, self.preconditioner = fitted.curvature, fitted.preconditioner
        self.gradients = lru_cache(1)(self._gradients)

    def _gradients(self, point: Point, basis: Curvature | None) -> Queries:
        """This rank's query gradients (or representations) at a point, in a curvature's eigenbasis if that fits."""
        work = self.fitted.works[-1]
        where = work.where(point)
        work.load(point)
        properties = as_properties(self.query)
        if properties is not None:
            return self._of_properties([properties[place] for place in self.whole], where)
        lens = work.lens("measurement", self.query, self.layers)
        lists = [self.own[part.start : part.stop] for part in in_order(len(self.own), self.batch_size)]
        data = work.walk(lens, self.query, lists, f"queries, {where}")
        if self.term.side == "representation":
            seen = representation_lens(lens, self.term.layer or list(self.layers)[-1], self.term.normalized)
            return Queries(query_gradients(seen, data, {}, work.ranks, where), None)
        blocks = self.curvature(basis) if basis else None
        fits = blocks is not None and blocks.fits
        bases = {name: block.basis for name, block in blocks.items() if block.basis} if blocks and fits else {}
        return Queries(query_gradients(lens, data, bases, work.ranks, where), basis if fits else None)

    def _of_properties(self, asked: Sequence[Property], where: str) -> Queries:
        """All ranks work on each property; each keeps its own ones' gradients, in no basis."""
        if self.term.side == "representation":
            raise MethodError(
                "a property has a gradient, but no representation. Use GradientDot or another method of gradients."
            )
        kept: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        work = self.fitted.works[-1]
        for place, one in zip(self.whole, asked, strict=True):
            found = property_gradient(work, self.layers, one, where, self.batch_size)
            for name, gradient in found.items() if place in self.own else ():
                kept[name].append(gradient)
        return Queries({n: torch.stack(parts) if parts else found[n][None][:0] for n, parts in kept.items()}, None)

    def parameter_group(self, stage: int, layer: str) -> int | None:
        """The layer's parameter group in a stage; None if the stage did not train it."""
        return self.fitted.works[stage].parameter_groups.get(layer)

    def inverse(self, of: ProjectedInverse | IterativeInverse, values: Gradients) -> Gradients:
        """An inverse that mixes the layers, applied to gradients."""
        if isinstance(of, ProjectedInverse):
            return self._projected(of, values)
        work = self.fitted.works[of.stage]
        lens = self.fitted.lens(of.stage)
        work.load(of.point)
        return lissa(lens, self.fitted.trains[of.stage], work.collate_fn, of, values)

    def _projected(self, of: ProjectedInverse, values: Gradients) -> Gradients:
        """R (R^T F R + damping)^-1 R^T of each query."""
        lens = self.fitted.lens(of.stage)
        probes_of = probes(of.projection, {n: layer.shape for n, layer in lens.layers.items()}, lens.dtype, lens.device)
        features_Qk = joined({n: probes_of[n].of_gradients(v) for n, v in values.items()}, of.projection)
        vectors, inverse = self.fitted.kernel(of)
        solved = (features_Qk.double() @ vectors * inverse) @ vectors.mT
        own = parted(solved.to(lens.dtype), probes_of, of.projection)
        return {name: probe.gradients(own[name]) for name, probe in probes_of.items()}

    def units(self, term: Term) -> tuple[str, ...]:
        """The names of the units that a term's operators are made of."""
        pools = dict.fromkeys(unit for of in curvatures((term,)) for unit in self.curvature(of).units)
        kernels = [kernel_unit(self.fitted.works[of.stage], of) for of in projected((term,))]
        return (*pools, *kernels)
