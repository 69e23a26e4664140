"""transformers' Trainer: a callback that records the run, so that `Trajectory.load` reads it."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from transformers import TrainerCallback

from ..errors import TrajectoryError
from ..runtime.sharding import unwrap
from ..training.record import record
from ..training.recording import Recording
from ..training.sampling import CountedSampler
from .accumulated_batches import AccumulatedBatches

_ADVICE = (
    "Give it to the Trainer as it is made, Trainer(..., callbacks=[RecordCallback(...)]); or, of one that exists, call "
    "callback.attach(trainer), which adds it."
)


class RecordCallback(TrainerCallback):  # type: ignore[misc]
    """Records the training of a transformers Trainer with `segflow.record`; its numbers stay bit-identical.

    Hand it to the Trainer as it is made, `Trainer(..., callbacks=[RecordCallback("run")])`, and read the run with
    `Trajectory.load("run")`. Steps are the optimizer's, so that gradient accumulation, mixed precision's skipped steps,
    clipping and any schedule are followed as they happen. The model that is recorded is that of the last step, also
    where the Trainer loads the best one in the end. A Trainer that resumes from a checkpoint goes on with the recording
    (see `record`'s resume). If training raises, all that observed it is taken away, and the folder holds what was
    recorded up to the last checkpoint. One callback records one run; a second `train()` needs one of its own, as
    another stage or in another directory.

    Args:
        directory: where to write.
        dataset_size: number of training examples N; None: the length of the training dataset, which an iterable
            dataset does not have.
        checkpoints, overwrite, stage, dtype, example_weights, sampler, progress: as in `record`.
        batch_size: examples in one optimizer step; None: as the Trainer's arguments say.
        gradient_scale: as in `record`; None: found in the first step, by whether the Trainer divides the losses of
            accumulated batches by their number, and whether the loss divides by `num_items_in_batch`.

    Raises:
        TrajectoryError: when training begins: as `record` does, or the dataset has no length, or `add_callback` was
            used instead of `attach`.
    """

    def __init__(  # noqa: PLR0913 (as `record`)
        self,
        directory: str | os.PathLike[str],
        *,
        checkpoints: int | Sequence[int] = 6,
        stage: str | None = None,
        dataset_size: int | None = None,
        overwrite: bool = False,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        example_weights: Any = None,
        sampler: CountedSampler | None = None,
        gradient_scale: float | None = None,
        progress: bool | None = None,
    ):
        self.directory = directory
        self.recording: Recording | None = None  # as long as it is under way, or the one that ended last
        self._options: dict[str, Any] = {
            "checkpoints": checkpoints,
            "stage": stage,
            "dtype": dtype,
            "example_weights": example_weights,
            "sampler": sampler,
            "progress": progress,
        }
        self._dataset_size, self._batch_size, self._overwrite = dataset_size, batch_size, overwrite
        self._open: AbstractContextManager[Recording] | None = None
        self._trainer: weakref.ref[Any] | None = None  # that it is attached to
        self._gradient_scale, self._batches = gradient_scale, cast("AccumulatedBatches | None", None)
        self._ended_at: int | None = None  # the Trainer's step at which the recording ended
        self._parameters: list[torch.Tensor] = []
        self._writes: list[int] = []  # how often these had been written to after the last step

    def attach(self, trainer: Any) -> None:
        """Add the callback to a Trainer that exists already, and end the recording if its `train` raises."""
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        if self._trainer is not None and self._trainer() is trainer:
            return
        self._trainer, self._batches = weakref.ref(trainer), AccumulatedBatches(trainer)
        train = trainer.train

        @functools.wraps(train)
        def train_and_close(*arguments: Any, **options: Any) -> Any:
            try:
                return train(*arguments, **options)
            finally:
                self._abandon()

        trainer.train = train_and_close

    def on_init_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """The Trainer is made: attach to it."""
        frame = inspect.currentframe()
        while frame is not None:
            made = frame.f_locals.get("self")
            if hasattr(made, "train") and self in getattr(getattr(made, "callback_handler", None), "callbacks", ()):
                self.attach(made)
                return
            frame = frame.f_back

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Begin to record, or go on where the Trainer does."""
        if self._trainer is None or self._batches is None:
            raise TrajectoryError(f"RecordCallback: the Trainer does not tell it when training fails. {_ADVICE}")
        unused = self._open is not None and self.recording is not None and self.recording.step == 0
        self._abandon()  # of a batch size that turned out to be too large
        self._check_first(state)
        self._batches.begin()
        model = unwrap(others["model"])
        opened = record(
            model,
            others["optimizer"],
            self.directory,
            dataset_size=self._size_of(others.get("train_dataloader")),
            batch_size=self._batch_size_of(args, state),
            total_steps=state.max_steps,
            **self._options,
            **self._beginning(args, state, unused),
        )
        self.recording, self._ended_at = opened.__enter__(), None
        self._open = opened
        self._parameters = list(model.parameters()) if getattr(args, "load_best_model_at_end", False) else []

    def _check_first(self, state: Any) -> None:
        if self._ended_at is not None and not state.global_step:
            raise TrajectoryError(
                f"RecordCallback({str(self.directory)!r}): it has recorded a run already, and train() was called "
                "again. Remove it (trainer.remove_callback), and attach one with a stage= or a directory of its own."
            )

    def _beginning(self, args: Any, state: Any, unused: bool) -> dict[str, Any]:
        if not state.global_step:
            return {"overwrite": self._overwrite or unused}
        return {"resume": True, "step": None if getattr(args, "fp16", False) else state.global_step}

    def _size_of(self, dataloader: Any) -> int:
        """The number of training examples."""
        if self._dataset_size is not None:
            return self._dataset_size
        try:
            return len(dataloader.dataset)
        except (TypeError, AttributeError) as problem:
            raise TrajectoryError(
                f"RecordCallback({str(self.directory)!r}): the training dataset has no length ({problem}). Give "
                "dataset_size=, the number of its examples."
            ) from problem

    def _batch_size_of(self, args: Any, state: Any) -> int | None:
        if self._batch_size is not None:
            return self._batch_size
        of_process = state.train_batch_size or args.train_batch_size
        return int(of_process * args.gradient_accumulation_steps * args.world_size)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """A step follows: what its gradients are multiples of is known."""
        if self._batches is None or self.recording is None or self._open is None:
            return
        own = self.recording.step + 1 - self.recording.begun_at
        scale = self._gradient_scale or self._batches.scale(own)
        if scale is None:
            raise TrajectoryError(
                f"RecordCallback({str(self.directory)!r}): it cannot be told whether the losses of accumulated batches "
                "are averaged. Give gradient_scale=, 1 if they are, or gradient_accumulation_steps if they are summed."
            )
        self.recording.scale_gradients(scale, own)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """An optimizer step was taken, perhaps the last one."""
        self._writes = [parameter._version for parameter in self._parameters]
        self._end_if_last(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Training may have been told to stop."""
        self._end_if_last(state, control)

    on_save = on_epoch_end = on_log = on_evaluate

    def _end_if_last(self, state: Any, control: Any) -> None:
        """End as soon as no step can follow: before the Trainer loads the best model, which is not the last one."""
        if control.should_training_stop:
            self._end(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """End the recording."""
        if self._open is not None and self._writes != [parameter._version for parameter in self._parameters]:
            raise TrajectoryError(
                f"RecordCallback({str(self.directory)!r}): the Trainer loaded its best model before the last step's "
                "was saved. Train without load_best_model_at_end."
            )
        self._end(state)
        if state.global_step != self._ended_at:
            raise TrajectoryError(
                f"RecordCallback({str(self.directory)!r}): training was told to stop at step {self._ended_at} and went "
                f"on to step {state.global_step}, so that the recording lacks its end. Record with segflow.record."
            )

    def _end(self, state: Any) -> None:
        if self._open is not None:
            opened, self._open, self._ended_at = self._open, None, state.global_step
            opened.__exit__(None, None, None)

    def _abandon(self) -> None:
        """Take away what observes training that did not come to its end."""
        if self._open is None:
            return
        opened, self._open = self._open, None
        problem = sys.exc_info()[1] or TrajectoryError("training ended without saying so")
        opened.__exit__(type(problem), problem, problem.__traceback__)
