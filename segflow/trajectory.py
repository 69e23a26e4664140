"""What training left behind: checkpoints, the learning rate of every step, the optimizer's constants, and stages."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import optimizers
from .errors import TrajectoryError
from .files import TensorFile, file_digest, inside, read_json, read_tensors
from .optimizers import OptimizerConstants, PerStep
from .ranks import laid_out

__all__ = ["FORMAT", "OptimizerConstants", "PerStep", "Trajectory", "check_stage", "stage_names"]

FORMAT = 2  # format 1, which held the optimizer's own state in place of second moments, is read as well
STAGES = "stages.json"  # of a folder with several stages: their names in order, each that of a recording's subfolder
_OWN = ("trajectory.json", "recording.json", "steps.safetensors", "checkpoints", STAGES)  # no names for stages
_PARTS = ("model.", "second_moment.", "optimizer.")  # of a checkpoint by record()


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
        _check_checkpoints(self.checkpoints, steps)
        self.steps = tuple(int(step) for step in steps)
        if dataset_size < 1 or dataset_size != int(dataset_size):
            raise TrajectoryError(f"dataset_size={dataset_size}: expected the number of training examples.")
        self.dataset_size = int(dataset_size)
        self.optimizer = optimizer or OptimizerConstants()
        self.parameter_groups = None if parameter_groups is None else dict(parameter_groups)
        self.learning_rates = optimizers.learning_rates(learning_rates, self.steps[-1])
        shape = self.learning_rates.shape
        self.momentum = optimizers.per_step("momentum", self.optimizer.momentum, shape, below=1.0)
        self.dampening = optimizers.per_step("dampening", self.optimizer.dampening, shape)
        self.weight_decay = optimizers.per_step("weight_decay", self.optimizer.weight_decay, shape)
        self.eps = optimizers.per_group("eps", self.optimizer.eps, shape[1])
        optimizers.check_parameter_groups(self.parameter_groups, shape[1])
        optimizers.check_batch_size(self.optimizer.batch_size)
        self.stage = check_stage(stage)
        self.earlier: Trajectory | None = None  # the stage before; see `after`
        self._moments = None if second_moments is None else tuple(Path(path) for path in second_moments)
        if self._moments is not None:
            _check_moment_files(self._moments, len(self.checkpoints), self.optimizer.name)
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
        """The recording of one folder."""
        stopped = (root / "recording.json").exists()
        if (root / "trajectory.json").exists():
            return cls._parsed(root / "trajectory.json")
        if unfinished and stopped:
            return cls._parsed(root / "recording.json")
        if stopped:
            raise TrajectoryError(
                f"{root}: the recorded run did not finish, its process was stopped inside segflow.record(). "
                "Train again, with overwrite=True to reuse the folder; or pass unfinished=True to explain the "
                "model of its last checkpoint."
            )
        raise TrajectoryError(f"{root}: no recorded run here (no trajectory.json). Record one with segflow.record().")

    @classmethod
    def _parsed(cls, path: Path) -> Trajectory:
        content = read_json(path, TrajectoryError)
        found = content.get("format") if isinstance(content, dict) else None
        if found not in (1, FORMAT) or isinstance(found, bool):
            raise TrajectoryError(f"{path.parent}: trajectory format {found!r}, this segflow reads 1 and {FORMAT}.")
        if content.get("finished") is False:
            raise TrajectoryError(
                f"{path.parent}: the recorded run was stopped before its first checkpoint. Train again (overwrite=True "
                "reuses the folder). A stage before it can be loaded from its own folder."
            )
        try:
            return cls._recorded(path.parent, content, whole=path.name == "trajectory.json")
        except (KeyError, TypeError, AttributeError, ValueError) as problem:
            raise TrajectoryError(
                f"{path}: damaged ({type(problem).__name__}: {problem}). Restore it, or record again."
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

        Everything but `earlier` and `stages` stays that of this stage. TrajectoryError if a name comes twice.
        """
        names = [stage.stage for stage in earlier.stages]
        if self.earlier is not None or self.stage in names:
            raise TrajectoryError(
                f"stage {self.stage!r} cannot come after {names}: it "
                + (f"comes after {self.earlier.stage!r} already. " if self.earlier else "has the name of one of them. ")
                + "Put stages in order one by one, each with a name of its own: Trajectory(..., stage=...)."
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
        return self.optimizer.name in optimizers.STATE

    @property
    def decoupled(self) -> bool:
        """True if weight decay bypassed the preconditioner, as AdamW's does."""
        return self.optimizer.name == "AdamW" if self.optimizer.decoupled is None else self.optimizer.decoupled

    def state(self, index: int) -> dict[str, Tensor]:
        """The model's state_dict at checkpoint `index`, on the CPU."""
        found = _by_record(self.checkpoints[index], self._expected.get(index), "model.")
        return _tensors(self.checkpoints[index], self._expected.get(index)) if found is None else found

    def second_moments(self, index: int) -> dict[str, Tensor] | None:
        """Bias-corrected second moments v_hat at checkpoint `index`, {parameter name: tensor}; None if not saved.

        A parameter that has taken no step is not among them. TrajectoryError names one whose moments are not finite,
        negative, or of another shape than the parameter.
        """
        if not self.preconditioned:
            return None
        path, sha256 = self.checkpoints[index], self._expected.get(index)
        if self._moments is not None:
            path, found = self._moments[index], _tensors(self._moments[index], None)
            optimizers.check_moments(str(path), found, self.state(index))
            return found
        found = _by_record(path, sha256, "second_moment.") or {}
        if not found and self._options:  # format 1
            raw = _by_record(path, sha256, "optimizer.") or {}
            found = optimizers.second_moments(self.optimizer.name, raw, lambda p: self._options[self._group(p)])
        optimizers.check_moments(str(path), found)
        return found or None

    def preconditioner(self, index: int) -> dict[str, Tensor] | None:
        """P = 1 / (sqrt(v_hat) + eps) at checkpoint `index`, {parameter name: tensor}; None without second moments."""
        moments = self.second_moments(index)
        step = self.steps[index]
        return moments and {
            name: optimizers.precondition(v, self.eps[self._group(name)], f"{name!r} at step {step}")
            for name, v in moments.items()
        }

    def digest(self, index: int) -> str:
        """sha256 of the checkpoint's file (with a file of second moments given beside it: of both files' sha256)."""
        files = [self.checkpoints[index], *([self._moments[index]] if self._moments else [])]
        found = [file_digest(path, TrajectoryError) for path in files]
        return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()

    def load_into(self, model: nn.Module, index: int | Mapping[int, float]) -> None:
        """Copy checkpoint `index` into `model`; TrajectoryError names what does not fit.

        index: also {index: weight >= 0}, for the weighted mean of checkpoints, taken in double precision. What is not
        floating-point (counters, masks) is that of the last of them.
        """
        if isinstance(index, Mapping):
            state, where = self._mean(index), f"the mean of checkpoints at steps {[self.steps[i] for i in index]}"
        else:
            state = self.state(index)
            where = f"checkpoint at step {self.steps[index]} ({self.checkpoints[index].name})"
        try:
            model.load_state_dict(laid_out(state, model), strict=True)
        except RuntimeError as problem:
            raise TrajectoryError(
                f"{where} is of another model: {problem}. Give the model that was trained."
            ) from problem

    def _mean(self, weights: Mapping[int, float]) -> dict[str, Tensor]:
        total = sum(weights.values())
        known = all(index in range(len(self)) for index in weights)
        if not known or not all(weight >= 0 for weight in weights.values()) or not 0 < total < math.inf:
            raise TrajectoryError(
                f"mean of checkpoints with weights {dict(weights)}: expected {{checkpoint from 0 to {len(self) - 1}: "
                "finite weight >= 0}, not all of them 0."
            )
        last = self.state(max(weights))
        mean = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in last.items() if t.is_floating_point()}
        for index, weight in weights.items():
            state = last if index == max(weights) else self.state(index)
            if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in last.items()}:
                raise TrajectoryError(
                    f"checkpoints at steps {self.steps[index]} and {self.steps[max(weights)]} are of different models: "
                    "their tensors' names or shapes differ. Take the mean over checkpoints of one model."
                )
            for name in mean:
                mean[name] += state[name].double() * (weight / total)
        return last | {name: summed.to(last[name].dtype) for name, summed in mean.items()}

    def lr_steps(self, start: int, end: int) -> tuple[float, ...]:
        """Summed effective learning rates of the steps in (start, end], for each parameter group.

        See `optimizers.effective_rates`. TrajectoryError for an optimizer whose effective rates are not known.
        """
        optimizers.require_known(self.optimizer.name)
        return tuple(self._effective()[start:end].sum(0).tolist())

    def mean_weight_decay(self, start: int, end: int) -> tuple[float, ...]:
        """Weight decay over (start, end], weighted by the effective learning rate, for each parameter group."""
        rates, decay = self._effective()[start:end], self.weight_decay[start:end]
        total = rates.sum(0)
        mean = torch.where(total > 0, (rates * decay).sum(0) / total.clamp_min(1e-300), decay.mean(0))
        return tuple(mean.tolist())

    def group_of(self, parameter: str) -> int | None:
        """The parameter group that trained `parameter`; None if the optimizer did not hold it."""
        return 0 if self.parameter_groups is None else self.parameter_groups.get(parameter)

    def _group(self, parameter: str) -> int:
        group = self.group_of(parameter)
        if group is None:
            raise TrajectoryError(
                f"second moments of {parameter!r}, which is in no parameter group. Put it into parameter_groups, or "
                "leave its second moments out."
            )
        return group

    def _effective(self) -> Tensor:
        return optimizers.effective_rates(self.optimizer.name, self.learning_rates, self.momentum, self.dampening)


