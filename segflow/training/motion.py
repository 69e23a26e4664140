"""What really moved the parameters: each step's rate, times the data's gradient, and decay, times the parameter.

To first order training moved the parameters by minus the sum over steps of rate * P * gradient + decay * parameter, P
being the preconditioner of Adam and its like (1 for SGD). With momentum a gradient goes on moving the parameters in
later steps, so its rate is the sum of what those steps take of it, up to the end of training. Gradient clipping scales
gradients and not weight decay, which optimizers add afterwards. Pure: numbers in, numbers out.

Axes: T steps, G parameter groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..arguments import real_number
from ..errors import TrajectoryError
from .optimizers import OptimizerConstants
from .per_step import PerStep, constant_by_group, constant_by_step, one_by_group


@dataclass(frozen=True)
class Moves:
    """Which steps moved which parameters: each a constant, [steps], or [steps, parameter groups].

    Args:
        clip_factors: what clipping by norm left of the gradients, from 0 to 1.
        moved: 1 for a step in which the optimizer stepped the parameters, 0 where they had no gradient.
        carried: 1 where that step's gradient was the data's, 0 where it was all zeros, as that of parameters that were
            left out and whose gradients were zeroed; None: as `moved`.
        left_out: 1 for a step in which parameters in training were reached by no gradient of the batch, so that it did
            not carry; 0 where they were frozen.
        fresh: 1 where the optimizer began with no state of the parameters, so that momentum and step counts begin;
            None: at the first step, unless steps were taken before.
        taken_before: how many steps the optimizer had taken before the first one, for each parameter group.
        gradient_scale: what a step's gradient was a multiple of: 1 for the gradient of the mean loss over examples, 4
            where the mean losses of 4 accumulated batches were added up.
    """

    clip_factors: PerStep = 1.0
    moved: PerStep = 1.0
    carried: PerStep | None = None
    left_out: PerStep = 0.0
    fresh: PerStep | None = None
    taken_before: float | Sequence[float] = 0.0
    gradient_scale: float = 1.0


@dataclass(frozen=True)
class Steps:
    """Every step's numbers as the formulas need them, all [T, G].

    Args:
        kinds: each parameter group's optimizer, by its class name. nesterov, decoupled: of each parameter group.
        taken_before: steps that each group's optimizer had taken before the first one, [G].
        learning_rates: and the others as in `OptimizerConstants` and `Moves`.
    """

    kinds: tuple[str, ...]
    nesterov: tuple[bool, ...]
    decoupled: tuple[bool, ...]
    taken_before: np.ndarray
    learning_rates: np.ndarray
    momentum: np.ndarray
    beta1: np.ndarray
    dampening: np.ndarray
    weight_decay: np.ndarray
    clip_factors: np.ndarray
    moved: np.ndarray
    carried: np.ndarray
    left_out: np.ndarray
    fresh: np.ndarray
    gradient_scale: float = 1.0

    def differing(self, first: int, second: int) -> list[str]:
        """What differs in the steps of two parameter groups, in words."""
        columns = {
            "learning rate": self.learning_rates,
            "momentum": self.momentum,
            "beta1": self.beta1,
            "dampening": self.dampening,
            "weight decay": self.weight_decay,
            "clipping": self.clip_factors,
            "steps that moved it": np.stack([self.moved, self.carried, self.left_out, self.fresh]),
            "steps before": self.taken_before,
            "optimizer": np.array(list(zip(self.kinds, self.nesterov, self.decoupled, strict=True)), dtype=object).T,
        }
        return [name for name, values in columns.items() if (values[..., first] != values[..., second]).any()]

    def mean_squared_factor(self, group: int, steps: range) -> float:
        """What gradients were multiplied by, squared: a parameter group's mean over those of some steps that carried.

        That is the clip factors and the scale; the scale alone if no step carried.
        """
        here = slice(steps.start, steps.stop)
        factors = self.clip_factors[here, group][self.carried[here, group] > 0]
        return self.gradient_scale**2 * (float(np.square(factors).mean()) if len(factors) else 1.0)


def steps_used(
    learning_rates: Tensor,
    optimizer: OptimizerConstants,
    moves: Moves,
    kinds: tuple[str, ...],
    decoupled: tuple[bool, ...],
) -> Steps:
    """Every step's numbers, checked; TrajectoryError names those that do not fit learning_rates [T, G]."""
    shape = learning_rates.shape
    unknown = torch.nonzero(~torch.isfinite(torch.as_tensor(moves.clip_factors, dtype=torch.float64)))
    if len(unknown):
        raise TrajectoryError(
            f"step {int(unknown[0][0]) + 1 if unknown.shape[1] else 1}: the clip factor is no finite number, for the "
            "gradients' norm was none. Leave such steps out, as GradScaler does, or end the run before them."
        )
    before = np.array(constant_by_group("taken_before", moves.taken_before, len(kinds)))
    first = torch.zeros(shape, dtype=torch.float64)
    first[:1] = torch.from_numpy(before == 0).double()
    moved = constant_by_step("moved", moves.moved, shape, most=1.0)
    given = {
        "learning_rates": learning_rates,
        "momentum": constant_by_step("momentum", optimizer.momentum, shape, below=1.0),
        "beta1": constant_by_step("beta1", optimizer.beta1, shape, below=1.0),
        "dampening": constant_by_step("dampening", optimizer.dampening, shape),
        "weight_decay": constant_by_step("weight_decay", optimizer.weight_decay, shape),
        "clip_factors": constant_by_step("clip_factors", moves.clip_factors, shape, most=1.0),
        "moved": moved,
        "carried": moved if moves.carried is None else constant_by_step("carried", moves.carried, shape, most=1.0),
        "left_out": constant_by_step("left_out", moves.left_out, shape, most=1.0),
        "fresh": first if moves.fresh is None else constant_by_step("fresh", moves.fresh, shape, most=1.0),
    }
    for name in ("moved", "carried", "left_out", "fresh"):
        values = given[name]
        if ((values != 0) & (values != 1)).any():
            raise TrajectoryError(f"Moves({name}=...): expected 1 or 0 for each step, found {values.max().item():g}.")
    return Steps(
        kinds=kinds,
        decoupled=decoupled,
        nesterov=one_by_group("nesterov", optimizer.nesterov, bool, len(kinds)),
        taken_before=before,
        gradient_scale=real_number("gradient_scale", moves.gradient_scale, TrajectoryError, above=0),
        **{name: values.numpy() for name, values in given.items()},
    )


