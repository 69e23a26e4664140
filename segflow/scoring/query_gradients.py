"""Query gradients of examples at a point, each rank working on its share.

Axes: Q queries, P parts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..curvature.kronecker import Eigenbasis, example_gradients
from ..data.batches import Batch
from ..model.finite import FiniteCheck
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.representation_view import RepresentationView
from ..model.tokens import Tokens
from ..runtime.ranks import Ranks
from .outer_products import OuterProducts, Stack, Stacks, together


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
