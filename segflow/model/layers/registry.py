"""The kinds of layers that are known, and which of them a module is."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ...data.as_written import hides_method
from ...errors import LayerError
from .tracked import TrackedLayer

Kind = TypeVar("Kind", bound=type[TrackedLayer])
_KINDS: list[type[TrackedLayer]] = []  # the latest first, so that a user's own kind comes before the built-in ones


def register(kind: Kind) -> Kind:
    """Make a kind of layer known, so that its modules are attributed: a decorator for subclasses of `TrackedLayer`.

    Where two kinds claim a module, the one registered last takes it. Raises LayerError unless it is a subclass of
    `TrackedLayer` that names a tuple of module types (or of their full names).
    """
    if not isinstance(kind, type) or not issubclass(kind, TrackedLayer):
        raise LayerError(f"{kind!r}: expected a subclass of segflow.model.layers.TrackedLayer.")
    types = kind.modules
    if not isinstance(types, tuple) or not types or not all(isinstance(one, type | str) for one in types):
        raise LayerError(f"{kind.__name__}: modules={types!r}, expected a tuple of module types, such as (MyLinear,).")
    if kind not in _KINDS:
        _KINDS.insert(0, kind)
    return kind


def kind_of(module: nn.Module) -> type[TrackedLayer] | None:
    """The kind of layer that a module is, that knows all of its parameters and runs it; None where there is none."""
    kind = next((kind for kind in _KINDS if kind.base_of(module)), None)
    if kind is None or _overridden(module, kind) or _computed(module) or not kind.knows(module):
        return None
    return kind


def why_never(module: nn.Module) -> str | None:
    """Why no gradient of the module's parameters belongs to an example, because of its options; None if it does."""
    kind = next((kind for kind in _KINDS if kind.base_of(module)), None)
    return None if kind is None else kind.why_not(module)


def _overridden(module: nn.Module, kind: type[TrackedLayer]) -> bool:
    """Whether the module has its own of the methods that the kind knows."""
    actual, base = type(module), kind.base_of(module)
    return any(hides_method(module, m) or getattr(actual, m, 0) is not getattr(base, m, 0) for m in kind.methods)


def _computed(module: nn.Module) -> bool:
    """Whether the module computes its weight or bias from other tensors (a parametrization, weight norm, ...)."""
    return hasattr(module, "parametrizations") or any(
        name in vars(module) or hasattr(type(module), name)
        for name in ("weight", "bias")
        if name not in module._parameters
    )
