"""Query gradients under a plan's operators, kept in the eigenbasis of the operator that was applied last.

Queries of one token stay outer products as long as their operators allow it (module outer_products).

Axes: Q queries, P parts, O outputs, I inputs; a block of gradients is [Q, P, O, I].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, singledispatchmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..curvature.fitted_factors import FittedFactors
from ..curvature.kronecker import Eigenbasis
from ..methods.plan import (
    CoupledFunction,
    Curvature,
    Operator,
    Plan,
    Point,
    Scale,
    Spectral,
    Term,
    UnitNorm,
)
from ..model.representation_view import last_matrix
from .outer_products import OuterProducts, Stack, Stacks, formed, plus, reference, squared_norms, times
from .query_sets import QueryShare


@dataclass(frozen=True)
class Queries:
    """This rank's query gradients of every layer, in the eigenbasis of a curvature (None: in no basis).

    A layer that the curvature's stage did not train is in none.
    """

    values: Stacks
    basis: Curvature | None


def basis_of(curvature: Curvature | None) -> Curvature | None:
    """The curvature whose eigenbasis makes it diagonal; None where it is diagonal in the parameters' own axes."""
    return None if curvature is None or curvature.kind == "diagonal" else curvature


class Start(NamedTuple):
    """What a term applies its operators to: the mean of the queries' gradients at points, or a layer's representations.

    weights: of the points.
    """

    points: tuple[Point, ...]
    weights: tuple[float, ...]
    layer: str | None = None
    normalized: bool = False

    @classmethod
    def of(cls, term: Term, last_layer: str) -> Start:
        """A term's start; last_layer: whose representations are taken where the term names none."""
        if term.side != "representation":
            return cls(term.query_points, term.query_weights)
        return cls(term.query_points, term.query_weights, term.layer or last_layer, term.normalized)

    @property
    def order(self) -> tuple[Any, ...]:
        """A sort key: terms of one start follow one another."""
        at = [(point.stage, point.weights) for point in self.points]
        return at, self.weights, self.layer or "", self.normalized


