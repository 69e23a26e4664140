"""A callback that records the training of a Lightning Trainer, so that a trajectory is left behind.

The Trainer may be lightning.pytorch's or that of the separate pytorch_lightning package; its callbacks must be of the
same package, so the class derives from those of both where both are installed.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch.utils.data import DataLoader, SequentialSampler

from ..errors import TrajectoryError
from ..training.record import record
from ..training.recording import Recording

_PACKAGES = {
    "lightning.pytorch": lambda: import_module("lightning.pytorch"),
    "pytorch_lightning": lambda: import_module("pytorch_lightning"),
}
_OPTIONS = {"total_steps", "overwrite", "step", "batch_size", "dtype", "example_weights", "sampler", "progress"}


def _callback_classes() -> tuple[type, ...]:
    """Lightning's own Callback, of the packages that are imported already, or else of those that are installed."""
    names = [name for name in _PACKAGES if name in sys.modules]
    names = names or [name for name in _PACKAGES if find_spec(name.partition(".")[0])]
    if not names:
        raise ImportError(
            "segflow.integrations.lightning needs Lightning, which is not installed: pip install lightning"
        )
    return tuple(_PACKAGES[name]().Callback for name in names)


class RecordCallback(*_callback_classes()):  # type: ignore[misc]
    """Record the training of a Lightning Trainer with `segflow.record`; the numbers of training stay as they are.

    The model that is recorded is the LightningModule, whose parameters are named `model.weight` where it holds the
    network as `self.model`. So the analyzer takes the LightningModule too, and its task calls that.

    A fit that goes on from a Lightning checkpoint (`ckpt_path=`) goes on with the recording in the folder.

    Args:
        directory: where to write; read it with `Trajectory.load`.
        checkpoints: how many, or the explicit optimizer steps (the last step is saved besides).
        stage: the name of this stage, where training has several.
        dataset_size: number of training examples N; None: the length of the training dataloader's dataset.
        options: `total_steps`, `overwrite`, `step`, `batch_size`, `dtype`, `example_weights`, `sampler` and `progress`
            of `segflow.record`. `total_steps` is otherwise the Trainer's own estimate; in manual optimization, where
            the module decides how often it steps, it is taken to be unknown. `overwrite` holds for a fit from the
            start, `step` for one that goes on, where neither the optimizer nor the Trainer tells (manual optimization
            with SGD).

    Attributes:
        recording: the `Recording` under way, or the last one; None before training.

    Raises:
        TypeError: an option that `segflow.record` does not have, when the callback is made.
        TrajectoryError: when training starts, what `segflow.record` raises, or the dataset's size cannot be told.

    Example:
        trainer = lightning.pytorch.Trainer(max_epochs=3, callbacks=[RecordCallback("run")])
        trainer.fit(module, loader)
        analyzer = sf.Analyzer(module, task, sf.Trajectory.load("run"), store="store")
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        checkpoints: int | Sequence[int] = 6,
        stage: str | None = None,
        dataset_size: int | None = None,
        **options: Any,
    ):
        super().__init__()
        if unknown := sorted(options.keys() - _OPTIONS):
            raise TypeError(f"RecordCallback has no option {unknown[0]!r}: expected some of {sorted(_OPTIONS)}.")
        self.recording: Recording | None = None
        self._directory, self._dataset_size = directory, dataset_size
        self._options = {"checkpoints": checkpoints, "stage": stage, **options}
        self._open: ExitStack | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to record: parameters, optimizers and their states are now as training will have them."""
        size = _dataset_size(trainer) if self._dataset_size is None else self._dataset_size
        options = {"total_steps": None, **self._options} | _resumption(trainer)
        if options["total_steps"] is None and isinstance(options["checkpoints"], int):
            options["total_steps"] = _total_steps(trainer, pl_module)
        if self._options.get("step") is not None and "resume" in options:
            options["step"] = self._options["step"]
        _warn_of_short_steps(trainer)
        _warn_of_averages(trainer)
        stack = ExitStack()
        block = record(pl_module, trainer.optimizers, self._directory, dataset_size=size, **options)
        self.recording = stack.enter_context(block)
        self._open = stack

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the last step; the recording is whole."""
        if (stack := self._closed()) is not None:
            stack.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop the recording, which can go on, or be read with `unfinished=True`."""
        if (stack := self._closed()) is not None:
            stack.__exit__(type(exception), exception, exception.__traceback__)

    def _closed(self) -> ExitStack | None:
        stack, self._open = self._open, None
        return stack


def _dataset_size(trainer: Any) -> int:
    """The length of the training dataset; TrajectoryError where it is not that of the examples that training sees."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
        raise TrajectoryError(
            f"RecordCallback: the Trainer reads its training data from a {type(getattr(loader, 'dataset', loader))}, "
            "whose number of examples is not told. Expected one DataLoader of a dataset with a length; or give "
            "RecordCallback(dataset_size=...)."
        )
    batches, every = trainer.num_training_batches, len(loader)
    if batches < every and isinstance(loader.sampler, SequentialSampler):
        raise TrajectoryError(
            f"RecordCallback: of {every} batches the Trainer reads the first {batches} in each epoch, and never the "
            "others. Give it a dataset of the examples that it trains on; or RecordCallback(dataset_size=...), their "
            "number."
        )
    return len(loader.dataset)


def _total_steps(trainer: Any, module: Any) -> int | None:
    """The optimizer steps of the whole of training, as the Trainer estimates them; None where that is not known."""
    schedules = any(type(callback).__name__ == "GradientAccumulationScheduler" for callback in trainer.callbacks)
    if schedules or not module.automatic_optimization:
        return None
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) and steps > 0 else None


def _warn_of_short_steps(trainer: Any) -> None:
    """Warn where the last step of an epoch gathers fewer batches than Lightning divides its loss by."""
    batches, gathered = trainer.num_training_batches, trainer.accumulate_grad_batches
    if math.isfinite(batches) and (left := batches % gathered):
        warnings.warn(
            f"RecordCallback: each epoch's last step gathers {left} of {gathered} batches, and Lightning divides their "
            f"gradient by {gathered}, so that it moves less than is counted. Train on a multiple of {gathered} batches "
            "(drop_last, limit_train_batches), or take the scores of such a run as slightly off.",
            stacklevel=2,
        )


def _warn_of_averages(trainer: Any) -> None:
    """Warn where a callback of Lightning will leave averaged weights in the module when training ends."""
    kinds = {kind.__name__ for callback in trainer.callbacks for kind in type(callback).__mro__}
    if found := sorted(kinds & {"StochasticWeightAveraging", "WeightAveraging"}):
        warnings.warn(
            f"RecordCallback: {found[0]} leaves averaged weights in the module when training ends, and the recording "
            "ends with the last step's, which scores then explain. For the average save module.state_dict() and see "
            "Trajectory.averaged.",
            stacklevel=2,
        )


def _resumption(trainer: Any) -> dict[str, Any]:
    """What `record` is told where the fit goes on from a checkpoint; nothing where it begins.

    The Trainer counts steps of all optimizers together, so that its count is a step's of one optimizer only. Adam's own
    count goes first, for it leaves out the steps that GradScaler skips.
    """
    if trainer.global_step == 0:
        return {}
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    tells = any("step" in state for state in states) or len(trainer.optimizers) > 1
    return {"resume": True, "overwrite": False, "step": None if tells else trainer.global_step}
