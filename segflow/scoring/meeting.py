"""Where queries meet training gradients: in which basis, and on which ranks; decided by counting multiplications.

Axes: Q queries, P parts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from ..curvature.kronecker import Eigenbasis
from ..curvature.stored_curvature import StoredCurvature
from ..methods.plan import (
    CoupledFunction,
    Curvature,
    IterativeInverse,
    Operator,
    Plan,
    ProjectedInverse,
    Scale,
    Spectral,
)
from ..model.loss_view import LossView
from ..runtime.ranks import Ranks
from .outer_products import OuterProducts, Stack, Stacks, fewer_factored, formed, together
from .query_operators import basis_of


@dataclass(frozen=True)
class MetQueries:
    """Queries that are ready to meet training gradients.

    values: the queries on this rank, for each layer; bases, sum_bases: the eigenbases of layers whose tokens, or whose
    summed gradients, are rotated to meet the queries there; holders: how many ranks hold a block of the queries each,
    1 where every rank holds all of them.
    """

    values: Stacks
    bases: Mapping[str, Eigenbasis]
    holders: int
    ranks: Ranks
    sum_bases: Mapping[str, Eigenbasis] = field(default_factory=dict)

    @property
    def here(self) -> bool:
        """True if this rank holds all queries."""
        return self.holders == 1

    def blocks(self) -> Iterator[Stacks]:
        """All queries, in order, block by block; where ranks hold blocks of their own, every rank must take part."""
        if self.here:
            yield self.values
            return
        for source in range(self.holders):
            yield {name: _from_rank(value, source, self.ranks) for name, value in self.values.items()}


class Traffic(NamedTuple):
    """What will meet: queries on all ranks, groups that are summed at all points, and training tokens of each layer."""

    queries: int
    groups: int
    tokens: Mapping[str, int]


def met_queries(
    values: Stacks, blocks: StoredCurvature | None, traffic: Traffic, room: int, holders: int, ranks: Ranks
) -> MetQueries:
    """Queries in the bases, and on the ranks, where they meet training gradients, by counting multiplications.

    Rotating training tokens into the eigenbasis, or few groups' summed gradients, costs less than taking many queries
    out of it; queries leave it where the bases do not fit the memory budget. Of several blocks each rank keeps its own;
    one block goes to every rank.

    Args:
        values: this rank's queries in the eigenbases of `blocks` (None where they stand in none).
        traffic: what will meet.
        room: how many queries that are outer products may be formed.
        holders: how many ranks hold a block of the queries each; ranks: all of them.
    """
    met, fit = dict(values), -(-traffic.queries // holders) <= room  # the same on every rank
    token_bases: dict[str, Eigenbasis] = {}
    sum_bases: dict[str, Eigenbasis] = {}
    for name, given_QPOI in values.items():
        queries_QPOI = met[name] = _formed_once(given_QPOI, fit)
        basis = blocks[name].basis if blocks is not None and name in blocks else None
        if blocks is None or basis is None:
            continue
        _, _, O, I = queries_QPOI.shape
        of_gradient = basis.gradient_cost(O, I)
        token_cost, sum_cost = traffic.tokens[name] * basis.token_cost(), traffic.groups * of_gradient
        may_form = not isinstance(queries_QPOI, OuterProducts) or fit
        leaves = may_form and traffic.queries * of_gradient <= min(token_cost, sum_cost)
        if not of_gradient:  # in a basis of axes there is nothing to rotate
            continue
        if leaves or not blocks.fits:
            met[name] = basis.unrotate(formed(queries_QPOI))
        else:
            (token_bases if token_cost <= sum_cost else sum_bases)[name] = basis
    if holders == 1 and ranks.count > 1:
        met = {name: _from_all(value_QPOI, ranks) for name, value_QPOI in met.items()}
    return MetQueries(met, token_bases, holders, ranks, sum_bases)


def _formed_once(stack: Stack, fit: bool) -> Stack:
    """Scaled sums of several outer products, which every tile of groups would have formed, as gradients if they fit."""
    several = isinstance(stack, OuterProducts) and stack.rank > 1 and stack.scale_POI is not None
    return formed(stack) if several and fit else stack


def outer_layers(plan: Plan, view: LossView, fits: bool) -> dict[str, int]:
    """The layers whose queries stay outer products all the way (of one token, if every operator allows), and how many.

    fits: whether eigenbases fit the memory, so that queries need not leave them.
    """
    rank = max(len(term.query_points) for term in plan)
    if not all(_stays_outer(term.operators, fits) for term in plan):
        return {}
    sizes = {name: layer.shape[1:] for name, layer in view.layers.items() if view.positions(name) == 1}
    return {name: rank for name, size in sizes.items() if fewer_factored(rank, *size)}


def _stays_outer(operators: Sequence[Operator], fits: bool) -> bool:
    """Whether all operators are elementwise in one basis, which the queries need not change once they are scaled."""
    basis: Curvature | None = None
    scaled = False
    for operator in operators:
        if isinstance(operator, ProjectedInverse | IterativeInverse | CoupledFunction):
            return False
        if isinstance(operator, Scale) or (isinstance(operator, Spectral) and operator.curvature is not None):
            wanted = None if isinstance(operator, Scale) else basis_of(operator.curvature)
            if wanted != basis and (scaled or basis is not None or not fits):
                return False
            basis, scaled = wanted, True
    return True


def _from_rank(stack: Stack, source: int, ranks: Ranks) -> Stack:
    """The stack of rank `source` on every rank. An outer product's scale is the same on all ranks already."""
    is_source = source == ranks.index
    if isinstance(stack, OuterProducts):
        g, a = (
            ranks.broadcast(side if is_source else None, source, side.device) for side in (stack.g_PQRO, stack.a_PQRI)
        )
        return replace(stack, g_PQRO=g, a_PQRI=a)
    return ranks.broadcast(stack if is_source else None, source, stack.device)


def _from_all(stack: Stack, ranks: Ranks) -> Stack:
    """Every rank's queries, in rank order, on every rank."""
    stacks = [_from_rank(stack, rank, ranks) for rank in range(ranks.count)]
    if not isinstance(stack, OuterProducts):
        return torch.cat([formed(of_rank) for of_rank in stacks])
    unscaled = [replace(of_rank, scale_POI=None) for of_rank in stacks if isinstance(of_rank, OuterProducts)]
    of_all = together(unscaled, form=False)
    return of_all if stack.scale_POI is None else of_all * stack.scale_POI
