"""Whether the pseudo-labels of `sample=True` have the exact Gauss-Newton curvature, measured along random directions.

Averaged over draws, the second moment of the sampled loss's gradients must be the Gauss-Newton matrix J^T H J, where J
is the Jacobian of the model's outputs and H the loss's Hessian in the outputs (Martens 2020, arXiv 1412.1193).

J v is computed once for each direction v. An example's sampled gradient along v is then its slopes in the outputs times
J v, so that a draw costs a forward; that the outputs are all that the sampled loss sees of the parameters is tried.

Axes: D draws of pseudo-labels, R directions, B examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..curvature.projection import Probes
from ..data.batches import Batch
from ..errors import TaskError
from ..model.loss_view import LossView
from ..runtime.sharding import is_sharded
from .directions import DIRECTIONS, probed, random_probes
from .gauss_newton import AlongDirections, differentiable, gauss_newton, loss_and_outputs
from .probe_examples import ProbeExamples

_FIRST, _MORE, _MOST = 16, 8, 128  # draws: before the first look at the standard error, between two looks, and at most
_SURE = 3.0  # standard errors
_LARGEST = 1 << 20  # numbers in the outputs and their slopes along all directions: of long ones, few examples suffice


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


def curvature_scale(train: LossView, sample: LossView, examples: ProbeExamples, tolerance: float) -> CurvatureScale:
    """The second moment of sampled gradients, divided by the exact Gauss-Newton curvature.

    Both are summed over random directions, and over as many of the examples as fit a fixed size. train, sample: views
    of the same model. Labels are drawn until the standard error is a quarter of what `tolerance` allows.
    """
    try:
        return _measured(train, sample, examples, tolerance)
    except _NotMeasured as problem:
        return CurvatureScale(None, note=str(problem))


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


class _NotMeasured(Exception):
    """Says why the scale cannot be measured."""


def _measured(train: LossView, sample: LossView, examples: ProbeExamples, tolerance: float) -> CurvatureScale:
    if is_sharded(train.model):
        raise _NotMeasured("the model is sharded; check the task on a small unsharded model")
    along = random_probes(train)
    try:
        batch = _affordable(train, examples)
        exact = gauss_newton(train, batch, along)
    except (RuntimeError, NotImplementedError) as problem:
        raise _NotMeasured(f"no second derivatives: {str(problem).splitlines()[0]}") from problem
    if exact is None or not exact.curvature > 0:
        raise _NotMeasured("the loss has no curvature in any tensor that the model returned")
    _require_all_in_outputs(sample, batch, along, exact)
    slopes_DRB = _drawn_slopes(sample, batch, exact, min(tolerance, 1.25) - 1)
    if getattr(train.task, "draws_labels", True) and bool((slopes_DRB == slopes_DRB[0]).all()):
        raise _NotMeasured("the model is so sure that its pseudo-labels do not vary")
    mean, error = _mean_and_error(slopes_DRB)
    return CurvatureScale(mean / exact.curvature, error / exact.curvature)


def _affordable(view: LossView, examples: ProbeExamples) -> Batch:
    """As many of the examples in a batch as fit `_LARGEST`, at least one."""
    with differentiable(view):
        _, outputs = loss_and_outputs(view, examples.alone[0])
    size = sum(output.numel() for output in outputs)
    return examples.together(max(1, _LARGEST // (DIRECTIONS * max(1, size))))


def _drawn_slopes(sample: LossView, batch: Batch, exact: AlongDirections, allowed: float) -> Tensor:
    """[D, R, B]: the slope of each example's loss along each direction, in draws of pseudo-labels.

    There are as many draws as make the standard error of their mean square a quarter of what is allowed, relative.
    """
    rows: list[Tensor] = []
    for count in range(_FIRST, _MOST + 1, _MORE):
        rows += [_slopes(replace(sample, seed=draw), batch, exact) for draw in range(len(rows), count)]
        mean, error = _mean_and_error(torch.stack(rows))
        if error <= mean * allowed / 4:
            break
    return torch.stack(rows)


def _mean_and_error(slopes_DRB: Tensor) -> tuple[float, float]:
    """The mean over draws of the sum of squares, and its standard error."""
    squares_D = slopes_DRB.square().sum((1, 2))
    return squares_D.mean().item(), (squares_D.std() / len(squares_D) ** 0.5).item()


def _slopes(sample: LossView, batch: Batch, exact: AlongDirections) -> Tensor:
    """[R, B]: the slope of each example's sampled loss along each direction, by its slopes in the outputs."""
    with differentiable(sample):
        loss, outputs = loss_and_outputs(sample, batch)
    if len(outputs) != exact.returned:
        raise _NotMeasured(f"with sample=True the model returns {len(outputs)} tensors instead of {exact.returned}")
    used = [outputs[place] for place in exact.places]
    slopes = torch.autograd.grad(loss, used, allow_unused=True, materialize_grads=True)
    if any(slope.shape != pushed.shape[1:] for slope, pushed in zip(slopes, exact.pushed, strict=True)):
        raise _NotMeasured("with sample=True the model's outputs have other shapes")
    pairs = zip(exact.pushed, slopes, strict=True)
    return torch.stack([_by_example(pushed * slope, batch.size) for pushed, slope in pairs]).sum(0)


def _by_example(rows: Tensor, size: int) -> Tensor:
    """[R, B]: sums over all but the axis of examples, which is the first or second of an output, or part of its first.

    Where that is not so the sums are those of no example, as `_require_all_in_outputs` tells.
    """
    if rows.ndim > 2 and rows.shape[1] != size and rows.shape[2] == size:
        rows = rows.transpose(1, 2)
    if rows.ndim < 2 or rows.shape[1] % size:
        raise _NotMeasured(f"an output of shape {tuple(rows.shape[1:])} has no axis of {size} examples")
    return rows.double().reshape(len(rows), size, -1).sum(-1)


def _require_all_in_outputs(
    sample: LossView, batch: Batch, along: Mapping[str, Probes], exact: AlongDirections
) -> None:
    """Raise unless one draw's slopes are those of the gradients in the layers, of which nothing is then left out."""
    expected_RB = _slopes(sample, batch, exact)
    features = probed(sample, batch, along, "check, slopes").features
    off = torch.linalg.vector_norm(torch.stack([*features.values()]).sum(0).T - expected_RB)
    if off > (0.2 if sample.layout.coarse else 0.01) * torch.linalg.vector_norm(expected_RB):
        raise _NotMeasured("with sample=True the loss depends on the parameters in another way than by those outputs")
