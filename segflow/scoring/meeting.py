"""Where queries meet training gradients: in which basis, decided by counting multiplications."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..curvature.kronecker import Eigenbasis
from ..curvature.stored import StoredCurvature
from ..methods.plan import Curvature, IterativeInverse, Operator, Plan, ProjectedInverse, Scale, Spectral
from ..model.loss_view import LossView
from .outer_products import OuterProducts, formed
from .query_operators import Stacks, basis_of


def outer_layers(plan: Plan, view: LossView, fits: bool) -> set[str]:
    """The layers whose queries stay outer products all the way: those of one token, if every operator allows it.

    fits: whether eigenbases fit the memory, so that queries need not leave them.
    """
    stay = all(_stays_outer(term.operators, fits) for term in plan)
    return {name for name in view.layers if stay and view.positions(name) == 1}


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
        forms = not isinstance(queries_QPOI, OuterProducts) or len(queries_QPOI) <= room
        if not blocks.fits or (forms and count * O * I * (O + I) <= costs[cheaper]):
            met.values[name] = basis.unrotate(formed(queries_QPOI))
        else:
            (met.tokens if cheaper == "tokens" else met.sums)[name] = basis
    return met
