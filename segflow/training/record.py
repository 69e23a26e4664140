"""record(): leaves a trajectory behind a live training loop, without touching its numbers."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import real_number, shown, truth, whole_number
from ..errors import TrajectoryError
from ..runtime.progress import is_shown
from ..runtime.ranks import current
from ..runtime.sharding import unwrap
from .gradient_watch import watching
from .live_optimizers import unwrapped
from .per_step import check_batch_size
from .recorded import unaccounted_words
from .recording import Begun, Recording, RecordOptions
from .recording_folder import RecordingFolder
from .resumption import begun_anew, begun_before
from .sampling import CountedSampler, check_example_weights
from .schedule import CheckpointSchedule

_NAMED = 4  # parameters in a warning


@contextmanager
def record(  # noqa: PLR0913 (one argument for each thing to say of a run)
    model: nn.Module,
    optimizer: Any,
    directory: str | os.PathLike[str],
    *,
    dataset_size: int,
    total_steps: int | None = None,
    checkpoints: int | Sequence[int] = 6,
    overwrite: bool = False,
    resume: bool = False,
    step: int | None = None,
    stage: str | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    example_weights: Any = None,
    sampler: CountedSampler | None = None,
    gradient_scale: float | None = None,
    progress: bool | None = None,
) -> Iterator[Recording]:
    """Record the training that happens inside the `with` block; the loop and its numbers stay as they are.

    Every step is logged as it is taken: learning rate, momentum and weight decay of each parameter group, which
    parameters it moved (those with a gradient; frozen ones, unused branches and steps that GradScaler skips count for
    nothing), and what clipping by norm left of their gradients (torch's `clip_grad_norm_`, also as accelerate, the
    Trainer and Lightning call it). Evenly spaced checkpoints of what is trained are saved, always with the last step,
    with the second moments of Adam, AdamW, RMSprop and Adagrad. docs/TRAINING.md says which training regimes are
    followed. A run that is killed leaves what it had at its last checkpoint (`Trajectory.load(..., unfinished=True)`),
    and can go on (resume=True). Of several processes the first writes; parameters that are sharded over them are put
    together. An optimizer with `maximize=True` made minus its objective smaller, so that is what
    `Task.compute_train_loss` must then return.

    Args:
        model: the model in training.
        optimizer: its torch.optim optimizer (or a trainer's wrapper of one); a list of them where several train the
            model together. A step is then one round of all of them.
        directory: where to write; read it with `Trajectory.load`.
        dataset_size: number of training examples N.
        total_steps: optimizer steps from the start to the end of training. None: checkpoints are saved often and
            thinned on the way, and end up evenly spaced to within a factor of two; give the number where you know it.
        checkpoints: how many, or the explicit steps (the last step is saved besides).
        overwrite: replace an earlier recording in `directory`; of a stage, also those recorded after it.
        resume: go on with the recording in `directory`, if there is one, after the step whose state was loaded into
            model and optimizer; what it holds after that step is dropped.
        step: for `resume`, how many steps had been taken, where the optimizer's state does not tell (SGD's does not).
        stage: the name of this stage, where training has several (pretraining, then fine-tuning, each in a block of its
            own). It is recorded into a subfolder of `directory`, and `Trajectory.load(directory)` puts stages in order.
        batch_size: examples in one optimizer step, for the record.
        dtype: of the model's and the moments' numbers in checkpoints, such as torch.bfloat16; None: as they are. With
            torch.float16 second moments, which are tiny, stay in single precision.
        example_weights: [dataset_size] numbers >= 0, how often each example was drawn compared with the others; only
            their ratios count (what multiplies an example's loss belongs into the task). None: all count alike.
        sampler: counts instead how often the sampler of the training loop drew each example; see `CountedSampler`.
        gradient_scale: what a step's gradient is a multiple of, where it is not that of the mean loss over examples: 4
            if the mean losses of 4 accumulated batches are added up, not averaged. None: 1, or as in the recording
            that goes on.
        progress: say on standard error what will be written: True always, False never, None on a terminal only. The
            `Recording` that the block gets says the same when it is printed.

    Raises:
        TrajectoryError: `directory` holds a recording already, or none that reaches the step at which training goes on;
            the optimizer holds none of the model's parameters, or options that are no numbers; the arguments make no
            sense.

    Example:
        >>> import tempfile, segflow as sf
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> folder = tempfile.mkdtemp()
        >>> with sf.record(model, optimizer, folder, dataset_size=4, total_steps=8, checkpoints=2) as recording:
        ...     for _ in range(8):
        ...         optimizer.zero_grad()
        ...         model(torch.ones(4, 2)).square().mean().backward()
        ...         _ = optimizer.step()
        >>> print(recording)
        2 checkpoints of 12 B each
        >>> sf.Trajectory.load(folder).steps
        (4, 8)
    """
    options = _options(dataset_size, batch_size, dtype, example_weights, sampler)
    if gradient_scale is not None:
        options = replace(
            options, gradient_scale=real_number("gradient_scale", gradient_scale, TrajectoryError, above=0)
        )
    if step is not None:
        step = whole_number("step", step, TrajectoryError)
    overwrite, resume = truth("overwrite", overwrite, TrajectoryError), truth("resume", resume, TrajectoryError)
    folder, schedule = RecordingFolder(Path(directory), stage), CheckpointSchedule(total_steps, checkpoints)
    progress = None if progress is None else truth("progress", progress, TrajectoryError)
    recording = Recording(unwrap(model), unwrapped(optimizer), folder, schedule, options)
    ranks = current()
    with ranks.together("record"):
        begun = Begun(**ranks.same(asdict(_begun(recording, overwrite, resume, step)) if ranks.main else None))
        recording.begin(begun)
        _say(recording, begun, progress)
        hooks = [
            hook
            for number, one in enumerate(recording.optimizers)
            for hook in (
                one.register_step_pre_hook(partial(_before_step, recording, number)),
                one.register_step_post_hook(lambda *_, number=number: recording.after_step(number)),
            )
        ]
        try:
            with watching(recording.observer.watch):
                yield recording
        except BaseException:
            recording.stop()
            raise
        finally:
            for hook in hooks:
                hook.remove()
        recording.finish()


def _options(dataset_size: Any, batch_size: Any, dtype: Any, example_weights: Any, sampler: Any) -> RecordOptions:
    """The user's words on the run, checked; TrajectoryError names the one that makes no sense."""
    size = whole_number(
        "dataset_size", dataset_size, TrajectoryError, 1, advice="Give the number of training examples."
    )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise TrajectoryError(f"dtype={shown(dtype)}: expected a floating-point torch.dtype, such as torch.bfloat16.")
    if sampler is not None and not isinstance(sampler, CountedSampler):
        raise TrajectoryError(
            f"sampler={shown(sampler)}: expected a segflow.CountedSampler, which counts what it hands out. Wrap your "
            "sampler in one, and give that to the DataLoader as well."
        )
    if sampler is not None and example_weights is not None:
        raise TrajectoryError("example_weights= and sampler= both say how often examples were drawn. Give one of them.")
    weights = None if example_weights is None else check_example_weights(example_weights, size)
    return RecordOptions(size, check_batch_size(batch_size), dtype, weights, sampler)


def _before_step(
    recording: Recording, number: int, _optimizer: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """An optimizer's hook before it steps; of a step with a closure, a look at the gradients that this leaves."""
    recording.before_step(number)
    closure = options["closure"] if "closure" in options else (*arguments, None)[1]  # after the optimizer itself
    if closure is None:
        return None

    def looked_at() -> Any:
        loss = closure()
        recording.observer.check(number)
        return loss

    if "closure" in options:
        return arguments, {**options, "closure": looked_at}
    return (arguments[0], looked_at, *arguments[2:]), options


def _begun(recording: Recording, overwrite: bool, resume: bool, step: int | None) -> Begun:
    """What stays of an earlier recording, or nothing; the folder is then a recording under way."""
    if (step is not None or overwrite) and resume is overwrite:
        raise TrajectoryError(
            f"overwrite={overwrite}, resume={resume}, step={step}: expected one of overwrite and resume, and step= "
            "with resume=True only."
        )
    taken, folder = recording.observer.taken_before(), recording.folder
    begun = begun_before(folder, taken, step, recording.description()) if resume else None
    if begun is None:
        if step:
            raise TrajectoryError(f"{folder.path}: no recording to go on with, so steps 1 to {step} are missing.")
        begun = begun_anew(folder, taken, overwrite or resume)
    return begun


def _say(recording: Recording, begun: Begun, progress: bool | None) -> None:
    """Say what will be written, and warn of what will be missing."""
    if is_shown(progress):
        sys.stderr.write(f"recording into {recording.folder.path}: {recording}\n")
    if unheld := recording.observer.unheld():
        more = f" and {len(unheld) - _NAMED} more" if len(unheld) > _NAMED else ""
        warnings.warn(
            f"record(): no recorded optimizer holds {', '.join(unheld[:_NAMED])}{more}. If another optimizer trains "
            "them, give record() a list of all optimizers; they are not attributed otherwise.",
            stacklevel=4,
        )
    if begun.unaccounted:
        warnings.warn(
            f"record(): the optimizer has taken {unaccounted_words(begun.unaccounted)} already that no stage in "
            f"{recording.folder.root} has recorded. Methods that need the whole of training will refuse this "
            "recording; record from the start, or go on with the recording of the earlier part (resume=True).",
            stacklevel=4,
        )
