"""What training left behind: checkpoints, the learning rate of every step, and the optimizer's constants."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import TrajectoryError
from .files import file_digest, inside, read_json, read_tensors
from .ranks import laid_out

FORMAT = 1
PerStep = float | Sequence[float] | Sequence[Sequence[float]] | np.ndarray | Tensor


@dataclass(frozen=True)
class OptimizerConstants:
    """The optimizer that trained the model; each value is constant, [steps], or [steps, parameter groups].

    Args:
        name: the class name of the torch.optim optimizer, such as "SGD" or "AdamW".
        momentum, dampening, weight_decay: as in torch.optim.SGD.
        nesterov: Nesterov's form of momentum; it has heavy-ball's effective learning rate.
        maximize: True if the optimizer climbed instead of descending.
    """

    name: str = "SGD"
    momentum: PerStep = 0.0
    dampening: PerStep = 0.0
    weight_decay: PerStep = 0.0
    nesterov: bool = False
    maximize: bool = False


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
    ):
        self.checkpoints = tuple(Path(path) for path in checkpoints)
        _check_checkpoints(self.checkpoints, steps)
        self.steps = tuple(int(step) for step in steps)
        if dataset_size < 1 or dataset_size != int(dataset_size):
            raise TrajectoryError(f"dataset_size={dataset_size}: expected the number of training examples.")
        self.dataset_size = int(dataset_size)
        self.optimizer = optimizer or OptimizerConstants()
        self.parameter_groups = None if parameter_groups is None else dict(parameter_groups)
        self.learning_rates = _learning_rates(learning_rates, self.steps[-1])
        shape = self.learning_rates.shape
        self.momentum = _per_step("momentum", self.optimizer.momentum, shape, below=1.0)
        self.dampening = _per_step("dampening", self.optimizer.dampening, shape)
        self.weight_decay = _per_step("weight_decay", self.optimizer.weight_decay, shape)
        if self.parameter_groups is None and shape[1] > 1:
            raise TrajectoryError(
                f"learning_rates cover {shape[1]} parameter groups, and parameter_groups does not say which parameter "
                "is in which. Pass parameter_groups={parameter name: group}."
            )
        _check_parameter_groups(self.parameter_groups or {}, shape[1])
        self._digests: dict[int, tuple[tuple[int, ...], str]] = {}  # (what the file looked like, sha256)
        self._expected: dict[int, str] = {}

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, unfinished: bool = False) -> Trajectory:
        """Read what `segflow.record` wrote into `directory`.

        unfinished: accept a run that was stopped inside `segflow.record`, up to the last checkpoint that it left.

        Raises TrajectoryError where the recording is missing, unfinished or damaged.
        """
        root = Path(directory)
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

    def __repr__(self) -> str:
        return (
            f"Trajectory({self.optimizer.name}, {self.total_steps} steps, checkpoints at {list(self.steps)}, "
            f"{self.dataset_size} examples)"
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps from the start to the last checkpoint."""
        return self.steps[-1]

    def state(self, index: int) -> dict[str, Tensor]:
        """The model's state_dict at checkpoint `index`, on the CPU."""
        path = self.checkpoints[index]
        if path.suffix == ".safetensors":
            found = read_tensors(path, self._expected.get(index), TrajectoryError)
        else:
            found = _foreign_state(path)
        if all(name.startswith(("model.", "optimizer.")) for name in found) and "step-" in path.name:  # by record()
            return {name[len("model.") :]: tensor for name, tensor in found.items() if name.startswith("model.")}
        return found

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

    def load_into(self, model: nn.Module, index: int) -> None:
        """Copy checkpoint `index` into `model`; TrajectoryError names what does not fit."""
        state = self.state(index)
        try:
            model.load_state_dict(laid_out(state, model), strict=True)
        except RuntimeError as problem:
            raise TrajectoryError(
                f"checkpoint at step {self.steps[index]} ({self.checkpoints[index].name}) is of another model: "
                f"{problem}. Give the model that was trained."
            ) from problem

    def lr_steps(self, start: int, end: int) -> tuple[float, ...]:
        """Summed effective learning rates of the steps in (start, end], for each parameter group.

        Heavy-ball momentum m with dampening d multiplies a rate by (1 - d)/(1 - m), the limit of its velocity.
        """
        self._require_plain_sgd()
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
        """Effective learning rates [steps, parameter groups]; torch.optim.SGD dampens only where it has momentum."""
        effective = self.learning_rates * (1 - self.dampening) / (1 - self.momentum)
        return torch.where(self.momentum == 0, self.learning_rates, effective)

    def _require_plain_sgd(self) -> None:
        constants = self.optimizer
        if constants.name != "SGD" or constants.maximize:
            raise TrajectoryError(
                f"the run was trained with {constants.name}{' (maximize=True)' if constants.maximize else ''}: "
                "effective learning rates are known for SGD with momentum only. "
                "Use InfluenceFunction, which needs none, or train with torch.optim.SGD."
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


def _check_parameter_groups(group_of: Mapping[str, int], known: int) -> None:
    for name, group in group_of.items():
        if not isinstance(group, int) or not 0 <= group < known:
            raise TrajectoryError(
                f"parameter_groups puts {name!r} in group {group!r}, but learning rates cover {known} group(s), "
                "counted from 0. Give learning_rates as [steps, parameter groups]."
            )


def _numbers(name: str, given: Any) -> Tensor:
    try:
        values = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise TrajectoryError(
            f"{name}: expected numbers, [steps] or [steps, parameter groups] ({problem})."
        ) from problem
    if values.ndim > 2 or (values.ndim and 0 in values.shape[1:]):
        raise TrajectoryError(
            f"{name} has shape {tuple(values.shape)}: expected a number, [steps] or [steps, parameter groups]."
        )
    return values[:, None] if values.ndim == 1 else values


def _learning_rates(given: PerStep | Mapping[int, float], total: int) -> Tensor:
    """Learning rates as [steps, parameter groups]; every step up to `total` must have one."""
    if isinstance(given, Mapping):
        values = _numbers("learning_rates", list(given.values()))
        rates = torch.full((total, values.shape[1]), torch.nan, dtype=torch.float64)
        for step, rate in zip(given, values, strict=True):
            if step not in range(1, total + 1):
                raise TrajectoryError(f"a learning rate for step {step!r}, but steps run from 1 to {total}.")
            rates[int(step) - 1] = rate
    else:
        rates = _numbers("learning_rates", given)
        rates = rates.expand(total, 1) if rates.ndim == 0 else rates
    if len(rates) > total:
        raise TrajectoryError(
            f"learning rates for {len(rates)} steps, but the last checkpoint stands at step {total}. "
            "Training's end must be a checkpoint."
        )
    missing = torch.cat([~torch.isfinite(rates).all(1), torch.ones(total - len(rates), dtype=torch.bool)])
    if missing.any():
        gaps, covered = (_ranges(torch.nonzero(mask).flatten() + 1) for mask in (missing, ~missing))
        raise TrajectoryError(
            f"steps {gaps}: no learning rate was recorded (the log covers {covered or 'nothing'}). "
            "Pass learning_rates= for every step to Trajectory, or record with segflow.record()."
        )
    if (rates < 0).any():
        raise TrajectoryError(f"learning rates must not be negative, found {rates.min().item()}.")
    return rates


def _ranges(steps: Tensor) -> str:
    runs: list[list[int]] = []
    for step in steps.tolist():
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(f"{first}..{last}" if last > first else str(first) for first, last in runs)


def _per_step(name: str, given: PerStep, shape: torch.Size, below: float = torch.inf) -> Tensor:
    values = _numbers(name, given)
    if values.ndim and (values.shape[0] != shape[0] or values.shape[1] not in (1, shape[1])):
        raise TrajectoryError(
            f"{name} has shape {tuple(values.shape)}: expected a number, [{shape[0]}] or "
            f"{list(shape)} as learning_rates."
        )
    wrong = values[~((values >= 0) & (values < below))]
    if wrong.numel():
        upper = "" if below == torch.inf else f" and < {below:g}"
        raise TrajectoryError(f"{name}={wrong[0].item():g}: expected finite numbers >= 0{upper}.")
    return values.expand(shape)


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
