"""From what the user gives to one workspace for each stage of each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .data import Collate
from .errors import MethodError, SegflowError, TrajectoryError
from .layers import choose_layers
from .ranks import is_sharded
from .task import check_task, tracked_module_names
from .trajectory import Trajectory
from .units import Units
from .workspace import Workspace, check_parameter_names, settle_parameter_groups


@dataclass(frozen=True)
class Settings:
    """What all workspaces of an analyzer share."""

    model: nn.Module
    units: Units
    seed: int
    memory: int
    collate_fn: Collate | None
    progress: bool | None


def workspaces(settings: Settings, task: Any, run: Trajectory, prefix: str) -> list[Workspace]:
    """One workspace for each stage of a run, whose units' names begin with `prefix`.

    Raises TaskError, LayerError or TrajectoryError where task, model and trajectory do not fit together.
    """
    names = [stage.stage for stage in run.stages]
    found = []
    for place, (own_task, stage) in enumerate(zip(by_stage(task, names, "task"), run.stages, strict=True)):
        if own_task is None:
            raise TrajectoryError(
                f"task: none is given for stage {stage.stage!r}. Give one task, or one for each stage."
            )
        check_task(own_task)
        check_parameter_names(settings.model, stage)
        recorded = stage.parameter_groups
        trained = None if recorded is None else recorded.__contains__
        choice = choose_layers(settings.model, tracked_module_names(own_task), trained)
        layers, groups = settle_parameter_groups(choice, stage)
        found.append(
            Workspace(
                settings.model,
                own_task,
                run,
                place,
                settings.units,
                layers,
                groups,
                settings.seed,
                settings.memory,
                settings.collate_fn,
                settings.progress,
                is_sharded(settings.model),
                prefix + (f"stages/{stage.stage}/" if len(names) > 1 else ""),
            )
        )
    return found


def by_stage(given: Any, names: Sequence[str], what: str) -> list[Any]:
    """What is given for each stage: a mapping's entries (None where it has none), or one thing for all.

    Datasets that are mappings themselves are told apart by their keys. TrajectoryError for an unknown stage.
    """
    stages = isinstance(given, Mapping) and all(isinstance(key, str) for key in given) and bool(set(given) & set(names))
    if not stages:
        if what == "train" and len(names) > 1:
            raise TrajectoryError(
                f"the run has the stages {list(names)}: give training data as {{stage: dataset}}, for the stage to "
                "attribute and all later ones."
            )
        return [given] * len(names)
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise TrajectoryError(f"{what}: there is no stage {unknown[0]!r}. The run has {list(names)}.")
    return [given.get(name) for name in names]


def check_arguments(runs: Sequence[Any], method: Any, memory: Any) -> None:
    """Name what was given where something else is expected."""
    if not runs or not all(isinstance(run, Trajectory) for run in runs):
        raise TrajectoryError(
            f"trajectory={runs[0] if len(runs) == 1 else runs!r}: expected a segflow.Trajectory, or several "
            "of one recipe. Read a recorded run with Trajectory.load(folder)."
        )
    shapes = {tuple((stage.stage, stage.dataset_size) for stage in run.stages) for run in runs}
    if len(shapes) > 1:
        raise TrajectoryError(
            f"the runs of an ensemble differ in their stages or dataset sizes: {sorted(shapes)}. "
            "Expected the same recipe."
        )
    if method is not None and (isinstance(method, type) or not callable(getattr(method, "plan", None))):
        raise MethodError(f"method={method!r}: expected one of Source(...), InfluenceFunction(...), TracIn(), ...")
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise SegflowError(f"memory={memory!r}: expected a whole number of bytes, such as 2 << 30.")
