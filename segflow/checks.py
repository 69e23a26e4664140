"""What can be wrong with a task, a model or a trajectory, found on a few batches before hours are spent."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .curvature.passes import covariances
from .data.batches import Batch, batches, in_order
from .errors import LayerError, TaskError
from .methods.plan import Point
from .model.capture import requiring_grad
from .model.finite import FiniteCheck
from .model.layers.registry import LayerChoice
from .model.layers.tracked import TrackedLayer
from .model.loss_view import LossView
from .model.tokens import Tokens
from .runtime.progress import track
from .runtime.ranks import Ranks
from .runtime.sharding import is_sharded
from .scoring.query_sets import query_set
from .stage.context import StageContext
from .tasks.task import defines_output

_FEW = 16  # examples of a batch
_DIRECTIONS = 8  # random directions along which curvatures are compared
_DRAWS = 64  # sampled losses for each batch
_SURE = 3.0  # standard errors


@dataclass(frozen=True)
class CurvatureScale:
    """How many times the exact Gauss-Newton curvature `sample=True` has, with its standard error.

    factor is None where it could not be measured, and `note` says why. fixed: every draw gave the same gradients.
    """

    factor: float | None
    error: float = 0.0
    note: str = ""
    fixed: bool = False

    def __str__(self) -> str:
        if self.factor is None:
            return f"curvature of sample=True: not measured ({self.note})"
        return f"curvature of sample=True: {self.factor:.3g} +- {self.error:.2g} times the exact Gauss-Newton curvature"


@dataclass(frozen=True, repr=False)
class CheckReport:
    """What `Analyzer.check` found to be in order."""

    attributed: int
    parameters: int
    skipped: Mapping[str, str]
    curvature: CurvatureScale
    earlier: Mapping[str, CheckReport] = field(default_factory=dict)  # of earlier stages

    def __str__(self) -> str:
        share = self.attributed / max(1, self.parameters)
        before = [f"stage {name!r}:\n{report}\n\nlast stage:" for name, report in self.earlier.items()]
        lines = [*before, f"attributed: {self.attributed:,} of {self.parameters:,} parameters ({share:.1%})"]
        lines += [f"not attributed: {name or 'the model itself'}: {reason}" for name, reason in self.skipped.items()]
        lines += ["the loss is a sum over the batch, repeats itself, and is finite; every tracked layer is reached"]
        return "\n".join([*lines, str(self.curvature)])

    __repr__ = __str__


def check_checkpoints(contexts: Sequence[StageContext]) -> None:
    """Every checkpoint of these stages fits the model; TrajectoryError for one that does not."""
    points = [
        (context, Point.at(context.stage, index)) for context in contexts for index in range(len(context.trajectory))
    ]
    for context, point in track(points, "checkpoints fit the model", enabled=contexts[-1].settings.progress):
        context.load(point)


def check_stage(context: StageContext, train: Any, query: Any | None) -> CurvatureScale:
    """The training loss of one stage, and the measurement where queries are given; how far its curvature is off."""
    context.load(context.last)
    view = context.loss_view("train", train)
    _check_loss(context, view, train)
    if query is not None:
        query_set(query).check(
            context, view.layers, lambda data: _check_loss(context, context.loss_view("measurement", data), data)
        )
    if defines_output(context.task):
        _check_loss(context, context.loss_view("output", train), train)
    sample = replace(view, kind="sample", seed=context.settings.seed)
    covariances(sample, _few(context, train), Ranks(), f"check, {context.where(context.last)}")
    context.load(Point.at(context.stage, 0))  # the least converged checkpoint: pseudo-labels still vary there
    return curvature_scale(view, sample, next(_few(context, train)))


def _few(context: StageContext, dataset: Any, size: int = _FEW) -> Iterator[Batch]:
    device = next(context.model.parameters()).device
    lists = in_order(min(len(dataset), 4 * size), size)
    return batches(dataset, lists, context.collate_fn, device)


def _check_loss(context: StageContext, view: LossView, dataset: Any) -> None:
    count = min(len(dataset), 16)
    lists = [range(count), *in_order(count, max(1, (count + 1) // 2))]
    whole, *halves = batches(dataset, lists, context.collate_fn, view.device)
    check_sum(view, whole, halves)
    some = range(min(count, 4))
    together, *alone = batches(dataset, [some, *([index] for index in some)], context.collate_fn, view.device)
    check_examples(view, together, alone)
    check_reached(view, _few(context, dataset), context.where(context.last))


def report(model: nn.Module, choice: LayerChoice, curvature: CurvatureScale) -> CheckReport:
    """Put together what was found."""
    attributed = sum(layer.size for layer in choice.tracked.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return CheckReport(attributed, total, choice.skipped, curvature)


def check_sum(view: LossView, whole: Batch, halves: Iterable[Batch]) -> None:
    """The loss repeats itself, leaves buffers alone, is finite, and adds up over the halves of a batch."""
    name = type(view.task).__name__
    before = {key: buffer.clone() for key, buffer in view.model.named_buffers()}
    with torch.enable_grad():  # parameters are frozen; a task may differentiate by itself
        first, second = (view.loss(whole).detach().double() for _ in range(2))
        parts = torch.stack([view.loss(half).detach().double() for half in halves])
    total, size = parts.sum(), torch.maximum(first.abs(), parts.abs().sum()).clamp_min(1e-12)
    moved = [key for key, buffer in view.model.named_buffers() if not torch.equal(before[key], buffer)]
    if moved:
        raise TaskError(
            f"{name}: the forward changes the buffer {moved[0]!r} although the model is in eval mode. A module runs in "
            "train mode (batch norm?) or keeps state; leave the mode alone inside the task."
        )
    if not torch.isfinite(first):
        raise TaskError(f"{name}: the {view.kind} loss of the first batch is {first.item()}, not finite.")
    tolerance = 1e-2 if view.layout.coarse else 1e-9 if view.dtype == torch.float64 else 1e-4
    if (first - second).abs() > tolerance * size:
        raise TaskError(
            f"{name}: the {view.kind} loss of one batch was {first.item():.6g}, then {second.item():.6g}. Something is "
            "random: dropout left on, or noise in the task. Make compute_train_loss(sample=False) repeat itself."
        )
    if (first - total).abs() <= 10 * tolerance * size:
        return
    ratio = (first / total).item()
    if abs(ratio - 0.5) < 0.05:
        raise TaskError(
            f"{name}: the {view.kind} loss is a mean over the batch: a batch has {ratio:.3g} times the sum of its "
            "halves' losses. Return the sum over the batch (reduction='sum')."
        )
    raise TaskError(
        f"{name}: the {view.kind} loss of a batch is {first.item():.6g}, but its halves' losses add up to "
        f"{total.item():.6g}. The loss must be a sum over examples that do not interact (no batch statistics)."
    )


def check_reached(view: LossView, data: Iterable[Batch], where: str) -> None:
    """Every tracked layer is reached by a training loss (one by a measurement), and all that passes is finite."""
    finite = FiniteCheck(f"check, {view.kind} loss, {where}")
    for batch in data:
        view.capture(batch, lambda _layer, _tokens: None, finite)
    finite.finish(view.layout.axes, Ranks(), every=view.kind == "train")


def check_examples(view: LossView, batch: Batch, alone: Iterable[Batch]) -> None:
    """Every layer's rows stand in the batch's order: an example's gradient is the same alone and in a batch."""
    directions = _directions(view)
    together = _slopes(view, batch, directions)
    singles = [_slopes(view, one, directions) for one in alone]
    for name, found_RB in together.items():
        none = torch.zeros_like(found_RB[:, :1])
        expected_RB = torch.cat([single.get(name, none) for single in singles], 1)
        off = torch.linalg.vector_norm(found_RB - expected_RB)
        if off > view.tolerance * torch.linalg.vector_norm(expected_RB):
            raise LayerError(
                f"layer {name!r}: an example's gradient of the {view.kind} loss differs alone and in a batch, as where "
                "the model sorts or mixes the examples of a batch, or padding is not masked. Keep examples in order "
                "in front of the layer and mask what pads them, or leave it out of get_influence_tracked_modules()."
            )


