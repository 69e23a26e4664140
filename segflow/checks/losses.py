"""What every loss of a task must fulfil: it sums over examples that do not meet, repeats itself, and is finite.

Axes: B examples, k features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..curvature.projection import Probes
from ..data.batches import Batch
from ..errors import LayerError, TaskError
from ..model.capture import DetachedError
from ..model.finite_check import FiniteCheck
from ..model.loss_view import LossView
from ..runtime.ranks import Ranks
from ..runtime.sharding import is_sharded
from ..tasks.task import task_name
from .directions import Probed, probed, random_probes
from .probe_examples import ProbeExamples

_FEW = 6  # examples so few that a model that sorts them may leave them as they are: they are tried backwards too
_PERTURBATIONS = 2
_NOISE = 4.0  # times what rounding the parameters changes may be noise


def check_loss(view: LossView, examples: ProbeExamples, where: str) -> set[str]:
    """Raise unless the loss repeats itself, leaves buffers alone, is finite, and is a sum over separate examples.

    That is so of the loss, and of each layer's share of the gradient. It runs at most 4 batches, and each example
    alone; where rounding may explain a difference, each example alone twice more. where: names the checkpoint. Returns
    the layers that were reached; raises TaskError and LayerError.
    """
    along, where = random_probes(view), f"probe of the {view.kind} loss, {where}"
    before = {key: buffer.clone() for key, buffer in view.model.named_buffers()}
    whole = examples.together()
    together = probed(view, whole, along, where)
    with torch.enable_grad():  # parameters are frozen; a task may differentiate by itself
        again = view.loss(whole).detach().double()
    _require_still(view, before)
    _require_repeated(view, together.loss, again)
    if len(examples.alone) == 1:
        return {*together.features}
    alone = [_probed_alone(view, single, along, where) for single in examples.alone]
    noise = lru_cache(1)(partial(_rounding, view, examples.alone, alone, along))
    _require_split(view, together, alone, noise)
    if len(alone) <= _FEW:
        backwards = probed(view, examples.together(backwards=True), along, where)
        _require_split(view, backwards, alone[::-1], noise)
    return {name for probe in (together, *alone) for name in probe.features}


def check_reached(view: LossView, reached: set[str], data: Iterable[Batch], where: str) -> None:
    """Raise unless a training loss reaches every tracked layer, and other losses one or more.

    reached: the layers that are known to be; data: walked only as far as others are still looked for. where: names the
    checkpoint in errors. Raises LayerError, and TaskError for a loss that is not finite.
    """
    finite, found, every = FiniteCheck(f"check, {view.kind} loss, {where}"), set(reached), view.kind == "train"
    for batch in data:
        if found >= set(view.layout.reached) or (found and not every):
            return
        view.capture(batch, lambda layer, _tokens: found.add(layer.name), finite)
    finite.finish(set(view.layout.reached) - reached, Ranks(), every)


def require_no_mean(view: LossView, total: Tensor, parts: Tensor, count: int) -> None:
    """Raise TaskError if what a batch of `count` examples adds up to is its examples' sum over their number."""
    ratio = (total / parts).item()
    if abs(ratio * count - 1) < 0.01:
        raise TaskError(
            f"{task_name(view.task)}: the {view.kind} loss is a mean over the batch: a batch of {count} has "
            f"{ratio:.3g} times the sum of its examples' losses. Return the sum over the batch (reduction='sum')."
        )


def _probed_alone(view: LossView, single: Batch, along: Mapping[str, Probes], where: str) -> Probed:
    """As `probed`, of one example, whose loss may be a constant although others' are not."""
    try:
        return probed(view, single, along, where)
    except DetachedError:
        return Probed(view.loss(single).detach().double(), {}, {})


def _require_still(view: LossView, before: Mapping[str, Tensor]) -> None:
    moved = [key for key, buffer in view.model.named_buffers() if not _same(before[key], buffer)]
    if moved:
        raise TaskError(
            f"{task_name(view.task)}: the forward changes the buffer {moved[0]!r} although the model is in eval mode. "
            "A module runs in train mode (batch norm?) or keeps state; leave the mode alone inside the task."
        )


def _same(before: Tensor, after: Tensor) -> bool:
    if before.shape == after.shape and before.is_floating_point():
        return torch.allclose(before, after, 0.0, 0.0, equal_nan=True)
    return torch.equal(before, after)


def _require_repeated(view: LossView, first: Tensor, second: Tensor) -> None:
    size = torch.maximum(first.abs(), second.abs())
    if (first - second).abs() > _tolerance(view) * size:
        raise TaskError(
            f"{task_name(view.task)}: the {view.kind} loss of one batch was {first.item():.6g}, then "
            f"{second.item():.6g}. Something is random: dropout left on, or noise in the task. Make "
            "compute_train_loss(sample=False) repeat itself."
        )


