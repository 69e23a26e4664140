"""The query side: query gradients under a plan's operators, kept in the eigenbasis of the operator applied last.

Axes: Q queries, P parts, O outputs, I inputs; a block of gradients is [Q, P, O, I].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .data import Batch
from .factors import Pool
from .kronecker import Eigenbasis, KroneckerBlock, example_gradients
from .layers import Tokens, TrackedLayer
from .lens import FiniteWatch, Lens
from .methods import Operator, Plan

Gradients = dict[str, Tensor]
Curvature = Mapping[str, KroneckerBlock]


def query_gradients(lens: Lens, data: Iterable[Batch], bases: Mapping[str, Eigenbasis], where: str) -> Gradients:
    """The measurement's gradient for every query, for each layer [Q, P, O, I]; in a basis where one is given."""
    pieces: dict[str, list[Tensor]] = {name: [] for name in lens.layers}
    watch = FiniteWatch(f"query gradients, {where}")

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        pieces[layer.name].append(example_gradients(tokens, bases.get(layer.name)))

    for batch in data:
        before = {name: len(parts) for name, parts in pieces.items()}
        lens.capture(batch, consume, watch)
        for name, layer in lens.layers.items():
            if len(pieces[name]) == before[name]:  # this batch's measurement does not depend on the layer
                pieces[name].append(torch.zeros(batch.size, *layer.shape, dtype=lens.dtype, device=lens.device))
    watch.finish(lens.axes)
    return {name: torch.cat(parts) for name, parts in pieces.items()}


@dataclass(frozen=True)
class Queries:
    """Query gradients of every layer, in the eigenbasis of the curvature pooled over `pool` (empty: in none)."""

    values: Gradients
    pool: Pool


@dataclass
class QuerySide:
    """Query gradients under a plan's operators; what two terms share of their operators is computed once.

    gradients: the query gradients at a checkpoint, in a pool's eigenbasis; curvature: the blocks of a pool;
    parameter_groups: each layer's.
    """

    plan: Plan
    gradients: Callable[[int, Pool], Gradients]
    curvature: Callable[[Pool], Curvature]
    parameter_groups: Mapping[str, int]
    _kept: dict[tuple[int, tuple[Operator, ...]], Queries] = field(default_factory=dict)

    def walk(self) -> Iterator[tuple[int, Queries]]:
        """Each term's place in the plan with its query side, shortest operators first: little is kept between."""
        remaining = sorted(enumerate(self.plan), key=lambda t: (t[1].query_checkpoint, len(t[1].operators)))
        while remaining:
            place, term = remaining.pop(0)
            yield place, self._applied(term.query_checkpoint, term.operators)
            useful = {(t.query_checkpoint, t.operators[:n]) for _, t in remaining for n in range(len(t.operators))}
            self._kept = {key: value for key, value in self._kept.items() if key in useful}

    def _applied(self, checkpoint: int, operators: tuple[Operator, ...]) -> Queries:
        """The query gradients at a checkpoint with the operators (at least one) applied in order."""
        key = (checkpoint, operators)
        if key not in self._kept:
            last = operators[-1]
            if len(operators) == 1:
                before = Queries(self.gradients(checkpoint, last.checkpoints), last.checkpoints)
            else:
                before = self._moved(self._applied(checkpoint, operators[:-1]), last.checkpoints)
                self._kept[checkpoint, operators[:-1]] = before  # the next term goes on from there
            self._kept[key] = self._apply(last, before)
        return self._kept[key]

    def _apply(self, operator: Operator, before: Queries) -> Queries:
        """The operator's function of the eigenvalues (sigma = 0 without curvature) times queries in its eigenbasis."""
        group = self.parameter_groups
        if not operator.checkpoints:
            scaled = {n: g * operator.on(g.new_zeros(()), group[n]) for n, g in before.values.items()}
        else:
            blocks = self.curvature(operator.checkpoints)
            scaled = {n: g * operator.on(blocks[n].eigenvalues_POI, group[n]) for n, g in before.values.items()}
        return Queries(scaled, before.pool)

    def _moved(self, queries: Queries, pool: Pool) -> Queries:
        """The same queries in the eigenbasis of another pool (of no curvature: they stay where they are)."""
        if not pool or pool == queries.pool:
            return queries
        blocks, origin = self.curvature(pool), self.curvature(queries.pool) if queries.pool else {}
        changes = {n: origin[n].basis.to(b.basis) if origin else b.basis for n, b in blocks.items()}
        return Queries({name: changes[name].rotate(g) for name, g in queries.values.items()}, pool)


def meeting(values: Gradients, blocks: Curvature, tokens: Mapping[str, int]) -> tuple[Gradients, dict[str, Eigenbasis]]:
    """Where each layer's queries meet the training tokens, by counting multiplications.

    Rotating few training tokens into the eigenbasis costs less than taking many queries out of it.

    Args:
        values: queries in the eigenbases of `blocks` (which is empty where they stand in none).
        tokens: how many training tokens each layer will see.

    Returns:
        The queries, and the basis for each layer whose queries stay in it.
    """
    met, bases = {}, {}
    for name, queries_QPOI in values.items():
        Q, _, O, I = queries_QPOI.shape
        if name not in blocks:
            met[name] = queries_QPOI
        elif tokens[name] * (I * I + O * O) < Q * O * I * (O + I):
            met[name], bases[name] = queries_QPOI, blocks[name].basis
        else:
            met[name] = blocks[name].basis.unrotate(queries_QPOI)
    return met, bases