def curvature_scale(train: LossView, sample: LossView, batch: Batch) -> CurvatureScale:
    """Second moment of sampled gradients over the exact Gauss-Newton curvature, along random directions."""
    if is_sharded(train.model):
        return CurvatureScale(None, note="the model is sharded; check the task on a small unsharded model")
    directions = _directions(train)
    try:
        exact = _gauss_newton_forms(train, batch, directions)
    except (RuntimeError, NotImplementedError) as problem:
        return CurvatureScale(None, note=f"no second derivatives: {str(problem).splitlines()[0]}")
    if exact is None or not exact > 0:
        return CurvatureScale(None, note="the loss has no curvature in any tensor that the model returned")
    draws = [replace(sample, seed=draw) for draw in range(_DRAWS)]
    slopes_DLRB = torch.stack([torch.stack(list(_slopes(draw, batch, directions).values())) for draw in draws])
    moments = slopes_DLRB.sum(1).square().sum((1, 2)) / exact  # D draws, L layers, R directions, B examples
    fixed = bool((slopes_DLRB == slopes_DLRB[0]).all())
    return CurvatureScale(moments.mean().item(), (moments.std() / _DRAWS**0.5).item(), fixed=fixed)


def require_scale(scale: CurvatureScale, tolerance: float, task: Any) -> None:
    """Raise TaskError if the sampled curvature is off by more than `tolerance` and surely so."""
    if not tolerance >= 1:
        raise TaskError(f"curvature_tolerance={tolerance}: expected a factor of at least 1.")
    if scale.factor is None or tolerance == float("inf"):
        return
    if scale.fixed:
        raise TaskError(
            f"{type(task).__name__}: compute_train_loss(sample=True) gives the same gradients in every draw, so "
            "`sample` is ignored or its labels are fixed. Draw labels from the model's own outputs, see segflow.Task "
            "(curvature_tolerance=float('inf') accepts it, as an empirical Fisher)."
        )
    low, high = scale.factor - _SURE * scale.error, scale.factor + _SURE * scale.error
    if low <= tolerance and high >= 1 / tolerance:
        return
    raise TaskError(
        f"{type(task).__name__}: the {scale}. SOURCE puts curvature in an exponential, so its scores would be wrong. "
        f"Multiply the sampled loss by {max(scale.factor, 1e-12) ** -0.5:.3g}, and see segflow.Task.compute_train_loss "
        "for what sample=True must return (curvature_tolerance= accepts another factor)."
    )