def check_stage(name: str) -> str:
    """The name of a stage; TrajectoryError unless it is plain enough to name a folder."""
    plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name)
    if not plain or name.lower() in _OWN:
        raise TrajectoryError(
            f"stage={name!r}: expected a plain word of letters, digits, '_', '-' and '.', not starting with '.', "
            f"and none of {', '.join(_OWN)}."
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
        raise TrajectoryError(
            f'{path}: expected {{"format": 1, "stages": [names that differ]}}. Restore it, or record again.'
        )
    return [check_stage(name) for name in names]


def _check_checkpoints(paths: Sequence[Path], steps: Sequence[int]) -> None:
    if not paths or len(paths) != len(steps):
        raise TrajectoryError(f"{len(paths)} checkpoint files for {len(steps)} steps: expected one step for each file.")
    for path in paths:
        if not path.is_file():
            raise TrajectoryError(f"{path}: no such checkpoint file. Restore it, or leave it out of the trajectory.")
    whole = all(step == int(step) for step in steps)
    if not whole or steps[0] < 1 or any(later <= earlier for earlier, later in pairwise(steps)):
        raise TrajectoryError(f"checkpoint steps {list(steps)}: expected ascending whole steps, counted from 1.")


def _check_moment_files(paths: Sequence[Path], checkpoints: int, optimizer: str) -> None:
    if optimizer not in optimizers.STATE or len(paths) != checkpoints:
        raise TrajectoryError(
            f"{len(paths)} files of second moments for {checkpoints} checkpoints of {optimizer}: expected a file for "
            f"each checkpoint, and one of {', '.join(optimizers.STATE)}."
        )
    for path in paths:
        if not path.is_file():
            raise TrajectoryError(f"{path}: no such file of second moments. Restore it, or leave second_moments= out.")


def _by_record(path: Path, sha256: str | None, part: str) -> dict[str, Tensor] | None:
    """One part of a checkpoint that record() wrote; None if it is somebody else's."""
    if not re.fullmatch(r"step-\d{8,}\.safetensors", path.name):
        return None
    file = TensorFile(path, sha256, TrajectoryError)
    if not all(name.startswith(_PARTS) for name in file.names()):
        return None
    return {name[len(part) :]: file.tensor(name) for name in file.names() if name.startswith(part)}


def _tensors(path: Path, sha256: str | None) -> dict[str, Tensor]:
    return read_tensors(path, sha256, TrajectoryError) if path.suffix == ".safetensors" else _foreign_state(path)


def _foreign_state(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as problem:  # torch raises many kinds here, none of its own
        raise TrajectoryError(
            f"{path}: not readable as a plain state_dict ({type(problem).__name__}: {problem}). "
            "Save model.state_dict() with torch.save or safetensors."
        ) from problem
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TrajectoryError(f"{path}: expected a state_dict of tensors. Save model.state_dict() on its own.")
    return dict(state)
