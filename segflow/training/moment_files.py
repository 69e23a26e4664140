"""An optimizer's state as torch.save wrote it: parameters by number, brought to names and bias-corrected moments."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import shown
from ..errors import TrajectoryError
from ..runtime.sharding import named_modules, named_parameters, plain_name
from ..store.files import file_digest
from .adapters import has_adapter
from .optimizers import KNOWN, SECOND_MOMENTS, has_second_moment, second_moment
from .trainer_files import read_saved

# What only the optimizers of torch.optim with these formulas have among their groups' options.
_OPTIONS = {
    "SGD": ({"momentum", "dampening", "nesterov", "maximize"}, {"betas"}),
    "AdamW": ({"betas", "eps", "amsgrad", "maximize"}, {"momentum_decay"}),
    "RMSprop": ({"alpha", "centered", "momentum", "maximize"}, {"betas"}),
    "Adagrad": ({"lr_decay", "initial_accumulator_value", "maximize"}, {"betas"}),
}
_CONSTANTS = {"weight_decay", "momentum", "dampening", "eps", "lr_decay", "betas"}
_TORCH_ONES = re.compile(r"adamw_torch|adamw_torch_fused|adamw_torch_xla|adamw_torch_npu_fused|sgd|adagrad|rmsprop")
# Names of parameters that a Trainer's weight decay leaves out, of transformers 5 and of versions before.
_PATTERNS = (r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", "bias")
_GIVE_NAMES = "Give parameter_names=, the names of the optimizer's parameters in its order."


@dataclass(frozen=True)
class OptimizerState:
    """The content of an optimizer.pt whose parameters have names.

    Args:
        names: of the parameters by their numbers. kinds: each parameter group's optimizer.
    """

    path: Path
    state: Mapping[int, Mapping[str, Any]]
    groups: tuple[Mapping[str, Any], ...]
    names: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def group_of(self) -> dict[str, int]:
        """The parameter group of each parameter."""
        return {self.names[number]: place for place, group in enumerate(self.groups) for number in group["params"]}

    def steps(self) -> dict[str, int] | None:
        """How many steps were taken with each parameter, 0 without a state; None where the optimizer does not count."""
        if not any("step" in values for values in self.state.values()):
            return None
        counts = {self.names[number]: int(values.get("step", 0)) for number, values in self.state.items()}
        return dict.fromkeys(self.names, 0) | counts

    def held(self) -> Iterator[tuple[str, int, int]]:
        """The parameters that have second moments: each one's name, number and parameter group."""
        for place, (group, kind) in enumerate(zip(self.groups, self.kinds, strict=True)):
            for number in group["params"]:
                if has_second_moment(kind, self.state.get(number, {})):
                    yield self.names[number], number, place

    def moment(self, number: int, place: int) -> Tensor:
        """The bias-corrected second moments of one of them."""
        found = second_moment(self.kinds[place], self.state[number], self.groups[place])
        assert found is not None  # noqa: S101
        return found


@dataclass(frozen=True)
class OptimizerFile:
    """The second moments in an optimizer.pt, for `SavedCheckpoints`.

    Args:
        order: the names of the parameters by number. kinds: each parameter group's optimizer.
        without: parameters that are not attributed.
    """

    path: Path
    order: tuple[str, ...]
    kinds: tuple[str, ...]
    without: frozenset[str] = frozenset()

    def names(self) -> list[str]:
        """The names of the parameters that have second moments."""
        return [name for name, _, _ in self._opened().held() if name not in self.without]

    def read(self) -> dict[str, Tensor]:
        """The bias-corrected second moments by these names."""
        state = self._opened()
        return {name: state.moment(*which) for name, *which in state.held() if name not in self.without}

    def digests(self) -> list[str]:
        """The sha256 of the file."""
        return [file_digest(self.path, TrajectoryError)]

    def _opened(self) -> OptimizerState:
        state, groups = read_optimizer(self.path)
        return OptimizerState(self.path, state, groups, self.order, self.kinds)


