"""Query gradients of examples at a point; each rank works on its share.

Axes: Q queries, P parts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..curvature.kronecker import Eigenbasis, example_gradients
from ..data.batches import Batch
from ..model.finite_check import FiniteCheck
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
    """The gradients of what the view measures, of this rank's queries: for each layer [Q, P, O, I].

    A layer whose queries have one token each on all ranks keeps them as outer products.

    Args:
        data: batches of this rank's queries.
        bases: eigenbases; the gradients of a layer that has one are given in it.
        ranks: those that share the queries; a layer must be reached on one of them.
        where: names the point in errors.
    """
    pieces: dict[str, list[Stack]] = {name: [] for name in view.layers}
    finite = FiniteCheck(f"query gradients, {where}")

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        basis, one_token = bases.get(layer.name), tokens.positions == 1
        pieces[layer.name].append(OuterProducts.of(tokens, basis) if one_token else example_gradients(tokens, basis))

    for batch in data:
        before = {name: len(stacks) for name, stacks in pieces.items()}
        view.capture(batch, consume, finite)
        for name, layer in view.layers.items():
            if len(pieces[name]) == before[name] and not batch.idle:  # the measurement does not depend on the layer
                pieces[name].append(OuterProducts.zeros(batch.size, layer.shape, view.dtype, view.device))
    finite.finish(view.layout.reached, ranks, every=False)
    formed = {name for name, stacks in pieces.items() if not all(isinstance(s, OuterProducts) for s in stacks)}
    formed = formed.union(*ranks.gather(sorted(formed)))
    empty = {name: OuterProducts.zeros(0, layer.shape, view.dtype, view.device) for name, layer in view.layers.items()}
    return {name: together([empty[name], *stacks], name in formed) for name, stacks in pieces.items()}