@dataclass(frozen=True)
class Motion:
    """Each step's rate and decay, [T, G]; both NaN where no formula is known for the group's optimizer.

    ceilings: for each group (rates of all steps but those in which it was frozen) over (rates of those that carried).
    """

    rates: Tensor
    decays: Tensor
    ceilings: tuple[float, ...] = field(default=())


def motion(steps: Steps) -> Motion:
    """What the steps moved; see the formulas of `_momentum_rates` and `_adam_rates`."""
    moved = np.empty_like(steps.learning_rates)
    for kind in set(steps.kinds):
        groups = [group for group, other in enumerate(steps.kinds) if other == kind]
        moved[:, groups] = _rates_of(kind, steps, groups)
    rates = np.where(
        steps.carried > 0, steps.gradient_scale * steps.clip_factors * moved, np.where(np.isnan(moved), np.nan, 0.0)
    )
    plain = np.where(np.isnan(moved), np.nan, steps.moved * steps.learning_rates)
    decays = np.where(np.array(steps.decoupled), plain, moved) * steps.weight_decay
    return Motion(torch.from_numpy(rates), torch.from_numpy(decays), _ceilings(steps))


def _ceilings(steps: Steps) -> tuple[float, ...]:
    carried = (steps.learning_rates * (steps.carried > 0)).sum(0)
    left_out = (steps.learning_rates * (steps.left_out > 0)).sum(0)
    ratio = np.divide(carried + left_out, carried, out=np.ones_like(carried), where=carried > 0)
    return tuple(ratio.tolist())


