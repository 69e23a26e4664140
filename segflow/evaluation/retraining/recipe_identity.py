"""What a recipe of retraining is, as JSON that a bank is bound to: what its functions reach, and what they compute.

Code tells what values cannot (a rate that a bank's few probes would not show), and values tell what code cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...arguments import plain
from ...data.changing import Reached, Seen, Slot, settled
from ...data.code_identity import reached
from ...data.fingerprints import digest
from ...store.comparison import PROBES
from .random_state import all_seeded
from .stage import Stage, loss_of, optimizer_of

_PERTURBATION = 0.1  # of a parameter, relative to its root mean square (or 1, where it is 0)


class _Holder:
    """What a recipe holds, as attributes: a function, an object that is called, or anything that these are made of."""

    def __init__(self, held: Any):
        self.held = held


def code_of(functions: Mapping[str, Any]) -> Callable[[], Reached]:
    """A function that reads what each of some functions, named, reaches as they are now."""
    subjects = {name: _subject(function) for name, function in functions.items()}

    def read() -> Reached:
        found, slots = Reached(), dict[Slot, Seen]()
        for name, (subject, method) in subjects.items():
            of_function = reached(subject, (method,))
            found.update({f"{name}: {entry.removeprefix('self.held')}": word for entry, word in of_function.items()})
            slots |= of_function.slots
        found.slots = slots
        return found

    return read


def _subject(function: Any) -> tuple[Any, str]:
    """The object, and the method of it, that a function is; of a method only what it names on its object counts."""
    if isinstance(function, MethodType):
        return function.__self__, function.__name__
    return _Holder(function), "held"


class Recipe(NamedTuple):
    """What `BatchedTraining` is made of; queries: their inputs and targets."""

    build: Callable[[], nn.Module]
    stages: Sequence[Stage]
    queries: tuple[Tensor, Tensor]
    measure: Callable[[Any, Tensor], Tensor]


def batched_identity(recipe: Recipe) -> dict[str, Any]:
    """What the results of a batched training depend on, as JSON."""
    functions = {"build": recipe.build, "measure": recipe.measure}
    for number, stage in enumerate(recipe.stages):
        functions |= {f"stage {number} {name}": getattr(stage, name) for name in ("loss", "optimizer", "schedule")}
    run = partial(_computed, recipe)
    code, computed = settled(code_of(functions), run, run)
    data = {
        "queries": digest(list(recipe.queries)),
        **{f"stage {k}": digest([stage.inputs, stage.targets]) for k, stage in enumerate(recipe.stages)},
    }
    plans = [{"epochs": stage.epochs, "batch_size": stage.batch_size} for stage in recipe.stages]
    return {"code": dict(code), "data": data, "stages": plans, **computed}


def _computed(recipe: Recipe) -> dict[str, Any]:
    """The model that seed 0 makes, each stage's optimizer for it, and numbers of its losses and measurements.

    Losses and the measure are copied, as for each training, so that what they keep from call to call stays as it is.
    """
    losses = [loss_of(stage) for stage in recipe.stages]
    stages = [replace(stage, loss=loss) for stage, loss in zip(recipe.stages, losses, strict=True)]
    recipe = recipe._replace(stages=stages, measure=_copied(recipe.measure))
    with all_seeded(0):
        model = recipe.build().train()
        optimizers = [_optimizer(stage, model) for stage in recipe.stages]
        initial = digest([[name, value] for name, value in model.state_dict().items()])
        numbers = list(_numbers(recipe, model.eval()))
    described = {"text": str(model), "initial": initial, "frozen": _frozen(model)}
    return {"model": described, "optimizers": optimizers, "computed": {PROBES: numbers}}


def _copied(measure: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A copy, or what cannot be copied itself."""
    try:
        return deepcopy(measure)
    except (TypeError, RuntimeError, NotImplementedError):
        return measure


def _frozen(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def _optimizer(stage: Stage, model: nn.Module) -> dict[str, Any]:
    """The optimizer that a stage makes for the model: its groups by the names of their parameters, and its state."""
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = optimizer_of(stage, model)
    groups = [
        {"parameters": [names.get(parameter, "another") for parameter in group["params"]]}
        | {key: _as_text(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    state = {names.get(parameter, "another"): digest(dict(of_it)) for parameter, of_it in optimizer.state.items()}
    return {"name": type(optimizer).__qualname__, "groups": groups, "state": state}


def _as_text(option: Any) -> str:
    """An optimizer's option, whose text does not depend on the kind of its numbers."""
    return str(tuple(map(plain, option)) if isinstance(option, tuple | list) else plain(option))


def _numbers(recipe: Recipe, model: nn.Module) -> Iterator[Any]:
    """All measurements, the losses of all batches and gradients' sizes, at the initial and at other parameters."""
    yield from _at_these_parameters(recipe, model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = float(parameter.square().mean().sqrt()) if parameter.numel() else 0.0
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((_PERTURBATION * (scale or 1.0) * noise).to(parameter))
    yield from _at_these_parameters(recipe, model)


def _at_these_parameters(recipe: Recipe, model: nn.Module) -> Iterator[Any]:
    with torch.no_grad():
        yield from _plain_numbers(recipe.measure(model(recipe.queries[0]), recipe.queries[1]))
    for stage in recipe.stages:
        with torch.no_grad():
            for inputs, targets in _batches(stage):
                yield from _plain_numbers(stage.loss(model(inputs), targets))
        inputs, targets = next(_batches(stage))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = stage.loss(model(inputs), targets)
        if loss.requires_grad:
            slopes = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
            yield from _plain_numbers(torch.stack([slope.norm() for slope in slopes]))


def _batches(stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(stage.inputs.split(stage.batch_size), stage.targets.split(stage.batch_size), strict=True)


def _plain_numbers(result: Tensor) -> list[Any]:
    """Numbers as JSON has them: what is not finite as text."""
    numbers = torch.as_tensor(result).detach().double().flatten().tolist()
    return [number if abs(number) < float("inf") else str(number) for number in numbers]
