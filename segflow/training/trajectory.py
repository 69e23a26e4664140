"""What training left behind: checkpoints, the learning rate of every step, the optimizer's constants, and stages."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrajectoryError
from ..runtime.sharding import laid_out
from ..store.files import TensorFile, file_digest, inside, read_tensors
from .checkpoints import (
    MODEL,
    SECOND_MOMENT,
    check_checkpoint_files,
    check_files,
    check_moment_files,
    check_moments,
    open_recorded,
    part_names,
    read_part,
    read_state_dict,
    state_dict_names,
)
from .optimizers import SECOND_MOMENTS, OptimizerConstants, effective_rates, mean_decay, require_known
from .per_step import (
    PerStep,
    check_batch_size,
    check_parameter_groups,
    constant_by_group,
    constant_by_step,
    rates_by_step,
)
from .recording_folder import STAGES, STEPS, Description, check_stage, read_description, stage_names
from .sampling import example_weights_by_checkpoint


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
        example_weights: the share that each training example had, [N], or [checkpoints, N]; None: all alike.

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
        stage: str = "train",
        second_moments: Sequence[str | os.PathLike[str]] | None = None,
        example_weights: Any = None,
    ):
        self.checkpoints = tuple(Path(path) for path in checkpoints)
        check_checkpoint_files(self.checkpoints, steps)
        self.steps = tuple(int(step) for step in steps)
        if dataset_size < 1 or dataset_size != int(dataset_size):
            raise TrajectoryError(f"dataset_size={dataset_size}: expected the number of training examples.")
        self.dataset_size = int(dataset_size)
        if example_weights is not None:
            example_weights = example_weights_by_checkpoint(example_weights, len(self.steps), self.dataset_size)
        self._example_weights = example_weights
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
        self._moment_files = None if second_moments is None else tuple(Path(path) for path in second_moments)
        if self._moment_files is not None:
            check_moment_files(self.optimizer.name, len(self._moment_files), len(self))
            check_files(self._moment_files, "file of second moments")
        self._sha256: dict[int, str] = {}  # of a recording's checkpoints, by index

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, unfinished: bool = False) -> Trajectory:
        """Read what `segflow.record` wrote into `directory`: of several stages the last, which knows those before.

        unfinished: accept a run whose last stage was stopped inside `segflow.record`, up to its last checkpoint.

        Raises TrajectoryError where the recording is missing, unfinished or damaged.
        """
        root = Path(directory)
        names = stage_names(root)
        folders = [inside(root, name, error=TrajectoryError) for name in names] or [root]
        stages = [cls._loaded(folder, unfinished and folder == folders[-1]) for folder in folders]
        for name, stage in zip(names, stages, strict=False):
            if stage.stage != name:
                raise TrajectoryError(
                    f"{root / name}: holds stage {stage.stage!r}, but {STAGES} says {name!r}. "
                    "Put the folders back in their places, or record again."
                )
        return reduce(lambda earlier, later: later.after(earlier), stages)

    @classmethod
    def _loaded(cls, folder: Path, unfinished: bool) -> Trajectory:
        """The one stage that was recorded into a folder."""
        description = read_description(folder, unfinished=unfinished)
        try:
            return cls._described(folder, description)
        except (KeyError, TypeError, AttributeError, ValueError) as problem:
            raise TrajectoryError(
                f"{description.path}: damaged ({type(problem).__name__}: {problem}). Restore it, or record again."
            ) from problem

    @classmethod
    def _described(cls, folder: Path, description: Description) -> Trajectory:
        """The trajectory that a recording describes; of a run that was stopped, only what is surely there."""
        content, finished = description.content, description.finished
        log = read_tensors(folder / STEPS, content["log"]["sha256"] if finished else None, TrajectoryError)
        entries = [(inside(folder, entry["file"], error=TrajectoryError), entry) for entry in content["checkpoints"]]
        entries = [(path, entry) for path, entry in entries if finished or path.exists()]
        last = None if finished else entries[-1][1]["step"] if entries else 0
        log = {name: values[:last] for name, values in log.items()}
        trajectory = cls(
            checkpoints=[path for path, _ in entries],
            steps=[entry["step"] for _, entry in entries],
            learning_rates=log["learning_rate"],
            dataset_size=content["dataset_size"],
            optimizer=_recorded_optimizer(content, log),
            parameter_groups=content["parameter_groups"],
            stage=content["stage"],
        )
        trajectory._sha256 = {index: entry["sha256"] for index, (_, entry) in enumerate(entries)}
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
        return self.optimizer.name in SECOND_MOMENTS

    @property
    def decoupled(self) -> bool:
        """True if weight decay bypassed the preconditioner, as AdamW's does."""
        return self.optimizer.name == "AdamW" if self.optimizer.decoupled is None else self.optimizer.decoupled

    def state(self, index: int) -> dict[str, Tensor]:
        """The model's state_dict at checkpoint `index`, on the CPU."""
        recorded = self._recorded(index)
        if recorded is not None:
            return read_part(recorded, MODEL)
        return read_state_dict(self.checkpoints[index], self._sha256.get(index))

    def saved_moments(self, index: int) -> frozenset[str] | None:
        """The names of the parameters whose second moments were saved at checkpoint `index`; None if none were.

        Only names are read, so that the moments themselves may still be refused by `second_moments`.
        """
        if not self.preconditioned:
            return None
        if self._moment_files is not None:
            names = state_dict_names(self._moment_files[index])
        else:
            recorded = self._recorded(index)
            names = [] if recorded is None else part_names(recorded, SECOND_MOMENT)
        return frozenset(names) or None

    def second_moments(self, index: int) -> dict[str, Tensor] | None:
        """Bias-corrected second moments v_hat at checkpoint `index`, {parameter name: tensor}; None if not saved.

        A parameter that has taken no step is not among them. TrajectoryError names one whose moments are not finite,
        negative, or not those of a parameter in the checkpoint.
        """
        if not self.preconditioned:
            return None
        if self._moment_files is not None:
            path = self._moment_files[index]
            moments = read_state_dict(path, None)
            check_moments(str(path), moments, self.group_of, self.state(index))
        else:
            recorded = self._recorded(index)
            moments = {} if recorded is None else read_part(recorded, SECOND_MOMENT)
            check_moments(str(self.checkpoints[index]), moments, self.group_of)
        return moments or None

    def _recorded(self, index: int) -> TensorFile | None:
        """The file of checkpoint `index` if record() wrote it; None if it is somebody else's."""
        return open_recorded(self.checkpoints[index], self._sha256.get(index))

    def digest(self, index: int) -> str:
        """sha256 of the checkpoint's file; where `second_moments` were given, "-" and that of their file besides."""
        paths = [self.checkpoints[index], *(self._moment_files[index : index + 1] if self._moment_files else ())]
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
        known_checkpoints = all(index in range(len(self)) for index in weights)
        if not known_checkpoints or not all(weight >= 0 for weight in weights.values()) or not 0 < total < math.inf:
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

    def example_weights(self, index: int) -> Tensor | None:
        """The share each training example had around checkpoint `index`, [N] with mean 1; None: uniform."""
        return None if self._example_weights is None else self._example_weights[index]

    def group_of(self, parameter: str) -> int | None:
        """The parameter group that trained `parameter`; None if the optimizer did not hold it."""
        return 0 if self.parameter_groups is None else self.parameter_groups.get(parameter)


def _recorded_optimizer(content: Mapping[str, Any], log: Mapping[str, Tensor]) -> OptimizerConstants:
    """What trajectory.json and the log of steps say of it; KeyError, TypeError and the like where they are damaged."""
    groups = content["constants"]
    return OptimizerConstants(
        name=content["optimizer"],
        momentum=log["momentum"],
        dampening=log["dampening"],
        weight_decay=log["weight_decay"],
        nesterov=content["nesterov"],
        maximize=content["maximize"],
        eps=[float(group.get("eps", 1e-8)) for group in groups],
        decoupled=any(group.get("decoupled_weight_decay") for group in groups) or None,
        batch_size=content["batch_size"],
    )
