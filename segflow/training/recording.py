"""A recording under way: what a live training loop did, step by step, and the checkpoints it is to leave."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrajectoryError
from ..runtime.memory import bytes_in_words
from ..runtime.ranks import current
from ..runtime.sharding import named_parameters, state_of, whole
from ..store.files import file_digest, read_tensors, write_json, write_tensors
from .checkpoints import COUNTS, MODEL, SECOND_MOMENT
from .frozen import FrozenPart
from .live_optimizers import constants, optimizer_name
from .optimizers import KNOWN, SECOND_MOMENTS, second_moment
from .recorded import read_counts
from .recording_folder import (
    EXAMPLE_WEIGHTS,
    FINISHED,
    FORMAT,
    FROZEN,
    STEPS,
    UNFINISHED,
    RecordingFolder,
    checkpoint_file,
)
from .sampling import CountedSampler
from .schedule import CheckpointSchedule
from .step_log import Round, StepLog
from .step_observer import StepObserver


@dataclass(frozen=True)
class RecordOptions:
    """What the user says of the run; see `record` for the fields."""

    dataset_size: int
    batch_size: int | None = None
    dtype: torch.dtype | None = None
    example_weights: Tensor | None = None
    sampler: CountedSampler | None = None
    gradient_scale: float | None = None


@dataclass(frozen=True)
class Begun:
    """What was recorded before, of a recording that goes on; the defaults are those of a new one.

    Args:
        step: the last step that stays.
        saved: what trajectory.json says of each checkpoint that stays.
        interval: of checkpoints whose number of steps is not known beforehand.
        frozen: what trajectory.json says of the parameters that were stored once; moved: those that have moved.
        taken_before: how many steps the optimizer had taken with each parameter before the first one.
        unaccounted: how many of these no recording in the folder has, -1 where their number is not known.
        resumed: the steps after which the recording went on; skipped: steps left out so far; strange: what was done to
            gradients that no factor follows.
    """

    step: int = 0
    saved: Sequence[dict[str, Any]] = ()
    interval: int = 1
    frozen: dict[str, Any] | None = None
    moved: Sequence[str] = ()
    taken_before: dict[str, int] = field(default_factory=dict)
    unaccounted: int = 0
    resumed: Sequence[int] = ()
    skipped: int = 0
    strange: Sequence[str] = ()
    gradient_scale: float = 1.0


class Recording:
    """The state of one `record()` block; `step` counts the rounds of steps of all optimizers so far."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        folder: RecordingFolder,
        schedule: CheckpointSchedule,
        options: RecordOptions,
    ):
        self.model, self.optimizers, self.folder, self.schedule = model, optimizers, folder, schedule
        self.options = options
        self._main = current().main  # of several ranks the first writes
        self._begun, self._saved, self._log = Begun(), dict[int, dict[str, Any]](), StepLog(None)
        self.observer, self._layouts = StepObserver(model, optimizers), 0
        self._drawn_before: Tensor | None = None  # how often each example was drawn before a resume
        self._model_state()  # refuses now what could not be saved
        self.frozen = FrozenPart(model, self.observer.names)

    @property
    def step(self) -> int:
        """Steps so far, those before a resume among them."""
        return self._log.step

    @property
    def begun_at(self) -> int:
        """The step after which the recording went on; 0 for a new one."""
        return self._begun.step

    @property
    def _scale(self) -> float:
        """What gradients are multiples of the mean loss's, on average over the steps."""
        return self._begun.gradient_scale if self.options.gradient_scale is None else self.options.gradient_scale

    def scale_gradients(self, scale: float, steps: int) -> None:
        """Note what the gradients of the last `steps` steps are multiples of, those before a resume not among them."""
        before = self._begun.step
        mean = (self._begun.gradient_scale * before + scale * steps) / (before + steps)
        self.options = replace(self.options, gradient_scale=mean)

    def __str__(self) -> str:
        """How many checkpoints there will be, and how large they are."""
        count, each, once = self.expected()
        stored_once = f", and {bytes_in_words(once)} of frozen parameters once" if once else ""
        return f"{count} checkpoint{'s' * (count != 1)} of {bytes_in_words(each)} each{stored_once}"

    def begin(self, begun: Begun) -> None:
        """Go on from what was recorded before, nothing for a new recording; called once the folder is claimed."""
        self._begun, self.schedule.interval = begun, begun.interval
        self._saved = {entry["step"]: entry for entry in begun.saved}
        if self._main and begun.saved and self.options.sampler is not None:
            last = self.folder.path / begun.saved[-1]["file"]
            self._drawn_before = read_counts(last, begun.saved[-1]["sha256"], self.options.dataset_size)
        self._log = StepLog(self.folder.path / STEPS if self._main else None, begun.step)
        observer = self.observer
        observer.moved = {place for place, name in enumerate(observer.names) if name in begun.moved}
        observer.skipped = begun.skipped
        observer.watch.strange |= set(begun.strange)
        if begun.frozen is not None:
            self.frozen.entry = begun.frozen
            self.frozen.keep(self._still_frozen(begun.frozen))
        elif self.frozen.names:
            tensors = self._stored({f"{MODEL}{name}": self._model_state()[name] for name in sorted(self.frozen.names)})
            self.frozen.entry = {"file": FROZEN, "names": sorted(self.frozen.names)}
            if self._main:
                self.frozen.entry |= write_tensors(self.folder.path / FROZEN, tensors)
        if self._main and self.options.example_weights is not None:
            write_tensors(self.folder.path / EXAMPLE_WEIGHTS, {"weights": self.options.example_weights})
        self._describe(UNFINISHED)

    def _still_frozen(self, entry: dict[str, Any]) -> set[str]:
        """The parameters that were stored once and are so still."""
        unchanged: list[str] = []
        now = self._stored({name: self._model_state()[name] for name in entry["names"]})
        if self._main:
            stored = read_tensors(self.folder.path / entry["file"], entry["sha256"], TrajectoryError)
            unchanged = [name for name, value in now.items() if torch.equal(stored[f"{MODEL}{name}"], value.cpu())]
        return set(current().same(unchanged))

    def _model_state(self) -> dict[str, Tensor]:
        state = state_of(self.model)
        unknown = [name for name, value in state.items() if not isinstance(value, Tensor) or value.is_complex()]
        if unknown:
            raise TrajectoryError(
                f"the model's state {unknown[0]!r} is no tensor of real numbers, so it cannot be saved as safetensors."
            )
        return state

    def before_step(self, number: int) -> None:
        """One of the optimizers is about to step; a step hook."""
        self._end(self.observer.before_step(number))

    def after_step(self, number: int) -> None:
        """One of the optimizers has stepped; a step hook."""
        self._end(self.observer.after_step(number))

    def _end(self, ended: Round | None) -> None:
        """Log a round as one step, and save a checkpoint where one is due."""
        if ended is None:
            return
        if self._layouts != self.observer.layouts:
            self._layouts = self.observer.layouts
            self._log.follow(self.observer.names, self.observer.groups())
        self._log.append(ended)
        if self.schedule.due(self.step):
            self._save()
        for step in self.schedule.surplus(self._saved):
            self._drop(step)

    def _second_moments(self) -> dict[str, Tensor]:
        """v_hat of every parameter that has taken a step."""
        moments = {}
        for place, name in enumerate(self.observer.names):
            optimizer, options = self.observer.holder(place)
            parameter = self.observer.watch.parameters[place]
            if parameter in optimizer.state:
                moment = second_moment(optimizer_name(optimizer), optimizer.state[parameter], options)
                if moment is not None:
                    moments[name] = moment
        return moments

    def _stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as they are written: whole, and in the precision asked for."""
        dtype = self.options.dtype
        complete = {name: whole(tensor) for name, tensor in tensors.items()}  # sharded ones, on every rank
        if dtype is None:
            return complete
        return {
            name: _converted(tensor, _precision(name, dtype)) if tensor.is_floating_point() else tensor
            for name, tensor in complete.items()
        }

    def expected(self) -> tuple[int, int, int]:
        """How many checkpoints there will be, the bytes of each, and the bytes of what is stored once."""
        state, once = self._model_state(), self.frozen.names
        each = sum(self._bytes(f"{MODEL}{name}", value) for name, value in state.items() if name not in once)
        for place, name in enumerate(self.observer.names):
            if optimizer_name(self.observer.holder(place)[0]) in SECOND_MOMENTS and name not in once:
                each += self._bytes(f"{SECOND_MOMENT}{name}", self.observer.watch.parameters[place])
        return self.schedule.expected, each, sum(self._bytes(f"{MODEL}{name}", state[name]) for name in once)

    def _bytes(self, name: str, tensor: Tensor) -> int:
        dtype = self.options.dtype
        itemsize = tensor.element_size()
        if dtype is not None and tensor.is_floating_point():
            itemsize = _precision(name, dtype).itemsize
        return tensor.numel() * itemsize

    def _save(self) -> None:
        """Save a checkpoint, and then what is known of the trajectory, so that a run that is killed can be read."""
        self._log.flush()
        self.frozen.forget_moved(self._moved())
        state = self._model_state()
        tensors = {f"{MODEL}{name}": value for name, value in state.items() if name not in self.frozen.names}
        tensors |= {f"{SECOND_MOMENT}{name}": value for name, value in self._second_moments().items()}
        complete = self._stored(tensors)
        if self.options.sampler is not None:
            complete[COUNTS] = self._counts(self.options.sampler)
        entry: dict[str, Any] = {"file": checkpoint_file(self.step), "step": self.step}
        self._saved[self.step] = entry
        if self._main:
            entry |= write_tensors(self.folder.path / entry["file"], complete)
        self._describe(UNFINISHED)

    def _counts(self, sampler: CountedSampler) -> Tensor:
        """How often each example was handed out so far, on all ranks."""
        counts = sampler.counts(self.options.dataset_size)
        drawn = torch.stack([torch.tensor(of_rank) for of_rank in current().gather(counts.tolist())]).sum(0)
        return drawn if self._drawn_before is None else drawn + self._drawn_before

    def _drop(self, step: int) -> None:
        file = self.folder.path / self._saved.pop(step)["file"]
        if self._main:
            file.unlink()

    def finish(self) -> None:
        """Save the last step and write trajectory.json, which makes the recording whole."""
        self._end(self.observer.rest())
        if self.step == 0:
            raise TrajectoryError("record(): the optimizer took no step inside the block, so there is no trajectory.")
        if self.step not in self._saved:
            self._save()
        for step in self.schedule.surplus_at_end(self._saved, self.step):
            self._drop(step)
        self._log.close()
        self._describe(FINISHED)
        for warning in self._warnings():
            warnings.warn(f"record(): {warning}.", stacklevel=4)

    def _warnings(self) -> list[str]:
        found = [f"gradients were {what}, which scores do not follow" for what in sorted(self.observer.watch.strange)]
        if unmet := self.schedule.unmet(self.step):
            checkpoints = f"the recording has checkpoints at {sorted(self._saved)}"
            found.append(f"training ended at step {self.step}, {unmet}; {checkpoints}")
        return found

    def stop(self) -> None:
        """Put on disk what is known of a run that ends in an error."""
        self._log.close()

    def _describe(self, file: str) -> None:
        """Write what is known of the trajectory: FINISHED as a whole, UNFINISHED so far."""
        content = self.description()
        if self._main:
            if file == FINISHED:
                content["log"]["sha256"] = file_digest(self.folder.path / STEPS, TrajectoryError)
            write_json(self.folder.path / file, content)
            if file == FINISHED:
                (self.folder.path / UNFINISHED).unlink()

    def description(self) -> dict[str, Any]:
        """What trajectory.json says so far."""
        begun = asdict(self._begun)
        return {
            "format": FORMAT,
            "stage": "train" if self.folder.stage is None else self.folder.stage,
            "dataset_size": self.options.dataset_size,
            "batch_size": self.options.batch_size,
            "optimizers": [optimizer_name(one) for one in self.optimizers for _ in one.param_groups],
            "constants": [
                constants(group, optimizer_name(one) in KNOWN) for one in self.optimizers for group in one.param_groups
            ],
            "moved": sorted(self._moved()),
            "unmoved": self._reasons(),
            "checkpoints": [self._saved[step] for step in sorted(self._saved)],
            "frozen": self.frozen.entry,
            "interval": self.schedule.interval,
            "sampling": self._sampling(),
            "skipped": self.observer.skipped,
            "strange": sorted(self.observer.watch.strange),
            "log": {"steps": self.step, "sha256": None},
            **{key: begun[key] for key in ("taken_before", "unaccounted", "resumed")},
            **({} if self.options.gradient_scale is None and self._scale == 1 else {"gradient_scale": self._scale}),
        }

    def _reasons(self) -> dict[str, str]:
        """Why each parameter that did not move is not attributed."""
        moved, held, changed = self._moved(), set(self.observer.names), self.frozen.changed
        reasons = {}
        for name in named_parameters(self.model, remove_duplicate=False):
            if name not in moved:
                reasons[name] = "no step moved it" if name in held else "no recorded optimizer holds it"
                if name not in held and name in changed:
                    reasons[name] += ", and it changed during training"
        return reasons

    def _moved(self) -> set[str]:
        return {self.observer.names[place] for place in self.observer.moved}

    def _sampling(self) -> str:
        if self.options.sampler is not None:
            return "counted"
        return "uniform, as is assumed" if self.options.example_weights is None else "example weights"


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another precision, unless finite numbers would overflow there."""
    converted = tensor.to(dtype)
    overflows = dtype == torch.float16 and bool((converted.isinf() & tensor.isfinite()).any())
    return tensor if overflows else converted


def _precision(name: str, dtype: torch.dtype) -> torch.dtype:
    """The precision of a stored tensor: half precision has no room for second moments, which are tiny."""
    return torch.float32 if dtype == torch.float16 and name.startswith(SECOND_MOMENT) else dtype
