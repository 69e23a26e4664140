"""Query gradients of examples and properties at a point, each rank working on its share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..curvature.kronecker import Eigenbasis, Gradients, example_gradients
from ..curvature.lissa import lissa
from ..curvature.names import kernel_unit
from ..curvature.projection import joined, parted, probes
from ..curvature.stored import FittedFactors
from ..data.batches import Batch, in_order
from ..errors import MethodError
from ..methods.plan import Curvature, IterativeInverse, Point, ProjectedInverse, Term, curvatures, projected
from ..model.finite import FiniteCheck
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.representation_view import RepresentationView, representation_view
from ..model.tokens import Tokens
from ..properties.property import Property, as_properties
from ..runtime.ranks import Ranks
from .outer_products import OuterProducts, Stack, together
from .property_gradients import property_gradient
from .query_operators import Queries, Stacks


class AskedQueries:
    """The resources of one query side: what was fitted, and this rank's queries (see `query_operators.Resources`).

    query: a dataset, or properties; whole: which of them are asked for on all ranks, own: on this one; term: any of the
    plan's; layers: those that are scored.
    """

    def __init__(
        self,
        fitted: FittedFactors,
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
        context = self.fitted.contexts[-1]
        where = context.where(point)
        context.load(point)
        properties = as_properties(self.query)
        if properties is not None:
            return self._of_properties([properties[place] for place in self.whole], where)
        view = context.loss_view("measurement", self.query, self.layers)
        lists = [self.own[part.start : part.stop] for part in in_order(len(self.own), self.batch_size)]
        data = context.walk(view, self.query, lists, f"queries, {where}")
        if self.term.side == "representation":
            seen = representation_view(view, self.term.layer or list(self.layers)[-1], self.term.normalized)
            return Queries(query_gradients(seen, data, {}, context.ranks, where), None)
        blocks = self.curvature(basis) if basis else None
        fits = blocks is not None and blocks.fits
        bases = {name: block.basis for name, block in blocks.items() if block.basis} if blocks and fits else {}
        return Queries(query_gradients(view, data, bases, context.ranks, where), basis if fits else None)

    def _of_properties(self, asked: Sequence[Property], where: str) -> Queries:
        """All ranks work on each property; each keeps its own ones' gradients, in no basis."""
        if self.term.side == "representation":
            raise MethodError(
                "a property has a gradient, but no representation. Use GradientDot or another method of gradients."
            )
        kept: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        context = self.fitted.contexts[-1]
        for place, one in zip(self.whole, asked, strict=True):
            found = property_gradient(context, self.layers, one, where, self.batch_size)
            for name, gradient in found.items() if place in self.own else ():
                kept[name].append(gradient)
        return Queries({n: torch.stack(parts) if parts else found[n][None][:0] for n, parts in kept.items()}, None)

    def parameter_group(self, stage: int, layer: str) -> int | None:
        """The layer's parameter group in a stage; None if the stage did not train it."""
        return self.fitted.contexts[stage].parameter_groups.get(layer)

    def inverse(self, of: ProjectedInverse | IterativeInverse, values: Gradients) -> Gradients:
        """An inverse that mixes the layers, applied to gradients."""
        if isinstance(of, ProjectedInverse):
            return self._projected(of, values)
        context = self.fitted.contexts[of.stage]
        view = self.fitted.loss_view(of.stage)
        context.load(of.point)
        return lissa(view, self.fitted.trains[of.stage], context.collate_fn, of, values)

    def _projected(self, of: ProjectedInverse, values: Gradients) -> Gradients:
        """R (R^T F R + damping)^-1 R^T of each query."""
        view = self.fitted.loss_view(of.stage)
        probes_of = probes(of.projection, {n: layer.shape for n, layer in view.layers.items()}, view.dtype, view.device)
        features_Qk = joined({n: probes_of[n].of_gradients(v) for n, v in values.items()}, of.projection)
        vectors, inverse = self.fitted.kernel(of)
        solved = (features_Qk.double() @ vectors * inverse) @ vectors.mT
        own = parted(solved.to(view.dtype), probes_of, of.projection)
        return {name: probe.gradients(own[name]) for name, probe in probes_of.items()}

    def unit_names(self, term: Term) -> tuple[str, ...]:
        """The names of the units that a term's operators are made of."""
        pools = dict.fromkeys(unit for of in curvatures((term,)) for unit in self.curvature(of).unit_names)
        kernels = [kernel_unit(self.fitted.contexts[of.stage], of) for of in projected((term,))]
        return (*pools, *kernels)


def query_gradients(
    view: LossView | RepresentationView,
    data: Iterable[Batch],
    bases: Mapping[str, Eigenbasis],
    ranks: Ranks,
    where: str,
) -> Stacks:
    """The measurement's gradient for this rank's queries, for each layer [Q, P, O, I]; in a basis where one is given.

    A layer whose queries have one token each on all ranks keeps them as outer products. ranks: those that share the
    queries; a layer must be reached on one of them.
    """
    pieces: dict[str, list[Stack]] = {name: [] for name in view.layers}
    finite = FiniteCheck(f"query gradients, {where}")

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        basis, one = bases.get(layer.name), tokens.a_PBSI.shape[2] == 1
        pieces[layer.name].append(OuterProducts.of(tokens, basis) if one else example_gradients(tokens, basis))

    for batch in data:
        before = {name: len(parts) for name, parts in pieces.items()}
        view.capture(batch, consume, finite)
        for name, layer in view.layers.items():
            if len(pieces[name]) == before[name] and not batch.idle:  # the measurement does not depend on the layer
                pieces[name].append(OuterProducts.zeros(batch.size, layer.shape, view.dtype, view.device))
    finite.finish(view.layout.axes, ranks, every=False)
    longer = {name for name, parts in pieces.items() if not all(isinstance(part, OuterProducts) for part in parts)}
    longer = longer.union(*ranks.gather(sorted(longer)))
    none = {name: OuterProducts.zeros(0, layer.shape, view.dtype, view.device) for name, layer in view.layers.items()}
    return {name: together([none[name], *parts], name in longer) for name, parts in pieces.items()}
