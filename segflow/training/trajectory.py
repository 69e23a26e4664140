"""What training left behind: checkpoints, the learning rate of every step, the optimizer's constants, and stages."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrajectoryError
from ..runtime.sharding import laid_out
from ..store.files import file_digest, inside, read_json, read_tensors
from .checkpoints import (
    check_checkpoint_files,
    check_files,
    check_moment_files,
    check_moments,
    recorded_part,
    state_dict_of,
)
from .optimizers import (
    STATE,
    OptimizerConstants,
    effective_rates,
    mean_decay,
    precondition,
    require_known,
    second_moments,
)
from .per_step import (
    PerStep,
    check_batch_size,
    check_parameter_groups,
    constant_by_group,
    constant_by_step,
    rates_by_step,
)

__all__ = ["FORMAT", "OptimizerConstants", "PerStep", "Trajectory", "check_stage", "stage_names"]
FORMAT = 2  # format 1, which held the optimizer's own state in place of second moments, is read as well
STAGES = "stages.json"  # of a folder with several stages: their names in order, each that of a recording's subfolder
_OWN = ("trajectory.json", "recording.json", "steps.safetensors", "checkpoints", STAGES)  # no names for stages


class Trajectory:
    """Checkpoints of one training run, or of one stage of it, and how the optimizer moved between them.

    Runs that `segflow.record` observed are read with `Trajectory.load`; for others, give what they left behind.

    Args:
        checkpoints: state files in the order of `steps`: safetensors, or torch files (read with
            `weights_only=True`) holding the model's state_dict.
        steps: how many optimizer steps had been taken at each checkpoint, ascending; the last is the end of training.
        learning_rates: a constant, [steps], [steps, parameter groups], or {step: rate} with steps counted from 1;
            with Adagrad's `lr_decay` in them.
        dataset_size: number of training examples N; the objective is the mean of their losses.
        optimizer: what else the optimizer was given.
        parameter_groups: {parameter name: index of its parameter group}; None puts every parameter in group 0.
        stage: what this stage of training is called; see `after`.
        second_moments: a file for each checkpoint, with {parameter name: bias-corrected second moments v_hat}.

    Raises:
        TrajectoryError: a file is missing, steps are out of order, or a step has no learning rate.
    """

    def __init__(
        self,
        checkpoints: Sequence[str | os.PathLike[str]],
        steps: Sequence[int],
        learning_rates: PerStep | Mapping[int, float],
        dataset_size: int,
        optimizer: OptimizerConstants | None = None,
        parameter_groups: Mapping[str, int] | None = None,
        stage: str = "train",
        second_moments: Sequence[str | os.PathLike[str]] | None = None,
    ):
        self.checkpoints = tuple(Path(path) for path in checkpoints)
        check_checkpoint_files(self.checkpoints, steps)
        self.steps = tuple(int(step) for step in steps)
        if dataset_size < 1 or dataset_size != int(dataset_size):
            raise TrajectoryError(f"dataset_size={dataset_size}: expected the number of training examples.")
        self.dataset_size = int(dataset_size)
        self.optimizer = optimizer or OptimizerConstants()
        self.parameter_groups = None if parameter_groups is None else dict(parameter_groups)
        self.learning_rates = rates_by_step(learning_rates, self.steps[-1])
        shape = self.learning_rates.shape
        self.momentum = constant_by_step("momentum", self.optimizer.momentum, shape, below=1.0)
        self.dampening = constant_by_step("dampening", self.optimizer.dampening, shape)
        self.weight_decay = constant_by_step("weight_decay", self.optimizer.weight_decay, shape)
        self._effective = effective_rates(self.optimizer.name, self.learning_rates, self.momentum, self.dampening)
        self.eps = constant_by_group("eps", self.optimizer.eps, shape[1])
        check_parameter_groups(self.parameter_groups, shape[1])
        check_batch_size(self.optimizer.batch_size)
        self.stage = check_stage(stage)
        self.earlier: Trajectory | None = None  # the stage before; see `after`
        self._moments = None if second_moments is None else tuple(Path(path) for path in second_moments)
        if self._moments is not None:
            check_moment_files(self.optimizer.name, len(self._moments), len(self))
            check_files(self._moments, "file of second moments")
        self._expected: dict[int, str] = {}
        self._options: Sequence[Mapping[str, Any]] = ()  # each parameter group's, of a recording of format 1

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, unfinished: bool = False) -> Trajectory:
        """Read what `segflow.record` wrote into `directory`: of several stages the last, which knows those before.

        unfinished: accept a run whose last stage was stopped inside `segflow.record`, up to its last checkpoint.

        Raises TrajectoryError where the recording is missing, unfinished or damaged.
        """
        root = Path(directory)
        names = stage_names(root)
        folders = [inside(root, name, error=TrajectoryError) for name in names] or [root]
        found = [cls._loaded(folder, unfinished and folder == folders[-1]) for folder in folders]
        for name, stage in zip(names, found, strict=False):
            if stage.stage != name:
                raise TrajectoryError(
                    f"{root / name}: holds stage {stage.stage!r}, but {STAGES} says {name!r}. "
                    "Put the folders back in their places, or record again."
                )
        return reduce(lambda earlier, later: later.after(earlier), found)

    @classmethod
    def _loaded(cls, root: Path, unfinished: bool) -> Trajectory:
        names = [name for name in ("trajectory.json", "recording.json") if (root / name).exists()]
        if not names:
            raise TrajectoryError(f"{root}: no recorded run here (no trajectory.json). Make one with segflow.record().")
        if names == ["recording.json"] and not unfinished:
            raise TrajectoryError(
                f"{root}: the recorded run did not finish, its process was stopped inside segflow.record(). "
                "Train again, with overwrite=True to reuse the folder; or pass unfinished=True to explain the "
                "model of its last checkpoint."
            )
        content = read_json(root / names[0], TrajectoryError)
        found = content.get("format") if isinstance(content, dict) else None
        if found not in (1, FORMAT) or isinstance(found, bool):
            raise TrajectoryError(f"{root}: trajectory format {found!r}, this segflow reads 1 and {FORMAT}.")
        if content.get("finished") is False:
            raise TrajectoryError(
                f"{root}: the recorded run was stopped before its first checkpoint. Train again, with overwrite=True "
                "to reuse the folder; a stage before it can be loaded from its own folder."
            )
        try:
            return cls._recorded(root, content, whole=names[0] == "trajectory.json")
        except (KeyError, TypeError, AttributeError, ValueError) as problem:
            raise TrajectoryError(
                f"{root / names[0]}: damaged ({type(problem).__name__}: {problem}). Restore it, or record again."
            ) from problem

    @classmethod
    def _recorded(cls, root: Path, content: Mapping[str, Any], whole: bool) -> Trajectory:
        """The trajectory that a file describes; of a run that was stopped, only what is surely there."""
        log = read_tensors(root / "steps.safetensors", content["log"]["sha256"] if whole else None, TrajectoryError)
        entries = [(inside(root, entry["file"], error=TrajectoryError), entry) for entry in content["checkpoints"]]
        entries = [(path, entry) for path, entry in entries if whole or path.exists()]
        last = None if whole else entries[-1][1]["step"] if entries else 0
        log = {name: values[:last] for name, values in log.items()}
        trajectory = cls(
            [path for path, _ in entries],
            [entry["step"] for _, entry in entries],
            log["learning_rate"],
            content["dataset_size"],
            OptimizerConstants.recorded(content, log),
            content["parameter_groups"],
            content.get("stage", "train"),
        )
        trajectory._expected = {index: entry["sha256"] for index, (_, entry) in enumerate(entries)}
        trajectory._options = content["constants"]
        return trajectory

    def after(self, earlier: Trajectory) -> Trajectory:
        """This stage of training as the one that went on where `earlier` ended (pretraining, then fine-tuning).

        All but `earlier` and `stages` stays that of this stage. TrajectoryError if a name comes twice.
        """
        names = [stage.stage for stage in (*earlier.stages, *self.stages)]
        if self.earlier is not None or len(set(names)) < len(names):
            raise TrajectoryError(
                f"stages {names}: expected names that differ, put in order one by one. Use Trajectory(..., stage=...)."
            )
        later = copy.copy(self)
        later.earlier = earlier
        return later

    @property
    def stages(self) -> tuple[Trajectory, ...]:
        """The stages of training, first to last; the last is this one. Steps count from each one's own start."""
        return (*(self.earlier.stages if self.earlier else ()), self)

    def __len__(self) -> int:
        """The number of checkpoints."""
        return len(self.checkpoints)

    def __repr__(self) -> str:
        names = ", ".join(stage.stage for stage in self.stages)
        return (
            f"Trajectory({self.optimizer.name}, {self.total_steps} steps, checkpoints at {list(self.steps)}, "
            f"{self.dataset_size} examples{f'; last of the stages {names}' if self.earlier else ''})"
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps from the start to the last checkpoint."""
        return self.steps[-1]

    @property
    def preconditioned(self) -> bool:
        """True if steps were divided by the root of second moments (Adam, AdamW, RMSprop, Adagrad)."""
        return self.optimizer.name in STATE

    @property
    def decoupled(self) -> bool:
        """True if weight decay bypassed the preconditioner, as AdamW's does."""
        return self.optimizer.name == "AdamW" if self.optimizer.decoupled is None else self.optimizer.decoupled

    def state(self, index: int) -> dict[str, Tensor]:
        """The model's state_dict at checkpoint `index`, on the CPU."""
        found = recorded_part(self.checkpoints[index], self._expected.get(index), "model.")
        return state_dict_of(self.checkpoints[index], self._expected.get(index)) if found is None else found

    def second_moments(self, index: int) -> dict[str, Tensor] | None:
        """Bias-corrected second moments v_hat at checkpoint `index`, {parameter name: tensor}; None if not saved.

        A parameter that has taken no step is not among them. TrajectoryError names one whose moments are not finite,
        negative, or not those of a parameter in the checkpoint.
        """
        if not self.preconditioned:
            return None
        path, sha256 = self.checkpoints[index], self._expected.get(index)
        found = recorded_part(path, sha256, "second_moment.") or {}
        if not found and self._options:
            raw = recorded_part(path, sha256, "optimizer.") or {}
            found = second_moments(self.optimizer.name, raw, self._options, self.group_of)
        if self._moments is not None:
            path, found = self._moments[index], state_dict_of(self._moments[index], None)
        check_moments(str(path), found, self.group_of, self.state(index) if self._moments else None)
        return found or None

    def preconditioner(self, index: int) -> dict[str, Tensor] | None:
        """P = 1 / (sqrt(v_hat) + eps) at checkpoint `index`, {parameter name: tensor}; None without second moments."""
        found = {}
        for name, moments in (self.second_moments(index) or {}).items():
            eps = self.eps[self.group_of(name) or 0]
            found[name] = precondition(moments, eps, f"step {self.steps[index]}, {name!r}")
        return found or None

    def digest(self, index: int) -> str:
        """sha256 of the checkpoint's file; where `second_moments` were given, "-" and that of their file besides."""
        paths = [self.checkpoints[index], *(self._moments[index : index + 1] if self._moments else ())]
        return "-".join(file_digest(path, TrajectoryError) for path in paths)

    def load_into(self, model: nn.Module, index: int | Mapping[int, float]) -> None:
        """Copy checkpoint `index` into `model`; TrajectoryError names what does not fit.

        index: or {index: weight}, for a weighted mean in double precision; counters and the like are the last one's.
        """
        if isinstance(index, Mapping):
            state, where = self._mean(index), f"mean of the checkpoints {sorted(index)}"
        else:
            state, where = self.state(index), f"checkpoint at step {self.steps[index]} ({self.checkpoints[index].name})"
        try:
            model.load_state_dict(laid_out(state, model), strict=True)
        except RuntimeError as problem:
            raise TrajectoryError(
                f"{where} is of another model: {problem}. Give the one that was trained."
            ) from problem

    def _mean(self, weights: Mapping[int, float]) -> dict[str, Tensor]:
        total = sum(weights.values())
        known = all(index in range(len(self)) for index in weights)
        if not known or not all(weight >= 0 for weight in weights.values()) or not 0 < total < math.inf:
            raise TrajectoryError(
                f"mean of checkpoints: got {{checkpoint: weight}} {dict(weights)}, expected checkpoints 0 to "
                f"{len(self) - 1} with finite weights >= 0, not all of them 0."
            )
        last = self.state(max(weights))
        mean = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in last.items() if t.is_floating_point()}
        for index, weight in [(index, weight) for index, weight in weights.items() if weight > 0]:
            state = self.state(index)
            if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in last.items()}:
                raise TrajectoryError(f"{self.checkpoints[index]}: its tensors are not those of the last of the mean.")
            for name in mean:
                mean[name] += state[name].double() * (weight / total)
        return last | {name: summed.to(last[name].dtype) for name, summed in mean.items()}

    def lr_steps(self, start: int, end: int) -> tuple[float, ...]:
        """Summed effective learning rates of the steps in (start, end], for each parameter group.

        TrajectoryError for an optimizer whose effective learning rates are not known.
        """
        require_known(self.optimizer.name)
        return tuple(self._effective[start:end].sum(0).tolist())

    def mean_weight_decay(self, start: int, end: int) -> tuple[float, ...]:
        """Weight decay over (start, end], weighted by the effective learning rate, for each parameter group."""
        return mean_decay(self._effective[start:end], self.weight_decay[start:end])

    def group_of(self, parameter: str) -> int | None:
        """The parameter group that trained `parameter`; None if the optimizer did not hold it."""
        return 0 if self.parameter_groups is None else self.parameter_groups.get(parameter)


def check_stage(name: str) -> str:
    """The name of a stage; TrajectoryError unless it is plain enough to name a folder."""
    plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name)
    if not plain or name.lower() in _OWN:
        raise TrajectoryError(
            f"stage={name!r}: expected up to 100 letters, digits, '_', '-' and '.', no '.' first, and not {_OWN}."
        )
    return name


def stage_names(root: Path) -> list[str]:
    """The stages recorded in a folder, first to last; none if it holds no stages. TrajectoryError if damaged."""
    path = root / STAGES
    if not path.exists():
        return []
    content = read_json(path, TrajectoryError)
    names = content.get("stages") if isinstance(content, dict) and content.get("format") == 1 else None
    if not isinstance(names, list) or not names or len({str(name).lower() for name in names}) < len(names):
        raise TrajectoryError(f'{path}: expected {{"format": 1, "stages": [names]}}. Restore it, or record again.')
    return [check_stage(name) for name in names]
