"""What SOURCE needs to know of torch's optimizers: their constants, effective learning rates and second moments.

One step goes from theta to theta - rate * P * (gradient + weight decay), with the effective rate and, for the
preconditioned ones, P = 1 / (sqrt(v_hat) + eps). Pure: numbers and tensors in, numbers and tensors out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import TrajectoryError
from .per_step import PerStep

# What each preconditioned optimizer keeps of a parameter, as far as v_hat depends on it.
STATE = {
    "Adam": ("step", "exp_avg_sq", "max_exp_avg_sq"),
    "AdamW": ("step", "exp_avg_sq", "max_exp_avg_sq"),
    "RMSprop": ("step", "square_avg", "grad_avg"),
    "Adagrad": ("step", "sum"),
}


KNOWN = ("SGD", *STATE)  # to SOURCE


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

    @classmethod
    def recorded(cls, content: Mapping[str, Any], log: Mapping[str, Tensor]) -> OptimizerConstants:
        """What trajectory.json and the log of steps say; KeyError, TypeError and the like where they are damaged."""
        groups = content["constants"]
        return cls(
            content["optimizer"],
            log["momentum"],
            log["dampening"],
            log["weight_decay"],
            content["nesterov"],
            content["maximize"],
            [float(group.get("eps", 1e-8)) for group in groups],
            any(group.get("decoupled_weight_decay") for group in groups) or None,
            content.get("batch_size"),
        )


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


def second_moment(name: str, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor | None:
    """The bias-corrected second moments v_hat of one parameter; None if its optimizer keeps none or took no step.

    name: of the optimizer. state: what it keeps of the parameter, under the names in STATE, `step` its own count t.
    options: its parameter group's. Adam: v / (1 - beta2^t), with amsgrad of the largest v so far; RMSprop: v, where
    centered less the mean's square; Adagrad: the sum of squares.
    """
    if name not in STATE or STATE[name][1] not in state or float(state.get("step", 0)) < 1:
        return None
    raw = state[STATE[name][1]].detach()
    if name in ("Adam", "AdamW"):
        raw = state["max_exp_avg_sq"].detach() if options.get("amsgrad") else raw
        return raw / (1 - float(options["betas"][1]) ** float(state["step"]))
    if name == "RMSprop" and options.get("centered"):
        mean = state["grad_avg"].detach()
        variance = raw.addcmul(mean, mean, value=-1)
        rounding = 8 * torch.finfo(raw.dtype).eps * raw  # torch's fused forms round otherwise
        return torch.where((variance < 0) & (variance >= -rounding), 0.0, variance)
    return raw


def second_moments(
    name: str,
    state: Mapping[str, Tensor],
    options: Sequence[Mapping[str, Any]],
    group_of: Callable[[str], int | None],
) -> dict[str, Tensor]:
    """{parameter: second_moment} from {"parameter.key of STATE": tensor}; options: each parameter group's."""
    kept: dict[str, dict[str, Tensor]] = {}
    for place, tensor in state.items():
        parameter, _, key = place.rpartition(".")
        kept.setdefault(parameter, {})[key] = tensor
    found = {parameter: second_moment(name, own, options[group_of(parameter) or 0]) for parameter, own in kept.items()}
    return {parameter: moments for parameter, moments in found.items() if moments is not None}


def precondition(moments: Tensor, eps: float, where: str) -> Tensor:
    """P = 1 / (sqrt(v_hat) + eps), in single precision at least; TrajectoryError naming `where` if it is infinite."""
    found = 1 / (moments.to(torch.promote_types(moments.dtype, torch.float32)).sqrt() + eps)
    if not torch.isfinite(found).all():
        raise TrajectoryError(
            f"{where}: some second moments are 0, and eps={eps:g} does not keep their steps finite. "
            "Give OptimizerConstants the eps > 0 that the optimizer was trained with."
        )
    return found


def described(optimizer: torch.optim.Optimizer, remarks: Sequence[str] = ()) -> str:
    """The optimizer's class name: torch.optim's own, if the formulas here are right for how it is used.

    remarks: what else makes them wrong.
    """
    kind, groups = type(optimizer), optimizer.param_groups
    decaying = [group for group in groups if group.get("weight_decay")]
    found = [*remarks]
    if len({bool(group.get("maximize")) for group in groups}) > 1:
        found.append("maximize=True in some parameter groups only")
    if len({bool(group.get("decoupled_weight_decay")) for group in decaying}) > 1:
        found.append("decoupled_weight_decay=True in some parameter groups only")
    name = kind.__name__ if kind.__module__.startswith("torch.optim.") else f"{kind.__module__}.{kind.__qualname__}"
    return f"{name} ({', '.join(found)})" if found else name


def lr_decays(optimizer: torch.optim.Optimizer) -> list[tuple[float, bool]]:
    """By what each parameter group's learning rate was divided in the step just taken, and whether for all alike.

    Adagrad: 1 + (t - 1) lr_decay, t being each parameter's own count of steps.
    """
    found = []
    for group in optimizer.param_groups:
        decay = float(group.get("lr_decay") or 0.0)
        trained = [p for p in group["params"] if p.grad is not None] if decay else []
        moved = [optimizer.state.get(p, {}) for p in trained]
        steps = {float(own["step"]) for own in moved if "step" in own}
        found.append((1 + (max(steps, default=1.0) - 1) * decay, len(steps) < 2))
    return found


def require_known(name: str) -> None:
    """Raise TrajectoryError unless effective learning rates are known for this optimizer."""
    if name not in KNOWN:
        raise TrajectoryError(
            f"the run was trained with {name}: effective learning rates are known for torch.optim's "
            f"{', '.join(KNOWN[:-1])} and {KNOWN[-1]} only. "
            "Use InfluenceFunction, which needs none, or train with one of these."
        )
