"""What the checkpoints of one Trainer's run must agree in, and what a folder of several runs would not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..errors import TrajectoryError
from .moment_files import OptimizerState
from .trainer_files import TrainerState
from .trainer_schedule import is_close


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
