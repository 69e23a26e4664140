"""The query side: query gradients under a plan's operators, kept in the eigenbasis of the operator applied last.

Queries of one token stay outer products as long as their operators allow it (module outer_products).

Axes: Q queries, P parts, O outputs, I inputs; a block of gradients is [Q, P, O, I].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import singledispatchmethod
from typing import Any, Protocol

import torch
from torch import Tensor

from ..curvature.kronecker import Eigenbasis, Gradients
from ..curvature.preconditioner import PreconditionerBlock
from ..curvature.stored import StoredCurvature
from ..methods.plan import (
    Curvature,
    IterativeInverse,
    Operator,
    Plan,
    Point,
    Preconditioner,
    ProjectedInverse,
    Scale,
    Spectral,
    UnitNorm,
)
from .outer_products import OuterProducts, Stack, example, formed, squared_norms

Stacks = dict[str, Stack]


@dataclass(frozen=True)
class Queries:
    """This rank's query gradients of every layer, in the eigenbasis of a curvature (None: in no basis).

    A layer that the curvature's stage did not train stands in none.
    """

    values: Stacks
    basis: Curvature | None


class Resources(Protocol):
    """What the operators need of the store, the model and the data."""

    def gradients(self, point: Point, basis: Curvature | None) -> Queries:
        """The query gradients at a point, if possible in a curvature's eigenbasis."""

    def curvature(self, of: Curvature) -> StoredCurvature:
        """The fitted blocks."""

    def preconditioner(self, of: Preconditioner) -> Mapping[str, PreconditionerBlock]:
        """P of every layer that its stage trained."""

    def parameter_group(self, stage: int, layer: str) -> int | None:
        """The layer's parameter group in a stage; None if the stage did not train it."""

    def inverse(self, of: ProjectedInverse | IterativeInverse, values: Gradients) -> Gradients:
        """An inverse that mixes the layers, applied to gradients."""


def basis_of(curvature: Curvature | None) -> Curvature | None:
    """What identifies the eigenbasis in which a curvature is diagonal; None if that is the parameters' own."""
    return None if curvature is None or curvature.kind == "diagonal" else curvature


@dataclass
class QueryOperators:
    """Query gradients under a plan's operators; what two terms share of their operators is computed once."""

    plan: Plan
    resources: Resources
    _kept: dict[tuple[Point, tuple[Operator, ...]], Queries] = field(default_factory=dict)

    def walk(self) -> Iterator[tuple[int, Queries]]:
        """Each term's place in the plan with its query side, shortest operators first: little is kept between."""
        remaining = sorted(
            enumerate(self.plan), key=lambda t: (t[1].query.stage, t[1].query.weights, len(t[1].operators))
        )
        while remaining:
            place, term = remaining.pop(0)
            yield place, self._applied(term.query, term.operators)
            useful = {(t.query, t.operators[:n]) for _, t in remaining for n in range(len(t.operators))}
            self._kept = {key: value for key, value in self._kept.items() if key in useful}

    def _applied(self, point: Point, operators: tuple[Operator, ...]) -> Queries:
        """The query gradients at a point with the operators applied in order."""
        key = (point, operators)
        if key not in self._kept:
            if not operators:
                return self.resources.gradients(point, None)
            last = operators[-1]
            wanted = basis_of(last.curvature) if isinstance(last, Spectral) else None
            if len(operators) == 1:
                before = self.resources.gradients(point, wanted)
            else:
                before = self._applied(point, operators[:-1])
            free = isinstance(last, UnitNorm) or (isinstance(last, Spectral) and last.curvature is None)
            moved = before if free else self._moved(before, wanted)
            if len(operators) > 1:
                self._kept[point, operators[:-1]] = moved  # the next term goes on from there
            self._kept[key] = self._apply(last, moved)
        return self._kept[key]

    @singledispatchmethod
    def _apply(self, operator: Any, before: Queries) -> Queries:
        """An operator on queries that stand in its basis."""
        values = {name: formed(value) for name, value in before.values.items()}
        return replace(before, values=dict(self.resources.inverse(operator, values)))

    @_apply.register
    def _(self, operator: Spectral, before: Queries) -> Queries:
        """The function of the eigenvalues times the queries; a layer that the stage did not train stays as it is."""
        blocks = self.resources.curvature(operator.curvature) if operator.curvature else None
        units = self.resources.preconditioner(operator.shifted_by) if operator.shifted_by else None
        scaled = {}
        for name, values_QPOI in before.values.items():
            group = self.resources.parameter_group(operator.stage, name)
            if group is None:
                scaled[name] = values_QPOI
                continue
            block = None if blocks is None else blocks[name]
            eigenvalues = example(values_QPOI).new_zeros(()) if block is None else block.eigenvalues_POI
            unit: Tensor | float = 1.0
            if units is not None:
                exact_POI = units[name].exact_POI
                unit = exact_POI if block is None or block.basis is None else block.basis.diagonal(exact_POI)
            scaled[name] = values_QPOI * operator.on(eigenvalues, group, unit)
        return replace(before, values=scaled)

    @_apply.register
    def _(self, operator: Scale, before: Queries) -> Queries:
        of = self.resources.preconditioner(operator.preconditioner)
        values = before.values.items()
        return replace(before, values={n: v * of[n].exact_POI.pow(operator.power) if n in of else v for n, v in values})

    @_apply.register
    def _(self, _operator: UnitNorm, before: Queries) -> Queries:
        norms_Q = torch.stack([squared_norms(value) for value in before.values.values()]).sum(0).sqrt()
        inverse_Q111 = norms_Q.clamp_min(torch.finfo(norms_Q.dtype).tiny).reciprocal()[:, None, None, None]
        return replace(before, values={name: value * inverse_Q111 for name, value in before.values.items()})

    def _moved(self, queries: Queries, basis: Curvature | None) -> Queries:
        """The same queries in another eigenbasis (None: in none)."""
        if basis == queries.basis:
            return queries
        origin = self.resources.curvature(queries.basis) if queries.basis else None
        target = self.resources.curvature(basis) if basis else None
        moved = {}
        for name, values_QPOI in queries.values.items():
            old = origin[name].basis if origin is not None and name in origin else None
            new = target[name].basis if target is not None and name in target else None
            moved[name] = _changed(values_QPOI, old, new)
        return Queries(moved, basis)


def _changed(values_QPOI: Stack, old: Eigenbasis | None, new: Eigenbasis | None) -> Stack:
    """Gradients taken from one basis to another; None stands for the parameters' own axes."""
    if old is None and new is None:
        return values_QPOI
    if old is None and isinstance(values_QPOI, OuterProducts) and values_QPOI.scale_POI is None:
        return values_QPOI.rotated(new)  # type: ignore[arg-type]
    gradients_QPOI = formed(values_QPOI)
    if old is None:
        return new.rotate(gradients_QPOI)  # type: ignore[union-attr]
    return old.unrotate(gradients_QPOI) if new is None else old.to(new).rotate(gradients_QPOI)
