"""Gradient accumulation in a transformers Trainer's folder: what a step's gradient is a multiple of.

The Trainer divides the loss of each accumulated batch by their number, but leaves that to losses that are given
`num_items_in_batch`: those of models whose forward takes **kwargs, where the batches have "labels". Not all of these
divide by it (BERT's classifier and Llama's do not), so that they train with the sum of the batches' gradients. All this
is as transformers 5.24 has it; a Trainer with a loss of its own does otherwise, which its folder does not tell.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..runtime.sharding import unwrap

_TOKENS = ("ForCausalLM", "ForMaskedLM", "ForTokenClassification")  # losses that divide by the count of items
_CLASSES = ("ForSequenceClassification", "ForImageClassification", "ForVideoClassification", "ForAudioClassification")
_OWN_MEANS = {"CrossEntropyLoss", "BCEWithLogitsLoss", "MSELoss"}


def added_up(model: nn.Module, arguments: Mapping[str, Any]) -> bool | None:
    """Whether a Trainer's gradients are the sum over accumulated batches, and not their mean; None: it cannot be told.

    arguments: of the Trainer.
    """
    if int(arguments.get("gradient_accumulation_steps") or 1) == 1 or arguments.get("label_smoothing_factor"):
        return False
    inner: Any = unwrap(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # peft's
    forward = inspect.unwrap(type(inner).forward)
    parameters = inspect.signature(forward).parameters
    takes = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if not getattr(inner, "accepts_loss_kwargs", takes) or "labels" not in parameters:
        return False
    divides = _divides_by_items(inner, forward)
    return None if divides is None else not divides


def _divides_by_items(model: Any, forward: Any) -> bool | None:
    """Whether a model's loss divides by `num_items_in_batch`; None where its code does not tell."""
    code = getattr(forward, "__code__", None)
    if code is None or "num_items_in_batch" in (*code.co_names, *code.co_varnames):
        return None
    if "loss_function" not in code.co_names:
        return False if _OWN_MEANS & set(code.co_names) else None
    if not _hands_on_options(forward):
        return False
    kind = getattr(model, "loss_type", None)
    if kind in _CLASSES:
        config = getattr(model, "config", None)
        single = getattr(config, "problem_type", None) in (None, "single_label_classification")
        return (single and getattr(config, "num_labels", 2) > 1) or (None if single else False)
    return True if kind is None or kind in _TOKENS else None


def _hands_on_options(forward: Any) -> bool:
    """Whether a forward gives its loss function the **kwargs that it was called with."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError, TypeError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    of_loss = [call for call in calls if getattr(call.func, "attr", None) == "loss_function"]
    return any(keyword.arg is None for call in of_loss for keyword in call.keywords)


def batches_of_a_step(batches: int, accumulated: int, steps: int) -> float:
    """How many batches each of the first `steps` steps has on average, of which an epoch's last may have fewer.

    batches: of an epoch.

    Example:
        >>> batches_of_a_step(10, 5, 20), batches_of_a_step(7, 4, 2), batches_of_a_step(7, 4, 1)
        (5.0, 3.5, 4.0)
    """
    of_epoch = math.ceil(batches / accumulated)
    epochs, rest = divmod(steps, of_epoch)
    return (epochs * batches + rest * accumulated) / steps