def _require_split(view: LossView, whole: Probed, alone: Sequence[Probed], noise: Callable[[], _Noise]) -> None:
    """Raise TaskError or LayerError unless a batch's loss and gradients are those of its examples alone.

    noise: what rounding may change; asked for only where something differs.
    """
    parts_B = torch.stack([single.loss for single in alone])
    allowed = 10 * _tolerance(view) * torch.maximum(whole.loss.abs(), parts_B.abs().sum()).item()
    off = (whole.loss - parts_B.sum()).abs().item()
    if off > allowed and off > allowed + _NOISE * noise().loss:
        require_no_mean(view, whole.loss, parts_B.sum(), len(alone))
        raise TaskError(
            f"{task_name(view.task)}: the {view.kind} loss of a batch is {whole.loss.item():.6g}, but its examples' "
            f"losses add up to {parts_B.sum().item():.6g}. The loss must be a sum over examples that do not interact "
            f"(no mean over the batch's tokens, no batch statistics, no row that sees another).{_padding(whole, alone)}"
        )
    for name in dict.fromkeys(name for probe in (whole, *alone) for name in probe.features):
        distance, norm = _difference(name, whole, alone)
        allowed = view.tolerance * norm
        if distance > allowed and distance > allowed + _NOISE * noise().features[name]:
            raise LayerError(
                f"layer {name!r}: an example's gradient of the {view.kind} loss differs alone and in a batch, as where "
                "the model sorts or mixes the examples of a batch, or padding is not masked. Keep examples in order "
                f"in front of the layer and mask what pads them, or leave it out: Analyzer(..., exclude=[{name!r}])."
            )


def _padding(whole: Probed, alone: Sequence[Probed]) -> str:
    """A sentence on padding, where some example has fewer positions alone than in the batch."""
    for name, inputs in whole.inputs.items():
        widths = [single.inputs[name].width for single in alone if name in single.inputs]
        if widths and min(widths) < inputs.width:
            return (
                f" Its examples were padded (one has {min(widths)} positions in layer {name!r} alone, and "
                f"{inputs.width} in the batch), and padding may be what differs: the model needs what masks it "
                "(attention_mask, pad_token_id, position_ids), and its labels must be ignored ones (-100)."
            )
    return ""


class _Difference(NamedTuple):
    """How far features in a batch are from those of each example alone, and how large these are: norms."""

    off: float
    size: float


def _difference(name: str, whole: Probed, alone: Sequence[Probed]) -> _Difference:
    given = next(probe.features[name] for probe in (whole, *alone) if name in probe.features)
    none_1k = torch.zeros_like(given[:1])
    expected_Bk = torch.cat([single.features.get(name, none_1k) for single in alone])
    found_Bk = whole.features.get(name, torch.zeros_like(expected_Bk))
    off = torch.linalg.vector_norm(found_Bk - expected_Bk).item()
    return _Difference(off, torch.linalg.vector_norm(expected_Bk).item())


class _Noise(NamedTuple):
    """What rounding may change: in the loss of a batch, and in each layer's features."""

    loss: float
    features: dict[str, float]


def _rounding(view: LossView, singles: Sequence[Batch], exact: Sequence[Probed], along: Mapping[str, Probes]) -> _Noise:
    """What changes where each parameter is moved by one unit in its last place; exact: of each example as it is.

    Losses and gradients of memorised examples are small differences, of which rounding is a large part, so that no
    relative tolerance would do.
    """
    loss, features = 0.0, dict.fromkeys(along, 0.0)
    for seed in range(0 if is_sharded(view.model) else _PERTURBATIONS):
        with _rounded_otherwise(view.model, seed):
            moved = [_probed_alone(view, single, along, "rounding") for single in singles]
        pairs = list(zip(exact, moved, strict=True))
        loss += sum(abs((a.loss - b.loss).item()) for a, b in pairs)
        for name in along:
            both = [(a.features[name], b.features[name]) for a, b in pairs if name in a.features and name in b.features]
            features[name] += sum((a - b).square().sum().item() for a, b in both) ** 0.5
    return _Noise(loss, features)


@contextmanager
def _rounded_otherwise(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside, each parameter is one unit in its last place off, up or down at random."""
    kept = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    try:
        with torch.no_grad():
            for number, (parameter, value) in enumerate(kept):
                if value.is_floating_point():
                    generator = torch.Generator().manual_seed(1000 * seed + number)
                    signs = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
                    parameter.add_(value * signs.to(value) * torch.finfo(value.dtype).eps)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def _tolerance(view: LossView) -> float:
    """The relative difference that rounding may make between two evaluations of one loss."""
    return 1e-2 if view.layout.coarse else 1e-9 if view.dtype == torch.float64 else 1e-4
