"""What the checkpoints of one Trainer's run must agree in, and what a folder of several runs would not."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TrajectoryError
from ..runtime.sharding import named_parameters
from .moment_files import OptimizerState
from .state_files import state_files
from .state_names import under_own_names, with_tied
from .trainer_files import ARGUMENTS, TrainerState, schedule_of, training_arguments
from .trainer_schedule import is_close, schedule_factors

# What training must have been told alike all along.
_ALIKE = ("gradient_accumulation_steps", "optim", "label_smoothing_factor")
_SCHEDULE = ("lr_scheduler_type", "learning_rate", "warmup_steps", "warmup_ratio", "lr_scheduler_kwargs")


def check_places(folders: Sequence[Path], states: Sequence[TrainerState]) -> None:
    """Raise TrajectoryError unless each checkpoint is of its folder's step, and all states are of one run."""
    for folder, state in zip(folders, states, strict=True):
        if folder.name != f"checkpoint-{state.step}":
            raise TrajectoryError(f"{state.path}: says step {state.step}. Put the folders back in their places.")
    for earlier, later in pairwise(states):
        check_goes_on(earlier, later)


def check_goes_on(earlier: TrainerState, later: TrainerState) -> None:
    """Raise TrajectoryError unless a later state's log begins with all that an earlier one logged."""
    before, after = ([json.dumps(row, sort_keys=True) for row in state.log] for state in (earlier, later))
    if after[: len(before)] == before:
        return
    same = [one == other for one, other in zip(before, after, strict=False)]
    row = earlier.log[same.index(False) if False in same else len(same)]
    raise TrajectoryError(
        f"{earlier.path}: its log of step {row['step']} is not that of {later.path}, so one of them is of another run, "
        "or damaged. Remove what is not of this run, or restore the file."
    )


def check_saved_rates(saved: OptimizerState, following: np.ndarray, taken: int, bases: np.ndarray) -> None:
    """Raise TrajectoryError unless an optimizer holds the rate of the step that follows, none of the run's last.

    following: that step's rates, [1 or 0, groups]. bases: the rates that the optimizer was made with, [groups].
    """
    for rates in following:
        for place, group in enumerate(saved.groups):
            if not is_close(rates[place], float(group["lr"]), bases[place]):
                raise TrajectoryError(
                    f"{saved.path}: after {taken} steps the learning rate of parameter group {place} is "
                    f"{float(group['lr']):g}, and the schedule says {rates[place]:g}. Give learning_rates=, the rate "
                    "of every optimizer step, or args=, the TrainingArguments of this run."
                )


def check_arguments(states: Sequence[TrainerState], last: Mapping[str, Any], known: Mapping[str, bool]) -> None:
    """Raise TrajectoryError where a checkpoint's training_args.bin says otherwise than the last one's.

    A Trainer that is resumed with other arguments leaves the earlier ones in the earlier checkpoints only.

    Args:
        last: the arguments saved in the last checkpoint.
        known: whether the user gave learning_rates, clip_factors and batch_size, of which the arguments then need not
            tell anything.
    """
    names = [*_ALIKE]
    names += [] if known["clip_factors"] else ["max_grad_norm"]
    names += [] if known["batch_size"] else ["per_device_train_batch_size"]
    for state in states[:-1]:
        if not (path := state.path.parent / ARGUMENTS).is_file():
            continue
        here = training_arguments(None, path.parent)
        odd = _told_apart(names, here, last)
        if not known["learning_rates"] and _other_schedule(here, last, state.planned, states[-1].planned):
            odd |= _told_apart(_SCHEDULE, here, last)
            odd |= {"max_steps": (state.planned, states[-1].planned)} if state.planned != states[-1].planned else {}
        if odd:
            changed = ", ".join(f"{name}={one!r}, later {other!r}" for name, (one, other) in odd.items())
            raise TrajectoryError(
                f"{path}: the Trainer was resumed with other arguments ({changed}), and the folder does not say from "
                "which step on. Give learning_rates=, clip_factors= or batch_size= where it is they that changed, or "
                "args= where one set of arguments holds for all steps; RecordCallback follows such a run."
            )


def _told_apart(names: Sequence[str], here: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The values of arguments that differ, by their names."""
    both = {name: (here.get(name), last.get(name)) for name in names}
    return {name: (one, other) for name, (one, other) in both.items() if (one or None) != (other or None)}


def _other_schedule(here: Mapping[str, Any], last: Mapping[str, Any], planned: int, at_last: int) -> bool:
    """Whether two sets of arguments make different rates of the same base.

    The base rate itself is the optimizer's, which a Trainer that is resumed does not take from its arguments.
    """
    made = schedule_of(here, planned), schedule_of(last, at_last)
    if made[0] == made[1]:
        return False
    here_factors, last_factors = (schedule_factors(one, max(planned, at_last)) for one in made)
    return not np.allclose(here_factors, last_factors, rtol=1e-6, atol=1e-9)


def check_frozen(paths: Sequence[Path], model: nn.Module, held: Collection[str]) -> None:
    """Raise TrajectoryError where a parameter changed between the first and the last checkpoint that no group holds.

    Another layer of the same shapes was then frozen in training than in the model, so that each moment goes by the name
    of another parameter. Only parameters that have the shape of one that is held are read.

    held: the names of the optimizer's parameters.
    """
    parameters = named_parameters(model, remove_duplicate=False)
    known = with_tied(dict.fromkeys(held, True), model)
    shapes = {parameters[name].shape for name in known}
    loose = [name for name, p in parameters.items() if name not in known and p.shape in shapes]
    if not loose or len(paths) < 2:
        return
    first, last = (_by_own_names(path, model) for path in (paths[0], paths[-1]))
    for name in loose:
        if name in first and name in last and not torch.equal(first[name](), last[name]()):
            raise TrajectoryError(
                f"{paths[-1]}: {name!r} changed since {paths[0].name}, and the optimizer of a model with the "
                "parameters that are frozen in this one does not hold it. Freeze what was frozen in training; or give "
                "parameter_names=, the optimizer's parameters in its order, if something else changed it."
            )


def _by_own_names(path: Path, model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """What reads each parameter of a checkpoint, by the model's name of it."""
    files = state_files(path, "checkpoint")
    names = under_own_names({name: name for name in files.names()}, model, str(path))
    return {own: partial(files.tensor, name) for own, name in names.items()}
