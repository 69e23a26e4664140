"""What training left behind: checkpoints, the learning rate of every step, and the optimizer's constants."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TrajectoryError
from .files import file_digest, inside, read_json, read_tensors
from .optimizers import KNOWN, OptimizerConstants, PerStep, effective_rates
from .ranks import laid_out
from .steplog import check_parameter_groups, check_stage_name, eps_of_groups, every_rate, per_step

FORMAT = 1
_RECORDED = ("model.", "optimizer.", "second_moment.")  # of a checkpoint by record(), the second once


class Trajectory:
    """Checkpoints of one training run and how the optimizer moved between them.

    Runs that `segflow.record` observed are read with `Trajectory.load`; for others, give what they left behind.

    Args:
        checkpoints: state files in the order of `steps`: safetensors, or torch files (read with
            `weights_only=True`) holding the model's state_dict.
        steps: how many optimizer steps had been taken at each checkpoint, ascending; the last is the end of training.
        learning_rates: a constant, [steps], [steps, parameter groups], or {step: rate} with steps counted from 1.
        dataset_size: number of training examples N; the objective is the mean of their losses.
        optimizer: what else the optimizer was given.
        parameter_groups: {parameter name: index of its parameter group}; None puts every parameter in group 0.
        second_moments: of a preconditioned optimizer, one file for each checkpoint with {parameter name: bias-corrected
            second moment}; None where they were not saved.
        stage: this stage's name, where training had several; see `after`.

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
        *,
        second_moments: Sequence[str | os.PathLike[str]] | None = None,
        stage: str = "train",
    ):
        self.checkpoints = tuple(Path(path) for path in checkpoints)
        _check_checkpoints(self.checkpoints, steps)
        self.steps = tuple(int(step) for step in steps)
        if dataset_size < 1 or dataset_size != int(dataset_size):
            raise TrajectoryError(f"dataset_size={dataset_size}: expected the number of training examples.")
        self.dataset_size = int(dataset_size)
        self.optimizer = optimizer or OptimizerConstants()
        self.parameter_groups = None if parameter_groups is None else dict(parameter_groups)
        self.learning_rates = every_rate(learning_rates, self.steps[-1])
        shape = self.learning_rates.shape
        self.momentum = per_step("momentum", self.optimizer.momentum, shape, below=1.0)
        self.dampening = per_step("dampening", self.optimizer.dampening, shape)
        self.weight_decay = per_step("weight_decay", self.optimizer.weight_decay, shape)
        if self.parameter_groups is None and shape[1] > 1:
            raise TrajectoryError(
                f"learning_rates cover {shape[1]} parameter groups, and parameter_groups does not say which parameter "
                "is in which. Pass parameter_groups={parameter name: group}."
            )
        check_parameter_groups(self.parameter_groups or {}, shape[1])
        self.eps = eps_of_groups(self.optimizer.eps, shape[1])
        self.stage = check_stage_name(stage)
        self.earlier: Trajectory | None = None
        self._moments = None if second_moments is None else tuple(Path(path) for path in second_moments)
        if self._moments is not None:
            _check_checkpoints(self._moments, self.steps)
        self._digests: dict[int, tuple[tuple[int, ...], str]] = {}  # (what the file looked like, sha256)
        self._expected: dict[int, str] = {}

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, unfinished: bool = False) -> Trajectory:
        """Read what `segflow.record` wrote into `directory`.

        unfinished: accept a run that was stopped inside `segflow.record`, up to the last checkpoint that it left.

        Raises TrajectoryError where the recording is missing, unfinished or damaged.
        """
        root = Path(directory)
        if (root / "stages.json").exists():
            return cls._staged(root, unfinished)
        if not (root / "trajectory.json").exists():
            if unfinished and (root / "recording.json").exists():
                return cls._parsed(root, "recording.json")
            if (root / "recording.json").exists():
                raise TrajectoryError(
                    f"{root}: the recorded run did not finish, its process was stopped inside segflow.record(). "
                    "Train again, with overwrite=True to reuse the folder; or pass unfinished=True to explain the "
                    "model of its last checkpoint."
                )
            raise TrajectoryError(
                f"{root}: no recorded run here (no trajectory.json). Record one with segflow.record()."
            )
        return cls._parsed(root, "trajectory.json")

    @classmethod
    def _staged(cls, root: Path, unfinished: bool) -> Trajectory:
        """Every stage that `record(stage=...)` left in a folder, as the last one with the earlier ones behind it."""
        content = read_json(root / "stages.json", TrajectoryError)
        names = content.get("stages") if isinstance(content, dict) else None
        if content.get("format") != FORMAT if isinstance(content, dict) else True:
            raise TrajectoryError(f"{root}: stages.json is of another format, expected {FORMAT}. Record again.")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise TrajectoryError(f"{root / 'stages.json'}: damaged, it lists no stages. Restore it, or record again.")
        found: Trajectory | None = None
        for place, name in enumerate(names):
            last = place == len(names) - 1
            stage = cls.load(root / check_stage_name(name), unfinished=unfinished and last)
            stage.stage = name
            found = stage if found is None else stage.after(found)
        if found is None:
            raise TrajectoryError(f"{root / 'stages.json'}: damaged, it lists no stages. Restore it, or record again.")
        return found

    @classmethod
    def _parsed(cls, root: Path, name: str) -> Trajectory:
        content = read_json(root / name, TrajectoryError)
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise TrajectoryError(f"{root}: trajectory format {found!r}, this segflow reads format {FORMAT}.")
        if content.get("finished") is False:
            raise TrajectoryError(f"{root}: the recorded run was stopped before its first checkpoint. Train again.")
        try:
            return cls._recorded(root, content, whole=name == "trajectory.json")
        except (KeyError, TypeError, AttributeError, ValueError) as problem:
            raise TrajectoryError(
                f"{root / name}: damaged ({type(problem).__name__}: {problem}). Restore it, or record again."
            ) from problem

    @classmethod
    def _recorded(cls, root: Path, content: Mapping[str, Any], whole: bool) -> Trajectory:
        """The trajectory that a file describes; of a run that was stopped, only what is surely there."""
        log = read_tensors(root / "steps.safetensors", content["log"]["sha256"] if whole else None, TrajectoryError)
        entries = [(inside(root, entry["file"], error=TrajectoryError), entry) for entry in content["checkpoints"]]
        entries = [(path, entry) for path, entry in entries if whole or path.exists()]
        last = None if whole else entries[-1][1]["step"] if entries else 0
        constants = OptimizerConstants(
            content["optimizer"],
            log["momentum"][:last],
            log["dampening"][:last],
            log["weight_decay"][:last],
            content["nesterov"],
            content["maximize"],
            [float(group.get("eps", 1e-8)) for group in content["constants"]],
            content.get("decoupled"),
            content.get("batch_size"),
        )
        trajectory = cls(
            [path for path, _ in entries],
            [entry["step"] for _, entry in entries],
            log["learning_rate"][:last],
            content["dataset_size"],
            constants,
            content["parameter_groups"],
        )
        trajectory._expected = {index: entry["sha256"] for index, (_, entry) in enumerate(entries)}
        return trajectory

    def __len__(self) -> int:
        """The number of checkpoints."""
        return len(self.checkpoints)

    def after(self, earlier: Trajectory) -> Trajectory:
        """This stage as it follows on an earlier one (and on those before it); TrajectoryError if names recur."""
        names = [stage.stage for stage in earlier.stages]
        if self.earlier is not None or self.stage in names:
            raise TrajectoryError(
                f"stage {self.stage!r} cannot follow on {names}: expected one stage with a name of its own. "
                "Pass stage= to Trajectory, or to segflow.record()."
            )
        chained = copy.copy(self)
        chained.earlier = earlier
        return chained

    @property
    def stages(self) -> tuple[Trajectory, ...]:
        """Every stage from the first to this one; steps and checkpoints of each count from its own start."""
        return (*(self.earlier.stages if self.earlier else ()), self)

    @property
    def preconditioned(self) -> bool:
        """Whether the optimizer scales gradients elementwise: Adam, AdamW, RMSprop, Adagrad."""
        return self.optimizer.preconditioned

    @property
    def decoupled(self) -> bool:
        """Whether weight decay acts beside the preconditioned gradient."""
        return self.optimizer.is_decoupled

    def __repr__(self) -> str:
        if self.earlier is not None:
            return " then ".join(f"{stage.stage}: {_described(stage)}" for stage in self.stages)
        return _described(self)

    @property
    def total_steps(self) -> int:
        """Optimizer steps from the start to the last checkpoint."""
        return self.steps[-1]

    def state(self, index: int) -> dict[str, Tensor]:
        """The model's state_dict at checkpoint `index`, on the CPU."""
        path = self.checkpoints[index]
        found = read_state(path, self._expected.get(index))
        if all(name.startswith(_RECORDED) for name in found) and "step-" in path.name:  # by record()
            return {name[len("model.") :]: tensor for name, tensor in found.items() if name.startswith("model.")}
        return found

    def second_moments(self, index: int) -> dict[str, Tensor] | None:
        """Bias-corrected second moments at checkpoint `index`, by parameter name; None if they were not saved.

        P = 1 / (sqrt(second moment) + eps), eps being that of the parameter's group.
        """
        if self._moments is not None:
            path, found = self._moments[index], read_state(self._moments[index], None)
        else:
            path = self.checkpoints[index]
            if path.suffix != ".safetensors":
                return None
            every = read_tensors(path, self._expected.get(index), TrajectoryError)
            prefix = "second_moment."
            found = {name[len(prefix) :]: tensor for name, tensor in every.items() if name.startswith(prefix)}
        for name, moment in found.items():
            if not (torch.isfinite(moment) & (moment >= 0)).all():
                raise TrajectoryError(
                    f"{path}: the second moment of {name!r} is negative or not finite. The run diverged, or "
                    "the file is of something else."
                )
        return found or None

    def digest(self, index: int) -> str:
        """sha256 of the checkpoint's file."""
        path = self.checkpoints[index]
        try:
            stat = path.stat()
        except OSError as problem:
            raise TrajectoryError(f"{path}: no such checkpoint file any more ({problem}). Restore it.") from problem
        look = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if index not in self._digests or self._digests[index][0] != look:
            self._digests[index] = (look, file_digest(path, TrajectoryError))
        return self._digests[index][1]

    def load_into(self, model: nn.Module, index: int | Mapping[int, float]) -> None:
        """Copy checkpoint `index` into `model`; TrajectoryError names what does not fit.

        index: or {index: weight}, for the weighted mean of several (what is not floating-point is the last one's).
        """
        state = self._mean_state(index) if isinstance(index, Mapping) else self.state(index)
        index = list(index)[-1] if isinstance(index, Mapping) else index
        try:
            model.load_state_dict(laid_out(state, model), strict=True)
        except RuntimeError as problem:
            raise TrajectoryError(
                f"checkpoint at step {self.steps[index]} ({self.checkpoints[index].name}) is of another model: "
                f"{problem}. Give the model that was trained."
            ) from problem

    def _mean_state(self, weights: Mapping[int, float]) -> dict[str, Tensor]:
        total = sum(weights.values())
        if not weights or min(weights.values()) < 0 or not total > 0:
            raise TrajectoryError(f"weights {dict(weights)}: expected numbers >= 0 that are not all 0.")
        mean: dict[str, Tensor] = {}
        for index, weight in weights.items():
            state = self.state(index)
            for name, value in state.items():
                share = value.double() * (weight / total) if value.is_floating_point() else value
                mean[name] = mean[name] + share if name in mean and value.is_floating_point() else share
        return {name: value.to(state[name].dtype) for name, value in mean.items()}

    def lr_steps(self, start: int, end: int) -> tuple[float, ...]:
        """Summed effective learning rates of the steps in (start, end], for each parameter group.

        See `optimizers.effective_rates`. TrajectoryError for an optimizer that is not known.
        """
        if self.optimizer.name not in KNOWN:
            raise TrajectoryError(
                f"the run was trained with {self.optimizer.name}, but effective learning rates are known for "
                f"{', '.join(KNOWN)} only. Use InfluenceFunction, which needs none, or train with one of these."
            )
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

    def _effective(self) -> Tensor:
        """Effective learning rates [steps, parameter groups]."""
        return effective_rates(self.optimizer.name, self.learning_rates, self.momentum, self.dampening)


def _described(of: Trajectory) -> str:
    return (
        f"Trajectory({of.optimizer.name}, {of.total_steps} steps, checkpoints at {list(of.steps)}, "
        f"{of.dataset_size} examples)"
    )


def _check_checkpoints(paths: Sequence[Path], steps: Sequence[int]) -> None:
    if not paths or len(paths) != len(steps):
        raise TrajectoryError(f"{len(paths)} checkpoint files for {len(steps)} steps: expected one step for each file.")
    for path in paths:
        if not path.is_file():
            raise TrajectoryError(f"{path}: no such checkpoint file. Restore it, or leave it out of the trajectory.")
    whole = all(step == int(step) for step in steps)
    if not whole or steps[0] < 1 or any(later <= earlier for earlier, later in pairwise(steps)):
        raise TrajectoryError(f"checkpoint steps {list(steps)}: expected ascending whole steps, counted from 1.")


def read_state(path: Path, sha256: str | None) -> dict[str, Tensor]:
    """Tensors by name from a safetensors or a torch file."""
    if path.suffix == ".safetensors":
        return read_tensors(path, sha256, TrajectoryError)
    return _foreign_state(path)


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