def _directions(view: LossView) -> dict[str, Tensor]:
    """Random directions [R, P, O, I] for each layer, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(_DIRECTIONS, *layer.shape, generator=generator, dtype=view.dtype).to(view.device)
        for name, layer in view.layers.items()
    }


def _slopes(view: LossView, batch: Batch, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """<G_b, V> for each layer, [R, B]: how each example's loss changes along each direction V."""
    slopes: dict[str, Tensor] = {}

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        projected = torch.einsum("pbsi,rpoi->rpbso", tokens.a_PBSI, directions[layer.name])
        slopes[layer.name] = torch.einsum("rpbso,pbso->rb", projected, tokens.g_PBSO).double()

    view.capture(batch, consume, FiniteCheck("check, slopes"))
    return slopes


def _gauss_newton_forms(view: LossView, batch: Batch, directions: Mapping[str, Tensor]) -> Tensor | None:
    """sum over directions v of (J v)^T H (J v): J of the model's outputs, H the loss's Hessian in the outputs."""
    pairs = [
        pair
        for name, layer in view.layers.items()
        for pair in zip(layer.parameters, layer.by_parameter(directions[name]), strict=True)
    ]
    parameters = [parameter for parameter, _ in pairs]
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.enable_grad(), requiring_grad(parameters), math_only:
        outputs: list[Tensor] = []
        handle = view.model.register_forward_hook(lambda _m, _i, out: _handed_on(out, outputs))
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
        for r in range(_DIRECTIONS):
            form += _one_form(used, parameters, [direction[r] for _, direction in pairs])
    return form


def _one_form(used: list[tuple[Tensor, Tensor]], parameters: list[Tensor], direction: list[Tensor]) -> Tensor:
    """(J v)^T H (J v) for one direction, by differentiating twice."""
    outputs, slopes = [z for z, _ in used], [s for _, s in used]
    dummies = [torch.zeros_like(z, requires_grad=True) for z in outputs]
    pulled = torch.autograd.grad(outputs, parameters, dummies, create_graph=True, allow_unused=True)
    pairs = [(g, v) for g, v in zip(pulled, direction, strict=True) if g is not None]
    pushed = torch.autograd.grad([g for g, _ in pairs], dummies, [v.to(g.dtype) for g, v in pairs])
    bent = torch.autograd.grad(slopes, outputs, pushed, retain_graph=True, allow_unused=True)
    forms = [(u.double() * h.double()).sum() for u, h in zip(pushed, bent, strict=True) if h is not None]
    return torch.stack(forms).sum() if forms else torch.zeros(())


def _handed_on(output: Any, found: list[Tensor]) -> Any:
    """A model's (nested) output with each differentiable tensor copied, the copies collected in `found`.

    The loss depends on a copy only where it uses that very output, not where another output was made from it (as
    logits are from hidden states). What cannot be rebuilt is handed on as it is.
    """
    if isinstance(output, Tensor):
        if not output.requires_grad:
            return output
        found.append(output.clone())
        return found[-1]
    if isinstance(output, MutableMapping):
        rebuilt = copy.copy(output)
        for key, value in output.items():
            rebuilt[key] = _handed_on(value, found)
        return rebuilt
    if isinstance(output, list | tuple):
        items = [_handed_on(value, found) for value in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if is_dataclass(output) and not isinstance(output, type):
        own = [part.name for part in fields(output) if part.init]
        return replace(output, **{name: _handed_on(getattr(output, name), found) for name in own})
    return output
