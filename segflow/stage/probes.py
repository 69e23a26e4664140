"""Losses of a few examples, which tell two functions apart where reading their code does not.

They are taken at a stage's last checkpoint, and at parameters near it, where a model that has memorised its data has
losses of ordinary size as well; alone, and some of them in one batch, for which a collate function pads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import evenly_spaced
from ..data.draws import seeded
from ..data.generators import Generators
from ..errors import SegflowError, TaskError
from ..model.loss_view import LossView
from ..runtime.sharding import laid_out, named_parameters
from .context import StageContext
from .joining import joinable
from .unfilled import unfilled

_PROBES = 16  # examples whose losses tell one task from another
_TOGETHER = 4  # of them, those that are run in one batch as well
_SEED = 0  # of the perturbation and of what a loss draws, whatever the seed of the pseudo-labels is
_NEAR = 1.0  # the standard deviation of the logarithm of a perturbed parameter's size
_REPEATS = 1e-4  # relative; accelerators add up in another order each time
Losses = Callable[[], list[float]]


def steady_probes(context: StageContext, data: Any, view: LossView) -> dict[str, Any]:
    """The view's losses of some examples, as the store has them: at the last checkpoint, and at perturbed parameters.

    At each of these of the first examples in one batch, and of every one alone. Random functions are seeded. Raises
    TaskError where the loss does not repeat itself even so.
    """
    chosen = evenly_spaced(len(data), _PROBES)
    together = joinable(context.reader_of(view.kind, data), view.device, chosen[:_TOGETHER])
    lists = [*filter(None, [together]), *([index] for index in chosen)]
    losses = partial(_steady, context, data, view, lists)
    return {"probes": _noting(together, _at_both(context, losses, losses))}


def probe_again(context: StageContext, data: Any, view: LossView) -> None:
    """Run the loss of some of the probes once more."""
    context.load(context.last)
    _losses(context, data, view, [evenly_spaced(len(data), _PROBES)[:_TOGETHER]])


def sampled_probes(context: StageContext, data: Any, sample: LossView) -> tuple[dict[str, Any], bool]:
    """The same of pseudo-labels; and whether losses of examples alone do not add up to their loss in one batch.

    They are said not to where no examples can be joined, as nothing is known of batches.
    """
    chosen, losses = evenly_spaced(len(data), _PROBES), partial(_losses, context, data, sample)
    together = joinable(context.reader_of(sample.kind, data), sample.device, chosen)
    alone = [[index] for index in together or chosen]
    if not together:
        return {"probes": _noting(together, _at_both(context, partial(losses, alone), partial(losses, alone)))}, True
    points = _at_both(context, partial(losses, [together, *alone]), partial(losses, [together]))
    total, *parts = map(float, points[0])
    mixes = abs(sum(parts) - total) > max(1e-4, sample.tolerance) * sum(map(abs, parts))
    return {"probes": points}, mixes


def _noting(together: list[int], points: list[list[Any]]) -> list[list[Any]]:
    """The points, the first of which says so where no examples could be joined."""
    return points if together else [["not joined", *points[0]], *points[1:]]


def _at_both(context: StageContext, at_last: Losses, near_it: Losses) -> list[list[Any]]:
    """Losses at the last checkpoint, and at perturbed parameters; there, the name of the error where there are none."""
    context.load(context.last)
    points: list[list[Any]] = [[*at_last()]]
    try:
        perturb(context.model, _SEED, unfilled(context, context.last))
        points.append([*near_it()])
    except torch.OutOfMemoryError:
        raise
    except (SegflowError, ValueError, ArithmeticError, RuntimeError, AssertionError) as problem:  # the loss refuses
        points.append([type(problem).__name__])
    finally:
        context.load(context.last)
    return [list(map(_plain, numbers)) for numbers in points]


@torch.no_grad()
def perturb(model: nn.Module, seed: int, kept: Collection[str] = ()) -> None:
    """Scale every parameter by random factors of its rows and columns, which keep its sign and its mean square.

    The factors are the same on every rank, also where parameters are spread over the ranks, and on every machine.
    kept: the names of parameters to leave as they are, which no checkpoint would put back.
    """
    generator, factors = torch.Generator().manual_seed(seed), {}
    for name, parameter in named_parameters(model).items():
        if name not in kept and (parameter.is_floating_point() or parameter.is_complex()):
            factors[name] = _factors(parameter.shape, generator)
    spread = laid_out(factors, model)
    for name, parameter in named_parameters(model).items():
        if name in spread:
            parameter.mul_(spread[name].to(parameter.device, parameter.dtype))


def _factors(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """exp(s z - s^2) for each entry, z being standard normal, made of a factor for each row and one for each column."""
    axes = range(len(shape)) if len(shape) < 2 else (0, len(shape) - 1)
    spread, product = _NEAR / max(1, len(axes)) ** 0.5, torch.ones((), dtype=torch.float64)
    for axis in axes:
        normal = torch.randn(shape[axis], generator=generator, dtype=torch.float64)
        along = [-1 if other == axis else 1 for other in range(len(shape))]
        product = product * (spread * normal - spread**2).exp().reshape(along)
    return product.expand(tuple(shape))


def _steady(context: StageContext, data: Any, view: LossView, lists: list[list[int]]) -> list[float]:
    """The losses at the parameters in the model; TaskError where the first is another one the second time."""
    losses = _losses(context, data, view, lists)
    [again] = _losses(context, data, view, lists[:1])
    if abs(losses[0] - again) > _REPEATS * max(map(abs, [*losses, again])):
        raise TaskError(
            f"{type(view.task).__name__}: the {view.kind} loss of one batch was {losses[0]:.6g}, then {again:.6g}, "
            "although torch's, NumPy's and Python's random functions were seeded alike. A store could not tell it from "
            "that of another task. Draw in it with torch's random functions, from no generator of your own."
        )
    return losses


def _losses(context: StageContext, data: Any, view: LossView, lists: list[list[int]]) -> list[float]:
    """The view's loss of each list of examples, at the parameters in the model."""
    with _seeded(_SEED), torch.enable_grad():  # a task may differentiate by itself
        losses = [view.loss(batch).detach() for batch in context.reader_of(view.kind, data).probes(lists, view.device)]
    numbers: list[float] = torch.stack(losses).double().tolist()
    return numbers


def _plain(number: Any) -> Any:
    """A number, or the name of one that JSON does not have."""
    return number if isinstance(number, str) or math.isfinite(number) else str(number)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, torch, NumPy and Python draw what they always draw for a seed; afterwards they go on where they were."""
    generators = Generators()
    before = generators.states()
    try:
        with seeded(seed):
            generators.seed(seed % 2**32)
            yield
    finally:
        generators.restore(before)
