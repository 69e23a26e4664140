"""The learning rate of every step of a transformers Trainer, rebuilt from the schedule's definition, and checked.

A LambdaLR scheduler gives step k (from 1) the rate base * factor(k - 1). A Trainer logs few of the rates; what it has
logged, and what it has saved of the scheduler, must meet the definition. Pure: numbers in, numbers out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import TrajectoryError

_CLOSE = 1e-6  # of a logged rate to the definition's, relative to the larger of it and a thousandth of the base rate
_GIVE = "Give learning_rates=, the rate of every optimizer step, or args=, the TrainingArguments of this run."


@dataclass(frozen=True)
class ScheduleDefinition:
    """What a Trainer's scheduler was made of.

    Args:
        kind: the value of transformers' SchedulerType, such as "linear".
        warmup: steps of warm-up. total: optimizer steps that were planned.
        base: the rate that the optimizer was made with. options: `lr_scheduler_kwargs`.
    """

    kind: str
    warmup: int
    total: int
    base: float
    options: Mapping[str, Any] = field(default_factory=dict)


def schedule_factors(definition: ScheduleDefinition, count: int) -> np.ndarray:
    """What the base rate is multiplied by in each of the first `count` steps, [count].

    TrajectoryError where the definition makes no schedule that depends on the step alone.

    Example:
        >>> schedule_factors(ScheduleDefinition("linear", 2, 4, 1e-3), 5).tolist()
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    kind, steps = definition.kind, np.arange(count, dtype=np.float64)
    try:
        if kind in _FORMULAS:
            factors = _FORMULAS[kind](steps, definition, **definition.options)
        else:
            factors = _of_transformers(definition, steps)
    except (TypeError, ValueError, ArithmeticError) as problem:
        raise TrajectoryError(
            f"the schedule {kind!r} with {dict(definition.options)} cannot be rebuilt ({problem}). {_GIVE}"
        ) from problem
    warming = kind not in ("constant", *_OWN_WARMUP) and steps < definition.warmup
    return np.where(warming, steps / max(1, definition.warmup), factors)


def _progress(steps: np.ndarray, made: ScheduleDefinition) -> np.ndarray:
    return (steps - made.warmup) / max(1, made.total - made.warmup)


def _constant(steps: np.ndarray, made: ScheduleDefinition) -> np.ndarray:
    return np.ones_like(steps)


def _linear(steps: np.ndarray, made: ScheduleDefinition) -> np.ndarray:
    return np.maximum(0.0, (made.total - steps) / max(1, made.total - made.warmup))


def _cosine(
    steps: np.ndarray,
    made: ScheduleDefinition,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> np.ndarray:
    least = min_lr / made.base if min_lr is not None else min_lr_rate or 0.0
    wave = 0.5 * (1 + np.cos(math.pi * num_cycles * 2 * _progress(steps, made)))
    return np.maximum(0.0, wave * (1 - least) + least)


def _restarts(steps: np.ndarray, made: ScheduleDefinition, num_cycles: int = 1) -> np.ndarray:
    progress = _progress(steps, made)
    wave = 0.5 * (1 + np.cos(math.pi * ((num_cycles * progress) % 1.0)))
    return np.where(progress >= 1, 0.0, np.maximum(0.0, wave))


def _polynomial(steps: np.ndarray, made: ScheduleDefinition, lr_end: float = 1e-7, power: float = 1.0) -> np.ndarray:
    left = np.clip(1 - (steps - made.warmup) / max(1, made.total - made.warmup), 0.0, 1.0)
    return ((made.base - lr_end) * left**power + lr_end) / made.base


def _inverse_sqrt(steps: np.ndarray, made: ScheduleDefinition, timescale: int | None = None) -> np.ndarray:
    scale = (made.warmup or 10_000) if timescale is None else timescale
    return 1 / np.sqrt((np.maximum(steps, made.warmup) + scale - made.warmup) / scale)


_FORMULAS: dict[str, Callable[..., np.ndarray]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_min_lr": _cosine,
    "cosine_with_restarts": _restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
}
_OWN_WARMUP = ("cosine_warmup_with_min_lr", "warmup_stable_decay")  # transformers' own, which warm up in their own way


def _of_transformers(made: ScheduleDefinition, steps: np.ndarray) -> np.ndarray:
    """The factors of a schedule whose formula is transformers' alone, if it is imported."""
    if made.kind not in _OWN_WARMUP:
        raise ValueError("its rates do not follow from the step alone")
    if (transformers := sys.modules.get("transformers")) is None:
        raise ValueError("transformers, whose formula it is, is not imported")
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=made.base)
    scheduler = transformers.get_scheduler(made.kind, optimizer, made.warmup, made.total, dict(made.options))
    return np.array([scheduler.lr_lambdas[0](int(step)) for step in steps], dtype=np.float64)


@dataclass(frozen=True)
class LoggedRate:
    """A learning rate that was logged after a step.

    Args:
        step: the Trainer's global step. rate: of the first parameter group.
        skipped: how many of the steps up to it the optimizer may have left out, the least and the most.
    """

    step: int
    rate: float
    skipped: tuple[int, int] = (0, 0)


def check_logged(rates: Sequence[float], logged: Iterable[LoggedRate], base: float) -> None:
    """Raise TrajectoryError, naming the first point, unless all logged rates are those of the steps.

    Trainers log after a step either its own rate or, before transformers 5, that of the next one; which of the two is
    told by the points themselves, and must be the same for all of them.

    Args:
        rates: of every optimizer step, and of the one after the last.
    """
    points = list(logged)
    odd = [[point for point in points if not _meets(rates, point, later, base)] for later in (0, 1)]
    if all(odd):
        point = max((missed[0] for missed in odd), key=lambda missed: missed.step)
        expected = " or, of the next step, ".join(
            f"{rates[place]:g}" for place in (point.step - 1, point.step) if place < len(rates)
        )
        raise TrajectoryError(
            f"trainer_state.json: step {point.step} was logged with a learning rate of {point.rate:g}, and the "
            f"schedule says {expected}. {_GIVE}"
        )


def _meets(rates: Sequence[float], point: LoggedRate, later: int, base: float) -> bool:
    least, most = point.skipped
    places = range(point.step - 1 + later - most, point.step + later - least)
    return any(0 <= place < len(rates) and is_close(rates[place], point.rate, base) for place in places)


def is_close(rate: float, other: float, base: float) -> bool:
    """Whether two rates are the same but for rounding."""
    return abs(rate - other) <= _CLOSE * max(abs(rate), abs(other), 1e-3 * base)