def read_optimizer(path: Path) -> tuple[Mapping[int, Mapping[str, Any]], tuple[Mapping[str, Any], ...]]:
    """An optimizer's state by the parameters' numbers, and its parameter groups; tensors stay in the file."""
    content = read_saved(path)
    try:
        state, groups = content["state"], tuple(content["param_groups"])
        numbers = [number for group in groups for number in group["params"]]
        rates = [
            float(group[name]) for group in groups for name in ("lr", "initial_lr") if name == "lr" or name in group
        ]
        if not all(map(math.isfinite, rates)):
            raise ValueError(f"its learning rates are {rates}")
        if sorted(numbers) != list(range(len(numbers))) or not set(state) <= set(numbers):
            raise ValueError("its parameters are not numbered from 0")
        for number, values in state.items():
            if float(values.get("step", 0)) % 1 != 0:
                raise ValueError(f"step of parameter {number} is {values['step']}")
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise TrajectoryError(
            f"{path}: expected the state_dict of a torch optimizer ({type(problem).__name__}: {problem}). Restore it."
        ) from problem
    return state, groups


def named_state(path: Path, model: nn.Module, optim: str, given: Sequence[str] | None) -> OptimizerState:
    """An optimizer.pt whose parameters have the model's names.

    optim: the Trainer's word for the optimizer. given: names by number, as the user says. TrajectoryError where it
    cannot be told which parameter is which.
    """
    state, groups = read_optimizer(path)
    names = tuple(_names(path, state, groups, model, given))
    kinds = tuple(optimizer_kind(group, optim) for group in groups)
    for group, kind in zip(groups, kinds, strict=True):
        if problem := _odd_options(group, kind) or _without_moments(state, group, kind, names):
            raise TrajectoryError(f"{path}: {problem}. Restore it, or leave this checkpoint out.")
    return OptimizerState(path, state, groups, names, kinds)


def _odd_options(group: Mapping[str, Any], kind: str) -> str | None:
    """Which option of a known optimizer's group is not the number that it should be, in words."""
    for option in _CONSTANTS & set(group) if kind in KNOWN else ():
        try:
            finite = all(math.isfinite(value) for value in (group[option] if option == "betas" else [group[option]]))
        except TypeError:
            finite = False
        if not finite or (option == "betas" and len(group[option]) != 2):
            return f"{option}={shown(group[option])} of a parameter group of {kind}"
    return None


def _without_moments(
    state: Mapping[int, Mapping[str, Any]], group: Mapping[str, Any], kind: str, names: Sequence[str]
) -> str | None:
    """Which second moments are not there although steps were taken, in words; None where nothing is missing."""
    if kind not in SECOND_MOMENTS:
        return None
    if not state:
        return f"{kind} has taken steps, and its state is empty"
    needed = {SECOND_MOMENTS[kind], "step"}
    needed |= {"max_exp_avg_sq"} if group.get("amsgrad") else set()
    needed |= {"grad_avg"} if group.get("centered") else set()
    for number in group["params"]:
        held = state.get(number) or {}
        lacking = [key for key in sorted(needed) if key not in held or (key != "step" and not _is_real(held[key]))]
        if held and lacking:
            return f"parameter {number} ({names[number]!r}) has no {lacking[0]}, and {kind} keeps one"
    return None


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def optimizer_kind(options: Mapping[str, Any], optim: str) -> str:
    """The class name of torch.optim's optimizer with these options of a group; of others the Trainer's word for it.

    optim: that word, TrainingArguments.optim.
    """
    kinds = [kind for kind, (has, lacks) in _OPTIONS.items() if has <= set(options) and not lacks & set(options)]
    if len(kinds) != 1 or not _TORCH_ONES.fullmatch(optim):
        return f"{optim} (unknown options)" if optim in KNOWN else optim
    decoupled = options.get("decoupled_weight_decay", True)
    return "Adam" if kinds == ["AdamW"] and not decoupled else kinds[0]


