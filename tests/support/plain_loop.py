"""Training as a user's own loop does it: what batched training is compared with."""

from __future__ import annotations

import random
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from segflow.evaluation import BatchedTraining, Stage, random_subsets


def plain_loop(training: BatchedTraining, kept: np.ndarray, seed: int) -> np.ndarray:
    """The measurements after one model was trained alone, in an ordinary loop in torch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        model, generator, before = training.build().train(), torch.Generator().manual_seed(seed), 0
        for stage in training.stages:
            own = torch.tensor([index - before for index in kept if 0 <= index - before < len(stage.inputs)])
            loss, optimizer = deepcopy(stage.loss), stage.optimizer(list(model.parameters()))
            schedule = stage.schedule(optimizer) if stage.schedule else None
            for _ in range(stage.epochs):
                for batch in own[torch.randperm(len(own), generator=generator)].split(stage.batch_size):
                    optimizer.zero_grad()
                    loss(model(stage.inputs[batch]), stage.targets[batch]).backward()
                    optimizer.step()
                    if schedule:
                        schedule.step()
            before += len(stage.inputs)
        model.eval()
        with torch.no_grad():
            return training.measure(model(training.query_inputs), training.query_targets).double().numpy()


def stage_of(count: int = 14, seed: int = 0, **changes: Any) -> Stage:
    """A stage of random examples [count, 3] of four classes, in float64: three epochs of SGD in batches of four."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 4, (count,), generator=generator)
    plain: dict[str, Any] = {"loss": functional.cross_entropy, "optimizer": partial(torch.optim.SGD, lr=0.1)}
    return Stage(inputs, targets, **(plain | {"epochs": 3, "batch_size": 4} | changes))


def training_of(*stages: Stage, build: Any = None, together: int = 64, measure: Any = None) -> BatchedTraining:
    """A training that measures the loss of six queries."""
    queries = stage_of(6, seed=9)
    return BatchedTraining(
        build or small_net, stages or (stage_of(),), queries.inputs, queries.targets, measure or losses_of, together
    )


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


def jobs_of(training: BatchedTraining, count: int = 3) -> list[tuple[np.ndarray, int]]:
    """Jobs that each keep half of every stage's examples."""
    parts, before = [], 0
    for stage in training.stages:
        masks = random_subsets(count, len(stage.inputs), seed=before)
        parts.append([before + np.flatnonzero(mask) for mask in masks])
        before += len(stage.inputs)
    return [(np.concatenate(of_job), 10 + number) for number, of_job in enumerate(zip(*parts, strict=True))]
