"""What every unit of a stage is made of, as the store compares it, and how points are called in units' names.

A unit is bound to the model's shapes, the dataset, the task and the checkpoint; where two functions cannot be told
apart by reading their code, their values on some examples tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..data.batches import evenly_spaced
from ..data.fingerprints import digest, task_fingerprint
from ..methods.plan import Point
from ..model.loss_view import LossView
from .context import StageContext

_SPELLED_OUT = 6  # steps in a unit's name
SAMPLING_KEYS = ("sampled losses", "batch_size")  # of `sampling_identity`, which who reads a unit does not know
_PROBES = 16  # training examples whose losses tell one task from another


def training_identity(context: StageContext, train: Any, view: LossView) -> dict[str, Any]:
    """What binds every unit of a stage: model, training dataset and task.

    The dataset's digest is a function, which the store calls when it compares or writes: a pass may read the data first.
    The training losses of some examples at the last checkpoint are among it, because they change with whatever the
    loss depends on: the task's tensors and helpers, the collate function.
    """
    settings, reader = context.settings, context.train_reader(train)
    reader.check_steady(context.ranks)
    fewer = settings.curvature_examples is not None and settings.curvature_examples < len(train)
    examples: dict[str, Any] = {"curvature examples": settings.curvature_examples} if fewer else {}
    if settings.views > 1:
        examples["views"] = settings.views
    return examples | {
        "model": context.shapes,
        "dataset": partial(reader.fingerprint, context.ranks, settings.progress),
        "task": task_fingerprint(context.task),
        "training losses": steady_losses(context, train, replace(view, kind="train")),
        "seed": settings.seed,
    }


def sampling_identity(context: StageContext, train: Any, sample: LossView, batch_size: int) -> dict[str, Any]:
    """The sampled losses of some examples, and the batch size where pseudo-labels depend on it ("any" where not).

    They do where examples' losses, each in a batch of its own, do not add up to their loss in one batch: the task then
    draws in a way that mixes examples (for a selection of rows, say), and a store keeps its batch size.
    """
    alone = _probe_losses(context, train, sample)
    probes = evenly_spaced(len(train), _PROBES)
    with torch.enable_grad():
        [together] = [sample.loss(batch) for batch in context.train_reader(train).probes([probes], sample.device)]
    difference = abs(sum(alone) - together.item())
    mixes = difference > max(1e-4, sample.tolerance) * sum(map(abs, alone))
    return dict(zip(SAMPLING_KEYS, (alone, batch_size if mixes else "any"), strict=True))


def steady_losses(context: StageContext, train: Any, view: LossView) -> list[float] | str:
    """The view's losses of some examples at the last checkpoint; "random" where they do not repeat themselves."""
    first, second = (_probe_losses(context, train, view) for _ in range(2))
    return first if first == second else "random"


def _probe_losses(context: StageContext, train: Any, view: LossView) -> list[float]:
    """The view's loss of evenly spaced examples, each a batch of its own, at the last checkpoint."""
    context.load(context.last)
    probes = [[index] for index in evenly_spaced(len(train), _PROBES)]
    torch.manual_seed(context.settings.seed)
    with torch.enable_grad():  # parameters are frozen; a task may differentiate by itself
        losses = [view.loss(batch).detach() for batch in context.train_reader(train).probes(probes, view.device)]
    return torch.stack(losses).tolist()


def checkpoint_digest(context: StageContext, point: Point) -> str:
    """sha256 of a checkpoint's file (of several: of their digests and weights), the same on every rank.

    Where examples have weights there, a digest of these follows: they are part of what was trained.
    """
    trajectory, checkpoint = context.run.stages[point.stage], None
    if context.ranks.main:
        digests = [[trajectory.digest(index), weight] for index, weight in point.weights]
        checkpoint = digests[0][0] if len(digests) == 1 else digest(digests)
        weights_N = context.example_weights(point)
        if weights_N is not None:  # rounded, for sums differ between machines
            checkpoint = f"{checkpoint} with example weights {digest(weights_N.float())[:16]}"
    return str(context.ranks.same(checkpoint))


def point_name(context: StageContext, point: Point) -> str:
    """A point in a unit's name: the steps of its checkpoints, after their stage where that is not the context's."""
    trajectory = context.run.stages[point.stage]
    steps = [str(trajectory.steps[index]) for index, _ in point.weights]
    words = ["step", *steps] if len(steps) == 1 else ["mean", short(steps), rounded(point.weights)]
    return "-".join(([] if point.stage == context.stage else [trajectory.stage]) + words)


def rounded(weights: Sequence[Any]) -> str:
    """A word for weights in a unit's name, the same where they differ by rounding only; they may be nested."""
    return digest([f"{number:.9g}" for number in _numbers(weights)])[:8]


def _numbers(nested: Any) -> list[float]:
    if isinstance(nested, Sequence):
        return [number for part in nested for number in _numbers(part)]
    return [nested]


def short(steps: Sequence[str]) -> str:
    """Steps joined for a unit's name: up to six all, more as the first and the last with a digest of all."""
    if len(steps) <= _SPELLED_OUT:
        return "-".join(steps)
    return f"{steps[0]}-to-{steps[-1]}-{digest(list(steps))[:12]}"
