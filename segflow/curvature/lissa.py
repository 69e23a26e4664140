"""Iterative inverses of the exact Hessian: LiSSA (Agarwal et al. 2017, arXiv 1602.03943; Koh and Liang 2017).

Axes: Q queries, P parts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Batch
from ..data.readers import Reader
from ..data.reading import Request
from ..data.streams import stream
from ..errors import MethodError
from ..methods.plan import IterativeInverse
from ..model.loss_view import LossView
from ..model.observing import requiring_grad
from ..runtime.sharding import is_sharded
from .kronecker import Gradients

_Draw = Callable[[np.random.Generator, int], Iterator[Batch]]  # so many batches
_AT_ONCE = 8  # queries that are differentiated together: each keeps the batch's activations
_POWER_ITERATIONS = 10
_DIVERGED = 5.0  # a residual above this is divergence; noise of small batches and few steps leave up to about 1
_MARGIN = 1.2  # the largest eigenvalue by power iteration may still be below the true one


def hessian_products(view: LossView, batch: Batch, values: Mapping[str, Tensor]) -> Gradients:
    """H v for each query, layer by layer [Q, P, O, I]; H: the Hessian of the batch's mean loss.

    Call it inside `observing(model)`.
    """
    layers = view.layers.values()
    parameters = [parameter for layer in layers for parameter in layer.parameters]
    vectors = [vector for name, layer in view.layers.items() for vector in layer.by_parameter(values[name])]
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    pieces: list[tuple[Tensor, ...]] = []
    with torch.enable_grad(), requiring_grad(parameters), math_only:
        loss = view.loss(batch) / batch.size
        slopes = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        for queries in zip(*(vector.split(_AT_ONCE) for vector in vectors), strict=True):
            along = [vector.to(slope.dtype) for slope, vector in zip(slopes, queries, strict=True)]
            pieces.append(
                torch.autograd.grad(
                    slopes, parameters, along, retain_graph=True, is_grads_batched=True, materialize_grads=True
                )
            )
    products = iter(torch.cat(by_query).to(view.dtype) for by_query in zip(*pieces, strict=True))
    return {layer.name: layer.gradient_matrices([next(products) for _ in layer.parameters]) for layer in layers}


def lissa(
    view: LossView,
    train: Reader,
    views: int,
    operator: IterativeInverse,
    values: Gradients,
    weights_N: Tensor | None = None,
) -> Gradients:
    """(H + damping)^-1 of each query q, layer by layer [Q, P, O, I].

    By the iteration v <- q + v - (H_batch + damping) v / scale, averaged over repetitions. Call it inside
    `observing(model)`, at the operator's point. train: reads the training data, of which each example has so many
    views. weights_N: of the training examples, which are drawn in proportion to them; None: all alike. Raises
    MethodError where it diverges, and for sharded models.
    """
    if is_sharded(view.model):
        raise MethodError("LiSSA differentiates twice, which a sharded model does not allow. Use InfluenceFunction.")
    if not len(next(iter(values.values()))):
        return values
    draws = stream(operator.seed, "LiSSA")
    draw = partial(_drawn, view, train, views, operator.sample_size, weights_N)
    scale = operator.scale or _MARGIN * _largest_eigenvalue(view, draw, operator)
    mean = {name: torch.zeros_like(value) for name, value in values.items()}
    for _ in range(operator.repetitions):
        iterate = dict(values)
        for batch in draw(draws, operator.steps):
            products = hessian_products(view, batch, iterate)
            iterate = {n: values[n] + v - (products[n] + operator.damping * v) / scale for n, v in iterate.items()}
        for name, value in iterate.items():
            mean[name] += value / (scale * operator.repetitions)
    [batch] = draw(draws, 1)
    products = hessian_products(view, batch, mean)
    residual = _norm({n: products[n] + operator.damping * v - values[n] for n, v in mean.items()}) / _norm(values)
    if not residual < _DIVERGED:
        raise MethodError(
            f"LiSSA diverged (scale={scale:.3g}, damping={operator.damping:g}): (H + damping) times its answer misses "
            f"the query gradients by {residual:.2g} times their size. The Hessian has eigenvalues above twice the "
            "scale or below minus the damping. Give a larger scale or more damping."
        )
    return mean


def _norm(values: Gradients) -> float:
    return torch.stack([torch.linalg.vector_norm(value.double()) for value in values.values()]).norm().item()


def _largest_eigenvalue(view: LossView, draw: _Draw, operator: IterativeInverse) -> float:
    """The largest absolute eigenvalue of H, plus the damping; by power iteration, each step on another batch."""
    generator = torch.Generator().manual_seed(operator.seed)
    vector = {
        name: torch.randn(1, *layer.shape, generator=generator, dtype=torch.float64).to(view.device, view.dtype)
        for name, layer in view.layers.items()
    }
    draws, largest = stream(operator.seed, "LiSSA", "largest eigenvalue"), 0.0
    for batch in draw(draws, _POWER_ITERATIONS):
        norm = _norm(vector)
        vector = hessian_products(view, batch, {name: value / norm for name, value in vector.items()})
        largest = max(largest, _norm(vector))
    return largest + operator.damping


def _drawn(
    view: LossView,
    train: Reader,
    views: int,
    sample_size: int,
    weights_N: Tensor | None,
    draws: np.random.Generator,
    count: int,
) -> Iterator[Batch]:
    """`count` batches of examples, each drawn without replacement from all of the training data.

    Where examples have weights, each comes as often as its weight says. Views take turns from batch to batch.
    """
    size = min(sample_size, len(train))
    if weights_N is None:
        lists = [np.sort(draws.choice(len(train), size, replace=False)) for _ in range(count)]
    else:
        lists = [in_proportion(weights_N.numpy(), size, draws) for _ in range(count)]
    requests = [Request(indices.tolist(), place % views) for place, indices in enumerate(lists)]
    return train.read(requests, view.device)


def in_proportion(weights_N: np.ndarray, size: int, draws: np.random.Generator) -> np.ndarray:
    """`size` indices, of which i comes size * weights_N[i] / sum(weights_N) times on average, and never one off that.

    Systematic sampling: evenly spaced places on a line on which each example has its weight's length, in random order.
    """
    order = draws.permutation(len(weights_N))
    ends = np.cumsum(weights_N[order])
    places = (draws.random() + np.arange(size)) * (ends[-1] / size)
    return np.sort(order[np.searchsorted(ends, np.minimum(places, np.nextafter(ends[-1], 0)), side="right")])
