"""What a recording says each parameter received, judged by retraining (see `support.retraining_oracle`).

Every situation is a loop as users write it. A score must be the change that retraining shows: slopes within 2% of 1
for the queries of every layer's own weights, for SOURCE and, where it claims as much, for TracIn: it follows the same
sums, but knows neither weight decay nor what divides the steps of Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf

from ..support.retraining_oracle import (
    ALL,
    KIND,
    N,
    STEPS,
    X,
    Y,
    Net,
    Queries,
    Run,
    Situation,
    losses,
    measurements,
    slopes,
)

TRAIN = TensorDataset(X, Y, KIND)
# (torch's class, options): so small that the change is of first order, and eps so large that P hardly moves.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 2e-4}),
    "momentum": (torch.optim.SGD, {"lr": 4e-5, "momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"lr": 4e-5, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"lr": 4e-5, "eps": 0.3}),
    "AdamW": (torch.optim.AdamW, {"lr": 4e-5, "eps": 0.3, "weight_decay": 50.0}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 4e-5, "eps": 0.3}),
}
each_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)
Parameters = Callable[[Net], Any]


class Task(sf.Task):
    """The loss of `asks` (see `losses`), measured by the queries of the oracle."""

    def __init__(self, asks: str):
        self.asks = asks

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        x, y, kind = batch
        if not sample:
            return losses(model, x, y, kind, self.asks).sum()
        heads = ("a", "b") if self.asks == "both" else (self.asks,)
        drawn = []
        for head in heads:
            with torch.no_grad():
                rows = [losses(model, x, torch.full_like(y, label), kind, head) for label in range(3)]
                labels = torch.multinomial(torch.stack(rows, 1).neg().exp(), 1)[:, 0]
            drawn.append(losses(model, x, labels, kind, head).sum())
        return torch.stack(drawn).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return measurements(model, batch, self.asks).sum()


def optimizer(kind: str, parameters: Parameters = Net.parameters, **options: Any) -> Callable[[Run], Any]:
    made, usual = OPTIMIZERS[kind]
    return lambda run: run.optimizer(made, parameters(run.model), **(usual | options))


def recorded(situation: Situation, folder: Path, **options: Any) -> Run:
    """The situation's first run, recorded."""
    run = situation.begin()
    given = run.optimizers[0] if len(run.optimizers) == 1 else run.optimizers
    options = {"dataset_size": N, "total_steps": situation.steps, "checkpoints": 4} | options
    with sf.record(run.model, given, folder, **options):
        situation.loop(run)
    return run


def scores(situation: Situation, trajectory: sf.Trajectory, method: Any, store: Path) -> Tensor:
    analyzer = sf.Analyzer(
        Net(situation.heads), Task(situation.asks), trajectory, store=store, method=method, progress=False
    )
    analyzer.fit(TRAIN)
    queries = TensorDataset(*Queries.of(Net(situation.heads)).rows)
    return torch.as_tensor(analyzer.score(sf.Groups.singletons(N), TRAIN, queries).values, dtype=torch.float64)


def methods(run: Run) -> dict[str, Any]:
    """The methods that claim to be right for a run."""
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    plain = all("betas" not in group and "alpha" not in group and not group["weight_decay"] for group in groups)
    return {"SOURCE": sf.Source()} | ({"TracIn": sf.TracIn()} if plain else {})


def check_slopes(situation: Situation, folder: Path, only: tuple[str, ...] = (), **options: Any) -> Run:
    """Record, retrain, score, compare. only: the layers whose slopes the situation is about, "loss" for losses."""
    run = recorded(situation, folder / "run", **options)
    truth, trajectory = situation.truth(run), sf.Trajectory.load(folder / "run")
    found = {}
    for name, method in methods(run).items():
        values = scores(situation, trajectory, method, folder / name)
        for part, slope in slopes(values, truth, Net(situation.heads)).items():
            if not only or part in only:
                found[f"{name}, {part}"] = round(slope, 4)
    wrong = {name: slope for name, slope in found.items() if not abs(slope - 1) <= 0.02}
    assert found and not wrong, f"{wrong} of {found}"
    return run


def full_batch(run: Run) -> None:
    (step_with,) = run.optimizers
    for _ in range(STEPS):
        step_with.zero_grad()
        run.loss().backward()
        step_with.step()


@each_optimizer
def test_plain_training(kind: str, tmp_path: Path) -> None:
    check_slopes(Situation(optimizer(kind), full_batch), tmp_path)


# ---- frozen layers ----


def frozen(share: float, first: bool) -> Callable[[Run], None]:
    """The body is frozen for a share of the steps, the first or the last ones."""

    def loop(run: Run) -> None:
        (step_with,) = run.optimizers
        for step in range(STEPS):
            run.model.body.requires_grad_((step >= share * STEPS) if first else (step < (1 - share) * STEPS))
            step_with.zero_grad()
            run.loss().backward()
            step_with.step()

    return loop


@pytest.mark.parametrize(("share", "first"), [(0.5, True), (0.9, True), (0.5, False)])
@each_optimizer
def test_a_layer_that_is_frozen_for_some_steps(kind: str, share: float, first: bool, tmp_path: Path) -> None:
    check_slopes(Situation(optimizer(kind), frozen(share, first)), tmp_path)


# ---- clipping by norm ----


def clipped(max_norm: float, **options: Any) -> Callable[[Run], None]:
    def loop(run: Run) -> None:
        (step_with,) = run.optimizers
        for _ in range(STEPS):
            step_with.zero_grad()
            run.loss().backward()
            run.clip(run.model.parameters(), max_norm, **options)
            step_with.step()

    return loop


# max_norm by the factor that it makes.
CLIPPED = {0.2: 0.05, 0.02: 0.005}


@pytest.mark.parametrize("factor", CLIPPED)
@each_optimizer
def test_clipping_by_norm(kind: str, factor: float, tmp_path: Path) -> None:
    eps = {"eps": 0.3 * factor} if "eps" in OPTIMIZERS[kind][1] else {}
    run = check_slopes(Situation(optimizer(kind, **eps), clipped(CLIPPED[factor])), tmp_path)
    mean = sum(run.tape.factors) / STEPS
    assert 0.7 * factor < mean < 1.4 * factor, mean
