"""Many models trained at once: parameters stacked along a first axis, one forward and one step for all of them.

That each model comes out as an ordinary loop makes it is not taken for granted. Beside the stacked parameters stand the
real models: the optimizer is made from them, and every stage's first gradients and the last outputs are compared with
what they give.

Axis letters: J models, N examples, B examples of a batch, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .agreement import OnlyStackable, Untouched, check_gradients, check_outputs, gradients_alone
from .carry import (
    carry,
    check_alike,
    check_attributes,
    check_hooks,
    check_models,
    check_optimizer,
    check_schedule,
    refusal,
)
from .random_state import nothing_drawn
from .stage import Stage, batches_of, initialised, loss_of, optimizer_of, schedule_of


class StackedModels:
    """Models of several seeds, trained together.

    Attributes:
        models: the real ones [J], with the values that they have between stages.
        skeleton: one more, of another seed, through which stacked parameters are called: what it has of its own shows.
        parameters: by name, stacked [J, ...], since the first stage.

    Raises:
        ScoreError: the models have what cannot be stacked.
    """

    def __init__(self, build: Callable[[], nn.Module], seeds: Sequence[int]):
        self.seeds, self._all_seeds = seeds, [*seeds, max(seeds) + 1]
        self._all = [initialised(build, seed) for seed in self._all_seeds]
        *self.models, self.skeleton = self._all
        check_models(self._all, self._all_seeds)
        check_attributes(self._all, self._all_seeds)
        self.parameters: dict[str, Tensor] = {}
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def train(self, stage: Stage, kept: Sequence[np.ndarray]) -> None:
        """Train all models through one more stage, each on its own kept examples, which are as many for each."""
        first, stage = not self.parameters, replace(stage, loss=loss_of(stage))
        optimizer, schedule = self._prepared(stage)
        real = [parameter for model in self._all for parameter in model.parameters()]
        untouched = Untouched("the schedule", [*self.parameters.values(), *real])
        with _nothing_drawn("the model or the loss"):
            orders = [batches_of(stage, *pair) for pair in zip(kept, self._generators, strict=True)]
            for number, batch_of_each in enumerate(zip(*orders, strict=True)):
                batch_JB = torch.stack(batch_of_each)
                optimizer.zero_grad()
                if number:
                    self._backward(stage, batch_JB)
                else:
                    self._checked_backward(stage, batch_JB, every=first)
                optimizer.step()
                if schedule is not None:
                    with untouched:
                        schedule.step()
        self._unstack()

    def outputs(self, inputs: Tensor) -> list[Any]:
        """What each model, in evaluation mode, says of the inputs [Q, ...]: [J] times its outputs [Q, ...]."""
        self.skeleton.eval()
        with torch.no_grad():
            with _nothing_drawn("the model in evaluation mode"), OnlyStackable():
                alone = [model.eval()(inputs) for model in self.models]
            with _stacking():
                stacked = vmap(lambda of_one: functional_call(self.skeleton, of_one, (inputs,)))(self.parameters)
        check_outputs(alone, stacked, self.parameters)
        return alone

    def _prepared(self, stage: Stage) -> tuple[Optimizer, LRScheduler | None]:
        """The stage's optimizer and schedule as the first model has them, with the stacked parameters in its place.

        In the first stage that of the skeleton is compared as well, so that one model is refused where many are.
        """
        models, seeds = (self.models, self.seeds) if self.parameters else (self._all, self._all_seeds)
        optimizers, schedules = [], []
        with _nothing_drawn("`optimizer` or `schedule`"):
            for model in models:
                optimizer = optimizer_of(stage, model)
                check_optimizer(optimizer)
                schedules.append(schedule_of(stage, optimizer))
                check_schedule(schedules[-1])
                check_hooks(optimizer)
                optimizers.append(optimizer)
        check_models(models, seeds)  # once more: `optimizer` may have frozen parameters
        check_alike(optimizers, schedules, models, seeds)
        self._stack()
        carry(optimizers[: len(self.models)], self.models, self.parameters)
        return optimizers[0], schedules[0]

    def _stack(self) -> None:
        of_each = [dict(model.named_parameters()) for model in self.models]
        self.parameters = {
            name: torch.stack([of_one[name].detach() for of_one in of_each]).requires_grad_(parameter.requires_grad)
            for name, parameter in of_each[0].items()
        }

    def _unstack(self) -> None:
        """Give the real models their values and gradients, of which the next stage's optimizer may be made."""
        with torch.no_grad():
            for number, model in enumerate(self.models):
                for name, parameter in model.named_parameters():
                    gradient = self.parameters[name].grad
                    parameter.copy_(self.parameters[name][number])
                    parameter.grad = None if gradient is None else gradient[number].clone()

    def _checked_backward(self, stage: Stage, batch_JB: Tensor, every: bool) -> None:
        """The same as `_backward`, after which the gradients are those of the real models; every: of each of them."""
        with _nothing_drawn("the model or the loss"):
            alone = gradients_alone(self.models, stage, batch_JB)
        self._backward(stage, batch_JB)
        check_gradients(alone, self.parameters, self.seeds, every)

    def _backward(self, stage: Stage, batch_JB: Tensor) -> None:
        """Leave the gradient of each model's loss in the stacked parameters."""

        def loss(parameters: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            return stage.loss(functional_call(self.skeleton, dict(parameters), (inputs,)), targets)

        with _stacking():
            with OnlyStackable():
                losses_J = vmap(loss)(self.parameters, stage.inputs[batch_JB], stage.targets[batch_JB])
            losses_J.sum().backward()


def _nothing_drawn(what: str) -> AbstractContextManager[None]:
    return nothing_drawn(lambda name: refusal(f"{what} draws at random (from {name}'s global generator)"))


@contextmanager
def _stacking() -> Iterator[None]:
    """What fails here, and did not for the real models, is refused by what torch says of it."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError) as problem:
        raise refusal(f"torch cannot stack what the model or the loss does ({problem})") from problem
