"""The files that a transformers Trainer leaves, read without running any code that they name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from ..arguments import shown
from ..errors import TrajectoryError
from ..store.files import read_content
from .checkpoints import load_torch
from .trainer_schedule import ScheduleDefinition

ARGUMENTS, STATE, OPTIMIZER, SCHEDULER = "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt"
_LARGEST = 1 << 30  # bytes of trainer_state.json
_NEEDED = ("learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "optim")
_MAY_BE_NONE = ("warmup_steps", "max_grad_norm")
_NUMBERS = {  # and the least that they may be; a max_grad_norm below 0 clips nothing
    "learning_rate": 0.0,
    "warmup_steps": 0.0,
    "warmup_ratio": 0.0,
    "max_grad_norm": -math.inf,
    "label_smoothing_factor": 0.0,
    "gradient_accumulation_steps": 1.0,
}


class _Stub:
    """Stands for every class that a file names: it keeps what it is given, and does nothing."""

    def __init__(self, value: Any = None):
        self.value = value


def read_saved(path: Path) -> Any:
    """What torch.save wrote: tensors, which stay in the file until they are used, and plain containers of them."""
    if not path.is_file():
        raise TrajectoryError(
            f"{path}: no such file, and nothing else says which steps the optimizer took. Train with "
            "save_only_model=False on one process group (neither FSDP nor DeepSpeed), or with RecordCallback."
        )
    try:
        return load_torch(path, mmap=True)
    except Exception as problem:  # torch raises many kinds here, none of its own
        raise TrajectoryError(
            f"{path}: not readable as plain tensors and numbers ({type(problem).__name__}: {problem}). Train with "
            "RecordCallback to explain a run of such an optimizer."
        ) from problem


def training_arguments(given: Any, folder: Path) -> Mapping[str, Any]:
    """The TrainingArguments of a run as plain values: those given, or those saved in a checkpoint's folder.

    given: TrainingArguments, or a mapping of their names to values; None to read training_args.bin. TrajectoryError
    where they cannot be read, or lack what a run cannot be explained without.
    """
    found = _plain(given) if given is not None else _read_arguments(folder / ARGUMENTS)
    found = found if isinstance(found, dict) else {}
    lacking = [name for name in _NEEDED if name not in found or (found[name] is None and name not in _MAY_BE_NONE)]
    if lacking:
        raise TrajectoryError(
            f"the training arguments lack {lacking}. Give args=, the TrainingArguments of this run or a dict of their "
            f"values, with {', '.join(_NEEDED)} among them."
        )
    _check_values("args" if given is not None else str(folder / ARGUMENTS), found)
    return found


def _check_values(where: str, arguments: Mapping[str, Any]) -> None:
    """Raise TrajectoryError naming the first argument whose value makes no sense."""
    problem: str | None = None
    for name, least in _NUMBERS.items():
        try:
            number = float(arguments.get(name) or least)
        except (TypeError, ValueError):
            number = math.nan
        whole = name != "gradient_accumulation_steps" or number % 1 == 0
        if not (number >= least and whole):
            problem = f"{name}={shown(arguments[name])}: expected a {'whole number' if least == 1 else 'number'}"
            problem += f", at least {least:g}" if least > -math.inf else ""
    if not isinstance(arguments.get("distributed_state") or {}, Mapping):
        problem = f"distributed_state={shown(arguments['distributed_state'])}: expected accelerate's PartialState"
    if not isinstance(_scheduler_options(arguments), Mapping):
        problem = f"lr_scheduler_kwargs={shown(arguments['lr_scheduler_kwargs'])}: expected a dict, or one as JSON"
    if problem:
        raise TrajectoryError(
            f"{where}: {problem}. Give args=, the TrainingArguments of this run or a dict of their values."
        )


def _scheduler_options(arguments: Mapping[str, Any]) -> Any:
    """The scheduler's own options; None where they are no JSON."""
    options = arguments.get("lr_scheduler_kwargs") or {}
    try:
        return json.loads(options) if isinstance(options, str) else options
    except ValueError:
        return None


