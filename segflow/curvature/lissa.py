"""Iterative inverses of the exact Hessian: LiSSA (Agarwal et al. 2017, arXiv 1602.03943; Koh and Liang 2017).

Axes: Q queries, P parts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Batch, Collate, batches
from ..errors import MethodError
from ..methods.plan import IterativeInverse
from ..model.capture import requiring_grad
from ..model.loss_view import LossView
from ..runtime.sharding import is_sharded
from .kronecker import Gradients

_AT_ONCE = 8  # queries that are differentiated together: each keeps the batch's activations
_POWER_ITERATIONS = 10
_HOPELESS = 5.0  # a residual above this is divergence; noise of small batches and few steps leave up to about 1
_MARGIN = 1.2  # the largest eigenvalue found may still be below the true one


def hessian_products(view: LossView, batch: Batch, values: Mapping[str, Tensor]) -> Gradients:
    """H v for each query, layer by layer [Q, P, O, I]; H: of the batch's mean loss. Inside `observing(model)`."""
    layers = view.layers.values()
    parameters = [parameter for layer in layers for parameter in layer.parameters]
    vectors = [part for name, layer in view.layers.items() for part in layer.by_parameter(values[name])]
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    pieces: list[tuple[Tensor, ...]] = []
    with torch.enable_grad(), requiring_grad(parameters), math_only:
        loss = view.loss(batch) / batch.size
        slopes = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        for some in zip(*(vector.split(_AT_ONCE) for vector in vectors), strict=True):
            along = [vector.to(slope.dtype) for slope, vector in zip(slopes, some, strict=True)]
            pieces.append(
                torch.autograd.grad(
                    slopes, parameters, along, retain_graph=True, is_grads_batched=True, materialize_grads=True
                )
            )
    joined = iter(torch.cat(of_parameter).to(view.dtype) for of_parameter in zip(*pieces, strict=True))
    return {
        layer.name: layer.gradient_matrices(next(joined), next(joined) if layer.has_bias else None) for layer in layers
    }


def lissa(
    view: LossView, train: Any, collate_fn: Collate | None, operator: IterativeInverse, values: Gradients
) -> Gradients:
    """(H + damping)^-1 of each query by v <- q + v - (H_batch + damping) v / scale, averaged over repetitions.

    Only inside `observing(model)`, at the operator's point. Raises MethodError where it diverges, or on sharded models.
    """
    if is_sharded(view.model):
        raise MethodError("LiSSA differentiates twice, which a sharded model does not allow. Use InfluenceFunction.")
    if not len(next(iter(values.values()))):
        return values
    draws = np.random.default_rng(operator.seed)
    scale = operator.scale or _MARGIN * _largest(view, train, collate_fn, operator)
    total = {name: torch.zeros_like(value) for name, value in values.items()}
    for _ in range(operator.repetitions):
        found = dict(values)
        for batch in _drawn(view, train, collate_fn, draws, operator, operator.steps):
            bent = hessian_products(view, batch, found)
            found = {n: values[n] + v - (bent[n] + operator.damping * v) / scale for n, v in found.items()}
        for name, value in found.items():
            total[name] += value / (scale * operator.repetitions)
    [batch] = _drawn(view, train, collate_fn, draws, operator, 1)
    bent = hessian_products(view, batch, total)
    residual = _norm({n: bent[n] + operator.damping * v - values[n] for n, v in total.items()}) / _norm(values)
    if not residual < _HOPELESS:
        raise MethodError(
            f"LiSSA diverged (scale={scale:.3g}, damping={operator.damping:g}): (H + damping) times its answer misses "
            f"the query gradients by {residual:.2g} times their size. The Hessian has eigenvalues above twice the "
            "scale or below minus the damping. Give a larger scale or more damping."
        )
    return total


def _norm(values: Gradients) -> float:
    return torch.stack([torch.linalg.vector_norm(value.double()) for value in values.values()]).norm().item()


def _largest(view: LossView, train: Any, collate_fn: Collate | None, operator: IterativeInverse) -> float:
    """The largest absolute eigenvalue of H + damping over some batches, by power iteration."""
    generator = torch.Generator().manual_seed(operator.seed)
    vector = {
        name: torch.randn(1, *layer.shape, generator=generator, dtype=torch.float64).to(view.device, view.dtype)
        for name, layer in view.layers.items()
    }
    draws, largest = np.random.default_rng(operator.seed), 0.0
    for batch in _drawn(view, train, collate_fn, draws, operator, _POWER_ITERATIONS):
        norm = _norm(vector)
        vector = hessian_products(view, batch, {name: part / norm for name, part in vector.items()})
        largest = max(largest, _norm(vector))
    return largest + operator.damping


def _drawn(
    view: LossView,
    train: Any,
    collate_fn: Collate | None,
    draws: np.random.Generator,
    operator: IterativeInverse,
    count: int,
) -> Iterator[Batch]:
    """Batches of distinct examples, drawn anew each time (all of the data where a batch holds all)."""
    size = min(operator.sample_size, len(train))
    lists = [np.sort(draws.choice(len(train), size, replace=False)) for _ in range(count)]
    return batches(train, lists, collate_fn, view.device)
