"""What a task is, the loss that trained the model and the measurement to explain, and the class that one derives from.

Tasks to use as they are stand beside it, a file for each family. The method names are Kronfluence's, so that its tasks
run here unchanged. Axes: B examples of a batch, S positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TaskError


class FaultyRowError(TaskError):
    """An example that a task cannot take; row: its place in the batch."""

    def __init__(self, row: int, text: str):
        super().__init__(text)
        self.row = row


class Task(ABC):
    """The training loss and the measurement of one problem, each **summed** over the batch.

    They are called with batches of any size, also of one example. So a task names the dimension that it squeezes away:
    `.squeeze(-1)` makes predictions [B, 1] to [B], where `.squeeze()` would make those of one example a scalar.

    Example:
        >>> class Ridge(Task):
        ...     def compute_train_loss(self, batch, model, sample=False):
        ...         x, y = batch
        ...         prediction = model(x)
        ...         if sample:  # noise of variance 1/2: the squared error's curvature, see below
        ...             y = prediction.detach() + 0.5**0.5 * torch.randn_like(prediction)
        ...         return (prediction - y).square().sum()
        ...
        ...     def compute_measurement(self, batch, model):
        ...         return self.compute_train_loss(batch, model)
    """

    measurement_options: tuple[str, ...] = ()  # attributes that only compute_measurement reads: factors outlive them
    draws_labels: bool = True  # False: sample=True draws nothing, on purpose, as for an empirical Fisher

    @abstractmethod
    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """The training loss summed over the batch's examples, without weight decay; shape [].

        With `sample=True`, a loss whose per-example gradients have the curvature as their second moment: labels
        drawn from the model's own output distribution. For a negative log-likelihood with weight w (w = 1/T for
        the mean over T tokens) that is sqrt(w) * NLL of the drawn labels; for a squared error w * (y - f)^2 it is
        sqrt(w) * (f + noise - f)^2 with noise of variance 1/2. SOURCE puts the curvature in an exponential, so a
        wrong constant there is a wrong score; `Analyzer.check` measures it. `Analyzer.fit` refuses a loss in which
        `sample` changes nothing from draw to draw, unless the task says `draws_labels = False`: an empirical Fisher, of
        the real labels, or a loss whose gradients are a root of the curvature without any drawing.
        """

    @abstractmethod
    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """What the scores explain (a loss, a margin, ...), summed over the batch's examples; shape []."""

    def compute_output(self, batch: Any, model: nn.Module) -> Tensor:
        """TRAK's model output function summed over the batch's examples, shape []: a margin, a prediction.

        The training loss should depend on the model through it: its gradient is then this one times a slope. Nothing
        but TRAK calls it, and TRAK refuses one inherited from a task whose losses are both replaced.
        """
        raise TaskError(
            f"{type(self).__name__} has no compute_output(), which TRAK needs: the model's output (a margin, a "
            "prediction), summed over the batch. Define it, or use ProjectedFisher, which takes the training loss."
        )

    def get_influence_tracked_modules(self) -> list[str] | None:
        """Names of the modules to attribute; None takes every supported one."""
        return None

    def get_attention_mask(self, batch: Any) -> Tensor | Mapping[str, Tensor] | None:
        """[B, S], 0 where a position is padding (or such a mask for each module name); None: no padding."""
        return None


def check_task(task: Any) -> None:
    """Raise TaskError unless `task` has what the engine calls; Kronfluence's tasks pass."""
    if isinstance(task, type):
        raise TaskError(f"the task is the class {task.__name__}: expected an object, {task.__name__}(...).")
    needed = ("compute_train_loss", "compute_measurement")
    missing = [name for name in needed if not callable(getattr(task, name, None))]
    if missing:
        raise TaskError(f"{type(task).__name__} has no method {' and no '.join(missing)}. Derive it from segflow.Task.")
    if getattr(task, "enable_post_process_per_sample_gradient", False):
        raise TaskError(
            f"{type(task).__name__} post-processes per-example gradients, which segflow never forms. "
            "Express the change in compute_train_loss, or set enable_post_process_per_sample_gradient to False."
        )


def _require_own_output(task: Any) -> None:
    """Raise TaskError where the output function is inherited from a task whose two losses the class has replaced."""
    losses = [_defining_class(task, name) for name in ("compute_train_loss", "compute_measurement")]
    of_output, classes = _defining_class(task, "compute_output"), type(task).__mro__
    if of_output in (None, Task) or None in losses or any(_is_ready_made(of_loss) for of_loss in losses):
        return
    if all(classes.index(of_loss) < classes.index(of_output) for of_loss in losses):
        raise TaskError(
            f"{type(task).__name__} inherits compute_output() from {of_output.__name__}, but has a training loss and a "
            "measurement of its own, so the output that TRAK takes may be another loss's. Define compute_output() for "
            f"these; where it is the same, say so in the class: compute_output = {of_output.__name__}.compute_output."
        )


def _is_ready_made(kind: Any) -> bool:
    """Whether a class is among segflow's own tasks, whose methods belong together."""
    return str(kind.__module__).startswith(f"{__package__}.")


def _defining_class(task: Any, method: str) -> Any:
    """The class in which a task's method stands; None where it is none of its classes'."""
    return next((kind for kind in type(task).__mro__ if method in vars(kind)), None)


def task_name(task: Any) -> str:
    """What a task is called in errors: its class, unless it says `shown_as`."""
    return str(getattr(task, "shown_as", type(task).__name__))


def tracked_module_names(task: Any) -> list[str] | None:
    """The task's own choice of modules, or None."""
    chosen = getattr(task, "get_influence_tracked_modules", None)
    return None if chosen is None else chosen()


def attention_mask(task: Any, batch: Any) -> Tensor | Mapping[str, Tensor] | None:
    """The task's padding mask for this batch, or None."""
    mask = getattr(task, "get_attention_mask", None)
    return None if mask is None else mask(batch)


def summed_loss(task: Any, batch: Any, model: nn.Module, *, kind: str) -> Tensor:
    """The task's "train", "sample", "measurement" or "output" loss of a batch, checked to be one real number."""
    name = {"measurement": "compute_measurement", "output": "compute_output"}.get(kind, "compute_train_loss")
    if name == "compute_train_loss":
        loss = task.compute_train_loss(batch, model, sample=kind == "sample")
    else:
        if kind == "output":
            _require_own_output(task)
        loss = getattr(task, name, partial(Task.compute_output, task))(batch, model)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not torch.is_floating_point(loss):
        returned = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TaskError(
            f"{task_name(task)}.{name}: expected one number, the sum over the batch, found {returned}. Return a "
            "floating-point tensor of shape []."
        )
    return loss.reshape(())
