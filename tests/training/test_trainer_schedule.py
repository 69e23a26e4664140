"""The rate of every step of a Trainer's schedule: transformers' own schedules, and what a log must meet."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from segflow.errors import TrajectoryError
from segflow.training.trainer_clipping import clip_factor, clip_factors_of
from segflow.training.trainer_schedule import (
    LoggedRate,
    ScheduleDefinition,
    check_logged,
    schedule_factors,
)

BASE = 0.02
KINDS: dict[str, dict[str, Any]] = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {"num_cycles": 0.7},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"power": 2.0, "lr_end": 1e-4},
    "inverse_sqrt": {"timescale": 7},
    "cosine_with_min_lr": {"min_lr": 0.004},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 6},
}


def of_transformers(kind: str, warmup: int, total: int, options: dict[str, Any], count: int) -> list[float]:
    """The rates of a live optimizer that transformers' scheduler steps, divided by the base rate."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE)
    scheduler = get_scheduler(kind, optimizer, warmup, total, dict(options))
    factors = []
    for _ in range(count):
        factors.append(optimizer.param_groups[0]["lr"] / BASE)
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("warmup", "options"), [(0, False), (5, False), (4, True)])
def test_each_schedule_is_that_of_transformers(kind: str, warmup: int, options: bool) -> None:
    pytest.importorskip("transformers")
    needed = {"cosine_with_min_lr": {"min_lr_rate": 0.3}} | {name: KINDS[name] for name in list(KINDS)[-2:]}
    chosen = KINDS[kind] if options else needed.get(kind, {})
    found = schedule_factors(ScheduleDefinition(kind, warmup, 20, BASE, chosen), 21)
    assert found.tolist() == pytest.approx(of_transformers(kind, warmup, 20, chosen, 21), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("kind", [kind for kind, options in KINDS.items() if options])
def test_options_of_a_schedule_change_it(kind: str) -> None:
    pytest.importorskip("transformers")
    changed = {name: value * 2 for name, value in KINDS[kind].items()}
    one, other = (schedule_factors(ScheduleDefinition(kind, 3, 20, BASE, o), 20) for o in (KINDS[kind], changed))
    assert (one != other).any()


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy", "of my own"])
def test_a_schedule_that_does_not_follow_from_the_step_is_refused(kind: str) -> None:
    with pytest.raises(TrajectoryError, match=r"cannot be rebuilt .*Give learning_rates="):
        schedule_factors(ScheduleDefinition(kind, 0, 20, BASE), 20)


def test_unknown_options_of_a_schedule_are_refused() -> None:
    with pytest.raises(TrajectoryError, match=r"linear.*cannot be rebuilt"):
        schedule_factors(ScheduleDefinition("linear", 0, 20, BASE, {"num_cycles": 2}), 20)


RATES = (BASE * schedule_factors(ScheduleDefinition("linear", 3, 10, BASE), 11)).tolist()


@pytest.mark.parametrize("later", [0, 1])
def test_logs_of_a_steps_own_rate_and_of_the_next_ones_are_both_understood(later: int) -> None:
    check_logged(RATES, [LoggedRate(step, RATES[step - 1 + later]) for step in (2, 5, 10)], BASE)


def test_a_log_that_mixes_the_two_names_the_point() -> None:
    points = [LoggedRate(2, RATES[1]), LoggedRate(5, RATES[4]), LoggedRate(8, RATES[8])]
    with pytest.raises(TrajectoryError, match=rf"step 8 was logged with a learning rate of {RATES[8]:g}"):
        check_logged(RATES, points, BASE)


@pytest.mark.parametrize("factor", [0.0, 1 + 1e-4, 1.5])
def test_a_rate_that_is_not_the_schedules_is_refused(factor: float) -> None:
    points = [LoggedRate(step, RATES[step - 1] * (factor if step == 6 else 1)) for step in range(1, 11)]
    with pytest.raises(TrajectoryError, match="step 6 was logged"):
        check_logged(RATES, points, BASE)


def test_steps_that_were_left_out_shift_the_log_and_no_more() -> None:
    check_logged(RATES, [LoggedRate(7, RATES[4], (1, 2))], BASE)
    with pytest.raises(TrajectoryError, match="step 7 was logged"):
        check_logged(RATES, [LoggedRate(7, RATES[4], (0, 1)), LoggedRate(9, RATES[8])], BASE)


# Clipping


def none_skipped(step: int) -> tuple[int, int]:
    return 0, 0


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_a_clip_factor_is_torchs(scale: float) -> None:
    parameter = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    gradient = scale * torch.arange(5, dtype=torch.float64)
    parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_([parameter], 2.0)
    torch.testing.assert_close(parameter.grad, gradient * clip_factor(float(norm), 2.0), rtol=1e-12, atol=0)


def test_factors_of_steps_that_were_not_logged_lie_between_those_that_were() -> None:
    found = clip_factors_of([(2, 4.0), (4, 8.0)], 2.0, 5, none_skipped, None)
    assert found.factors == pytest.approx([0.5, 0.5, 0.375, 0.25, 0.25], rel=1e-6)
    assert found.warning is not None and "logged in 2 of 5 steps" in found.warning
    quiet = clip_factors_of([(2, 1.0), (4, 1.0)], 2.0, 5, none_skipped, None)
    assert quiet.warning is None and quiet.words == "logged in 2 of 5 steps, none of which was clipped"
    whole = clip_factors_of([(step, 4.0) for step in range(1, 6)], 2.0, 5, none_skipped, None)
    assert whole.warning is None and whole.words is None


def test_no_logged_norm_is_never_read_as_no_clipping() -> None:
    with pytest.raises(TrajectoryError, match=r"no grad_norm was logged. Give clip_factors="):
        clip_factors_of([], 1.0, 5, none_skipped, None)
    assert clip_factors_of([], 1.0, 5, none_skipped, 0.5).factors == 0.5
    assert clip_factors_of([], 0.0, 5, none_skipped, None).factors == 1.0


def test_norms_of_steps_that_were_left_out_are_not_counted() -> None:
    norms = [(1, math.inf), (2, 4.0), (3, 1.0), (4, math.nan), (5, 8.0)]
    found = clip_factors_of(norms, 2.0, 3, lambda step: (0, 2), None)
    assert found.factors == pytest.approx([0.5, 1.0, 0.25], rel=1e-6) and found.warning is None
    with pytest.raises(TrajectoryError, match="norm at step 1 is inf, and the optimizer took that"):
        clip_factors_of(norms, 2.0, 5, none_skipped, None)
