"""record(): leaves a trajectory behind a live training loop, without touching its numbers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrajectoryError
from ..runtime.ranks import current
from ..runtime.sharding import unwrap, whole
from ..store.files import write_json, write_tensors
from .checkpoints import MODEL, SECOND_MOMENT
from .optimizers import second_moment
from .per_step import check_batch_size
from .recording_folder import FINISHED, FORMAT, STEPS, UNFINISHED, RecordingFolder, checkpoint_file
from .schedule import CheckpointSchedule
from .step_log import StepLog

_UNEVEN = "lr_decay over parameters of one group that took different numbers of steps"


@contextmanager
def record(
    model: nn.Module,
    optimizer: Any,
    directory: str | os.PathLike[str],
    *,
    dataset_size: int,
    total_steps: int | None = None,
    checkpoints: int | Sequence[int] = 6,
    overwrite: bool = False,
    stage: str | None = None,
    batch_size: int | None = None,
) -> Iterator[Recording]:
    """Record the training that happens inside the `with` block; the loop and its numbers stay as they are.

    Every step's learning rate, momentum, dampening and weight decay of each parameter group is logged from the
    optimizer's own step hooks, and evenly spaced checkpoints are saved, always with the last step, with the second
    moments of Adam, AdamW, RMSprop and Adagrad. A run that is killed leaves what it had at its last checkpoint; see
    `Trajectory.load(..., unfinished=True)`. Of several processes the first writes; parameters that are sharded over
    them are put together. An optimizer with `maximize=True` made minus its objective smaller, so that is what
    `Task.compute_train_loss` must then return.

    Args:
        model: the model in training.
        optimizer: its torch.optim optimizer (or accelerate's wrapper of one).
        directory: where to write; read it with `Trajectory.load`.
        dataset_size: number of training examples N.
        total_steps: optimizer steps to come. None: checkpoints are saved often and thinned on the way, and end up
            evenly spaced to within a factor of two; give the number where you know it.
        checkpoints: how many, or the explicit steps (the last step is saved besides).
        overwrite: replace an earlier recording in `directory`; of a stage, also those recorded after it.
        stage: the name of this stage, where training has several (pretraining, then fine-tuning, each in a block of its
            own). It is recorded into a subfolder of `directory`, and `Trajectory.load(directory)` puts stages in order.
        batch_size: examples in one optimizer step, for the record.

    Raises:
        TrajectoryError: `directory` holds a recording already, the optimizer holds none of the model's parameters, or
            the steps asked for make no sense.

    Example:
        >>> import tempfile, segflow as sf
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> folder = tempfile.mkdtemp()
        >>> with sf.record(model, optimizer, folder, dataset_size=4, total_steps=8, checkpoints=2):
        ...     for _ in range(8):
        ...         optimizer.zero_grad()
        ...         model(torch.ones(4, 2)).square().mean().backward()
        ...         _ = optimizer.step()
        >>> sf.Trajectory.load(folder).steps
        (4, 8)
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    folder, schedule = RecordingFolder(Path(directory), stage), CheckpointSchedule(total_steps, checkpoints)
    recording = Recording(unwrap(model), optimizer, folder, schedule, dataset_size, batch_size)
    ranks = current()
    with ranks.together("record"):
        if ranks.main:
            folder.claim(overwrite)
        hooks = [
            recording.optimizer.register_step_pre_hook(lambda *_: recording.log_step()),
            recording.optimizer.register_step_post_hook(lambda *_: recording.end_step()),
        ]
        try:
            yield recording
        finally:
            for hook in hooks:
                hook.remove()
        recording.finish()


class Recording:
    """The state of one `record()` block; `step` counts the optimizer steps so far."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        folder: RecordingFolder,
        schedule: CheckpointSchedule,
        dataset_size: int,
        batch_size: int | None = None,
    ):
        _check_options(optimizer, dataset_size, batch_size)
        self.model, self.optimizer, self.folder, self.schedule = model, optimizer, folder, schedule
        self.dataset_size, self.batch_size = dataset_size, batch_size
        self.step = 0
        self._main = current().main  # of several ranks the first writes
        self._log = StepLog()
        self._saved: dict[int, dict[str, Any]] = {}  # by step, what trajectory.json says of a checkpoint
        self._group_of: dict[str, int] = {}  # each parameter's group
        self._note_parameters()
        self._model_state()  # refuses now what could not be saved
        if not self._group_of:
            raise TrajectoryError(
                "the optimizer holds none of this model's parameters. "
                "Give record() the model and the optimizer in training."
            )

    def log_step(self) -> None:
        """Log what the optimizer is about to use; a step hook."""
        self._log.before_step(self.optimizer)

    def end_step(self) -> None:
        """Count the step and save a checkpoint where one is due; a step hook."""
        self.step += 1
        self._log.after_step(self.optimizer)
        if self.schedule.due(self.step):
            self._save()
        for step in self.schedule.surplus(self._saved):
            self._drop(step)

    def finish(self) -> None:
        """Save the last step and write trajectory.json, which makes the recording whole."""
        if self.step == 0:
            raise TrajectoryError("record(): the optimizer took no step inside the block, so there is no trajectory.")
        if self.step not in self._saved:
            self._save()
        for step in self.schedule.surplus_at_end(self._saved, self.step):
            self._drop(step)
        self._note_parameters()
        self._write_trajectory()
        if unmet := self.schedule.unmet(self.step):
            warnings.warn(
                f"record(): training ended at step {self.step}, {unmet}; "
                f"the recording has checkpoints at {sorted(self._saved)}.",
                stacklevel=4,
            )

    def _note_parameters(self) -> None:
        """Note the group of every parameter in training; one that is frozen later stays noted."""
        group_of = {id(p): g for g, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) in group_of and parameter.requires_grad:
                self._group_of[name] = group_of[id(parameter)]

    def _model_state(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        plain = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if plain:
            raise TrajectoryError(f"the model's state {plain[0]!r} is no tensor, so it cannot be saved as safetensors.")
        return state

    def _second_moments(self) -> dict[str, Tensor]:
        """v_hat of every parameter that has taken a step."""
        name, states = optimizer_name(self.optimizer), self.optimizer.state
        moments = {}
        for parameter, values in self.model.named_parameters():
            if values in states and parameter in self._group_of:
                group = self.optimizer.param_groups[self._group_of[parameter]]
                moments[parameter] = second_moment(name, states[values], group)
        return {parameter: tensor for parameter, tensor in moments.items() if tensor is not None}

    def _save(self) -> None:
        """Save a checkpoint, and then what is known of the trajectory, so that a run that is killed can be read."""
        self._note_parameters()
        tensors = {f"{MODEL}{name}": value for name, value in self._model_state().items()}
        tensors |= {f"{SECOND_MOMENT}{name}": value for name, value in self._second_moments().items()}
        complete = {name: whole(tensor) for name, tensor in tensors.items()}  # sharded ones, on every rank
        entry: dict[str, Any] = {"file": checkpoint_file(self.step), "step": self.step}
        self._saved[self.step] = entry
        if self._main:
            entry |= write_tensors(self.folder.path / entry["file"], complete)
            write_json(self.folder.path / UNFINISHED, self._description())

    def _drop(self, step: int) -> None:
        file = self.folder.path / self._saved.pop(step)["file"]
        if self._main:
            file.unlink()

    def _write_trajectory(self) -> None:
        if self._main:
            write_json(self.folder.path / FINISHED, self._description())
            (self.folder.path / UNFINISHED).unlink()

    def _description(self) -> dict[str, Any]:
        """What trajectory.json says so far; the log of steps is written to its own file."""
        groups = self.optimizer.param_groups
        return {
            "format": FORMAT,
            "stage": "train" if self.folder.stage is None else self.folder.stage,
            "dataset_size": self.dataset_size,
            "batch_size": self.batch_size,
            "optimizer": optimizer_name(self.optimizer, [_UNEVEN] if self._log.uneven else []),
            "nesterov": any(bool(group.get("nesterov")) for group in groups),
            "maximize": any(bool(group.get("maximize")) for group in groups),
            "constants": [{k: _plain(v) for k, v in group.items() if _is_plain(_plain(v))} for group in groups],
            "parameter_groups": self._group_of,
            "checkpoints": [self._saved[step] for step in sorted(self._saved)],
            "log": write_tensors(self.folder.path / STEPS, self._log.tensors(len(groups))),
        }


def optimizer_name(optimizer: torch.optim.Optimizer, reservations: Sequence[str] = ()) -> str:
    """The optimizer's class name, which is torch.optim's own only if the formulas in `optimizers` hold for this run.

    reservations: known reasons why they do not; those that the optimizer's options show are added. The name then says
    them in parentheses, so that no formula is found under it.
    """
    kind, groups = type(optimizer), optimizer.param_groups
    decaying = [group for group in groups if group.get("weight_decay")]
    reasons = [*reservations]
    if len({bool(group.get("maximize")) for group in groups}) > 1:
        reasons.append("maximize=True in some parameter groups only")
    if len({bool(group.get("decoupled_weight_decay")) for group in decaying}) > 1:
        reasons.append("decoupled_weight_decay=True in some parameter groups only")
    name = kind.__name__ if kind.__module__.startswith("torch.optim.") else f"{kind.__module__}.{kind.__qualname__}"
    return f"{name} ({', '.join(reasons)})" if reasons else name


def _check_options(optimizer: Any, dataset_size: int, batch_size: int | None) -> None:
    check_batch_size(batch_size)
    if not hasattr(dataset_size, "__index__") or dataset_size < 1:
        raise TrajectoryError(f"dataset_size={dataset_size}: expected the number of training examples.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TrajectoryError(
            f"the optimizer is a {type(optimizer).__name__}, which has no step hooks. Expected a torch.optim optimizer."
        )


def _plain(value: Any) -> Any:
    """Numbers that an optimizer may also hold as tensors, as numbers."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None) or (
        isinstance(value, list | tuple) and all(isinstance(item, bool | int | float) for item in value)
    )