class QueryOperators:
    """Query gradients under a plan's operators; what two terms share of their operators is computed once.

    Args:
        fitted: curvature, preconditioners and inverses.
        share: the queries.
    """

    def __init__(self, plan: Plan, fitted: FittedFactors, share: QueryShare):
        self.plan, self.fitted, self.share = plan, fitted, share
        self._kept: dict[tuple[Start, tuple[Operator, ...]], Queries] = {}
        self._started = lru_cache(1)(self._start)

    def walk(self) -> Iterator[tuple[int, Queries]]:
        """Each term's place in the plan with its queries; in an order in which little has to be kept between terms."""
        last_layer = last_matrix(self.share.layers)
        starts = [Start.of(term, last_layer) for term in self.plan]
        remaining = sorted(
            range(len(self.plan)), key=lambda place: (*starts[place].order, len(self.plan[place].operators))
        )
        while remaining:
            place = remaining.pop(0)
            yield place, self._applied(starts[place], self.plan[place].operators)
            useful = {
                (starts[later], self.plan[later].operators[:count])
                for later in remaining
                for count in range(len(self.plan[later].operators))
            }
            self._kept = {key: value for key, value in self._kept.items() if key in useful}

    def _applied(self, start: Start, operators: tuple[Operator, ...]) -> Queries:
        """The queries at a start with the operators applied in order."""
        if not operators:
            return self._started(start, None)
        if (start, operators) not in self._kept:
            *earlier, last = operators
            wanted = basis_of(last.curvature) if isinstance(last, Spectral) else None
            before = self._applied(start, tuple(earlier)) if earlier else self._started(start, wanted)
            in_any_basis = isinstance(last, UnitNorm) or (isinstance(last, Spectral) and last.curvature is None)
            moved = before if in_any_basis else self._moved(before, wanted)
            if earlier:
                self._kept[start, tuple(earlier)] = moved  # the next term goes on from there
            self._kept[start, operators] = self._apply(last, moved)
        return self._kept[start, operators]

    def _start(self, start: Start, basis: Curvature | None) -> Queries:
        """This rank's query gradients, in a curvature's eigenbasis if that fits; or representations."""
        blocks = self.fitted.curvature(basis) if basis and self.share.queries.made_of_tokens else None
        if blocks is None or not blocks.fits or start.layer is not None:
            blocks = basis = None
        bases = {name: block.basis for name, block in blocks.items() if block.basis} if blocks is not None else {}
        values: Stacks = {}
        for point, weight in zip(start.points, start.weights, strict=True):
            for name, stack in self._at(point, start, bases).items():
                weighted = times(stack, weight)
                values[name] = plus(values[name], weighted) if name in values else weighted
        return Queries(values, basis)

    def _at(self, point: Point, start: Start, bases: Mapping[str, Eigenbasis]) -> Stacks:
        """This rank's query gradients at one point, in bases where they are given; or representations."""
        context, queries = self.fitted.contexts[-1], self.share.queries
        where = context.where(point)
        context.load(point)
        if start.layer is not None:
            return queries.representations(self.share, context, start.layer, start.normalized, where)
        return queries.gradients(self.share, context, bases, where)

    @singledispatchmethod
    def _apply(self, operator: Any, before: Queries) -> Queries:
        """An operator on queries that are in its basis."""
        values = {name: formed(value) for name, value in before.values.items()}
        return replace(before, values=dict(self.fitted.inverse(operator, values)))

    @_apply.register
    def _(self, operator: CoupledFunction, before: Queries) -> Queries:
        """A function of the curvature of all layers together."""
        values = {name: formed(value) for name, value in before.values.items()}
        return replace(before, values=dict(self.fitted.coupled(operator, values)))

    @_apply.register
    def _(self, operator: Spectral, before: Queries) -> Queries:
        """The queries times a function of the eigenvalues; a layer that the stage did not train stays as it is."""
        blocks = self.fitted.curvature(operator.curvature) if operator.curvature else None
        shifts = self.fitted.preconditioner(operator.shifted_by) if operator.shifted_by else None
        couplings, scaled = self.fitted.couplings(operator), {}
        for name, values_QPOI in before.values.items():
            group = self.fitted.parameter_group(operator.stage, name)
            if group is None:
                scaled[name] = values_QPOI
                continue
            block = None if blocks is None else blocks[name]
            eigenvalues = reference(values_QPOI).new_zeros(()) if block is None else block.eigenvalues_POI
            P: Tensor | float = 1.0
            if shifts is not None and operator.coupled[group]:
                exact_POI = shifts[name].exact_POI
                P = exact_POI if block is None or block.basis is None else block.basis.diagonal(exact_POI)
            share = self.fitted.share(operator, name)
            coupling = couplings[name].rate if name in couplings else None
            scaled[name] = values_QPOI * operator.on(eigenvalues, group, P, share, coupling)
        return replace(before, values=scaled)

    @_apply.register
    def _(self, operator: Scale, before: Queries) -> Queries:
        """The queries times a power of the preconditioner; a layer that its stage did not train stays as it is."""
        blocks = self.fitted.preconditioner(operator.preconditioner)
        scaled = {
            name: value * blocks[name].exact_POI.pow(operator.power) if name in blocks else value
            for name, value in before.values.items()
        }
        return replace(before, values=scaled)

    @_apply.register
    def _(self, _operator: UnitNorm, before: Queries) -> Queries:
        """Each query's whole gradient brought to norm 1."""
        norms_Q = torch.stack([squared_norms(value) for value in before.values.values()]).sum(0).sqrt()
        inverse_Q111 = norms_Q.clamp_min(torch.finfo(norms_Q.dtype).tiny).reciprocal()[:, None, None, None]
        return replace(before, values={name: value * inverse_Q111 for name, value in before.values.items()})

    def _moved(self, queries: Queries, basis: Curvature | None) -> Queries:
        """The same queries in another curvature's eigenbasis (None: in none)."""
        if basis == queries.basis:
            return queries
        origin = self.fitted.curvature(queries.basis) if queries.basis else None
        target = self.fitted.curvature(basis) if basis else None
        moved = {}
        for name, values_QPOI in queries.values.items():
            old = origin[name].basis if origin is not None and name in origin else None
            new = target[name].basis if target is not None and name in target else None
            moved[name] = _changed(values_QPOI, old, new)
        return Queries(moved, basis)


def _changed(values_QPOI: Stack, old: Eigenbasis | None, new: Eigenbasis | None) -> Stack:
    """Gradients taken from the old basis to the new; None stands for the parameters' own axes."""
    if old is None and new is None:
        return values_QPOI
    if old is None and isinstance(values_QPOI, OuterProducts) and values_QPOI.scale_POI is None:
        return values_QPOI.rotated(new)  # type: ignore[arg-type]
    gradients_QPOI = formed(values_QPOI)
    if old is None:
        return new.rotate(gradients_QPOI)  # type: ignore[union-attr]
    return old.unrotate(gradients_QPOI) if new is None else old.to(new).rotate(gradients_QPOI)
