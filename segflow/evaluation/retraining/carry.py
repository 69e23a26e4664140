"""One optimizer for many models: that of a single model, with stacked parameters in the places of its own.

It is made by the user's function from a real model, and only then handed the stacked parameters, so that what the
function reads (shapes, names, attributes, `requires_grad`) is what it reads where a model is trained alone.
What the stacked parameters cannot stand for is refused by name.

Axis letter: J models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim import optimizer as torch_optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...errors import ScoreError

_ELEMENTWISE = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop")
_OF_A_STEP = ("step", "eta", "mu", "mu_product")  # state that belongs to the count of steps, not to a number


def refusal(what: str) -> ScoreError:
    """The error for what can be trained alone only."""
    return ScoreError(f"many models at a time: {what}. With together=1 each is trained alone, by an ordinary loop.")


def check_models(models: Sequence[nn.Module], seeds: Sequence[int]) -> None:
    """ScoreError unless all models have the same parameters, and nothing that stacked parameters cannot stand for."""
    for model in models:
        for name, parameter in model.named_parameters():
            if nn.parameter.is_lazy(parameter):
                raise refusal(f"parameter {name} has no shape before the first call, as in a lazy module")
    _require_alike("models", [_parameters_of(model) for model in models], seeds)
    for model in models:
        for name, _ in model.named_buffers():
            raise refusal(f"the model has buffers ({name}), which training may change")
        for name, module in model.named_modules():
            if module._backward_hooks or module._backward_pre_hooks:
                raise refusal(f"module {name or type(module).__name__!r} has a backward hook")
        for name, parameter in model.named_parameters():
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise refusal(f"parameter {name} has a hook")


def check_attributes(models: Sequence[nn.Module], seeds: Sequence[int]) -> None:
    """ScoreError if the modules of freshly made models differ in a number, a text or a tensor that they keep."""
    _require_alike("models", [_attributes_of(model) for model in models], seeds)


def check_optimizer(optimizer: Optimizer) -> None:
    """ScoreError unless the optimizer is one of torch's that treat each number by itself, and steps as they do."""
    kind = type(optimizer)
    if kind not in [getattr(torch.optim, name) for name in _ELEMENTWISE]:
        known = ", ".join(_ELEMENTWISE)
        raise refusal(f"optimizer {kind.__name__}: expected one that treats each number by itself ({known})")
    if "step" in vars(optimizer):
        raise refusal(f"optimizer {kind.__name__}: its `step` was replaced. Give a scheduler as Stage(schedule=...)")


def check_schedule(schedule: LRScheduler | None) -> None:
    """ScoreError unless the scheduler, and those that it is made of, are torch's own and step as they do."""
    if schedule is None:
        return
    kind = type(schedule)
    if getattr(lr_scheduler, kind.__name__, None) is not kind:
        raise refusal(f"schedule {kind.__name__}: expected a class of torch.optim.lr_scheduler itself")
    if "step" in vars(schedule):
        raise refusal(f"schedule {kind.__name__}: its `step` was replaced")
    for part in getattr(schedule, "_schedulers", ()):
        check_schedule(part)


def check_hooks(optimizer: Optimizer) -> None:
    """ScoreError if something else runs before or after the optimizer's step."""
    own = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    general = [torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks]
    if any(own) or any(general):
        raise refusal(f"optimizer {type(optimizer).__name__} has a hook on its steps")


def check_alike(
    optimizers: Sequence[Optimizer],
    schedules: Sequence[LRScheduler | None],
    models: Sequence[nn.Module],
    seeds: Sequence[int],
) -> None:
    """ScoreError if the models' optimizers differ in an option or a group, or their schedulers in a number."""
    described = [_groups_of(*pair) for pair in zip(optimizers, map(_names_of, models), strict=True)]
    described = [groups | _numbers_of(schedule) for groups, schedule in zip(described, schedules, strict=True)]
    _require_alike("optimizers", described, seeds)


def _require_alike(what: str, described: Sequence[Mapping[str, object]], seeds: Sequence[int]) -> None:
    """ScoreError if the description of one seed's model or optimizer differs from the first one's."""
    for seed, of_one in zip(seeds, described, strict=True):
        if differing := _difference(described[0], of_one):
            raise refusal(f"the {what} of seeds {seeds[0]} and {seed} differ in {differing}")


