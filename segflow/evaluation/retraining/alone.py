"""One model trained by an ordinary loop in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from .stage import Stage, batches_of, loss_of, optimizer_of, schedule_of


def trained_alone(
    build: Callable[[], nn.Module], stages: Sequence[Stage], kept: Sequence[np.ndarray], seed: int
) -> nn.Module:
    """The model after all stages, each on the kept examples of its own; the caller has seeded the global generators."""
    model, generator = build().train(), torch.Generator().manual_seed(seed)
    for stage, kept_N in zip(stages, kept, strict=True):
        loss, optimizer = loss_of(stage), optimizer_of(stage, model)
        schedule = schedule_of(stage, optimizer)
        for batch_B in batches_of(stage, kept_N, generator):
            optimizer.zero_grad()
            loss(model(stage.inputs[batch_B]), stage.targets[batch_B]).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
    return model
