"""What SOURCE needs to know of torch's optimizers: their constants, effective learning rates and second moments.

One step goes from theta to theta - rate * P * (gradient + weight decay * theta) with the effective learning rate; of
the preconditioned optimizers P = 1 / (sqrt(v_hat) + eps), which `curvature.preconditioner` makes of the second moments
v_hat; decoupled weight decay bypasses P. Pure: numbers and tensors in, numbers and tensors out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import TrajectoryError
from .per_step import PerStep

# The optimizers that divide by the root of second moments, and where their state keeps these.
SECOND_MOMENTS = {"Adam": "exp_avg_sq", "AdamW": "exp_avg_sq", "RMSprop": "square_avg", "Adagrad": "sum"}
KNOWN = ("SGD", *SECOND_MOMENTS)  # the optimizers whose effective learning rates are known


@dataclass(frozen=True)
class OptimizerConstants:
    """The optimizer that trained the model; what is PerStep is constant, [steps], or [steps, parameter groups].

    An optimizer that climbed (torch's `maximize=True`) needs nothing here: `Task.compute_train_loss` is always the loss
    that training made *smaller*, hence minus what was climbed.

    Args:
        name: the class name of the torch.optim optimizer, such as "SGD" or "AdamW".
        momentum: of SGD and RMSprop, as in torch.optim. dampening: of SGD.
        weight_decay: as in torch.optim.
        nesterov: Nesterov's form of momentum; it has heavy-ball's effective learning rate.
        maximize: True if the optimizer climbed; kept for the record, no formula depends on it.
        eps: what Adam, AdamW, RMSprop and Adagrad add to sqrt(v_hat); one number, or one for each parameter group.
        decoupled: True if weight decay bypasses the preconditioner (also Adam's `decoupled_weight_decay=True`).
            None: as the name says, True for AdamW.
        batch_size: examples in one optimizer step; needed only where second moments were not saved, so that they must
            be estimated.
    """

    name: str = "SGD"
    momentum: PerStep = 0.0
    dampening: PerStep = 0.0
    weight_decay: PerStep = 0.0
    nesterov: bool = False
    maximize: bool = False
    eps: float | Sequence[float] = 1e-8
    decoupled: bool | None = None
    batch_size: int | None = None


def effective_rates(name: str, rates: Tensor, momentum: Tensor, dampening: Tensor) -> Tensor:
    """What one step moves by for each unit of P * gradient, all [steps, parameter groups].

    Heavy-ball momentum m multiplies a rate by 1/(1 - m), the limit of its velocity, and SGD's dampening d by 1 - d.
    Adam's first moments are averages that keep a gradient's scale; Adagrad's rates are logged as they decay.
    """
    if name == "SGD":  # torch.optim.SGD dampens only where it has momentum
        return torch.where(momentum == 0, rates, rates * (1 - dampening) / (1 - momentum))
    return rates / (1 - momentum) if name == "RMSprop" else rates


def mean_decay(rates: Tensor, decay: Tensor) -> tuple[float, ...]:
    """Weight decay [steps, parameter groups] averaged over steps by effective rate; evenly where all rates are 0."""
    total = rates.sum(0)
    mean = torch.where(total > 0, (rates * decay).sum(0) / total.clamp_min(1e-300), decay.mean(0))
    return tuple(mean.tolist())


def second_moment(name: str, state: Mapping[str, Any], options: Mapping[str, Any]) -> Tensor | None:
    """The bias-corrected second moments v_hat of one parameter; None if its optimizer keeps none or took no step.

    Adam's are v / (1 - beta2^t), with amsgrad of the largest v so far; RMSprop's are v, where centered less the square
    of the gradients' mean; Adagrad's are the sum of squares.

    Args:
        name: the optimizer's.
        state: what torch's optimizer keeps of the parameter, among it `step`, the parameter's own count t.
        options: those of the parameter's group.
    """
    if name not in SECOND_MOMENTS or SECOND_MOMENTS[name] not in state or float(state.get("step", 0)) < 1:
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


def require_known(name: str) -> None:
    """Raise TrajectoryError unless effective learning rates are known for this optimizer."""
    if name not in KNOWN:
        raise TrajectoryError(
            f"the run was trained with {name}: effective learning rates are known for torch.optim's "
            f"{', '.join(KNOWN[:-1])} and {KNOWN[-1]} only. "
            "Use InfluenceFunction, which needs none, or train with one of these."
        )
