"""Numbers of every step and parameter group, checked: learning rates and the optimizer's other constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..arguments import plain, shown, whole_number
from ..errors import TrajectoryError
from ..runtime.sharding import plain_name

PerStep = float | Sequence[float] | Sequence[Sequence[float]] | np.ndarray | Tensor


def rates_by_step(given: PerStep | Mapping[int, float], total: int) -> Tensor:
    """Learning rates as [steps, parameter groups]; TrajectoryError unless every step up to `total` has one."""
    if isinstance(given, Mapping):
        values = _numbers("learning_rates", list(given.values()))
        rates = torch.full((total, values.shape[1]), torch.nan, dtype=torch.float64)
        for step, rate in zip(given, values, strict=True):
            rates[whole_number("learning_rates: the step", step, TrajectoryError, 1, total) - 1] = rate
    else:
        rates = _numbers("learning_rates", given)
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


def constant_by_step(
    name: str, given: PerStep, shape: torch.Size, below: float = torch.inf, most: float = torch.inf
) -> Tensor:
    """A constant as [steps, parameter groups]; TrajectoryError unless all are >= 0, < `below` and <= `most`."""
    values = _numbers(name, given)
    if values.ndim and (values.shape[0] != shape[0] or values.shape[1] not in (1, shape[1])):
        raise TrajectoryError(
            f"{name} has shape {tuple(values.shape)}: expected a number, [{shape[0]}] or "
            f"{list(shape)} as learning_rates."
        )
    _check_range(name, values, below, most)
    return values.expand(shape)


Kind = TypeVar("Kind", str, bool)


def one_by_group(name: str, given: Any, kind: type[Kind], groups: int) -> tuple[Kind, ...]:
    """A text or a truth as one for each parameter group; TrajectoryError unless it is one, or one for each."""
    values = (
        (given,) * groups if isinstance(plain(given), kind) else tuple(given if isinstance(given, Sequence) else ())
    )
    values = tuple(map(plain, values))
    if len(values) != groups or not all(isinstance(value, kind) for value in values):
        raise TrajectoryError(
            f"{name}={shown(given)}: expected a {kind.__name__}, or one for each of {groups} parameter group(s)."
        )
    return values


def constant_by_group(name: str, given: float | Sequence[float], groups: int) -> tuple[float, ...]:
    """A constant as one number for each parameter group; TrajectoryError unless all are finite and >= 0."""
    values = _numbers(name, given)
    if values.ndim and values.shape != (groups, 1):
        raise TrajectoryError(
            f"{name} has {values.numel()} numbers, but learning rates cover {groups} parameter group(s). "
            f"Give {name} as one number, or as one for each group."
        )
    _check_range(name, values)
    return tuple(values.flatten().expand(groups).tolist())


def check_parameter_groups(group_of: Mapping[str, int] | None, known: int) -> dict[str, int] | None:
    """The group of each parameter; None: all in the one. TrajectoryError unless each is one of the `known` groups."""
    if group_of is None and known > 1:
        raise TrajectoryError(
            f"learning_rates cover {known} parameter groups, and parameter_groups does not say which parameter "
            "is in which. Pass parameter_groups={parameter name: group}."
        )
    if group_of is None:
        return None
    advice = f"learning_rates cover {known} group(s), counted from 0. Give them as [steps, parameter groups]."
    return {
        plain_name(name): whole_number(f"parameter_groups[{name!r}]", group, TrajectoryError, 0, known - 1, advice)
        for name, group in group_of.items()
    }


def check_batch_size(given: object) -> int | None:
    """The option `batch_size` of a trajectory; TrajectoryError unless it is a number of examples, or None."""
    if given is None:
        return None
    return whole_number("batch_size", given, TrajectoryError, 1, advice="It counts examples of one optimizer step.")


def _check_range(name: str, values: Tensor, below: float = torch.inf, most: float = torch.inf) -> None:
    wrong = values[~((values >= 0) & (values < below) & (values <= most))]
    if wrong.numel():
        upper = "" if below == torch.inf else f" and < {below:g}"
        upper = upper if most == torch.inf else f" and <= {most:g}"
        raise TrajectoryError(f"{name}={wrong[0].item():g}: expected finite numbers >= 0{upper}.")


def _numbers(name: str, given: Any) -> Tensor:
    try:
        if hasattr(given, "__array__") and not isinstance(given, Tensor):
            given = np.array(given)  # a copy that may be written to, also of a column of a frame
        values = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as problem:
        raise TrajectoryError(
            f"{name}: expected numbers, [steps] or [steps, parameter groups] ({problem})."
        ) from problem
    if values.ndim > 2 or (values.ndim and 0 in values.shape[1:]):
        raise TrajectoryError(
            f"{name} has shape {tuple(values.shape)}: expected a number, [steps] or [steps, parameter groups]."
        )
    return values[:, None] if values.ndim == 1 else values


def _ranges(steps: Tensor) -> str:
    runs: list[list[int]] = []
    for step in steps.tolist():
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(f"{first}..{last}" if last > first else str(first) for first, last in runs)
