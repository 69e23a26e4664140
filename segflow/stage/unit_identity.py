"""What every unit of a stage is made of, as the store compares it, and how points are called in units' names.

A unit is bound to the model's shapes, the dataset, the task and the checkpoint; where two functions cannot be told
apart by reading their code, their values on some examples tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..data.changing import Reached, settled
from ..data.code_identity import collate_fingerprint, task_fingerprint
from ..data.fingerprints import digest
from ..data.model_identity import model_fingerprint
from ..methods.plan import Point
from ..model.loss_view import LossView
from .context import StageContext
from .probes import probe_again, sampled_probes, steady_probes
from .unfilled import unfilled_digest

_SPELLED_OUT = 6  # steps in a unit's name
SAMPLING_KEYS = ("sampled losses", "batch_size")  # of `sampling_identity`, which who reads a unit does not know


def training_identity(context: StageContext, train: Any, view: LossView) -> dict[str, Any]:
    """What binds every unit of a stage: model, training dataset, collate function and task.

    The dataset's digest is a function, which the store calls when it compares or writes: a pass may read the data
    first. The training losses of some examples are among it, because they change with whatever the loss depends on,
    also where that cannot be read.
    """
    settings, reader = context.settings, context.train_reader(train)
    reader.check_steady(context.ranks)
    fewer = settings.curvature_examples is not None and settings.curvature_examples < len(train)
    examples: dict[str, Any] = {"curvature examples": settings.curvature_examples} if fewer else {}
    if settings.views > 1:
        examples["views"] = settings.views
    view = replace(view, kind="train")
    again = partial(probe_again, context, train, view)
    read = partial(read_and_probed, context, train, view, task_fingerprint)
    collated = partial(settled, partial(collate_fingerprint, context.collate_fn), read, again)
    forward, (collate, (task, losses)) = settled(partial(model_fingerprint, context.model), collated, again)
    return examples | {
        "model": context.shapes,
        "forward": forward,
        "dataset": partial(reader.fingerprint, context.ranks, settings.progress),
        "collate": collate,
        "task": task,
        "training losses": losses,
        "seed": settings.seed,
    }


def read_and_probed(
    context: StageContext, data: Any, view: LossView, read: Callable[[Any, nn.Module], Reached]
) -> tuple[Reached, Any]:
    """What tells one of the task's functions from others: what it reaches, and its values on some of the data.

    view: of that function; read: its fingerprint. What running it changes does not count among what it reaches.
    """
    return settled(
        partial(read, context.task, context.model),
        partial(steady_probes, context, data, view),
        partial(probe_again, context, data, view),
    )


def sampling_identity(context: StageContext, train: Any, sample: LossView, batch_size: int) -> dict[str, Any]:
    """The sampled losses of some examples, and the batch size where pseudo-labels depend on it ("any" where not).

    They do where examples' losses, each in a batch of its own, do not add up to their loss in one batch: the task then
    draws in a way that mixes examples (for a selection of rows, say), and a store keeps its batch size.
    """
    losses, mixes = sampled_probes(context, train, sample)
    return dict(zip(SAMPLING_KEYS, (losses, batch_size if mixes else "any"), strict=True))


def checkpoint_digest(context: StageContext, point: Point) -> str:
    """sha256 of a checkpoint's file (of several: of their digests and weights), the same on every rank.

    Where examples have weights there, a digest of these follows: they are part of what was trained. Where the
    checkpoint leaves a part of the model as it is, a digest of that part does.
    """
    trajectory, checkpoint, rest = context.run.stages[point.stage], None, unfilled_digest(context, point)
    if context.ranks.main:
        digests = [[trajectory.digest(index), weight] for index, weight in point.weights]
        checkpoint = digests[0][0] if len(digests) == 1 else digest(digests)
        weights_N = context.example_weights(point)
        if weights_N is not None:  # rounded, for sums differ between machines
            checkpoint = f"{checkpoint} with example weights {digest(weights_N.float())[:16]}"
        if rest:
            checkpoint = f"{checkpoint} on {rest[:16]}"
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
