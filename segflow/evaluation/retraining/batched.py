"""Many models trained at once in one process: parameters stacked along a first axis, one forward for all.

Axis letters: J models, N examples, B examples of a batch, Q queries, P measurements of each query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ...arguments import settle, whole_number
from ...errors import ScoreError
from .pool import Job
from .recipe_identity import batched_identity

Function = Callable[[Tensor, Tensor], Tensor]
_ELEMENTWISE = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop")


@dataclass(frozen=True)
class Stage:
    """How `BatchedTraining` trains through one stage, as an ordinary loop over shuffled batches would.

    It says how to train; the stages of a `Trajectory` say how a model was trained.

    Args:
        inputs, targets: tensors [N, ...] of the stage's examples.
        loss: (outputs [B, ...], targets [B, ...]) -> the loss that is minimised, such as the mean cross-entropy.
        optimizer: parameters -> a torch.optim optimizer that treats each number by itself (SGD, Adam, AdamW, ...).
        epochs: passes over what a subset keeps of the examples; its last batch is as small as it comes.
        batch_size: examples in a batch.

    Raises:
        ScoreError: inputs and targets differ in number, or a number is below 1.
    """

    inputs: Tensor
    targets: Tensor
    loss: Function
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    epochs: int
    batch_size: int

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ScoreError(f"stage: {len(self.inputs)} inputs for {len(self.targets)} targets. Give one for each.")
        for name in ("epochs", "batch_size"):
            settle(self, **{name: whole_number(name, getattr(self, name), ScoreError, 1)})
        if len(self.inputs) < 1:
            raise ScoreError("stage: there are no inputs. Expected one example or more.")


@dataclass(frozen=True)
class BatchedTraining:
    """Trains many models at once, each on its own subset, from its own initialisation, in its own order of the data.

    Each model is what an ordinary loop in torch would make of `build()` after `torch.manual_seed(seed)`, with every
    epoch's order drawn by `torch.randperm(kept, generator=...)` from one generator of the same seed. A model that draws
    at random in its forward (dropout) or that changes buffers (batch normalisation) is refused: use `FunctionTraining`.

    Args:
        build: makes the freshly initialised model.
        stages: one, or several in the order in which they are trained, each with an optimizer of its own. A subset's
            columns are the examples of the first stage, then those of the second, and so on.
        query_inputs, query_targets: what is measured after training.
        measure: (outputs [Q, ...], targets [Q, ...]) -> [Q], or [P, Q] for several measurements at once.
        together: how many models are trained at a time. Small models gain from hundreds; a model that fills the
            processor's caches does best alone.

    Raises:
        ScoreError: there are no stages, or an optimizer does not treat each number by itself.

    Example:
        >>> from functools import partial
        >>> inputs, targets = torch.randn(8, 3), torch.randn(8, 1)
        >>> stage = Stage(inputs, targets, nn.functional.mse_loss, partial(torch.optim.SGD, lr=0.1), 2, batch_size=4)
        >>> training = BatchedTraining(
        ...     partial(nn.Linear, 3, 1), (stage,), inputs, targets, lambda out, y: (out - y).square().squeeze(1)
        ... )
        >>> training.run([(np.arange(4), 1), (np.arange(4, 8), 2)]).shape
        (2, 8)
    """

    build: Callable[[], nn.Module]
    stages: Sequence[Stage]
    query_inputs: Tensor
    query_targets: Tensor
    measure: Function
    together: int = 64

    def __post_init__(self) -> None:
        settle(self, together=whole_number("together", self.together, ScoreError, 1, advice="It counts models."))
        if not self.stages:
            raise ScoreError("stages: there are none. Expected a Stage, or several in the order of training.")
        for stage in self.stages:
            kind = type(_optimizer_of(stage))
            if kind.__name__ not in _ELEMENTWISE or not kind.__module__.startswith("torch.optim"):
                raise ScoreError(
                    f"optimizer {kind.__name__}: models that are trained together need one that treats each number by "
                    f"itself: {', '.join(_ELEMENTWISE)}. Use FunctionTraining for others."
                )

    @property
    def examples(self) -> int:
        """The number of examples of all stages: a subset's columns."""
        return sum(len(stage.inputs) for stage in self.stages)

    def settings(self) -> dict[str, Any]:
        """What the results depend on, as JSON: the fingerprint that a bank is bound to.

        A loss, a measure, an optimizer and a schedule count by what their code reaches, and by numbers that they give.
        """
        return batched_identity(self)

    def batches(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Places of the jobs that are trained together: those that keep as many examples of each stage."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, (kept, _) in enumerate(jobs):
            alike.setdefault(tuple(map(len, self._by_stage(kept))), []).append(place)
        size = self.together
        return [places[begin : begin + size] for places in alike.values() for begin in range(0, len(places), size)]

    def run(self, jobs: Sequence[Job]) -> np.ndarray:
        """Train one model for each (indices of the kept examples, seed); the measurements [J, ...] in float64.

        Raises:
            ScoreError: a stage is left without examples, or the model cannot be trained this way.
        """
        measured: list[Any] = [None] * len(jobs)
        for places in self.batches(jobs):
            for place, of_job in zip(places, self._run([jobs[place] for place in places]), strict=True):
                measured[place] = of_job
        return np.stack(measured)

    def _run(self, jobs: Sequence[Job]) -> np.ndarray:
        models = [_seeded(self.build, seed) for _, seed in jobs]
        if any(True for _ in models[0].buffers()):
            raise ScoreError("the model has buffers, which training may change. Use FunctionTraining for it.")
        parameters = {
            name: torch.stack([dict(model.named_parameters())[name].detach() for model in models]).requires_grad_()
            for name, _ in models[0].named_parameters()
        }
        generators = [torch.Generator().manual_seed(seed) for _, seed in jobs]
        kept = [self._by_stage(indices) for indices, _ in jobs]
        try:
            for number, stage in enumerate(self.stages):
                _train(models[0], parameters, stage, [by_stage[number] for by_stage in kept], generators)
            return self._measured(models[0], parameters, len(jobs))
        except RuntimeError as problem:
            if "vmap" not in str(problem):
                raise
            raise ScoreError(
                f"the model cannot be trained beside others: {problem}. Use FunctionTraining."
            ) from problem

    def _by_stage(self, kept: np.ndarray) -> list[np.ndarray]:
        """The kept examples of each stage, counted from its own first."""
        bounds = np.cumsum([0, *(len(stage.inputs) for stage in self.stages)])
        if len(kept) and not 0 <= min(kept) <= max(kept) < bounds[-1]:
            raise ScoreError(f"a subset names example {max(kept)}, but the stages have 0..{bounds[-1] - 1}.")
        by_stage = [kept[(kept >= begin) & (kept < end)] - begin for begin, end in pairwise(bounds)]
        for number, of_stage in enumerate(by_stage):
            if not len(of_stage):
                raise ScoreError(f"a subset keeps no example of stage {number}. Keep at least one of each.")
        return by_stage

    def _measured(self, model: nn.Module, parameters: dict[str, Tensor], models: int) -> np.ndarray:
        def measured(parameters_of_one: dict[str, Tensor]) -> Tensor:
            return self.measure(functional_call(model, parameters_of_one, (self.query_inputs,)), self.query_targets)

        model.eval()
        with torch.no_grad():
            of_each: np.ndarray = _each(measured, models)(parameters).double().numpy()
        return of_each


def _train(
    model: nn.Module,
    parameters: dict[str, Tensor],
    stage: Stage,
    kept: Sequence[np.ndarray],
    generators: Sequence[torch.Generator],
) -> None:
    """Train all models through one stage, in place."""

    def loss(parameters_of_one: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return stage.loss(functional_call(model, parameters_of_one, (inputs,)), targets)

    losses_of = _each(loss, len(kept))
    optimizer = stage.optimizer(list(parameters.values()))
    kept_JN = torch.from_numpy(np.stack(kept))
    for _ in range(stage.epochs):
        orders = [
            kept_N[torch.randperm(len(kept_N), generator=g)] for kept_N, g in zip(kept_JN, generators, strict=True)
        ]
        for batch_JB in torch.stack(orders).split(stage.batch_size, dim=1):
            optimizer.zero_grad()
            losses_of(parameters, stage.inputs[batch_JB], stage.targets[batch_JB]).sum().backward()
            optimizer.step()


def _each(function: Callable[..., Tensor], models: int) -> Callable[..., Tensor]:
    """The function of one model as one of stacked models; a single model is spared the batched matrix products."""
    if models > 1:
        return vmap(function)

    def alone(stacked: dict[str, Tensor], *batch: Tensor) -> Tensor:
        parameters = {name: parameter.squeeze(0) for name, parameter in stacked.items()}
        return function(parameters, *(tensor.squeeze(0) for tensor in batch))[None]

    return alone


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model as the seed initialises it; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().train()


def _optimizer_of(stage: Stage) -> torch.optim.Optimizer:
    """The stage's optimizer, of a parameter that nobody trains."""
    return stage.optimizer([nn.Parameter(torch.zeros(1))])