def _rates_of(kind: str, steps: Steps, groups: list[int]) -> np.ndarray:
    """What one unit of gradient of a step moves the parameters by in all, before clipping; 0 where it moved nothing."""
    if kind in ("SGD", "RMSprop"):
        return _momentum_rates(steps, groups, dampened=kind == "SGD")
    if kind in ("Adam", "AdamW"):
        return _adam_rates(steps, groups)
    rates = steps.moved[:, groups] * steps.learning_rates[:, groups]
    return rates if kind == "Adagrad" else np.full_like(rates, np.nan)


def _momentum_rates(steps: Steps, groups: list[int], dampened: bool) -> np.ndarray:
    """Heavy-ball momentum, as torch.optim has it: v_k = m_k v_{k-1} + (1 - d_k) g_k moves by lr_k v_k.

    Gradient k moves by (1 - d_k) V_k with V_k = lr_k + m_{k+1} V_{k+1} over the moves from k on; Nesterov's form by
    lr_k + V_k with V_k = m_k lr_k + m_{k+1} V_{k+1}. The first gradient is not dampened; a step without momentum moves
    by lr_k g_k and leaves v as it was. RMSprop has no dampening.
    """
    lr, m, moved = (values[:, groups] for values in (steps.learning_rates, steps.momentum, steps.moved > 0))
    fresh = steps.fresh[:, groups] > 0
    if not m.any():
        return lr * moved
    d = np.where(fresh | (not dampened), 0.0, steps.dampening[:, groups])
    nesterov = np.array([steps.nesterov[group] and dampened for group in groups])
    rates, ahead = np.zeros_like(lr), np.zeros(len(groups))  # ahead: what later moves take of v_k
    for k in range(len(lr) - 1, -1, -1):
        keeps = moved[k] & (m[k] != 0)
        taken = np.where(nesterov, m[k], 1.0) * lr[k] + ahead
        rates[k] = np.where(keeps, (1 - d[k]) * taken + np.where(nesterov, lr[k], 0.0), lr[k]) * moved[k]
        ahead = np.where(keeps, np.where(fresh[k], 0.0, m[k]) * taken, ahead)
    return rates


def _adam_rates(steps: Steps, groups: list[int]) -> np.ndarray:
    """Adam's first moments: v_k = b_k v_{k-1} + (1 - b_k) g_k moves by lr_k v_k / (1 - b_k^n), n counting own moves.

    Gradient k moves by (1 - b_k) V_k with V_k = lr_k / (1 - b_k^n) + b_{k+1} V_{k+1} (Kingma and Ba 2015, arXiv
    1412.6980).
    """
    lr, b, moved = (values[:, groups] for values in (steps.learning_rates, steps.beta1, steps.moved > 0))
    fresh = steps.fresh[:, groups] > 0
    counts = step_counts(moved, fresh, steps.taken_before[groups])
    rates, ahead = np.zeros_like(lr), np.zeros(len(groups))
    for k in range(len(lr) - 1, -1, -1):
        taken = lr[k] / (1 - b[k] ** np.maximum(counts[k], 1)) + ahead
        rates[k] = np.where(moved[k], (1 - b[k]) * taken, 0.0)
        ahead = np.where(moved[k], np.where(fresh[k], 0.0, b[k]) * taken, ahead)
    return rates


def step_counts(moved: np.ndarray, fresh: np.ndarray, taken_before: np.ndarray) -> np.ndarray:
    """How many steps each parameter group had taken after each step, [T, G], counted from where it was fresh."""
    counts, so_far = np.zeros(moved.shape), np.array(taken_before, dtype=float)
    for k in range(len(moved)):
        so_far = np.where(moved[k] > 0, np.where(fresh[k] > 0, 0.0, so_far) + 1, so_far)
        counts[k] = so_far
    return counts
