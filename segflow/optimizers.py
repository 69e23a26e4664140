"""What optimizers do to a gradient: effective learning rates, second moments, and which of them precondition.

One step is theta <- theta - rate * (P * gradient + decay * theta), with P = 1 for SGD and
P = 1 / (sqrt(second moment) + eps) for Adam, AdamW, RMSprop and Adagrad (decay inside the gradient where it is
coupled).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

PerStep = float | Sequence[float] | Sequence[Sequence[float]] | np.ndarray | Tensor
PRECONDITIONED = ("Adam", "AdamW", "RMSprop", "Adagrad")
KNOWN = ("SGD", *PRECONDITIONED)


@dataclass(frozen=True)
class OptimizerConstants:
    """Draft."""

    name: str = "SGD"
    momentum: PerStep = 0.0
    dampening: PerStep = 0.0
    weight_decay: PerStep = 0.0
    nesterov: bool = False
    maximize: bool = False
    eps: float | Sequence[float] = 1e-8
    decoupled: bool | None = None
    batch_size: int | None = None

    @property
    def preconditioned(self) -> bool:
        """Whether steps are scaled elementwise by 1 / (sqrt(second moment) + eps)."""
        return self.name in PRECONDITIONED

    @property
    def is_decoupled(self) -> bool:
        """Whether weight decay is not preconditioned: in SGD, where there is nothing to tell, and in AdamW."""
        return self.name in ("SGD", "AdamW") if self.decoupled is None else self.decoupled


def effective_rates(name: str, rates: Tensor, momentum: Tensor, dampening: Tensor) -> Tensor:
    """Effective learning rates."""
    if name not in ("SGD", "RMSprop"):
        return rates
    return torch.where(momentum == 0, rates, rates * (1 - dampening) / (1 - momentum))


def logged_rate(name: str, group: Mapping[str, Any], steps_before: int) -> float:
    """The learning rate of the step to come; Adagrad's decays inside the optimizer."""
    rate = float(group.get("lr", 0.0))
    return rate / (1 + steps_before * float(group.get("lr_decay", 0.0))) if name == "Adagrad" else rate


def second_moment(name: str, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
    """The bias-corrected second moment of one parameter, from its optimizer state; None if there is none."""
    if name in ("Adam", "AdamW") and "exp_avg_sq" in state:
        raw: Tensor = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        return raw / (1 - float(group["betas"][1]) ** float(state["step"]))
    if name == "RMSprop" and "square_avg" in state:
        average: Tensor = state["square_avg"]
        return (average - state["grad_avg"].square()).clamp_min(0) if group.get("centered") else average
    if name == "Adagrad" and "sum" in state:
        total: Tensor = state["sum"]
        return total
    return None
