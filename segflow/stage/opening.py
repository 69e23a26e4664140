"""From what the user gives to one stage context for each stage of each run."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..arguments import shown
from ..errors import TaskError, TrajectoryError, check_choice
from ..model.layers.choice import LayerChoice, Training, choose_layers, parameter_aliases
from ..runtime.sharding import named_parameters
from ..tasks.task import check_task, tracked_module_names
from ..training.trajectory import Trajectory
from .context import Settings, StageContext


def open_stages(settings: Settings, task: Any, run: Trajectory, prefix: str) -> list[StageContext]:
    """One stage context for each stage of a run, whose units' names begin with `prefix`.

    Raises TaskError, LayerError or TrajectoryError where task, model and trajectory do not fit together.
    """
    run = run.of_model(settings.model)
    names = [stage.stage for stage in run.stages]
    tasks, collates = by_stage(task, names, "task"), by_stage(settings.collate_fn, names, "collate_fn")
    odd = [shown(collate) for collate in collates if collate is not None and not callable(collate)]
    if odd:
        raise TaskError(f"collate_fn={odd[0]}: expected a function that joins examples into a batch, or None.")
    return [
        StageContext(
            settings,
            run,
            place,
            tasks[place],
            layers,
            parameter_groups,
            collates[place],
            prefix + (f"stages/{names[place]}/" if len(names) > 1 else ""),
        )
        for place, (layers, parameter_groups) in enumerate(_stages(settings, tasks, run.stages))
    ]


def _settled(
    settings: Settings, task: Any, stage: Trajectory, apart: Collection[str] = ()
) -> tuple[LayerChoice, dict[str, int]]:
    """The layers that a stage trained, with their parameter groups; task: None where none is given for the stage.

    apart: names of biases that are blocks by themselves.
    """
    if task is not None:
        check_task(task)
    model = settings.model
    check_parameter_names(model, stage)
    aliases = parameter_aliases(model)
    why_untrained = None if stage.parameter_groups is None else stage.why_untrained

    def group(name: str) -> int:
        groups = (stage.group_of(alias) for alias in aliases.get(name, [name]))
        return next((group for group in groups if group is not None), 0)

    def alike(one: str, other: str) -> bool:
        pair = group(one), group(other)
        return not stage.used.differing(*pair) and stage.eps[pair[0]] == stage.eps[pair[1]]

    training = Training(why_untrained, alike, apart)
    choice = choose_layers(model, tracked_module_names(task), training, settings.selection, settings.block_sizes)
    return choice, {name: group(layer.names[0]) for name, layer in choice.tracked.items()}


def _stages(
    settings: Settings, tasks: Sequence[Any], stages: Sequence[Trajectory]
) -> list[tuple[LayerChoice, dict[str, int]]]:
    """The layers of each stage; a bias is in its weight's block in all stages that trained the weight, or in none."""
    settled = [_settled(settings, *of_stage) for of_stage in zip(tasks, stages, strict=True)]
    tracked = [layer for choice, _ in settled for layer in choice.tracked.values()]
    bare = {layer.name for layer in tracked if not layer.has_bias}
    apart = {layer.names[1] for layer in tracked if layer.has_bias and layer.name in bare}
    if not apart:
        return settled
    return [_settled(settings, *of_stage, apart) for of_stage in zip(tasks, stages, strict=True)]


def by_stage(given: Any, names: Sequence[str], what: str) -> list[Any]:
    """What is given for each stage: the entries of a mapping by stage (None where it has none), or one thing for all.

    A mapping that names no stage is taken as a dataset. what: names the argument in errors. TrajectoryError for a stage
    that the run does not have.
    """
    named = list(names) != ["train"]  # the name of a stage that was given none: a mapping is then a dataset
    keys = {key for key in given if isinstance(key, str)} if isinstance(given, Mapping) else set()
    if not named or not keys & set(names):
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


def given_runs(trajectory: Any) -> list[Trajectory]:
    """The runs of what was given as trajectory: one, or those of an ensemble.

    Raises TrajectoryError where these are no runs of one recipe.
    """
    if isinstance(trajectory, str | os.PathLike):
        raise TrajectoryError(
            f"trajectory={shown(trajectory)}: expected a segflow.Trajectory, found a path. Give "
            f"segflow.Trajectory.load({str(trajectory)!r})."
        )
    is_series = isinstance(trajectory, Iterable) and not isinstance(trajectory, Trajectory)
    runs = list(trajectory) if is_series else [trajectory]
    if not runs or not all(isinstance(run, Trajectory) for run in runs):
        raise TrajectoryError(
            f"trajectory={shown(trajectory)}: expected a segflow.Trajectory, or several of one recipe. Read a recorded "
            "run with Trajectory.load(folder)."
        )
    shapes = {tuple((stage.stage, stage.dataset_size) for stage in run.stages) for run in runs}
    if len(shapes) > 1:
        raise TrajectoryError(
            f"the runs of an ensemble differ in their stages or dataset sizes: {sorted(shapes)}. "
            "Expected the same recipe."
        )
    return runs


def check_alike(runs: Sequence[Sequence[StageContext]]) -> None:
    """Raise TrajectoryError unless the runs of an ensemble attribute the same layers."""
    for run in runs[1:]:
        for first, other in zip(runs[0], run, strict=True):
            if first.shapes != other.shapes:
                raise TrajectoryError(
                    f"the runs of an ensemble attribute different layers, {first.shapes} and {other.shapes}. "
                    "Were their parameter groups the same? Name the layers with get_influence_tracked_modules()."
                )


def training_data(runs: Sequence[Sequence[StageContext]], train: Any) -> list[Any]:
    """The training data of each stage, None where it is not given.

    Raises TrajectoryError unless it is given for the last stages without a gap and is as long as each run says, and
    TaskError for a stage that has data and no task.
    """
    contexts = runs[0]
    trains = by_stage(train, [context.trajectory.stage for context in contexts], "train")
    given = [data is not None for data in trains]
    if not any(given):
        raise TaskError("train is None: expected the training data, a dataset, or {stage: dataset} for several stages.")
    if not given[-1] or given != sorted(given):
        named = [context.trajectory.stage for context, data in zip(contexts, trains, strict=True) if data is not None]
        raise TrajectoryError(
            f"training data is given for {named}: expected it for the stage to attribute and for all later ones, "
            "which let it decay."
        )
    for run in runs:
        for context, data in zip(run, trains, strict=True):
            if data is not None:
                context.require_task()
                context.require_training_data(data)
    return trains


def scored_stage(contexts: Sequence[StageContext], stage: str | None, trains: Sequence[Any]) -> int:
    """The place of the stage to score, by default the last; TrajectoryError if its data is not given."""
    names = [context.trajectory.stage for context in contexts]
    if stage is None:
        return len(names) - 1
    check_choice("stage", stage, names, TrajectoryError)
    if trains[names.index(stage)] is None:
        raise TrajectoryError(f"stage={stage!r}: its training data is not given. Pass {{stage: dataset}}.")
    return names.index(stage)


def check_parameter_names(model: nn.Module, trajectory: Trajectory) -> None:
    """Raise TrajectoryError for a parameter that the trajectory names and the model does not have."""
    known = named_parameters(model, remove_duplicate=False)
    unknown = sorted(set(trajectory.parameter_groups or ()) - known.keys())
    if unknown:
        raise TrajectoryError(
            f"parameter_groups names {unknown[:4]}, which the model does not have. "
            "Give the names of model.named_parameters(), or the model that was trained."
        )
