"""Whether the pseudo-labels of `sample=True` have the exact Gauss-Newton curvature, measured along random directions.

Averaged over draws, the second moment of the sampled loss's gradients must be the Gauss-Newton matrix J^T H J, where J
is the Jacobian of the model's outputs and H the loss's Hessian in the outputs (Martens 2020, arXiv 1412.1193).

Axes: D draws of pseudo-labels, L layers, R directions, B examples.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batch
from ..errors import TaskError
from ..model.loss_view import LossView
from ..model.observing import requiring_grad
from ..runtime.sharding import is_sharded
from .directions import DIRECTIONS, example_slopes, random_directions

_DRAWS = 64  # sampled losses of the batch
_SURE = 3.0  # standard errors


@dataclass(frozen=True)
class CurvatureScale:
    """How many times the exact Gauss-Newton curvature `sample=True` has.

    Args:
        factor: None where it could not be measured.
        error: the factor's standard error.
        note: why it could not be measured.
    """

    factor: float | None
    error: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        if self.factor is None:
            return f"curvature of sample=True: not measured ({self.note})"
        return f"curvature of sample=True: {self.factor:.3g} +- {self.error:.2g} times the exact Gauss-Newton curvature"


def curvature_scale(train: LossView, sample: LossView, batch: Batch) -> CurvatureScale:
    """The second moment of sampled gradients, divided by the exact Gauss-Newton curvature.

    Both are summed over random directions. train, sample: views of the same model.
    """
    if is_sharded(train.model):
        return CurvatureScale(None, note="the model is sharded; check the task on a small unsharded model")
    directions = random_directions(train)
    try:
        exact = _gauss_newton_curvature(train, batch, directions)
    except (RuntimeError, NotImplementedError) as problem:
        return CurvatureScale(None, note=f"no second derivatives: {str(problem).splitlines()[0]}")
    if exact is None or not exact > 0:
        return CurvatureScale(None, note="the loss has no curvature in any tensor that the model returned")
    draws = [replace(sample, seed=draw) for draw in range(_DRAWS)]
    slopes_DLRB = torch.stack([torch.stack(list(example_slopes(draw, batch, directions).values())) for draw in draws])
    moments = slopes_DLRB.sum(1).square().sum((1, 2)) / exact  # D draws, L layers, R directions, B examples
    if getattr(train.task, "draws_labels", True) and bool((slopes_DLRB == slopes_DLRB[0]).all()):
        return CurvatureScale(None, note="the model is so sure that its pseudo-labels do not vary")
    return CurvatureScale(moments.mean().item(), (moments.std() / _DRAWS**0.5).item())


def require_scale(scale: CurvatureScale, tolerance: float, task: Any) -> None:
    """Raise TaskError if the sampled curvature is off by more than `tolerance`, and by three standard errors."""
    if scale.factor is None or tolerance == float("inf"):
        return
    low, high = scale.factor - _SURE * scale.error, scale.factor + _SURE * scale.error
    if low <= tolerance and high >= 1 / tolerance:
        return
    raise TaskError(
        f"{type(task).__name__}: the {scale}. SOURCE puts curvature in an exponential, so its scores would be wrong. "
        f"Multiply the sampled loss by {max(scale.factor, 1e-12) ** -0.5:.3g}, and see segflow.Task.compute_train_loss "
        "for what sample=True must return (curvature_tolerance= accepts another factor)."
    )


def _gauss_newton_curvature(view: LossView, batch: Batch, directions: Mapping[str, Tensor]) -> Tensor | None:
    """The sum over directions v of (J v)^T H (J v); None where the loss bends in no output of the model."""
    pairs = [
        pair
        for name, layer in view.layers.items()
        for pair in zip(layer.parameters, layer.by_parameter(directions[name]), strict=True)
    ]
    parameters = [parameter for parameter, _ in pairs]
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.enable_grad(), requiring_grad(parameters), math_only:
        outputs: list[Tensor] = []
        handle = view.model.register_forward_hook(lambda _m, _i, output: _with_copies(output, outputs))
        try:
            loss = view.loss(batch)
        finally:
            handle.remove()
        if not outputs:
            return None
        slopes = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)
        used = [(z, s) for z, s in zip(outputs, slopes, strict=True) if s is not None and s.requires_grad]
        if not used:
            return None
        form = torch.zeros((), dtype=torch.float64, device=view.device)
        for r in range(DIRECTIONS):
            form += _quadratic_form(used, parameters, [direction[r] for _, direction in pairs])
    return form


def _quadratic_form(used: list[tuple[Tensor, Tensor]], parameters: list[Tensor], direction: list[Tensor]) -> Tensor:
    """(J v)^T H (J v) for one direction v, by differentiating twice; used: outputs, and the loss's slopes in them."""
    outputs, slopes = [z for z, _ in used], [s for _, s in used]
    dummies = [torch.zeros_like(z, requires_grad=True) for z in outputs]
    pulled = torch.autograd.grad(outputs, parameters, dummies, create_graph=True, allow_unused=True)
    pairs = [(g, v) for g, v in zip(pulled, direction, strict=True) if g is not None]
    pushed = torch.autograd.grad([g for g, _ in pairs], dummies, [v.to(g.dtype) for g, v in pairs])
    bent = torch.autograd.grad(slopes, outputs, pushed, retain_graph=True, allow_unused=True)
    forms = [(u.double() * h.double()).sum() for u, h in zip(pushed, bent, strict=True) if h is not None]
    return torch.stack(forms).sum() if forms else torch.zeros(())


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
