"""The query side: query gradients under a plan's operators, kept in the eigenbasis of the operator applied last.

Queries of one token stay outer products as long as their operators allow it (module outer).

Axes: Q queries, P parts, O outputs, I inputs; a block of gradients is [Q, P, O, I].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatchmethod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .curvature import StoredCurvature
from .data import Batch
from .kronecker import Eigenbasis, PreconditionerBlock, example_gradients
from .layers import Tokens, TrackedLayer
from .lens import FiniteWatch, Lens
from .outer import Outer, Stack, example, formed, squared_norms, together
from .plans import (
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
from .ranks import Ranks
from .representation import RepresentationLens

Gradients = dict[str, Tensor]
Stacks = dict[str, Stack]


def query_gradients(
    lens: Lens | RepresentationLens, data: Iterable[Batch], bases: Mapping[str, Eigenbasis], ranks: Ranks, where: str
) -> Stacks:
    """The measurement's gradient for this rank's queries, for each layer [Q, P, O, I]; in a basis where one is given.

    A layer whose queries have one token each on all ranks keeps them as outer products. ranks: those that share the
    queries; a layer must be reached on one of them.
    """
    pieces: dict[str, list[Stack]] = {name: [] for name in lens.layers}
    watch = FiniteWatch(f"query gradients, {where}")

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        basis, one = bases.get(layer.name), tokens.a_PBSI.shape[2] == 1
        pieces[layer.name].append(Outer.of(tokens, basis) if one else example_gradients(tokens, basis))

    for batch in data:
        before = {name: len(parts) for name, parts in pieces.items()}
        lens.capture(batch, consume, watch)
        for name, layer in lens.layers.items():
            if len(pieces[name]) == before[name] and not batch.idle:  # the measurement does not depend on the layer
                pieces[name].append(Outer.zeros(batch.size, layer.shape, lens.dtype, lens.device))
    watch.finish(lens.axes, ranks, every=False)
    longer = {name for name, parts in pieces.items() if not all(isinstance(part, Outer) for part in parts)}
    longer = longer.union(*ranks.gather(sorted(longer)))
    none = {name: Outer.zeros(0, layer.shape, lens.dtype, lens.device) for name, layer in lens.layers.items()}
    return {name: together([none[name], *parts], name in longer) for name, parts in pieces.items()}


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
class QuerySide:
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
    if old is None and isinstance(values_QPOI, Outer) and values_QPOI.scale_POI is None:
        return values_QPOI.rotated(new)  # type: ignore[arg-type]
    gradients_QPOI = formed(values_QPOI)
    if old is None:
        return new.rotate(gradients_QPOI)  # type: ignore[union-attr]
    return old.unrotate(gradients_QPOI) if new is None else old.to(new).rotate(gradients_QPOI)


def outer_layers(plan: Plan, lens: Lens, fits: bool) -> set[str]:
    """The layers whose queries stay outer products all the way: those of one token, if every operator allows it.

    fits: whether eigenbases fit the memory, so that queries need not leave them.
    """
    stay = all(_stays_outer(term.operators, fits) for term in plan)
    return {name for name in lens.layers if stay and lens.positions(name) == 1}


def _stays_outer(operators: Sequence[Operator], fits: bool) -> bool:
    basis: Curvature | None = None
    scaled = False
    for operator in operators:
        if isinstance(operator, ProjectedInverse | IterativeInverse):
            return False
        if isinstance(operator, Scale) or (isinstance(operator, Spectral) and operator.curvature is not None):
            wanted = None if isinstance(operator, Scale) else basis_of(operator.curvature)
            if wanted != basis and (scaled or basis is not None or not fits):
                return False
            basis, scaled = wanted, True
    return True


class Meeting(NamedTuple):
    """Where queries meet training tokens: the queries, and the eigenbases for what comes to them.

    tokens: of the layers whose training tokens are rotated; sums: of those whose summed gradients are.
    """

    values: Stacks
    tokens: dict[str, Eigenbasis]
    sums: dict[str, Eigenbasis]


def meeting(
    values: Stacks, blocks: StoredCurvature | None, count: int, rows: int, tokens: Mapping[str, int], room: int
) -> Meeting:
    """Where each layer's queries meet the training tokens, by counting multiplications.

    Rotating training tokens into the eigenbasis, or few groups' summed gradients, costs less than taking many queries
    out of it; queries leave it where the bases do not fit the memory budget.

    Args:
        values: this rank's queries in the eigenbases of `blocks` (None where they stand in none).
        count: queries on all ranks; rows: groups that are summed, at all points; tokens: how many training tokens each
            layer will see on all ranks; room: how many queries may be formed that are outer products.
    """
    met = Meeting(dict(values), {}, {})
    for name, queries_QPOI in values.items():
        basis = blocks[name].basis if blocks is not None and name in blocks else None
        if blocks is None or basis is None:
            continue
        _, _, O, I = queries_QPOI.shape
        costs = {"tokens": tokens[name] * (I * I + O * O), "sums": rows * O * I * (O + I)}
        cheaper = min(costs, key=lambda way: costs[way])
        forms = not isinstance(queries_QPOI, Outer) or len(queries_QPOI) <= room
        if not blocks.fits or (forms and count * O * I * (O + I) <= costs[cheaper]):
            met.values[name] = basis.unrotate(formed(queries_QPOI))
        else:
            (met.tokens if cheaper == "tokens" else met.sums)[name] = basis
    return met
