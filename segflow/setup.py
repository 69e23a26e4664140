"""From what the user gives to one workspace for each stage of each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .data import Collate
from .errors import MethodError, SegflowError, TrajectoryError
from .layers import LayerChoice, choose_layers
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
    collate_fn: Collate | Mapping[str, Collate] | None
    progress: bool | None
    curvature_examples: int | None = None


def workspaces(settings: Settings, task: Any, run: Trajectory, prefix: str) -> list[Workspace]:
    """One workspace for each stage of a run, whose units' names begin with `prefix`.

    Raises TaskError, LayerError or TrajectoryError where task, model and trajectory do not fit together.
    """
    names = [stage.stage for stage in run.stages]
    tasks, collates = by_stage(task, names, "task"), by_stage(settings.collate_fn, names, "collate_fn")
    settled = [_layers(settings.model, *of) for of in zip(tasks, run.stages, strict=True)]
    found = []
    for place, (stage, (layers, groups)) in enumerate(zip(run.stages, _agreed(settled), strict=True)):
        found.append(
            Workspace(
                settings.model,
                tasks[place],
                run,
                place,
                settings.units,
                layers,
                groups,
                settings.seed,
                settings.memory,
                collates[place],
                settings.progress,
                is_sharded(settings.model),
                prefix + (f"stages/{stage.stage}/" if len(names) > 1 else ""),
                settings.curvature_examples,
            )
        )
    return found


def _layers(model: nn.Module, task: Any, stage: Trajectory) -> tuple[LayerChoice, dict[str, int]]:
    """The layers that a stage trained, with their parameter groups; task: None where none is given for the stage."""
    if task is not None:
        check_task(task)
    check_parameter_names(model, stage)
    trained = None if stage.parameter_groups is None else stage.parameter_groups.__contains__
    return settle_parameter_groups(choose_layers(model, tracked_module_names(task), trained), stage)


def _agreed(stages: Sequence[tuple[LayerChoice, dict[str, int]]]) -> list[tuple[LayerChoice, dict[str, int]]]:
    """The same, a layer's bias being attributed in all stages that trained the layer, or in none."""
    bare = {name for choice, _ in stages for name, layer in choice.tracked.items() if not layer.has_bias}
    found = []
    for choice, groups in stages:
        tracked, skipped = dict(choice.tracked), dict(choice.skipped)
        for name, layer in choice.tracked.items():
            if name in bare and layer.has_bias:
                tracked[name] = replace(layer, has_bias=False)
                skipped[layer.parameter_names[1]] = "another stage did not train it as it trained the weight"
        found.append((LayerChoice(tracked, skipped), groups))
    return found


def by_stage(given: Any, names: Sequence[str], what: str) -> list[Any]:
    """What is given for each stage: a mapping's entries (None where it has none), or one thing for all.

    Datasets that are mappings themselves are told apart by their keys. TrajectoryError for an unknown stage.
    """
    told = list(names) != ["train"]  # the name of a stage that was given none: a mapping is then a dataset by itself
    stages = told and isinstance(given, Mapping) and bool({key for key in given if isinstance(key, str)} & set(names))
    if not stages:
        if what == "train" and len(names) > 1:
            raise TrajectoryError(
                f"the run has the stages {list(names)}: give training data as {{stage: dataset}}, for the stage to "
                "attribute and all later ones."
            )
        return [given] * len(names)
    unknown = sorted(map(str, set(given) - set(names)))
    if unknown:
        raise TrajectoryError(f"{what}: there is no stage {unknown[0]!r}. The run has {list(names)}.")
    return [given.get(name) for name in names]


def check_arguments(runs: Sequence[Any], method: Any, memory: Any, curvature_examples: Any) -> None:
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
    few = curvature_examples
    if few is not None and (isinstance(few, bool) or not isinstance(few, int) or few < 1):
        raise SegflowError(f"curvature_examples={few!r}: expected a whole number of examples, or None for all.")
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise SegflowError(f"memory={memory!r}: expected a whole number of bytes, such as 2 << 30.")


def check_alike(runs: Sequence[Sequence[Workspace]]) -> None:
    """Raise TrajectoryError unless the runs of an ensemble attribute the same layers."""
    for run in runs[1:]:
        for first, other in zip(runs[0], run, strict=True):
            if first.shapes != other.shapes:
                raise TrajectoryError(
                    f"the runs of an ensemble attribute different layers, {first.shapes} and {other.shapes}. "
                    "Were their parameter groups the same? Name the layers with get_influence_tracked_modules()."
                )
