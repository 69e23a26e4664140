"""The exact Gauss-Newton curvature J^T H J of a batch along random directions, by differentiating twice.

J is the Jacobian of the model's outputs in the layers' parameters and H the loss's Hessian in the outputs.

Axes: R directions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..curvature.projection import Probes
from ..data.batches import Batch
from ..model.loss_view import LossView
from ..model.observing import requiring_grad
from .directions import DIRECTIONS


@dataclass(frozen=True)
class AlongDirections:
    """The curvature of a batch's loss along random directions v.

    Args:
        curvature: the sum over directions of (J v)^T H (J v).
        pushed: J v in each output that the loss bends in, [R, ...].
        places: of these outputs among all `returned` ones of the model.
    """

    curvature: float
    pushed: list[Tensor]
    places: list[int]
    returned: int


def gauss_newton(view: LossView, batch: Batch, along: Mapping[str, Probes]) -> AlongDirections | None:
    """None where the loss bends in no output of the model."""
    layers, math_only = view.layers, torch.nn.attention.SDPBackend.MATH
    with differentiable(view) as parameters, torch.nn.attention.sdpa_kernel(math_only):
        loss, outputs = loss_and_outputs(view, batch)
        slopes = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True) if outputs else ()
        places = [place for place, slope in enumerate(slopes) if slope is not None and slope.requires_grad]
        if not places:
            return None
        used, bent = [outputs[place] for place in places], [slopes[place] for place in places]
        jacobian = _Jacobian(used, parameters)
        curvature, columns = 0.0, []
        for r in range(DIRECTIONS):
            direction = [v[0] for name, layer in layers.items() for v in layer.by_parameter(_matrix(along[name], r))]
            pushed = jacobian.times(direction)
            curvature += _bending(bent, used, pushed)
            columns.append(pushed)
    return AlongDirections(
        curvature, [torch.stack(column) for column in zip(*columns, strict=True)], places, len(outputs)
    )


def _matrix(probe: Probes, r: int) -> Tensor:
    """One of a layer's directions, [1, P, O, I]."""
    chosen = torch.zeros(1, DIRECTIONS)
    chosen[0, r] = 1.0
    return probe.gradients(chosen.to(probe.inputs_kPI))


class _Jacobian:
    """J, of outputs in parameters, times directions: by differentiating u^T J in u, where u^T J is made once."""

    def __init__(self, outputs: list[Tensor], parameters: list[Tensor]):
        self._dummies = [torch.zeros_like(z, requires_grad=True) for z in outputs]
        self._pulled = torch.autograd.grad(outputs, parameters, self._dummies, create_graph=True, allow_unused=True)

    def times(self, direction: list[Tensor]) -> list[Tensor]:
        """J v in each output; direction: shaped as the parameters."""
        pairs = [(g, v.to(g.dtype)) for g, v in zip(self._pulled, direction, strict=True) if g is not None]
        pulled, weights = [g for g, _ in pairs], [v for _, v in pairs]
        return list(torch.autograd.grad(pulled, self._dummies, weights, retain_graph=True))


def _bending(slopes: list[Any], outputs: list[Tensor], pushed: list[Tensor]) -> float:
    """u^T H u, where u is a direction in the outputs and `slopes` are the loss's first derivatives in them."""
    bent = torch.autograd.grad(slopes, outputs, pushed, retain_graph=True, materialize_grads=True)
    return sum((u.double() * h.double()).sum().item() for u, h in zip(pushed, bent, strict=True))


@contextmanager
def differentiable(view: LossView) -> Iterator[list[Tensor]]:
    """Inside, the layers' parameters, which it gives, require gradients, so that the model's outputs do."""
    parameters = [parameter for layer in view.layers.values() for parameter in layer.parameters]
    with torch.enable_grad(), requiring_grad(parameters):
        yield parameters


def loss_and_outputs(view: LossView, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """A batch's loss, and copies of all tensors that the model returned, which it depends on instead."""
    outputs: list[Tensor] = []
    handle = view.model.register_forward_hook(lambda _m, _i, output: _with_copies(output, outputs))
    try:
        return view.loss(batch), outputs
    finally:
        handle.remove()


def _with_copies(output: Any, copies: list[Tensor]) -> Any:
    """A model's (nested) output in which each differentiable tensor is a copy; the copies are added to `copies`.

    The loss depends on a copy only where it uses that very output, not where another output was made from it (as
    logits are from hidden states). What cannot be rebuilt stays as it is.
    """
    if isinstance(output, Tensor):
        if not output.requires_grad:
            return output
        copies.append(output.clone())
        return copies[-1]
    if isinstance(output, MutableMapping):
        rebuilt = copy.copy(output)
        for key, value in output.items():
            rebuilt[key] = _with_copies(value, copies)
        return rebuilt
    if isinstance(output, list | tuple):
        items = [_with_copies(value, copies) for value in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if is_dataclass(output) and not isinstance(output, type):
        names = [field.name for field in fields(output) if field.init]
        return replace(output, **{name: _with_copies(getattr(output, name), copies) for name in names})
    return output
