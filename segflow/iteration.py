"""Iterative inverses of the exact Hessian: LiSSA (Agarwal et al. 2017, arXiv 1602.03943; Koh and Liang 2017).

Axes: Q queries, P parts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .capture import requiring_grad
from .data import Batch, Collate, batches
from .errors import MethodError
from .layers import TrackedLayer
from .lens import Lens
from .plans import IterativeInverse
from .ranks import is_sharded

Gradients = dict[str, Tensor]
_POWER_ITERATIONS = 10
_MARGIN = 1.2  # the largest eigenvalue found may still be below the true one


def hessian_products(lens: Lens, batch: Batch, values: Mapping[str, Tensor]) -> Gradients:
    """H v for each query, layer by layer [Q, P, O, I]; H: of the batch's mean loss. Inside `observing(model)`."""
    parameters = [parameter for layer in lens.layers.values() for parameter in layer.parameters]
    vectors = [part for name, layer in lens.layers.items() for part in layer.by_parameter(values[name])]
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.enable_grad(), requiring_grad(parameters), math_only:
        loss = lens.loss(batch) / batch.size
        slopes = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        bent = [(slope, vector.to(slope.dtype)) for slope, vector in zip(slopes, vectors, strict=True)]
        products = torch.autograd.grad(
            [slope for slope, _ in bent],
            parameters,
            [vector for _, vector in bent],
            is_grads_batched=True,
            materialize_grads=True,
        )
    return _by_layer(lens.layers, [product.detach() for product in products], lens.dtype)


def _by_layer(layers: Mapping[str, TrackedLayer], flat: list[Tensor], dtype: torch.dtype) -> Gradients:
    """Parameter-shaped tensors [Q, ...] as one matrix [Q, P, O, I] for each layer."""
    found, parts = {}, iter(flat)
    for name, layer in layers.items():
        weights, biases = next(parts).to(dtype), next(parts).to(dtype) if layer.has_bias else None
        rows = [layer.gradient_matrix(w, None if biases is None else biases[q]) for q, w in enumerate(weights)]
        found[name] = torch.stack(rows) if rows else weights.new_zeros(0, *layer.shape)
    return found


def lissa(
    lens: Lens, train: Any, collate_fn: Collate | None, operator: IterativeInverse, values: Gradients
) -> Gradients:
    """(H + damping)^-1 of each query by v <- q + v - (H_batch + damping) v / scale, averaged over repetitions.

    Only inside `observing(model)`, at the operator's point. Raises MethodError where it diverges, or on sharded models.
    """
    if is_sharded(lens.model):
        raise MethodError("LiSSA differentiates twice, which a sharded model does not allow. Use InfluenceFunction.")
    if not len(next(iter(values.values()))):
        return values
    draws = np.random.default_rng(operator.seed)
    scale = operator.scale or _MARGIN * _largest(lens, train, collate_fn, operator)
    total = {name: torch.zeros_like(value) for name, value in values.items()}
    for _ in range(operator.repetitions):
        found = dict(values)
        for batch in _drawn(lens, train, collate_fn, draws, operator, operator.steps):
            bent = hessian_products(lens, batch, found)
            found = {n: values[n] + v - (bent[n] + operator.damping * v) / scale for n, v in found.items()}
        for name, value in found.items():
            total[name] += value / (scale * operator.repetitions)
    before, after = (max(value.abs().max().item() for value in of.values()) for of in (values, total))
    if not np.isfinite(after) or after > before * 10 / (operator.damping or 1e-12):
        raise MethodError(
            f"LiSSA diverged (scale={scale:.3g}, damping={operator.damping:g}): the Hessian has eigenvalues above "
            "twice the scale or below minus the damping. Give a larger scale or more damping."
        )
    return total


def _largest(lens: Lens, train: Any, collate_fn: Collate | None, operator: IterativeInverse) -> float:
    """The largest absolute eigenvalue of H + damping over some batches, by power iteration."""
    generator = torch.Generator().manual_seed(operator.seed)
    vector = {
        name: torch.randn(1, *layer.shape, generator=generator, dtype=torch.float64).to(lens.device, lens.dtype)
        for name, layer in lens.layers.items()
    }
    draws, largest = np.random.default_rng(operator.seed), 0.0
    for batch in _drawn(lens, train, collate_fn, draws, operator, _POWER_ITERATIONS):
        norm = torch.stack([part.square().sum() for part in vector.values()]).sum().sqrt()
        vector = hessian_products(lens, batch, {name: part / norm for name, part in vector.items()})
        largest = max(largest, torch.stack([part.square().sum() for part in vector.values()]).sum().sqrt().item())
    return largest + operator.damping


def _drawn(
    lens: Lens,
    train: Any,
    collate_fn: Collate | None,
    draws: np.random.Generator,
    operator: IterativeInverse,
    count: int,
) -> Iterator[Batch]:
    """Batches of distinct examples, drawn anew each time (all of the data where a batch holds all)."""
    size = min(operator.sample_size, len(train))
    lists = [np.sort(draws.choice(len(train), size, replace=False)) for _ in range(count)]
    return batches(train, lists, collate_fn, lens.device)
