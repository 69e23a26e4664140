"""What training left behind: checkpoints, the learning rate of every step, the optimizer's constants, and stages."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import truth, whole_number
from ..errors import TrajectoryError
from ..runtime.sharding import named_parameters
from ..store.files import inside
from .averaged import averaged_files, averaging
from .checkpoints import check_moment_files, check_steps
from .motion import Moves, motion, steps_used
from .observed import seen
from .optimizers import OptimizerConstants, decoupled_by_group, require_known
from .per_step import (
    PerStep,
    check_batch_size,
    check_parameter_groups,
    constant_by_group,
    one_by_group,
    rates_by_step,
)
from .recorded import Recorded, read_counts, read_recorded
from .recording_folder import STAGES, check_stage, read_description, stage_names
from .sampling import example_weights_by_checkpoint, weights_at_checkpoints
from .saved import SavedCheckpoints
from .state_files import state_files
from .state_names import load_state, under_own_names, with_tied
from .stepped import Stepped
from .trainer_folder import TrainerFolder, TrainerWords


class Trajectory(Stepped):
    """Checkpoints of one training run, or of one stage of it, and how the optimizer moved between them.

    Runs that `segflow.record` observed are read with `Trajectory.load`; for others, give what they left behind.

    Args:
        checkpoints: state files in the order of `steps`: safetensors, or torch files (read with
            `weights_only=True`) holding the model's state_dict, or that of its peft adapter alone; or folders in
            which `save_pretrained` or a Trainer put them. docs/WRAPPERS.md says under which names.
        steps: how many optimizer steps had been taken at each checkpoint, ascending; the last is the end of training.
        learning_rates: a constant, [steps], [steps, parameter groups], or {step: rate} with steps counted from 1;
            with Adagrad's `lr_decay` in them.
        dataset_size: number of training examples N; the objective is the mean of their losses.
        optimizer: what else the optimizer was given.
        parameter_groups: {parameter name: index of its parameter group}; None puts every parameter in group 0.
        stage: what this stage of training is called; see `after`.
        second_moments: a file for each checkpoint, with {parameter name: bias-corrected second moments v_hat}.
        moves: which steps moved which parameters, and what clipping left of their gradients; None: all, everything.
        example_weights: the share that each training example had, [N] or [checkpoints, N], of which only the ratios
            count; None: all alike.

    Attributes:
        kinds: the optimizer's name, and decoupled: whether weight decay bypasses P, for each parameter group.
        used: every step's numbers, [steps, parameter groups].

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
        moves: Moves | None = None,
        example_weights: Any = None,
    ):
        self.checkpoints = tuple(Path(path) for path in checkpoints)
        self._saved = SavedCheckpoints(tuple(state_files(path, "checkpoint file") for path in self.checkpoints))
        self.steps = check_steps(steps, len(self.checkpoints))
        advice = "Give the number of training examples."
        self.dataset_size = whole_number("dataset_size", dataset_size, TrajectoryError, 1, advice=advice)
        self.optimizer = optimizer or OptimizerConstants()
        self.optimizer = replace(self.optimizer, batch_size=check_batch_size(self.optimizer.batch_size))
        self.learning_rates = rates_by_step(learning_rates, self.steps[-1])
        groups = self.learning_rates.shape[1]
        self.parameter_groups = check_parameter_groups(parameter_groups, groups)
        self.kinds = one_by_group("name", self.optimizer.name, str, groups)
        self.decoupled = decoupled_by_group(self.optimizer, self.kinds)
        self.eps = constant_by_group("eps", self.optimizer.eps, groups)
        self.used = steps_used(self.learning_rates, self.optimizer, moves or Moves(), self.kinds, self.decoupled)
        self._motion = motion(self.used)
        self.stage = check_stage(stage)
        self.earlier: Trajectory | None = None  # the stage before; see `after`
        if second_moments is not None:
            check_moment_files(self.kinds, len(second_moments), len(self))
            moments = tuple(state_files(Path(path), "file of second moments") for path in second_moments)
            self._saved = replace(self._saved, moments=moments)
        if example_weights is not None:
            example_weights = example_weights_by_checkpoint(example_weights, len(self.steps), self.dataset_size)
        self._example_weights: tuple[Tensor, ...] | None = example_weights
        self._model: nn.Module | None = None  # whose names parameters go by; see `of_model`

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, unfinished: bool = False, partial: bool = False) -> Trajectory:
        """Read what `segflow.record` wrote into `directory`: of several stages the last, which knows those before.

        Args:
            unfinished: accept a run whose last stage was stopped inside `segflow.record`, up to its last checkpoint.
            partial: accept a recording that began when the optimizer had taken steps already, and explain its part of
                training alone, which methods that need the whole refuse otherwise.

        Raises TrajectoryError where the recording is missing, unfinished or damaged.
        """
        unfinished, partial = (
            truth("unfinished", unfinished, TrajectoryError),
            truth("partial", partial, TrajectoryError),
        )
        root = Path(directory)
        names = stage_names(root)
        folders = [inside(root, name, error=TrajectoryError) for name in names] or [root]
        stages = [cls._loaded(folder, unfinished and folder == folders[-1], partial) for folder in folders]
        for name, stage in zip(names, stages, strict=False):
            if stage.stage != name:
                raise TrajectoryError(
                    f"{root / name}: holds stage {stage.stage!r}, but {STAGES} says {name!r}. "
                    "Put the folders back in their places, or record again."
                )
        return reduce(lambda earlier, later: later.after(earlier), stages)

    @classmethod
    def _loaded(cls, folder: Path, unfinished: bool, partial: bool) -> Trajectory:
        """The one stage that was recorded into a folder."""
        description = read_description(folder, unfinished=unfinished)
        try:
            arguments, recorded = read_recorded(folder, description)
            trajectory = cls(**arguments)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as problem:
            raise TrajectoryError(
                f"{description.path}: damaged ({type(problem).__name__}: {problem}). Restore it, or record again."
            ) from problem
        recorded = replace(recorded, missing=None) if partial else recorded
        trajectory._saved = replace(trajectory._saved, recorded=recorded)
        return trajectory

    @classmethod
    def from_trainer(  # noqa: PLR0913 (one argument for each thing to say of a run)
        cls,
        output_dir: str | os.PathLike[str],
        model: nn.Module,
        *,
        dataset_size: int,
        args: Any = None,
        stage: str = "train",
        learning_rates: PerStep | Mapping[int, float] | None = None,
        clip_factors: PerStep | None = None,
        parameter_names: Sequence[str] | None = None,
        batch_size: int | None = None,
        example_weights: Any = None,
        gradient_scale: float | None = None,
        unfinished: bool = False,
    ) -> Trajectory:
        """Read what a run of transformers' Trainer left in its output_dir: its checkpoint-* folders.

        Parameters and second moments are brought to the model's names, the learning rate of every step is rebuilt from
        the schedule's definition and checked against all that was logged and saved, and clipping follows from the
        logged norms: those between are interpolated, with a warning if any was clipped (logging_steps=1 logs them
        all). Steps are the optimizer's. Sampling is taken to be uniform. docs/TRAINING.md says more.

        Args:
            output_dir: the Trainer's. Its last checkpoint must be the end of training; or else trainer.save_model()
                and trainer.save_state() have put the end there, for which the last checkpoint's second moments stand.
            model: as it was trained, with the same parameters frozen; its values do not matter.
            dataset_size: number of training examples N.
            args: the TrainingArguments, or a dict of their values. None: read from training_args.bin, none of whose
                code is run.
            stage: what this stage of training is called; see `after`.
            learning_rates: of every optimizer step, for schedules of your own; they are checked in the same way.
            clip_factors: what clipping left of each step's gradient, where norms were not logged; 1.0 if it never did.
            parameter_names: of the optimizer's parameters in its order, for one that the Trainer did not make.
            batch_size: examples in one optimizer step. None: as the files say, as far as they do.
            example_weights: see `Trajectory`.
            gradient_scale: as in `record`. None: as transformers' own Trainer has it for the model and its arguments.
            unfinished: explain the model of the last checkpoint, although training went on or was stopped after it.

        Raises:
            TrajectoryError: a file is missing, the schedule does not meet a logged point, or it cannot be told which
                parameter is which, or what clipping did.
        """
        unfinished = truth("unfinished", unfinished, TrajectoryError)
        whole_number("dataset_size", dataset_size, TrajectoryError, 1, advice="Give the number of training examples.")
        told = args, learning_rates, clip_factors, parameter_names, batch_size, unfinished
        words = TrainerWords(dataset_size, gradient_scale, *told)
        folder = TrainerFolder(Path(output_dir), model, words)
        trajectory = cls(**folder.arguments, dataset_size=dataset_size, stage=stage, example_weights=example_weights)
        moments = folder.moments if trajectory.preconditioned else None
        recorded = Recorded(unmoved=folder.unmoved, observed=folder.observed)
        trajectory._saved = replace(trajectory._saved, moments=moments, recorded=recorded)
        return trajectory.of_model(model)

    def averaged(
        self,
        state: str | os.PathLike[str],
        *,
        decay: float | Sequence[float] | None,
        start: int | None = None,
        every: int = 1,
    ) -> Trajectory:
        """The same run, whose averaged weights (EMA, SWA) are the model that is explained.

        They stand for the last checkpoint, and each step counts by what of its move stays in the average:
        1 - decay^(n+1) of a step that n later updates followed, or with equal weights the share of the averaged models
        that came at or after it. To first order in the curvature over the averaged steps that is exact; a direction
        that is largely learned in these steps is overstated, by 14% for an EMA of 0.98 over 60 steps from the start in
        which rate times eigenvalue sums to 1 (0.9: 1%, equal weights: 7%; docs/TRAINING.md).

        Args:
            state: the file or folder of the averaged weights at the end of training, as for a checkpoint; also the
                state_dict of torch's AveragedModel.
            decay: what an update leaves of the average, such as 0.999 (a sequence: of each update); None: all averaged
                models have equal weights (SWA).
            start: the step at which the average was a copy of the model; needed where `every` is above 1. None: as the
                count in an AveragedModel's file says; of another file 0, the model before training.
            every: steps between updates.

        Raises:
            TrajectoryError: the file is missing, or its count of models is not that of `start` and `every`.
        """
        trained = None if self.parameter_groups is None else frozenset(self.parameter_groups)
        last = len(self) - 1
        files = averaged_files(Path(state), partial(self.state, last), trained)
        average = averaging(self.total_steps, decay, start, every, files.count())
        shares = average.shares(self.total_steps)[:, None]
        later = copy.copy(self)
        later._motion = motion(replace(self.used, learning_rates=self.used.learning_rates * shares))
        later._saved = self._saved.averaged(files, str(average), self.preconditioned)
        return later

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

    def of_model(self, model: nn.Module) -> Trajectory:
        """The same run, whose parameter groups and second moments go by the model's names of the parameters.

        They may have been saved under the names of a wrapper, of peft's adapter, or of one of two tied parameters.
        """
        named = copy.copy(self)
        if self.parameter_groups is not None:
            groups = under_own_names(self.parameter_groups, model, "parameter_groups")
            named.parameter_groups = with_tied(groups, model)
        named.earlier, named._model = self.earlier and self.earlier.of_model(model), model
        return named

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

    def state(self, index: int) -> dict[str, Tensor]:
        """The state that the files of checkpoint `index` hold, on the CPU, under the names that they have there."""
        return self._saved.state(index)

    def saved_moments(self, index: int) -> frozenset[str] | None:
        """The names of the parameters whose second moments were saved at checkpoint `index`; None if none were.

        Of a recording they may be none at all: those that its optimizer had not stepped yet have none. Only names are
        read, so that the moments themselves may still be refused by `second_moments`.
        """
        return self._saved.moment_names(index, self._model) if self.preconditioned else None

    def second_moments(self, index: int) -> dict[str, Tensor] | None:
        """Bias-corrected second moments v_hat at checkpoint `index`, {parameter name: tensor}; None if not saved.

        A parameter that has taken no step is not among them. TrajectoryError names one whose moments are not finite,
        negative, or not those of a parameter in the checkpoint.
        """
        return self._saved.second_moments(index, self._model, self.group_of) if self.preconditioned else None

    def digest(self, index: int) -> str:
        """sha256 of each file that is read for the checkpoint, joined by "-"."""
        return self._saved.digest(index)

    def left_alone(self, model: nn.Module, index: int) -> frozenset[str]:
        """The names in the model's state that checkpoint `index` leaves as they are: all but an adapter's, or none.

        TrajectoryError where one of them was trained, or the checkpoint is not of the model's adapter.
        """
        return self._saved.left_alone(model, index, self._where(index), self._trained(model))

    def fits(self, model: nn.Module, index: int) -> bool:
        """Whether checkpoint `index` is seen to have the model's tensors by its names, shapes and dtypes alone."""
        return self._saved.fits(model, index)

    def load_into(self, model: nn.Module, index: int | Mapping[int, float]) -> None:
        """Copy checkpoint `index` into `model`, but for what an adapter lacks; TrajectoryError names what does not fit.

        index: or {index: weight}, for a weighted mean in double precision; counters and the like are the last one's.
        """
        if isinstance(index, Mapping):
            found = self._saved.mean(index), f"mean of the checkpoints {sorted(index)}"
        else:
            found = self.state(index), self._where(index)
        load_state(model, *found, self._trained(model))

    @property
    def _recorded(self) -> Recorded:
        """Of a recording, what its files say besides."""
        return self._saved.recorded

    def _where(self, index: int) -> str:
        return f"checkpoint at step {self.steps[index]} ({self._saved.files[index].path.name})"

    def _trained(self, model: nn.Module) -> set[str]:
        """The parameters that training may have changed: of a parameter group, or else such as require gradients."""
        parameters, groups = named_parameters(model, remove_duplicate=False), self.parameter_groups
        return {n for n, p in parameters.items() if (p.requires_grad if groups is None else n in groups)}

    def lr_steps(self, start: int, end: int) -> tuple[float, ...]:
        """What the steps in (start, end] moved the parameters by, for each unit of P * gradient.

        One number for each parameter group: the sum of its steps' learning rates times clip factors, where a step moved
        it; with momentum a gradient counts for what later steps took of it. NaN for a group whose optimizer's steps are
        not known. TrajectoryError where no group's are, or where the recording does not have the whole of training.
        """
        require_known(self.kinds)
        if self._recorded.missing is not None:
            raise TrajectoryError(
                f"stage {self.stage!r}: {self._recorded.missing}, so the influence of the whole of training is not "
                "known. Record from the start, go on with the earlier part's recording (record(..., resume=True)), or "
                "explain the recorded part alone with Trajectory.load(folder, partial=True)."
            )
        return tuple(self._motion.rates[start:end].sum(0).tolist())

    def example_weights(self, index: int) -> Tensor | None:
        """The share that each training example had around checkpoint `index`, [N] with mean 1; None: all alike."""
        if self._example_weights is None and self._recorded.counted:
            files = [(path, self._recorded.sha256.get(place)) for place, path in enumerate(self.checkpoints)]
            counts = [read_counts(path, sha256, self.dataset_size) for path, sha256 in files]
            self._example_weights = tuple(weights_at_checkpoints(self.steps, torch.stack(counts)))
        return None if self._example_weights is None else self._example_weights[index]

    @property
    def observed(self) -> dict[str, Any]:
        """What really happened in training and is unlike a textbook's, for provenance and reports, by a short name."""
        weighted = self._example_weights is not None or self._recorded.counted
        sampling = {} if weighted else {"sampling": "uniform, as is assumed"}
        return dict(self._recorded.observed) | seen(self.used, self.parameter_groups) | sampling

    def group_of(self, parameter: str) -> int | None:
        """The parameter group that trained `parameter`; None if none did."""
        return 0 if self.parameter_groups is None else self.parameter_groups.get(parameter)

    def why_untrained(self, parameter: str) -> str | None:
        """Why a parameter is in no parameter group; None if it is in one."""
        if self.group_of(parameter) is not None:
            return None
        return self._recorded.unmoved.get(parameter, "it is in no parameter group")
