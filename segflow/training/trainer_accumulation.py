"""Gradient accumulation in transformers' Trainer: what a step's gradient is a multiple of.

The Trainer leaves averaging over accumulated batches to models whose forward takes `num_items_in_batch`, and takes
every forward with **kwargs for one that does. Models that average their loss by themselves all the same (BERT's
classifier and its like) then train with the sum of the batches' gradients (seen in transformers 5.24).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..runtime.sharding import unwrap


def added_up(model: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether a Trainer's gradients are the sum over accumulated batches, and not their mean.

    arguments: of the Trainer, among them gradient_accumulation_steps.
    """
    if int(arguments.get("gradient_accumulation_steps") or 1) == 1 or arguments.get("label_smoothing_factor"):
        return False
    inner: Any = unwrap(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # peft's
    forward = inspect.unwrap(type(inner).forward)
    takes = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
    if not getattr(inner, "accepts_loss_kwargs", takes):
        return False
    code = getattr(forward, "__code__", None)
    names = () if code is None else (*code.co_names, *code.co_varnames)
    return not {"loss_function", "num_items_in_batch"} & set(names)


def batches_of_a_step(dataset_size: int, batch_size: int, accumulated: int, drop_last: bool = False) -> float:
    """How many batches a step adds up, on average over an epoch, whose last step may have fewer.

    batch_size: examples of one batch on all processes.

    Example:
        >>> batches_of_a_step(100, 10, 5), batches_of_a_step(70, 10, 4)
        (5.0, 3.5)
    """
    batches = max(1, dataset_size // batch_size if drop_last else math.ceil(dataset_size / batch_size))
    return batches / math.ceil(batches / accumulated)
