"""How a batch becomes a model's outputs: which of its entries the model is given, and what of its answer is read.

A batch is (inputs, targets), where inputs are a tensor or a mapping, or it is a mapping with any keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..arguments import names, shown
from ..errors import TaskError

LABELS = ("labels", "label", "targets")  # keys of targets, the first that is there; no model is given them
LOGITS = ("logits", "prediction_logits")  # entries of models' outputs
Keys = str | Sequence[str] | None


class Parameters(NamedTuple):
    """What a model's forward takes by name: all names, those without a default, and whether it takes any others."""

    named: tuple[str, ...]
    needed: tuple[str, ...]
    any: bool


def as_keys(name: str, given: Keys) -> str | tuple[str, ...] | None:
    """Keys of a batch, checked."""
    return given if given is None or isinstance(given, str) else names(name, given, TaskError)


def as_key(name: str, given: object) -> str | None:
    """One key of a batch, checked."""
    if given is not None and not isinstance(given, str):
        raise TaskError(f"{name}={shown(given)}: expected a key of the batch, as text.")
    return given


def entry(batch: Any, key: str, option: str) -> Any:
    """What a mapping batch (or the mapping of a pair) holds under a key; TaskError where it does not."""
    mapping = mapping_in(batch)
    if mapping is None or key not in mapping:
        held = "is no mapping" if mapping is None else f"has no {key!r}, only {shown(sorted(mapping, key=str))}"
        raise TaskError(f"the batch {held}. Give its key in the task: {option}=.")
    return mapping[key]


def mapping_in(batch: Any) -> Mapping[Any, Any] | None:
    """The batch, if it is a mapping, or its inputs if they are one; None where neither is."""
    inputs = batch if isinstance(batch, Mapping) else _pair(batch)[0]
    return inputs if isinstance(inputs, Mapping) else None


def targets_of(batch: Any, key: str | None) -> Any:
    """The targets of a batch: of a pair the second part, of a mapping what stands under `key`.

    key: None for the first of LABELS that is there. Raises TaskError where there are none.
    """
    found = targets_if_any(batch, key)
    if found is None:
        raise TaskError(
            f"the batch has none of {list(LABELS)}, only {shown(sorted(batch, key=str))}. Give the key of its targets "
            "in the task: targets=."
        )
    return found


def targets_if_any(batch: Any, key: str | None) -> Any:
    """As `targets_of`, but None for a mapping in which none of LABELS is."""
    if not isinstance(batch, Mapping):
        return _pair(batch)[1]
    if key is not None:
        return entry(batch, key, "targets")
    return next((batch[name] for name in LABELS if batch.get(name) is not None), None)


def outputs_of(model: nn.Module, batch: Any, inputs: Keys = None, apart: Collection[str | None] = ()) -> Any:
    """What the model makes of a batch.

    inputs: the key of what is the model's one argument; several keys of what it is given by these names; None gives it
    `batch["inputs"]` where its forward has no argument of that name, and otherwise all entries that its forward takes,
    without labels and those in `apart`.
    """
    mapping = mapping_in(batch)
    if mapping is None:
        return run(model, batch if isinstance(batch, Mapping) else _pair(batch)[0])
    if isinstance(inputs, str):
        return run(model, entry(mapping, inputs, "inputs"), apart)
    if inputs is not None:
        return model(**{name: entry(mapping, name, "inputs") for name in inputs})
    if "inputs" in mapping and "inputs" not in parameters_of(model).named:
        return run(model, mapping["inputs"], apart)
    return run(model, mapping, apart)


def run(model: nn.Module, inputs: Any, apart: Collection[str | None] = ()) -> Any:
    """What the model makes of inputs: of a mapping, those entries that it takes by name; anything else as it is."""
    if isinstance(inputs, Mapping):
        return model(**taken(model, inputs, apart))
    try:
        return model(inputs)
    except TypeError as problem:
        if not isinstance(inputs, list):
            raise
        raise TaskError(
            f"the batch's inputs are a list of {len(inputs)} tensors, which the model does not take ({problem}). Give "
            'examples of tensors, as dataset.with_format("torch") has them, or a collate_fn that stacks them.'
        ) from problem


