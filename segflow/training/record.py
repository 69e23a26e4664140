"""record(): leaves a trajectory behind a live training loop, without touching its numbers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrajectoryError
from ..runtime.ranks import current
from ..runtime.sharding import unwrap, whole
from ..store.files import inside, write_json, write_tensors
from .optimizers import described, lr_decays, second_moment
from .per_step import check_batch_size
from .trajectory import FORMAT, STAGES, check_stage, stage_names

_LOGGED = {"learning_rate": "lr", "momentum": "momentum", "dampening": "dampening", "weight_decay": "weight_decay"}
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
    recording = Recording(unwrap(model), optimizer, Path(directory), dataset_size, stage, batch_size)
    recording.plan(total_steps, checkpoints)
    ranks = current()
    with ranks.together("record"):
        if ranks.main:
            recording.begin(overwrite)
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
        root: Path,
        dataset_size: int,
        stage: str | None = None,
        batch_size: int | None = None,
    ):
        self.model, self.optimizer, self.dataset_size, self.batch_size = model, optimizer, dataset_size, batch_size
        self.root, self.stage = root, stage
        self.directory = root if stage is None else root / check_stage(stage)
        self.step = 0
        self._main = current().main  # of several ranks the first writes
        self._total: int | None = None
        self._wanted: set[int] = set()
        self._count: int | None = None  # set where checkpoints are thinned on the way
        self._interval = 1
        self._rows: list[list[list[float]]] = []
        self._row: list[list[float]] = []  # of the step under way
        self._saved: dict[int, dict[str, Any]] = {}
        self._group_of: dict[str, int] = {}
        self._uneven = False  # parameters of one group had different learning rates
        check_batch_size(batch_size)
        if not hasattr(dataset_size, "__index__") or dataset_size < 1:
            raise TrajectoryError(f"dataset_size={dataset_size}: expected the number of training examples.")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TrajectoryError(
                f"the optimizer is a {type(optimizer).__name__}, which has no step hooks. "
                "Expected a torch.optim optimizer."
            )
        self._note_parameters()
        self._model_state()
        if not self._group_of:
            raise TrajectoryError(
                "the optimizer holds none of this model's parameters. "
                "Give record() the model and the optimizer in training."
            )

    def plan(self, total_steps: int | None, checkpoints: int | Sequence[int]) -> None:
        """Decide which steps to save."""
        self._total = total_steps
        if isinstance(checkpoints, Iterable):
            self._wanted = {int(step) for step in checkpoints}
            low, high = min(self._wanted, default=0), max(self._wanted, default=0)
            if low < 1 or high > (total_steps or high) or self._wanted != set(checkpoints):
                raise TrajectoryError(
                    f"checkpoints={list(checkpoints)}: expected steps from 1 to "
                    f"{'the end' if total_steps is None else total_steps}."
                )
        elif checkpoints < 1:
            raise TrajectoryError(f"checkpoints={checkpoints}: expected at least 1.")
        elif total_steps is None:
            self._count = checkpoints
        elif total_steps < checkpoints:
            raise TrajectoryError(f"total_steps={total_steps}: too few for {checkpoints} checkpoints.")
        else:
            self._wanted = set(_evenly(total_steps, checkpoints))

    def begin(self, overwrite: bool) -> None:
        """Mark the folder as a recording under way, refusing to overwrite one unasked."""
        names = stage_names(self.root)
        if self.stage is None and names:
            raise TrajectoryError(
                f"{self.root}: holds the stages {', '.join(names)}. Give record() a stage=, or another folder."
            )
        before = [] if self.stage is None else self._stages_before(names, overwrite)
        folder = self.directory
        if (present := _present(folder)) and not overwrite:
            raise TrajectoryError(
                f"{folder}: holds a recorded run already ({present[0]}). "
                "Record into another folder, or pass overwrite=True."
            )
        if self.stage is not None:
            later = [inside(self.root, name, error=TrajectoryError) for name in names[len(before) + 1 :]]
            write_json(self.root / STAGES, {"format": 1, "stages": [*before, self.stage]})
            for stale in later:
                _erase(stale)
        write_json(folder / "recording.json", {"format": FORMAT, "finished": False})
        (folder / "trajectory.json").unlink(missing_ok=True)
        for stale in (folder / "checkpoints").glob("step-*.safetensors*"):
            stale.unlink()

    def _stages_before(self, names: list[str], overwrite: bool) -> list[str]:
        """Those of the folder's stages that stay; refuses what would make no training run."""
        stage = str(self.stage)
        inside(self.root, stage, error=TrajectoryError)
        if present := _present(self.root):
            raise TrajectoryError(
                f"{self.root}: holds a recorded run without stages ({present[0]}). Record into another folder, "
                "every stage with a stage= of its own."
            )
        alike = [name for name in names if name.lower() == stage.lower()]
        if alike and (alike != [stage] or not overwrite):
            raise TrajectoryError(
                f"{self.root}: holds stage {alike[0]!r} already. Choose another name, or replace that stage and those "
                f"after it with stage={alike[0]!r} and overwrite=True."
            )
        before = names[: names.index(stage)] if alike else names
        if before and not (self.root / before[-1] / "trajectory.json").exists():
            raise TrajectoryError(
                f"{self.root}: stage {before[-1]!r}, before {stage!r}, did not finish. "
                "Train it again, with overwrite=True, before recording another."
            )
        return before

    def log_step(self) -> None:
        """Log what the optimizer is about to use; a step hook."""
        groups = self.optimizer.param_groups
        self._row = [[float(group.get(key, 0.0)) for group in groups] for key in _LOGGED.values()]

    def end_step(self) -> None:
        """Count the step and save a checkpoint where one is due; a step hook."""
        self.step += 1
        for index, (divisor, alike) in enumerate(lr_decays(self.optimizer)):
            if divisor != 1:
                self._row[0][index] /= divisor
            self._uneven |= not alike
        self._rows.append(self._row)  # only now: a step that raised was not taken
        if self.step in self._wanted or (self._count and self.step % self._interval == 0):
            self._save()
        if self._count and len(self._saved) > 2 * self._count:
            self._interval *= 2
            for step in [step for step in self._saved if step % self._interval]:
                self._drop(step)

    def finish(self) -> None:
        """Save the last step and write trajectory.json, which makes the recording whole."""
        if self.step == 0:
            raise TrajectoryError("record(): the optimizer took no step inside the block, so there is no trajectory.")
        if self.step not in self._saved:
            self._save()
        if self._count:
            self._thin(_evenly(self.step, min(self._count, self.step)))
        self._note_parameters()
        self._write_trajectory()
        missed = sorted(step for step in self._wanted if step > self.step)
        if missed or self.step > (self._total or self.step):
            reason = f"checkpoints at {missed} were never reached" if missed else f"not at total_steps={self._total}"
            warnings.warn(
                f"record(): training ended at step {self.step}, {reason}; "
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

    def _save(self) -> None:
        """Save a checkpoint, and then what is known of the trajectory, so that a run that is killed can be read."""
        self._note_parameters()
        tensors = {f"model.{name}": value for name, value in self._model_state().items()}
        complete = {name: whole(tensor) for name, tensor in (tensors | self._second_moments()).items()}  # on every rank
        entry: dict[str, Any] = {"file": f"checkpoints/step-{self.step:08d}.safetensors", "step": self.step}
        self._saved[self.step] = entry
        if self._main:
            entry |= write_tensors(self.directory / entry["file"], complete)
            write_json(self.directory / "recording.json", self._so_far())

    def _second_moments(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter in self.optimizer.state and name in self._group_of:
                group = self.optimizer.param_groups[self._group_of[name]]
                moments = second_moment(described(self.optimizer), self.optimizer.state[parameter], group)
                if moments is not None:
                    found[f"second_moment.{name}"] = moments
        return found

    def _write_trajectory(self) -> None:
        if self._main:
            write_json(self.directory / "trajectory.json", self._so_far())
            (self.directory / "recording.json").unlink()

    def _drop(self, step: int) -> None:
        file = self.directory / self._saved.pop(step)["file"]
        if self._main:
            file.unlink()

    def _thin(self, wanted: list[int]) -> None:
        """Keep the saved checkpoints nearest to the wanted steps, of which the last is one."""
        kept = {min(self._saved, key=lambda saved: abs(saved - step)) for step in wanted}
        for step in set(self._saved) - kept:
            self._drop(step)

    def _so_far(self) -> dict[str, Any]:
        """What trajectory.json says, the log of steps written to a file of its own."""
        groups = self.optimizer.param_groups
        width = max(len(groups), *(len(row[0]) for row in self._rows))
        padded = [[values + [0.0] * (width - len(values)) for values in row] for row in self._rows]
        log = torch.tensor(padded, dtype=torch.float64)  # [steps, logged values, parameter groups]
        tensors = {name: log[:, index] for index, name in enumerate(_LOGGED)}
        return {
            "format": FORMAT,
            "stage": "train" if self.stage is None else self.stage,
            "dataset_size": self.dataset_size,
            "batch_size": self.batch_size,
            "optimizer": described(self.optimizer, [_UNEVEN] if self._uneven else []),
            "nesterov": any(bool(group.get("nesterov")) for group in groups),
            "maximize": any(bool(group.get("maximize")) for group in groups),
            "constants": [{k: _plain(v) for k, v in group.items() if _is_plain(_plain(v))} for group in groups],
            "parameter_groups": self._group_of,
            "checkpoints": [self._saved[step] for step in sorted(self._saved)],
            "log": write_tensors(self.directory / "steps.safetensors", tensors),
        }


def _evenly(total: int, count: int) -> list[int]:
    return [round(total * place / count) for place in range(1, count + 1)]


def _present(folder: Path) -> list[str]:
    return [name for name in ("trajectory.json", "recording.json") if (folder / name).exists()]


def _erase(folder: Path) -> None:
    """Remove what record() wrote into a folder, and the folder if nothing else is in it."""
    files = [folder / name for name in ("trajectory.json", "recording.json", "steps.safetensors")]
    for file in [*files, *(folder / "checkpoints").glob("step-*.safetensors*")]:
        file.unlink(missing_ok=True)
    for empty in (folder / "checkpoints", folder):
        with suppress(OSError):
            empty.rmdir()


def _plain(value: Any) -> Any:
    """Numbers that an optimizer may also hold as tensors, as numbers."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None) or (
        isinstance(value, list | tuple) and all(isinstance(item, bool | int | float) for item in value)
    )
