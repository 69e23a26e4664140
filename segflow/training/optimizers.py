"""What SOURCE needs to know of torch's optimizers: their names, constants and second moments.

What the steps moved is known to `motion`; of the preconditioned optimizers P = 1 / (sqrt(v_hat) + eps), which
`curvature.preconditioner` makes of the second moments v_hat. Pure: numbers and tensors in, numbers and tensors out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import TrajectoryError
from .per_step import PerStep, one_by_group

# The optimizers that divide by the root of second moments, and where their state keeps these.
SECOND_MOMENTS = {"Adam": "exp_avg_sq", "AdamW": "exp_avg_sq", "RMSprop": "square_avg", "Adagrad": "sum"}
KNOWN = ("SGD", *SECOND_MOMENTS)  # the optimizers whose effective learning rates are known


@dataclass(frozen=True)
class OptimizerConstants:
    """The optimizer that trained the model; what is PerStep is constant, [steps], or [steps, parameter groups].

    An optimizer that climbed (torch's `maximize=True`) needs nothing here: `Task.compute_train_loss` is always the loss
    that training made *smaller*, hence minus what was climbed.

    Args:
        name: the class name of the torch.optim optimizer, such as "SGD" or "AdamW"; one, or one for each parameter
        group.
        momentum: of SGD and RMSprop, as in torch.optim. dampening: of SGD. beta1: of Adam and AdamW, their first beta.
        weight_decay: as in torch.optim.
        nesterov: Nesterov's form of momentum; one, or one for each parameter group.
        maximize: True if the optimizer climbed; kept for the record, no formula depends on it.
        eps: what Adam, AdamW, RMSprop and Adagrad add to sqrt(v_hat); one number, or one for each parameter group.
        decoupled: True if weight decay bypasses the preconditioner (also Adam's `decoupled_weight_decay=True`).
            None: as the name says, True for AdamW. One, or one for each parameter group.
        batch_size: examples in one optimizer step; needed only where second moments were not saved, so that they must
            be estimated.
    """

    name: str | Sequence[str] = "SGD"
    momentum: PerStep = 0.0
    dampening: PerStep = 0.0
    weight_decay: PerStep = 0.0
    nesterov: bool | Sequence[bool] = False
    maximize: bool = False
    eps: float | Sequence[float] = 1e-8
    decoupled: bool | Sequence[bool] | None = None
    batch_size: int | None = None
    beta1: PerStep = 0.9


def decoupled_by_group(optimizer: OptimizerConstants, kinds: Sequence[str]) -> tuple[bool, ...]:
    """Whether weight decay bypasses P, for each parameter group; kinds: each group's optimizer."""
    if optimizer.decoupled is None:
        return tuple(kind == "AdamW" for kind in kinds)
    return one_by_group("decoupled", optimizer.decoupled, bool, len(kinds))


def has_second_moment(name: str, state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state holds second moments: its optimizer, of that name, keeps some and took a step."""
    return name in SECOND_MOMENTS and SECOND_MOMENTS[name] in state and float(state.get("step", 0)) >= 1


def second_moment(name: str, state: Mapping[str, Any], options: Mapping[str, Any]) -> Tensor | None:
    """The bias-corrected second moments v_hat of one parameter; None if its optimizer keeps none or took no step.

    Adam's are v / (1 - beta2^t), with amsgrad of the largest v so far; RMSprop's are v, where centered less the square
    of the gradients' mean; Adagrad's are the sum of squares.

    Args:
        name: the optimizer's.
        state: what torch's optimizer keeps of the parameter, among it `step`, the parameter's own count t.
        options: those of the parameter's group.
    """
    if not has_second_moment(name, state):
        return None
    raw: Tensor = state[SECOND_MOMENTS[name]].detach()
    if name in ("Adam", "AdamW"):
        raw = state["max_exp_avg_sq"].detach() if options.get("amsgrad") else raw
        return raw / (1 - float(options["betas"][1]) ** float(state["step"]))
    if name == "RMSprop" and options.get("centered"):
        mean = state["grad_avg"].detach()
        variance = raw.addcmul(mean, mean, value=-1)
        rounding = 8 * torch.finfo(raw.dtype).eps * raw  # torch's fused forms round otherwise
        return torch.where((variance < 0) & (variance >= -rounding), 0.0, variance)
    return raw


def require_known(kinds: Sequence[str]) -> None:
    """Raise TrajectoryError if no parameter group was trained with an optimizer whose steps are known."""
    if not set(kinds) & set(KNOWN):
        raise TrajectoryError(
            f"the run was trained with {' and '.join(dict.fromkeys(kinds))}: effective learning rates are known for "
            f"torch.optim's {', '.join(KNOWN[:-1])} and {KNOWN[-1]} only. "
            "Use InfluenceFunction, which needs none, or train with one of these."
        )
