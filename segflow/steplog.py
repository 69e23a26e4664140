"""What was logged of every step, as tensors [steps, parameter groups]; what is missing or out of range is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import TrajectoryError
from .optimizers import PerStep

_STAGE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def numbers(name: str, given: Any) -> Tensor:
    """What was given as a number, [steps] or [steps, parameter groups], in float64 with a last axis for groups."""
    try:
        values = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise TrajectoryError(
            f"{name}: expected numbers, [steps] or [steps, parameter groups] ({problem})."
        ) from problem
    if values.ndim > 2 or (values.ndim and 0 in values.shape[1:]):
        raise TrajectoryError(
            f"{name} has shape {tuple(values.shape)}: expected a number, [steps] or [steps, parameter groups]."
        )
    return values[:, None] if values.ndim == 1 else values


def every_rate(given: PerStep | Mapping[int, float], total: int) -> Tensor:
    """Learning rates as [steps, parameter groups]; every step up to `total` must have one."""
    if isinstance(given, Mapping):
        values = numbers("learning_rates", list(given.values()))
        rates = torch.full((total, values.shape[1]), torch.nan, dtype=torch.float64)
        for step, rate in zip(given, values, strict=True):
            if step not in range(1, total + 1):
                raise TrajectoryError(f"a learning rate for step {step!r}, but steps run from 1 to {total}.")
            rates[int(step) - 1] = rate
    else:
        rates = numbers("learning_rates", given)
        rates = rates.expand(total, 1) if rates.ndim == 0 else rates
    if len(rates) > total:
        raise TrajectoryError(
            f"learning rates for {len(rates)} steps, but the last checkpoint stands at step {total}. "
            "Training's end must be a checkpoint."
        )
    missing = torch.cat([~torch.isfinite(rates).all(1), torch.ones(total - len(rates), dtype=torch.bool)])
    if missing.any():
        gaps, covered = (_ranges(torch.nonzero(mask).flatten() + 1) for mask in (missing, ~missing))
        raise TrajectoryError(
            f"steps {gaps}: no learning rate was recorded (the log covers {covered or 'nothing'}). "
            "Pass learning_rates= for every step to Trajectory, or record with segflow.record()."
        )
    if (rates < 0).any():
        raise TrajectoryError(f"learning rates must not be negative, found {rates.min().item()}.")
    return rates


def _ranges(steps: Tensor) -> str:
    runs: list[list[int]] = []
    for step in steps.tolist():
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(f"{first}..{last}" if last > first else str(first) for first, last in runs)


def per_step(name: str, given: PerStep, shape: torch.Size, below: float = torch.inf) -> Tensor:
    """A logged value for each of the steps and groups of `shape`; it must be >= 0 and < `below`."""
    values = numbers(name, given)
    if values.ndim and (values.shape[0] != shape[0] or values.shape[1] not in (1, shape[1])):
        raise TrajectoryError(
            f"{name} has shape {tuple(values.shape)}: expected a number, [{shape[0]}] or "
            f"{list(shape)} as learning_rates."
        )
    wrong = values[~((values >= 0) & (values < below))]
    if wrong.numel():
        upper = "" if below == torch.inf else f" and < {below:g}"
        raise TrajectoryError(f"{name}={wrong[0].item():g}: expected finite numbers >= 0{upper}.")
    return values.expand(shape)


def eps_of_groups(given: float | Sequence[float], groups: int) -> tuple[float, ...]:
    """One eps for each parameter group."""
    values = numbers("eps", given).flatten()
    if len(values) not in (1, groups) or not (torch.isfinite(values) & (values >= 0)).all():
        raise TrajectoryError(
            f"eps={given}: expected a finite number >= 0, or one for each of {groups} parameter groups."
        )
    return tuple(values.expand(groups).tolist())


def check_parameter_groups(group_of: Mapping[str, int], known: int) -> None:
    """Raise TrajectoryError unless every parameter is in a group for which learning rates were given."""
    for name, group in group_of.items():
        if not isinstance(group, int) or not 0 <= group < known:
            raise TrajectoryError(
                f"parameter_groups puts {name!r} in group {group!r}, but learning rates cover {known} group(s), "
                "counted from 0. Give learning_rates as [steps, parameter groups]."
            )


def check_stage_name(name: str) -> str:
    """The name, if it can name a folder and a unit; TrajectoryError otherwise."""
    if not isinstance(name, str) or not _STAGE.fullmatch(name):
        raise TrajectoryError(
            f"stage={name!r}: expected a word of letters, digits, '_', '-' and '.', not beginning with '-' or '.'."
        )
    return name
