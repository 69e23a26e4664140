"""Training data by stage: which is given, for which stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import TrajectoryError, check_choice
from .setup import by_stage
from .workspace import Workspace


def training_data(runs: Sequence[Sequence[Workspace]], train: Any) -> list[Any]:
    """The training data of each stage, None where it is not given; it must fit the stages of every run."""
    works = runs[0]
    trains = by_stage(train, [work.trajectory.stage for work in works], "train")
    given = [data is not None for data in trains]
    if not given[-1] or given != sorted(given):
        raise TrajectoryError(
            f"training data is given for {[w.trajectory.stage for w, ok in zip(works, given, strict=True) if ok]}: "
            "expected it for the stage to attribute and for all later ones, which let it decay."
        )
    for run in runs:
        for work, data in zip(run, trains, strict=True):
            if data is not None:
                work.require_task()
                work.require_training_data(data)
    return trains


def stage_place(works: Sequence[Workspace], stage: str | None, trains: Sequence[Any]) -> int:
    """The place of the stage to score, by default the last; TrajectoryError if its data is not given."""
    names = [work.trajectory.stage for work in works]
    if stage is None:
        return len(names) - 1
    check_choice("stage", stage, names, TrajectoryError)
    if trains[names.index(stage)] is None:
        raise TrajectoryError(f"stage={stage!r}: its training data is not given. Pass {{stage: dataset}}.")
    return names.index(stage)
