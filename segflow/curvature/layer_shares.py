"""Layers' shares: of a stage's training examples, where training's batches may have left layers out; of its curvature.

A layer that was moved only by batches of its own data is moved in fewer steps, and the mean over all N examples has the
others' zeros already; its rate is then that of its own steps times min(1 / share, ceiling), see `Spectral`. For shares
of the curvature see `TraceShares`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batches import Batch
from ..errors import LayerError
from ..methods.plan import Point, Spectral
from ..model.finite_check import FiniteCheck
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.tokens import Tokens
from ..runtime.ranks import Ranks
from ..stage.context import StageContext
from ..store.files import Tensors
from ..store.store import MadeFrom
from .unit_names import at_point, shares_unit


def capped_layers(context: StageContext, operators: Iterable[Spectral]) -> set[str]:
    """The stage's layers whose rates in any of the operators depend on the share of the examples that reach them."""
    of_stage = [operator for operator in operators if operator.stage == context.stage]
    groups = context.parameter_groups.items()
    return {name for name, group in groups if any(operator.needs_share(group) for operator in of_stage)}


def shares_point(context: StageContext) -> Point:
    """The stage's first checkpoint, at which shares are measured: fewer examples have a gradient of exactly zero."""
    return Point.at(context.stage, 0)


def measured_shares(view: LossView, data: Iterable[Batch], ranks: Ranks, where: str) -> Tensors:
    """`<layer>`, []: the share of the examples in whose training loss the gradient of some position is not zero.

    Examples count by their weights, where batches have some. One pass over this rank's data; ranks: all that share the
    data; where: names the point in errors.
    """
    totals = {name: torch.zeros((), dtype=torch.float64, device=view.device) for name in view.layers}
    examples = torch.zeros((), dtype=torch.float64, device=view.device)
    finite = FiniteCheck(f"shares of examples, {where}")

    for batch in data:
        counts_B = torch.ones(batch.size).to(examples) if batch.weights is None else batch.weights.to(examples)

        def consume(layer: TrackedLayer, tokens: Tokens, counts_B: Tensor = counts_B) -> None:
            totals[layer.name] += counts_B @ tokens.live().to(counts_B)

        view.capture(batch, consume, finite)
        examples += 0 if batch.idle else counts_B.sum()
    finite.finish(view.layers, ranks, every=False)
    ranks.sum_([*totals.values(), examples])
    return {name: total / examples for name, total in totals.items()}


def stored_shares(context: StageContext, train_from: MadeFrom) -> dict[str, float]:
    """Each layer's share, as `fit` measured it."""
    point = shares_point(context)
    unit = context.store.open(shares_unit(context), at_point(train_from, context, point))
    return {name: unit.tensor(name, (), kind="nonnegative").item() for name in context.layers.tracked}


class Coupling(NamedTuple):
    """A layer among coupled ones: its share of all layers' rate * trace, and its rate over that share."""

    share: float
    rate: float


def couplings(traces: Mapping[str, float], rates: Mapping[str, float]) -> dict[str, Coupling]:
    """Of each layer its share, which sum to 1, and rate / share = sum over layers of rate * trace / own trace.

    The latter holds for a layer without a rate too; it is 0 for one without a trace, which has no eigenvalues.

    Example:
        >>> couplings({"first": 30.0, "frozen": 20.0}, {"first": 0.1, "frozen": 0.0})["frozen"]
        Coupling(share=0.0, rate=0.15)
    """
    amounts = {name: rates[name] * trace for name, trace in traces.items()}
    total = math.fsum(amounts.values())
    return {
        name: Coupling(amounts[name] / total if total else 0.0, total / trace if trace else 0.0)
        for name, trace in traces.items()
    }


def check_shares(context: StageContext, shares: Mapping[str, float], capped: Iterable[str]) -> None:
    """Raise LayerError, naming it, for a layer among the `capped` that no training example reaches."""
    unreached = sorted(name for name in capped if not shares[name])
    if unreached:
        raise LayerError(
            f"{context.where(shares_point(context))}: no training example reaches layer {unreached[0]!r}"
            f"{f' (nor {unreached[1:]})' if unreached[1:] else ''}: its gradient of the training loss is zero for all "
            "of them, although training's steps moved it. Give the training data that the model was trained on, or "
            "leave the layer out of get_influence_tracked_modules()."
        )