def taken(model: nn.Module, mapping: Mapping[Any, Any], apart: Collection[str | None] = ()) -> dict[str, Any]:
    """The entries that the model's forward takes by name; where it takes any names, all that are tensors.

    Labels are not among them, and neither is what `apart` names.
    """
    takes = parameters_of(model)
    free = {key: value for key, value in mapping.items() if key not in LABELS and key not in apart}
    chosen = {k: v for k, v in free.items() if k in takes.named or (takes.any and isinstance(v, Tensor))}
    if not chosen or not set(takes.needed) <= set(chosen):
        raise TaskError(
            f"the model's forward takes {shown(list(takes.named))}, and the batch has "
            f"{shown(sorted(mapping, key=str))}. Say what it is given: inputs= takes the key of its one argument, or "
            "the keys of several that it takes by these names."
        )
    return chosen


def parameters_of(model: nn.Module) -> Parameters:
    """What the forward of a model takes, inside of wrappers that hand on all that they are given."""
    try:
        parameters = inspect.signature(unwrapped(model).forward).parameters.values()
    except (TypeError, ValueError):
        return Parameters((), (), True)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = tuple(p.name for p in named if p.default is p.empty)
    return Parameters(tuple(p.name for p in named), needed, any(p.kind == p.VAR_KEYWORD for p in parameters))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile, DistributedDataParallel, peft and the like."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    if callable(of_peft := getattr(model, "get_base_model", None)) and (base := of_peft()) is not model:
        return base
    if (compiled := model._modules.get("_orig_mod")) is not None:
        return compiled
    children = list(model.children())
    kinds = {p.kind for p in inspect.signature(type(model).forward).parameters.values() if p.name != "self"}
    hands_on = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return children[0] if hands_on and len(children) == 1 else None


def logits_in(output: Any, name: str, advice: str = "Derive a Task of your own for it.") -> Tensor:
    """The logits in what a model returned, in single precision or wider; TaskError where there are none.

    They are a tensor, what an output or a mapping has under one of LOGITS, or what a tuple begins with.
    name: who expects them, in errors.
    """
    found = tensor_in(output, LOGITS)
    if found is None:
        raise TaskError(
            f"{name}: expected the model to return logits (a tensor, an output or a mapping with 'logits', or a tuple "
            f"that begins with them), found {described(output)}. {advice}"
        )
    return found.float() if found.is_floating_point() and found.dtype.itemsize < 4 else found


def tensor_in(output: Any, entries: Sequence[str]) -> Tensor | None:
    """A model's output itself, its first entry of one of these names, or the first part of a tuple."""
    found = output
    if isinstance(output, Mapping):
        found = next((output[name] for name in entries if output.get(name) is not None), None)
    elif isinstance(output, tuple) and not hasattr(output, "_fields"):
        found = output[0] if output else None
    elif not isinstance(output, Tensor):
        found = next((value for name in entries if (value := getattr(output, name, None)) is not None), None)
    return found if isinstance(found, Tensor) else None


def described(output: Any) -> str:
    """What a model returned, in words."""
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {shown(list(output))}"
    if isinstance(output, list | tuple):
        return f"{type(output).__name__} of {[type(part).__name__ for part in output][:6]}"
    return type(output).__name__


def attention_mask_of(batch: Any) -> Tensor | None:
    """The `attention_mask` [B, S] that a batch holds, of those that tell padding; None where it holds none."""
    readable = isinstance(batch, Mapping) or (isinstance(batch, list | tuple) and len(batch) == 2)
    mapping = mapping_in(batch) if readable else None  # what is not readable is named by the loss
    if mapping is not None and isinstance(inner := mapping.get("inputs"), Mapping):
        mapping = inner
    mask = None if mapping is None else mapping.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise TaskError(
            f"expected a batch (inputs, targets) or a mapping, found {type(batch).__name__}. Derive a Task of your own."
        )
    return batch[0], batch[1]
