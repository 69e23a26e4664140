"""A stage of training as an ordinary loop runs it: data, loss, optimizer, schedule, and the order of the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ...arguments import settle, whole_number
from ...errors import ScoreError
from .random_state import all_seeded


@dataclass(frozen=True)
class Stage:
    """How `BatchedTraining` trains through one stage, as an ordinary loop over shuffled batches would.

    It says how to train; the stages of a `Trajectory` say how a model was trained.

    Args:
        inputs, targets: tensors [N, ...] of the stage's examples.
        loss: (outputs [B, ...], targets [B, ...]) -> the loss that is minimised, such as the mean cross-entropy.
            One that is an object is copied for each training, so that what it keeps from call to call is its own.
        optimizer: the list of one model's parameters, as `model.parameters()` gives them -> a torch.optim optimizer.
            It may make groups by shape or by attributes of parameters, leave some out, or freeze some.
        epochs: passes over what a subset keeps of the examples; its last batch is as small as it comes.
        batch_size: examples in a batch.
        schedule: the optimizer -> a scheduler of torch.optim.lr_scheduler, which is stepped after each step of the
            optimizer; None: options stay as the optimizer has them.

    Raises:
        ScoreError: inputs and targets differ in number, or a number is below 1.

    Example:
        >>> from functools import partial
        >>> warm_up = partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.1, total_iters=10)
        >>> sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        >>> stage = Stage(torch.zeros(8, 3), torch.zeros(8, 1), nn.functional.mse_loss, sgd, 5, 4, schedule=warm_up)
    """

    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Iterable[Tensor]], Optimizer]
    epochs: int
    batch_size: int
    schedule: Callable[[Optimizer], LRScheduler] | None = None

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ScoreError(f"stage: {len(self.inputs)} inputs for {len(self.targets)} targets. Give one for each.")
        for name in ("epochs", "batch_size"):
            settle(self, **{name: whole_number(name, getattr(self, name), ScoreError, 1)})
        if len(self.inputs) < 1:
            raise ScoreError("stage: there are no inputs. Expected one example or more.")


def initialised(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model as the seed initialises it, in training mode; the global random state stays as it is."""
    with all_seeded(seed):
        return build().train()


def loss_of(stage: Stage) -> Callable[[Tensor, Tensor], Tensor]:
    """The stage's loss as no other training has changed it; ScoreError if it cannot be copied."""
    try:
        return deepcopy(stage.loss)
    except (TypeError, RuntimeError, NotImplementedError) as problem:
        raise ScoreError(
            f"stage: the loss cannot be copied for each training ({problem}). Make it a function."
        ) from problem


def optimizer_of(stage: Stage, model: nn.Module) -> Optimizer:
    """The stage's optimizer of a model's parameters; ScoreError for one that an ordinary loop cannot step."""
    optimizer = stage.optimizer(list(model.parameters()))
    if not (callable(getattr(optimizer, "step", None)) and callable(getattr(optimizer, "zero_grad", None))):
        raise ScoreError(
            f"stage: `optimizer` gave a {type(optimizer).__name__}, expected one torch.optim optimizer. "
            "Put everything that is trained into its parameter groups, or use FunctionTraining."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ScoreError("stage: LBFGS evaluates the loss several times in a step. Use FunctionTraining for it.")
    return optimizer


def schedule_of(stage: Stage, optimizer: Optimizer) -> LRScheduler | None:
    """The stage's scheduler, if it has one; ScoreError for what is none that can be stepped without a measurement."""
    if stage.schedule is None:
        return None
    schedule = stage.schedule(optimizer)
    if isinstance(schedule, ReduceLROnPlateau) or not callable(getattr(schedule, "step", None)):
        raise ScoreError(
            f"stage: `schedule` gave a {type(schedule).__name__}, expected a scheduler of torch.optim.lr_scheduler "
            "that follows from the number of steps alone. Use FunctionTraining for others."
        )
    return schedule


def batches_of(stage: Stage, kept_N: np.ndarray, generator: torch.Generator) -> Iterator[Tensor]:
    """The places [B] of each batch's examples, epoch after epoch, each epoch in an order of its own."""
    places_N = torch.from_numpy(kept_N)
    for _ in range(stage.epochs):
        yield from places_N[torch.randperm(len(places_N), generator=generator)].split(stage.batch_size)
