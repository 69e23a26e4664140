"""What each optimizer step used, read from a live optimizer: learning rates and constants of its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What the log calls a number: what torch's optimizers call it.
_LOGGED = {"learning_rate": "lr", "momentum": "momentum", "dampening": "dampening", "weight_decay": "weight_decay"}


class StepLog:
    """The numbers of every step so far; `uneven`: parameters of one group were trained at different rates."""

    def __init__(self) -> None:
        self.uneven = False
        self._rows: list[list[list[float]]] = []  # [steps][logged numbers][parameter groups]
        self._row: list[list[float]] = []  # of the step under way

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note what the optimizer is about to use."""
        groups = optimizer.param_groups
        self._row = [[float(group.get(key, 0.0)) for group in groups] for key in _LOGGED.values()]

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step; one that raised is never logged, for it was not taken."""
        for group, (divisor, even) in enumerate(rate_divisors(optimizer)):
            if divisor != 1:
                self._row[0][group] /= divisor
            self.uneven |= not even
        self._rows.append(self._row)

    def tensors(self, groups: int) -> dict[str, Tensor]:
        """Each number as [steps, parameter groups]; a group that was added later has zeros before.

        groups: the optimizer's number of parameter groups now.
        """
        width = max(groups, *(len(row[0]) for row in self._rows))
        padded = [[values + [0.0] * (width - len(values)) for values in row] for row in self._rows]
        log = torch.tensor(padded, dtype=torch.float64)
        return {name: log[:, index] for index, name in enumerate(_LOGGED)}


def rate_divisors(optimizer: torch.optim.Optimizer) -> list[tuple[float, bool]]:
    """By what each parameter group's learning rate was divided in the step just taken, and whether for all alike.

    Adagrad divides by 1 + (t - 1) lr_decay, t being each parameter's own count of steps.
    """
    divisors = []
    for group in optimizer.param_groups:
        decay = float(group.get("lr_decay") or 0.0)
        trained = [p for p in group["params"] if p.grad is not None] if decay else []
        states: list[dict[str, Any]] = [optimizer.state.get(parameter, {}) for parameter in trained]
        counts = {float(state["step"]) for state in states if "step" in state}
        divisors.append((1 + (max(counts, default=1.0) - 1) * decay, len(counts) < 2))
    return divisors