def carry(optimizers: Sequence[Optimizer], models: Sequence[nn.Module], stacked: Mapping[str, Tensor]) -> None:
    """Put the stacked parameters [J, ...] and states into the first optimizer, in the places of its model's own.

    optimizers: [J], each made from the parameters of the model in its place; they are alike.
    """
    names = [_names_of(model) for model in models]
    states = [_states_of(*pair) for pair in zip(optimizers, names, strict=True)]
    first = optimizers[0]
    first.state.clear()
    for name in {name for of_one in states for name in of_one}:
        first.state[stacked[name]] = _stacked_state(name, [of_one.get(name, {}) for of_one in states], stacked[name])
    for group in first.param_groups:
        group["params"] = [stacked[names[0][id(p)]] for p in group["params"]]


def _names_of(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _parameters_of(model: nn.Module) -> dict[str, object]:
    """What must be alike of each parameter, and the module that holds it."""
    kinds: dict[str, object] = {f"module {name!r}": type(module).__name__ for name, module in model.named_modules()}
    for name, p in model.named_parameters():
        kinds[f"parameter {name}"] = f"{list(p.shape)} {p.dtype}, {'trained' if p.requires_grad else 'frozen'}"
    return kinds


def _attributes_of(model: nn.Module) -> dict[str, object]:
    """The plain attributes of all modules, by a name that tells which; what torch itself keeps there is left out."""
    own = vars(nn.Module())
    return {
        f"attribute {key} of module {name!r}{place}": value
        for name, module in model.named_modules()
        for key, attribute in vars(module).items()
        if key not in own
        for place, value in _plain_in(attribute)
    }


def _plain_in(value: Any, place: str = "") -> Iterator[tuple[str, object]]:
    """Numbers, texts and tensors, also inside lists and dictionaries; not parameters, nor what is computed of them."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _plain_in(part, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _plain_in(part, f"{place}[{number}]")
    elif isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter) and value.grad_fn is None:
            yield place, value
    elif value is None or isinstance(value, int | float | complex | str | bytes | np.generic | np.ndarray):
        yield place, value


def _groups_of(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, object]:
    """Every option of each group by a name that tells which, and the names of its parameters."""
    described: dict[str, object] = {"the number of groups": len(optimizer.param_groups)}
    for number, group in enumerate(optimizer.param_groups):
        if unknown := [p for p in group["params"] if id(p) not in names]:
            raise refusal(f"group {number} of the optimizer has a tensor {list(unknown[0].shape)} not of the model")
        described |= {f"option {key} of group {number}": value for key, value in group.items() if key != "params"}
        described[f"the parameters of group {number}"] = [names[id(p)] for p in group["params"]]
    return described


def _states_of(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    return {names[id(parameter)]: state for parameter, state in optimizer.state.items()}


def _stacked_state(name: str, states: Sequence[Mapping[str, Any]], stacked: Tensor) -> dict[str, Any]:
    """A parameter's state of all models: what has its shape is stacked, and the rest the same in all of them."""
    found: dict[str, Any] = {}
    for key in {key for state in states for key in state}:
        values: list[Any] = [state.get(key) for state in states]
        if key not in _OF_A_STEP and all(isinstance(v, Tensor) and v.shape == stacked.shape[1:] for v in values):
            found[key] = torch.stack(values)
        elif key in _OF_A_STEP and all(_same(values[0], value) for value in values):
            found[key] = values[0]
        else:
            raise refusal(f"the optimizer begins with a state {key!r} of parameter {name} that cannot be stacked")
    return found


def _numbers_of(schedule: object) -> dict[str, object]:
    """The attributes of a scheduler that are numbers, or lists of them, by a name that tells which."""
    found = vars(schedule) if schedule is not None else {}
    return {
        f"{key} of the schedule": value
        for key, value in found.items()
        if all(isinstance(v, int | float | Tensor) for v in (value if isinstance(value, list | tuple) else [value]))
    }


def _difference(first: Mapping[str, object], other: Mapping[str, object]) -> str | None:
    """What differs between two descriptions, with both values if they are short; None if nothing does."""
    for key in [*first, *(key for key in other if key not in first)]:
        a, b = first.get(key), other.get(key)
        if not _same(a, b):
            long = [isinstance(v, Tensor | np.ndarray) and v.ndim for v in (a, b)]
            return f"{key}: {a} and {b}" if not any(long) else key
    return None


def _same(a: Any, b: Any) -> bool:
    """Whether two options are equal: numbers, texts, tensors, or lists of them."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b))
    return a is b or bool(type(a) is type(b) and (a == b or str(a) == str(b) == "nan"))
