"""Gradients as autograd computes them, and as tokens: for what is not made up of a layer's calls.

Axes: P parts, O outputs, I inputs of a layer, S positions, D either of O and I.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..data.draws import seeded
from ..runtime.sharding import is_sharded
from .layers.tracked import TrackedLayer
from .observing import called_parameters, requiring_grad
from .tokens import Tokens


def autograd_gradients(
    model: nn.Module, layers: Mapping[str, TrackedLayer], loss: Callable[[], Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The gradient [P, O, I] of a loss in each layer, zeros where it is not reached; inside `observing(model)`."""
    by_layer = {} if is_sharded(model) else {name: layer.parameters for name, layer in layers.items()}
    with ExitStack() as stack:
        stack.enter_context(requiring_grad(_flat(by_layer)))
        by_layer = by_layer or stack.enter_context(called_parameters(layers))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(seeded(0))
        total = loss()
        parameters = _flat(by_layer)
        if not total.requires_grad:
            return {name: torch.zeros(layers[name].shape, dtype=dtype, device=total.device) for name in by_layer}
        slopes = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    gradients = iter((slope.to_dense() if slope.is_sparse else slope).to(dtype) for slope in slopes)
    return {name: layers[name].gradient_matrix([next(gradients) for _ in of]) for name, of in by_layer.items()}


def gradient_tokens(matrix_POI: Tensor, layer: TrackedLayer) -> Tokens:
    """Tokens of one example whose product is a gradient: its rows, or its columns where there are fewer.

    For a vector that is one token.
    """
    P, O, I = layer.shape
    if O <= I:
        g_POO = torch.eye(O, dtype=matrix_POI.dtype, device=matrix_POI.device).expand(P, O, O)
        return Tokens(matrix_POI[:, None], g_POO[:, None])
    a_PII = torch.eye(I, dtype=matrix_POI.dtype, device=matrix_POI.device).expand(P, I, I)
    return Tokens(a_PII[:, None], matrix_POI.mT[:, None])


def _flat(by_layer: Mapping[str, list[Tensor]]) -> list[Tensor]:
    return [parameter for parameters in by_layer.values() for parameter in parameters]
