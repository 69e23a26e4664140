"""What really moved: each step's rate and decay against pulses sent through torch's own optimizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

import segflow as sf

STEPS = 14
HUGE = 1e9  # an eps beside which second moments are nothing, so that P is 1 / HUGE and the optimizer is linear
MASKS = {
    "every step": [True] * STEPS,
    "frozen at first": [step > 5 for step in range(1, STEPS + 1)],
    "frozen at last": [step < 9 for step in range(1, STEPS + 1)],
    "every third": [step % 3 == 0 for step in range(1, STEPS + 1)],
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p, **o: SGD(p, lr=0.1, **o),
    "momentum": lambda p, **o: SGD(p, lr=0.1, momentum=0.9, **o),
    "momentum, dampening": lambda p, **o: SGD(p, lr=0.1, momentum=0.8, dampening=0.3, **o),
    "nesterov": lambda p, **o: SGD(p, lr=0.1, momentum=0.8, nesterov=True, **o),
    "Adam": lambda p, **o: Adam(p, lr=0.1, betas=(0.8, 0.9), eps=HUGE, **o),
    "AdamW": lambda p, **o: AdamW(p, lr=0.1, eps=HUGE, **{"weight_decay": 0.0, **o}),
    "RMSprop": lambda p, **o: RMSprop(p, lr=0.1, eps=HUGE, **o),
    "RMSprop, momentum": lambda p, **o: RMSprop(p, lr=0.1, momentum=0.7, eps=HUGE, **o),
    "Adagrad": lambda p, **o: Adagrad(p, lr=0.1, lr_decay=0.2, eps=HUGE, **o),
}


class Run:
    """One parameter stepped with given gradients: 0 but for a pulse, and None where the mask says so."""

    def __init__(self, make: Callable[..., Optimizer], mask: list[bool], start: float = 0.0, **options: Any):
        self.model = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(self.model.weight, start)
        self.optimizer, self.mask = make(self.model.parameters(), **options), mask

    def go(self, pulse: int | None, change: Callable[[Optimizer, int], None] = lambda _o, _s: None) -> float:
        """The parameter in the end; pulse: the step, counted from 1, whose gradient is 1."""
        for step, there in enumerate(self.mask, start=1):
            change(self.optimizer, step)
            gradient = torch.full((1, 1), float(step == pulse), dtype=torch.float64)
            self.model.weight.grad = gradient if there else None
            self.optimizer.step()
        return self.model.weight.item()


def scheduled(optimizer: Optimizer, step: int) -> None:
    """A warm-up from 0 and a momentum that changes, where there is one."""
    group = optimizer.param_groups[0]
    group["lr"] = 0.02 * (step - 1)
    if group.get("momentum"):
        group["momentum"] = 0.5 + 0.03 * step
    if "betas" in group:
        group["betas"] = (0.5 + 0.03 * step, group["betas"][1])


@pytest.mark.parametrize("change", [lambda _o, _s: None, scheduled], ids=["constant", "scheduled"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_steps_rate_is_what_a_unit_gradient_of_that_step_moves_in_all(
    tmp_path: Path, name: str, mask: str, change: Any
) -> None:
    make, there = OPTIMIZERS[name], MASKS[mask]
    unit = HUGE if "eps" in make([nn.Parameter(torch.zeros(1))]).defaults else 1.0
    recorded = Run(make, there)
    with sf.record(recorded.model, recorded.optimizer, tmp_path, dataset_size=1, checkpoints=1):
        recorded.go(None, change)
    trajectory = sf.Trajectory.load(tmp_path)
    for step in range(1, STEPS + 1):
        moved = -Run(make, there).go(step, change) * unit
        assert trajectory.lr_steps(step - 1, step)[0] == pytest.approx(moved, rel=1e-6, abs=1e-12), step
    assert there != MASKS["every step"] or trajectory.lr_steps(0, STEPS)[0] > 0


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_what_weight_decay_takes_of_the_parameter_in_all(tmp_path: Path, name: str, mask: str) -> None:
    """To first order in the decay, which is tiny, of a parameter that stays near 1."""
    make, there = OPTIMIZERS[name], MASKS[mask]
    coupled = name not in ("SGD", "momentum", "momentum, dampening", "nesterov", "AdamW")
    w, unit = (1.0, HUGE) if coupled else (1e-7, 1.0)  # either way as tiny a step
    recorded = Run(make, there, start=1.0, weight_decay=w)
    with sf.record(recorded.model, recorded.optimizer, tmp_path, dataset_size=1, checkpoints=1):
        left = recorded.go(None, scheduled)
    trajectory = sf.Trajectory.load(tmp_path)
    assert trajectory.decay_steps(0, STEPS)[0] == pytest.approx((1 - left) * unit, rel=1e-5)
    assert trajectory.coupled[0] is coupled


def test_clip_factors_scale_rates_and_not_decay(tmp_path: Path) -> None:
    checkpoints = []
    for factor in (1.0, 0.25):
        run = Run(OPTIMIZERS["momentum"], MASKS["every step"], weight_decay=0.1)
        with sf.record(run.model, run.optimizer, tmp_path / str(factor), dataset_size=1, checkpoints=1):
            run.go(None)
        checkpoints = sf.Trajectory.load(tmp_path / str(factor)).checkpoints

    def trajectory(factors: Any) -> sf.Trajectory:
        constants = sf.OptimizerConstants("SGD", momentum=0.9, weight_decay=0.1)
        return sf.Trajectory(checkpoints, [STEPS], 0.1, 1, constants, moves=sf.Moves(clip_factors=factors))

    factors: Tensor = torch.linspace(0.1, 1, STEPS)
    plain, clipped = trajectory(1.0), trajectory(factors)
    for step in range(STEPS):
        expected = plain.lr_steps(step, step + 1)[0] * factors[step].item()
        assert clipped.lr_steps(step, step + 1)[0] == pytest.approx(expected, rel=1e-6)
    assert clipped.decay_steps(0, STEPS) == plain.decay_steps(0, STEPS)
