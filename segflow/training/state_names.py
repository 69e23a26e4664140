"""A state as files name it, brought into a model: through wrappers, tied tensors, and peft's adapters.

Files name tensors as the model in them was wrapped. One of two tied names may be missing, as transformers leaves it
out. An adapter's file, as peft writes it, holds what was trained, without the adapter's name; the rest of the model
stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import TrajectoryError
from ..runtime.sharding import laid_out, local, named_parameters, parallel_prefix, plain_name, state_of
from .adapters import active_adapter, adapter_names, of_embeddings
from .checkpoints import numbers_of

Value = TypeVar("Value")


@dataclass(frozen=True)
class Filled:
    """What of a model a file fills: by name in the model, the name in the file; left: what stays as it is."""

    source: Mapping[str, str]
    left: frozenset[str]


def filled(names: Collection[str], model: nn.Module, where: str) -> Filled:
    """What a file of a state fills of a model; TrajectoryError where an adapter's file is not the model's adapter's.

    Names that the model does not have, and missing ones, are left to who loads the state. where: names the file.
    """
    present = state_of(model)
    source = {own: name for name, own in own_names(names, present, model, where).items()}
    source |= _tied(present, source)
    if present.keys() <= source.keys() or not (adapter := adapter_names(model)):
        return Filled(source, frozenset())
    base = source.keys() - adapter.values()
    absent, foreign = sorted(set(adapter.values()) - source.keys()), sorted(base - of_embeddings(model, present))
    if absent or foreign:
        odd = [f"lacks {absent[:4]}"] * bool(absent) + [f"holds {foreign[:4]} besides the adapter"] * bool(foreign)
        raise TrajectoryError(
            f"{where} {' and '.join(odd)}, so it is neither the whole state of the model nor that of its adapter "
            f"{active_adapter(model)!r}. Give what peft_model.save_pretrained(folder) writes, or the whole state_dict."
        )
    return Filled(source, frozenset(present.keys() - source.keys()))


def own_names(names: Collection[str], known: Collection[str], model: nn.Module, where: str) -> dict[str, str]:
    """{name in a file: the model's name of the same tensor}; a name without one stays as it is.

    known: the model's names. TrajectoryError where two names are of one tensor.
    """
    prefix = parallel_prefix(names, known)
    own = {name: name.removeprefix(prefix) for name in names}
    if not set(own.values()) <= set(known):
        adapter = adapter_names(model)
        own = {name: adapter.get(plain, plain) for name, plain in own.items()}
    if len(set(own.values())) < len(own):
        twice = sorted(name for name, of_model in own.items() if list(own.values()).count(of_model) > 1)
        raise TrajectoryError(f"{where} holds one tensor under the names {twice[:2]}. Save each once.")
    return own


def check_trained(match: Filled, trained: Collection[str], where: str) -> None:
    """Raise TrajectoryError where a file leaves a parameter as it is that was trained."""
    if lost := sorted(match.left & set(trained)):
        raise TrajectoryError(
            f"{where} holds the adapter only, without {lost[:4]}, which training changed (they are in a parameter "
            "group, or require gradients), so that their values are lost. Save the whole state_dict; or freeze them "
            "and leave them out of parameter_groups if they were not trained."
        )


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: str, trained: Collection[str]) -> None:
    """Copy a state into a model; TrajectoryError, beginning with `where`, says what does not fit.

    trained: the parameters that must not stay as they are.
    """
    match, present = filled(state, model, where), state_of(model)
    check_trained(match, trained, where)
    values = {own: state[name] for own, name in match.source.items()}
    for name, tensor in values.items():
        if isinstance(like := present.get(name), Tensor) and numbers_of(tensor) != numbers_of(like):
            raise TrajectoryError(
                f"{where} holds {name!r} as {tensor.dtype}, the model as {like.dtype}. Restore the file, or "
                "give the model that was trained."
            )
    _check_tied(present, values, where)
    wrapped = {plain_name(name): name for name in model.state_dict()}
    placed = {wrapped.get(name, name): tensor for name, tensor in laid_out(values, model).items()}
    try:
        model.load_state_dict(placed, strict=not match.left)
    except RuntimeError as problem:
        raise TrajectoryError(f"{where} is of another model: {problem}. Give the one that was trained.") from problem


def under_own_names(by_name: Mapping[str, Value], model: nn.Module | None, where: str) -> dict[str, Value]:
    """What a file says of parameters, under the model's names of them; where: names the file. Without a model as is."""
    if model is None:
        return dict(by_name)
    own = own_names(by_name, named_parameters(model, remove_duplicate=False), model, where)
    return {own[name]: value for name, value in by_name.items()}


def with_tied(by_name: Mapping[str, Value], model: nn.Module | None) -> dict[str, Value]:
    """What is known of parameters, also under the other names of tensors that are tied in the model."""
    tied = {} if model is None else _tied(named_parameters(model, remove_duplicate=False), by_name)
    return {**by_name, **tied}


def _tied(present: Mapping[str, Any], given: Mapping[str, Value]) -> dict[str, Value]:
    """For names that are not given, what is given for another name of the same tensor."""
    first: dict[Hashable, Value] = {}
    for name, value in given.items():
        first.setdefault(_memory(present.get(name)), value)
    memories = {name: _memory(tensor) for name, tensor in present.items() if name not in given}
    return {name: first[memory] for name, memory in memories.items() if memory is not None and memory in first}


def _memory(tensor: Any) -> Hashable:
    """What is equal for tensors that are one in memory; None for what is not told."""
    part: Any = local(tensor) if isinstance(tensor, Tensor) else None
    if part is None or part.numel() == 0 or part.device.type == "meta":
        return None
    return part.device, part.data_ptr(), part.shape, part.stride(), part.dtype


def _check_tied(present: Mapping[str, Any], values: Mapping[str, Tensor], where: str) -> None:
    """Raise TrajectoryError where a file has two values for what is one tensor in the model."""
    first: dict[Hashable, str] = {}
    for name, tensor in values.items():
        memory = _memory(present.get(name))
        other = first.setdefault(memory, name)
        if memory is not None and values[other] is not tensor and not _same(values[other], tensor):
            raise TrajectoryError(
                f"{where} has different values for {other!r} and {name!r}, which are one tensor in the model. Give a "
                "model in which they are not tied."
            )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())
