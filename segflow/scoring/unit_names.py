"""What a unit of scores is called, and what it is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..curvature.fitted_factors import FittedFactors
from ..data.fingerprints import digest
from ..methods.plan import Point, Term
from ..stage.context import StageContext
from ..stage.unit_identity import checkpoint_digest, point_name
from .outer_products import Stacks, products, reference, squared_norms
from .query_sets import QuerySet

_SKETCHING = 1 << 28  # bytes for temporaries
# Entries that may differ slightly on another machine: the store compares them, and a unit's name leaves them out.
_ROUNDED = ("training losses", "outputs", "measurements")


def groups_identity(
    fitted: FittedFactors, queries: QuerySet, stage: int, groups: str, per_layer: bool
) -> dict[str, Any]:
    """What all units of one call of `score` are made of: training data, task, the groups' digest, what is measured."""
    place = len(fitted.contexts) - 1
    return {
        **fitted.train_from(stage),
        "dtype": str(fitted.loss_view(stage).dtype),
        "groups": groups,
        "per_layer": per_layer,
        **queries.measured(fitted.contexts[place], fitted.loss_view(place)),
    }


def term_identity(fitted: FittedFactors, context: StageContext, term: Term, layers: list[str]) -> dict[str, Any]:
    """What a term's units are made of besides; layers: those in which its queries have values."""
    identity: dict[str, Any] = {
        "operators": [fitted.described(operator) for operator in term.operators],
        "query checkpoints": [checkpoint_digest(context, point) for point in term.query_points],
    }
    if len(term.query_points) > 1:
        identity["query weights"] = list(term.query_weights)
    if term.side != "gradient" or term.normalized:
        identity["side"] = [term.side, term.normalized, *layers]
    return identity


def score_unit(context: StageContext, made_from: Mapping[str, Any], point: Point) -> str:
    """The name of the unit that holds one term's scores of a block of queries at a point.

    What is a function, as the dataset's digest, is compared by the store and is not part of the name.
    """
    exact = {key: value for key, value in made_from.items() if key not in _ROUNDED and not callable(value)}
    hashed = digest(json.dumps(exact, sort_keys=True))[:16]
    return f"{context.prefix}scores/{hashed}/{point_name(context, point)}"


def sketch(values: Stacks) -> list[str]:
    """Two numbers that change with almost any change of the queries, and are rounded: sums differ between ranks."""
    if not len(next(iter(values.values()))):
        return []
    generator = torch.Generator().manual_seed(0)
    norm = torch.stack([squared_norms(value).double().sum() for value in values.values()]).sum().sqrt().item()
    projected = 0.0
    for value_QPOI in values.values():
        weights_1POI = torch.randn(1, *value_QPOI.shape[1:], generator=generator).to(reference(value_QPOI))
        rows = torch.linspace(1, 2, len(value_QPOI)).to(weights_1POI)
        projected += (rows @ products(value_QPOI, weights_1POI, _SKETCHING)).sum().item()
    return [f"{norm:.3e}", f"{projected / max(norm, 1e-300):.2f}"]
