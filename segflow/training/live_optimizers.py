"""What a live optimizer is about to use, what it is called, and what it has done before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..arguments import plain, shown
from ..errors import TrajectoryError
from .optimizers import KNOWN
from .step_log import Numbers

_USED = ("lr", "momentum", "dampening", "weight_decay", "eps", "alpha", "lr_decay", "betas")  # numbers in formulas
_TRUTHS = ("nesterov", "maximize", "amsgrad", "centered", "decoupled_weight_decay")


def unwrapped(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers in what is given: one, a trainer's wrapper of one, or several.

    Raises TrajectoryError for what is none, for one that comes twice, and for numbers that no formula can use.
    """
    given = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    optimizers = [_inner(one) for one in given]
    for one in optimizers:
        if not isinstance(one, torch.optim.Optimizer):
            raise TrajectoryError(
                f"the optimizer is a {type(one).__name__}, which has no step hooks. Expected a torch.optim optimizer, "
                "or a list of them."
            )
        for group in one.param_groups:
            constants(group, optimizer_name(one) in KNOWN)
    if not optimizers or len({id(one) for one in optimizers}) < len(optimizers):
        raise TrajectoryError(f"optimizer: expected one optimizer, or several different ones, found {len(given)}.")
    return optimizers


def _inner(given: Any) -> Any:
    """The optimizer in a trainer's wrapper; one of a library's own that steps another in its own way stays as it is."""
    trainers = ("accelerate", "lightning", "pytorch_lightning", "torch.optim")
    own = isinstance(given, torch.optim.Optimizer) and not type(given).__module__.startswith(trainers)
    return given if own else getattr(given, "optimizer", given)


def numbers(optimizer: torch.optim.Optimizer) -> Numbers:
    """What the optimizer is about to use: for each parameter group the numbers that NUMBERS names, in their order."""
    return tuple([_of_group(group) for group in optimizer.param_groups])


def _of_group(group: Mapping[str, Any]) -> tuple[float, ...]:
    betas, get = group.get("betas"), group.get
    return (
        float(get("lr") or 0.0),  # optimizers that have none, or a schedule of their own, are not known
        float(get("momentum") or 0.0),
        float(betas[0]) if betas else 0.0,
        float(get("dampening") or 0.0),
        float(get("weight_decay") or 0.0),
    )


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's class name, which is torch.optim's own only if the formulas in `optimizers` hold for this run.

    Known reasons why they do not are added in parentheses, so that no formula is found under the name.
    """
    kind, groups = type(optimizer), optimizer.param_groups
    name = kind.__name__ if kind.__module__.startswith("torch.optim.") else f"{kind.__module__}.{kind.__qualname__}"
    mixed = len({bool(group.get("maximize")) for group in groups}) > 1
    return f"{name} (maximize=True in some parameter groups only)" if mixed else name


def constants(group: Mapping[str, Any], known: bool = True) -> dict[str, Any]:
    """A parameter group's options as JSON can hold them.

    Numbers of any kind (NumPy's, tensors of one element) become plain ones. TrajectoryError for an option that formulas
    use and that is no number.

    known: whether there are formulas for the optimizer, which use these options.
    """
    options = {}
    for name, value in group.items():
        if name == "params":
            continue
        converted = _truth(name, value) if name in _TRUTHS else _plain(value)
        if converted is not None or value is None:
            options[name] = converted
        elif name in _USED and known:
            raise TrajectoryError(
                f"the optimizer's option {name}={value!r} is a {type(value).__name__}, expected a number. "
                "Give it as a plain float."
            )
    return options


def _truth(name: str, value: Any) -> bool:
    number = plain(value)
    if isinstance(number, bool | int | float):
        return bool(number)
    raise TrajectoryError(f"the optimizer's option {name}={shown(value)}: expected True or False.")


def _plain(value: Any) -> Any:
    """A finite number, a text, or a list of such; None for anything else."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return None if None in items else items
    try:
        number = value.item() if hasattr(value, "item") else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return number if isinstance(number, bool | int | float) and math.isfinite(number) else None


def steps_taken(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int | None:
    """How many steps an optimizer has taken with a parameter, by its state; None if it has, and does not count them."""
    values: dict[str, Any] = optimizer.state.get(parameter, {})
    if "step" in values:
        return int(values["step"])
    return None if started(optimizer, parameter) else 0


def started(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Whether an optimizer keeps anything of a parameter yet."""
    values: dict[str, Any] = optimizer.state.get(parameter, {})
    return any(value is not None for value in values.values())


def skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer, told so by GradScaler, left the step under way out.

    Reading that waits for the device, once a step, for fused optimizers under a GradScaler only.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