def _read_arguments(path: Path) -> Any:
    """Every class that the file names is replaced by one that does nothing, so that nothing of it is run."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stubs: Any = [(_Stub, name) for name in names]
        with torch.serialization.safe_globals(stubs):
            return _plain(load_torch(path))
    except Exception as problem:  # torch raises many kinds here, none of its own
        raise TrajectoryError(
            f"{path}: not readable ({type(problem).__name__}: {problem}). Give args=, the TrainingArguments of this "
            "run or a dict of their values."
        ) from problem


def _plain(value: Any) -> Any:
    """A value without its class: enums by their values, stubs and dataclasses as dicts."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, _Stub):
        return value.value if set(vars(value)) == {"value"} else _plain(vars(value))
    if hasattr(value, "__dataclass_fields__") or hasattr(value, "num_processes"):
        return {key: _plain(item) for key, item in vars(value).items()}
    return value


def schedule_of(arguments: Mapping[str, Any], total: int) -> ScheduleDefinition:
    """The definition of a run's schedule; total: the optimizer steps that were planned."""
    warmup, ratio = float(arguments["warmup_steps"] or 0), float(arguments.get("warmup_ratio") or 0)
    steps = int(warmup) if warmup >= 1 else math.ceil(total * (warmup or ratio))
    kind, base = str(arguments["lr_scheduler_type"]), float(arguments["learning_rate"])
    return ScheduleDefinition(kind, steps, total, base, _scheduler_options(arguments))


def batch_size_of(arguments: Mapping[str, Any], state: TrainerState) -> int | None:
    """Examples in one optimizer step; None where the files do not tell how many processes there were."""
    processes = (arguments.get("distributed_state") or {}).get("num_processes")
    if not processes or not state.batch_size:
        return None
    return state.batch_size * int(arguments.get("gradient_accumulation_steps") or 1) * int(processes)


def scheduled_steps(folder: Path) -> int | None:
    """How many steps a schedule of the step alone had taken; None where scheduler.pt is missing or of another kind."""
    path = folder / SCHEDULER
    content = read_saved(path) if path.is_file() else {}
    found = content.get("last_epoch") if isinstance(content, dict) and "lr_lambdas" in content else None
    return found if isinstance(found, int) else None


@dataclass(frozen=True)
class TrainerState:
    """What trainer_state.json says.

    Args:
        step: the Trainer's global step. planned: its max_steps. ended: whether training was about to stop there.
        log: what was logged, one mapping for each time. best: the best checkpoint's path, if one was looked for.
        batch_size: of one process, without accumulation.
    """

    path: Path
    step: int
    planned: int
    ended: bool
    log: tuple[Mapping[str, Any], ...]
    best: str | None = None
    batch_size: int | None = None

    def logged(self, name: str) -> list[tuple[int, float]]:
        """The global steps at which a number was logged, and the numbers, which may be infinite or NaN."""
        points = {int(row["step"]): float(row[name]) for row in self.log if row.get(name) is not None}
        return sorted(points.items())


def read_state(folder: Path) -> TrainerState:
    """What a folder's trainer_state.json says; TrajectoryError where it is missing or damaged."""
    path = folder / STATE
    content = read_content(path, TrajectoryError, _LARGEST)
    try:
        state = json.loads(content)  # Python's form of JSON, in which a norm may be NaN or Infinity
        control = (state.get("stateful_callbacks") or {}).get("TrainerControl") or {}
        step, planned = int(state["global_step"]), int(state["max_steps"])
        ended = step >= planned or bool((control.get("args") or {}).get("should_training_stop"))
        return TrainerState(
            path=path,
            step=step,
            planned=planned,
            ended=ended,
            log=tuple(_row(row) for row in state["log_history"]),
            best=None if state.get("best_model_checkpoint") is None else str(state["best_model_checkpoint"]),
            batch_size=int(state.get("train_batch_size") or 0) or None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise TrajectoryError(
            f"{path}: damaged ({type(problem).__name__}: {problem}). Restore it, or leave this checkpoint out."
        ) from problem


def _row(row: Any) -> Mapping[str, Any]:
    """One row of the log; ValueError, TypeError, KeyError or AttributeError where it is none."""
    int(row["step"])
    for name in ("learning_rate", "grad_norm"):
        float(row.get(name) or 0.0)
    return dict(row)
