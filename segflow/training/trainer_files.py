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

from ..errors import TrajectoryError
from ..store.files import read_content
from .checkpoints import load_torch
from .trainer_schedule import ScheduleDefinition

ARGUMENTS, STATE, OPTIMIZER, SCHEDULER = "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt"
_LARGEST = 1 << 30  # bytes of trainer_state.json
_NEEDED = ("learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "optim")


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
    if lacking := [name for name in _NEEDED if not isinstance(found, dict) or name not in found]:
        raise TrajectoryError(
            f"the training arguments lack {lacking}. Give args=, the TrainingArguments of this run or a dict of their "
            f"values, with {', '.join(_NEEDED)} among them."
        )
    return dict(found)


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
    options = arguments.get("lr_scheduler_kwargs") or {}
    options = json.loads(options) if isinstance(options, str) else options
    kind = str(arguments["lr_scheduler_type"])
    return ScheduleDefinition(kind, steps, total, float(arguments["learning_rate"]), options)


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