def _names(
    path: Path,
    state: Mapping[int, Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    model: nn.Module,
    given: Sequence[str] | None,
) -> Sequence[str]:
    """The names of the parameters by number: those given or saved, or the one order of the model's that fits."""
    shapes = {name: tuple(p.shape) for name, p in named_parameters(model, remove_duplicate=False).items()}
    saved = [name for group in groups for name in group.get("param_names", ())]
    if given is not None or saved:
        names = [plain_name(name) for name in (given if given is not None else saved)]
        names = names if set(names) <= set(shapes) else [name.removeprefix("module.") for name in names]
        wrong = misfit(names, state, groups, shapes)
        if wrong:
            raise TrajectoryError(f"{path}: {wrong}. {_GIVE_NAMES}")
        return names
    found = {tuple(names): misfit(names, state, groups, shapes) for names in _orders(groups, model)}
    fitting = [names for names, wrong in found.items() if wrong is None]
    if len(fitting) != 1:
        why = "; ".join(filter(None, found.values())) or _other_number(groups, model)
        why = why or "its groups are not those that a Trainer makes"
        why = f"{len(fitting)} orders of the model's parameters fit it" if fitting else why
        raise TrajectoryError(
            f"{path}: which of its parameters is which cannot be told ({why}). {_GIVE_NAMES} Or give the model as it "
            "was trained, with the same parameters frozen."
        )
    return fitting[0]


def _other_number(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> str | None:
    """That the model trains another number of parameters than an optimizer holds, in words; None where it does not."""
    held = sum(len(group["params"]) for group in groups)
    trained = sum(parameter.requires_grad for parameter in named_parameters(model).values())
    if held == trained:
        return None
    advice = "; load peft's model with is_trainable=True" if has_adapter(model) and not trained else ""
    return f"the optimizer holds {held} parameters, and the model has {trained} that require gradients{advice}"


def misfit(
    names: Sequence[str],
    state: Mapping[int, Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    shapes: Mapping[str, tuple[int, ...]],
) -> str | None:
    """Why the optimizer's parameters cannot have these names, in words; None where all its tensors fit."""
    held = sum(len(group["params"]) for group in groups)
    if len(names) != held or len(set(names)) != held:
        return f"the optimizer holds {held} parameters, and the model has {len(set(names))} in training"
    for number, name in enumerate(names):
        if name not in shapes:
            return f"the model has no parameter {name!r}"
        tensors = {key: value for key, value in state.get(number, {}).items() if isinstance(value, Tensor)}
        for key, value in tensors.items():
            if key != "step" and value.ndim and tuple(value.shape) != shapes[name] and key in _OF_PARAMETERS:
                return f"{key} of parameter {number} has shape {tuple(value.shape)}, and {name!r} has {shapes[name]}"
    return None


_OF_PARAMETERS = {*SECOND_MOMENTS.values(), "exp_avg", "max_exp_avg_sq", "momentum_buffer", "grad_avg"}


def _orders(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> Iterator[list[str]]:
    """The orders in which an optimizer may hold the model's parameters: a Trainer's two groups, or all in one."""
    trained = [name for name, p in named_parameters(model).items() if p.requires_grad]
    if len(groups) == 1:
        yield trained
    if len(groups) != 2 or groups[1].get("weight_decay"):
        return
    for pattern in _PATTERNS:
        decays = decaying(model, pattern)
        first, second = ([n for n in trained if (n in decays) is wanted] for wanted in (True, False))
        if [len(group["params"]) for group in groups] == [len(first), len(second)]:
            yield first + second


def decaying(model: nn.Module, pattern: str) -> set[str]:
    """The parameters that a Trainer's weight decay is for: outside of norms, with names without the pattern."""
    norms = {
        name
        for name, module in named_modules(model, remove_duplicate=False).items()
        if isinstance(module, torch.nn.LayerNorm)
        or (pattern == "bias" and type(module).__name__.endswith(("RMSNorm", "LayerNorm")))
    }
    parameters = named_parameters(model, remove_duplicate=False)
    return {
        name
        for name in parameters
        if not re.search(pattern, name.lower()) and not any(name.startswith(f"{norm}.") for norm in norms)
    }
