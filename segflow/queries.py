"""The query side: query gradients under a plan's operators, kept in the eigenbasis of the operator applied last.

Axes: Q queries, P parts, O outputs, I inputs; a block of gradients is [Q, P, O, I].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .data import Batch
from .factors import Pool, StoredCurvature
from .kronecker import Eigenbasis, example_gradients
from .layers import Tokens, TrackedLayer
from .lens import FiniteWatch, Lens
from .methods import Operator, Plan
from .ranks import Ranks

Gradients = dict[str, Tensor]


def query_gradients(
    lens: Lens, data: Iterable[Batch], bases: Mapping[str, Eigenbasis], ranks: Ranks, where: str
) -> Gradients:
    """The measurement's gradient for this rank's queries, for each layer [Q, P, O, I]; in a basis where one is given.

    ranks: those that share the queries; a layer must be reached on one of them.
    """
    pieces: dict[str, list[Tensor]] = {name: [] for name in lens.layers}
    watch = FiniteWatch(f"query gradients, {where}")

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        pieces[layer.name].append(example_gradients(tokens, bases.get(layer.name)))

    def none(layer: TrackedLayer, count: int) -> Tensor:
        return torch.zeros(count, *layer.shape, dtype=lens.dtype, device=lens.device)

    for batch in data:
        before = {name: len(parts) for name, parts in pieces.items()}
        lens.capture(batch, consume, watch)
        for name, layer in lens.layers.items():
            if len(pieces[name]) == before[name] and not batch.idle:  # the measurement does not depend on the layer
                pieces[name].append(none(layer, batch.size))
    watch.finish(lens.axes, ranks)
    return {name: torch.cat(parts) if parts else none(lens.layers[name], 0) for name, parts in pieces.items()}


@dataclass(frozen=True)
class Queries:
    """This rank's query gradients of every layer, in the eigenbasis of the curvature of `pool` (empty: in none)."""

    values: Gradients
    pool: Pool


@dataclass
class QuerySide:
    """Query gradients under a plan's operators; what two terms share of their operators is computed once.

    gradients: the query gradients at a checkpoint, if possible in a pool's eigenbasis; curvature: the blocks of a pool;
    parameter_groups: each layer's.
    """

    plan: Plan
    gradients: Callable[[int, Pool], Queries]
    curvature: Callable[[Pool], StoredCurvature]
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
                before = self.gradients(checkpoint, last.checkpoints)
            else:
                before = self._applied(checkpoint, operators[:-1])
            moved = self._moved(before, last.checkpoints)
            if len(operators) > 1:
                self._kept[checkpoint, operators[:-1]] = moved  # the next term goes on from there
            self._kept[key] = self._apply(last, moved)
        return self._kept[key]

    def _apply(self, operator: Operator, before: Queries) -> Queries:
        """The operator's function of the eigenvalues (sigma = 0 without curvature) times queries in its eigenbasis."""
        group = self.parameter_groups
        blocks = self.curvature(operator.checkpoints) if operator.checkpoints else None
        scaled = {}
        for name, values_QPOI in before.values.items():
            eigenvalues = values_QPOI.new_zeros(()) if blocks is None else blocks[name].eigenvalues_POI
            scaled[name] = values_QPOI * operator.on(eigenvalues, group[name])
        return Queries(scaled, before.pool)

    def _moved(self, queries: Queries, pool: Pool) -> Queries:
        """The same queries in the eigenbasis of another pool (of no curvature: they stay where they are)."""
        if not pool or pool == queries.pool:
            return queries
        blocks, origin = self.curvature(pool), self.curvature(queries.pool) if queries.pool else None
        moved = {}
        for name, values_QPOI in queries.values.items():
            basis = blocks[name].basis
            moved[name] = (basis if origin is None else origin[name].basis.to(basis)).rotate(values_QPOI)
        return Queries(moved, pool)


def meeting(
    values: Gradients, blocks: StoredCurvature | None, count: int, tokens: Mapping[str, int]
) -> tuple[Gradients, dict[str, Eigenbasis]]:
    """Where each layer's queries meet the training tokens, by counting multiplications.

    Rotating few training tokens into the eigenbasis costs less than taking many queries out of it; queries leave it
    where the bases do not fit the memory budget.

    Args:
        values: this rank's queries in the eigenbases of `blocks` (None where they stand in none).
        count: queries on all ranks; tokens: how many training tokens each layer will see on all ranks.

    Returns:
        The queries, and the basis for each layer whose queries stay in it.
    """
    if blocks is None:
        return values, {}
    met, bases = {}, {}
    for name, queries_QPOI in values.items():
        _, _, O, I = queries_QPOI.shape
        basis = blocks[name].basis
        if blocks.fits and tokens[name] * (I * I + O * O) < count * O * I * (O + I):
            met[name], bases[name] = queries_QPOI, basis
        else:
            met[name] = basis.unrotate(queries_QPOI)
    return met, bases
