"""What a transformers Trainer's gradients are multiples of, seen in its first step and counted as it goes.

A Trainer divides the loss of each of a step's batches by their number, or leaves that to the loss, which is then to
divide by `num_items_in_batch`. Whether a loss does so is seen by handing it a number that tells of its use.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_PASSED_ON = {"to", "float", "double", "long", "int", "clone", "detach", "expand", "unsqueeze", "view", "reshape"}
_LOOKED_AT = {"__get__", "dim", "size", "numel", "is_floating_point", "__repr__", "__format__", "data_ptr"}


class _Seen(Tensor):
    """A number that notes when something is computed with it; results are plain, and the same to the bit."""

    used: list[bool]

    @classmethod
    def of(cls, number: Tensor, used: list[bool]) -> _Seen:
        """The number, noting its use in `used`."""
        seen = number.as_subclass(cls)
        seen.used = used
        return seen

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_map(lambda one: one.as_subclass(Tensor) if isinstance(one, cls) else one, (args, kwargs or {}))
        result, name = func(*given[0], **given[1]), func.__name__
        seen = next((one for one in args if isinstance(one, cls)), None)
        if seen is None or name in _LOOKED_AT:
            return result
        if name in _PASSED_ON and isinstance(result, Tensor):
            return cls.of(result, seen.used)
        seen.used.append(True)
        return result


class AccumulatedBatches:
    """Watches a Trainer's batches: how many there are in its steps, and who divides by their number.

    batches: of the steps so far; divided: whether the Trainer divides, and used: whether the loss does, None as long as
    that is not seen.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.batches = trainer, 0
        self.divided: bool | None = None
        self.used: bool | None = None
        for name, watch in (("training_step", self._training_step), ("compute_loss", self._compute_loss)):
            setattr(
                trainer, name, functools.wraps(getattr(trainer, name))(functools.partial(watch, getattr(trainer, name)))
            )

    def begin(self) -> None:
        """Training begins."""
        self.batches, self.divided, self.used = 0, None, None

    def scale(self, steps: int) -> float | None:
        """What the gradients of so many steps were multiples of, on average; None if it is not known."""
        each = self.batches / max(1, steps)
        if self.used is None or self.divided is None:
            return None if each > 1 else 1.0
        return (1 / each if self.used else 1.0) if self.divided else (1.0 if self.used else each)

    def _training_step(self, step: Any, *arguments: Any, **options: Any) -> Any:
        self.batches += 1
        return step(*arguments, **options)

    def _compute_loss(self, compute: Any, *arguments: Any, **options: Any) -> Any:
        """The first training loss is given a count of items that tells of its use."""
        model = arguments[0] if arguments else options.get("model")
        count = options.get("num_items_in_batch")
        if self.used is not None or not getattr(model, "training", False) or self.batches == 0:
            return compute(*arguments, **options)
        self.divided = self._divides(count)
        if not isinstance(count, Tensor) or torch.compiler.is_compiling() or hasattr(model, "_orig_mod"):
            self.used = None if count is not None else False
            return compute(*arguments, **options)
        used: list[bool] = []
        found = compute(*arguments, **{**options, "num_items_in_batch": _Seen.of(count, used)})
        self.used = bool(used)
        return found

    def _divides(self, count: Any) -> bool:
        """Whether the Trainer divides the loss itself, by its own rule."""
        trainer = self.trainer
        if (said := getattr(trainer, "loss_is_scaled_for_ga", None)) is not None:
            return not said
        by_model = trainer.model_accepts_loss_kwargs and count is not None
        return not (by_model or trainer.compute_loss_func is not None)
