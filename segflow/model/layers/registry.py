"""The kinds of layers that are known, which of them a module is, and which layers of a model are attributed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Hashable
from typing import NamedTuple, TypeVar

from torch import nn

from ...data.as_written import hides_method
from ...errors import LayerError
from ...runtime.sharding import named_modules, named_parameters
from .tracked import TrackedLayer

Kind = TypeVar("Kind", bound=type[TrackedLayer])
_KINDS: list[type[TrackedLayer]] = []  # the latest first, so that a user's own kind comes before the built-in ones


def register(kind: Kind) -> Kind:
    """Make a kind of layer known, so that its modules are attributed: a decorator for subclasses of `TrackedLayer`.

    Where two kinds claim a module, the one registered last takes it. Raises LayerError unless it is a subclass of
    `TrackedLayer` that names a tuple of module types.
    """
    if not isinstance(kind, type) or not issubclass(kind, TrackedLayer):
        raise LayerError(f"{kind!r}: expected a subclass of segflow.model.layers.TrackedLayer.")
    types = kind.modules
    if not isinstance(types, tuple) or not types or not all(isinstance(one, type) for one in types):
        raise LayerError(f"{kind.__name__}: modules={types!r}, expected a tuple of module types, such as (MyLinear,).")
    if kind not in _KINDS:
        _KINDS.insert(0, kind)
    return kind


def kind_of(module: nn.Module) -> type[TrackedLayer] | None:
    """The kind of layer that a module is; None where no kind claims it."""
    return next((kind for kind in _KINDS if isinstance(module, kind.modules)), None)


def track(name: str, module: nn.Module, has_bias: bool) -> TrackedLayer:
    """A module as a layer to attribute; LayerError where no kind claims it."""
    kind = kind_of(module)
    if kind is None:
        raise LayerError(f"module {name!r}: {type(module).__name__} is not supported. Supported: {_supported()}.")
    return kind(name, module, has_bias)


def _supported() -> str:
    return ", ".join(module.__name__ for kind in reversed(_KINDS) for module in kind.modules)


class LayerChoice(NamedTuple):
    """The tracked layers by name, and why every other parametrised module is not attributed."""

    tracked: dict[str, TrackedLayer]
    skipped: dict[str, str]


def choose_layers(
    model: nn.Module, names: Collection[str] | None = None, why_untrained: Callable[[str], str | None] | None = None
) -> LayerChoice:
    """The layers to attribute, and the reason for every other module that has parameters.

    Args:
        names: the names of the modules to attribute; None takes every supported one.
        why_untrained: tells for a parameter's name why training did not change it, None if it did; None asks
            `requires_grad`.

    Raises:
        LayerError: a module of these names is unknown or not supported, or nothing is left to attribute.
    """
    modules = named_modules(model, remove_duplicate=False)
    _check_names(names, modules)
    first_name = {module: name for name, module in reversed(modules.items())}
    parameters = named_parameters(model, remove_duplicate=False)

    def untrained(name: str) -> str | None:
        if why_untrained is not None:
            return why_untrained(name)
        return None if parameters[name].requires_grad else "it does not require gradients"

    wanted = None if names is None else {first_name[modules[name]] for name in names}
    owners = _owners(model)
    tracked, skipped = {}, {}
    for name, module in named_modules(model).items():
        if not _has_parameters(module):
            continue
        prefix = f"{name}." if name else ""
        reason = _why_not(module, name, modules, prefix, untrained) or _why_shared(module, name, owners)
        if wanted is not None and name not in wanted:
            reason = "not among the tracked modules that the task names"
        elif wanted is not None and reason:
            raise LayerError(f"module {name!r} ({type(module).__name__}) cannot be attributed: {reason}.")
        if reason:
            skipped[name] = reason
        else:
            why_no_bias = untrained(f"{prefix}bias") if module.bias is not None else None
            has_bias = module.bias is not None and why_no_bias is None
            if why_no_bias:
                skipped[f"{prefix}bias"] = f"it was not trained: {why_no_bias}"
            tracked[name] = track(name, module, has_bias)
    if not tracked:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "no module has parameters"
        raise LayerError(f"no layer can be attributed ({reasons}). Supported: {_supported()}.")
    return LayerChoice(tracked, skipped)


def _check_names(names: Collection[str] | None, modules: dict[str, nn.Module]) -> None:
    for name in names or ():
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=3)
            raise LayerError(f"the model has no module {name!r}. Did you mean one of {close or sorted(modules)[1:9]}?")
        if not _has_parameters(modules[name]):
            inside = [inner for inner in modules if inner.startswith(f"{name}.")][:4]
            advice = f"Name the layers inside it: {inside}" if inside else "There is nothing in it to attribute"
            raise LayerError(f"module {name!r} has no parameters of its own. {advice}.")
    if names is not None and not names:
        raise LayerError("get_influence_tracked_modules() returned no names. Return None to track every layer.")


def _has_parameters(module: nn.Module) -> bool:
    """Whether the module has parameters of its own, or computes its own from others (a parametrization)."""
    return kind_of(module) is not None or any(p is not None for p in module._parameters.values())


def _why_not(
    module: nn.Module, name: str, modules: dict[str, nn.Module], prefix: str, untrained: Callable[[str], str | None]
) -> str | None:
    """Why this module cannot be tracked, whatever other modules hold; None if it can."""
    kind = kind_of(module)
    if kind is None:
        return f"{type(module).__name__} is not supported"
    actual, base = type(module), next(supported for supported in kind.modules if isinstance(module, supported))
    overridden = [
        m for m in kind.methods if hides_method(module, m) or getattr(actual, m, 0) is not getattr(base, m, 0)
    ]
    extra = sorted(set(module._parameters) - {"weight", "bias"})
    weight = module._parameters.get("weight")
    properties = {
        f"{actual.__name__} is a {base.__name__} with its own {''.join(overridden[:1])}()": bool(overridden),
        "nn.MultiheadAttention uses its weight without calling it": isinstance(
            modules.get(name.rpartition(".")[0]), nn.MultiheadAttention
        ),
        "its weight is computed from other tensors (a parametrization, weight norm, ...)": weight is None
        or "bias" not in module._parameters,
        f"it has extra parameters {extra}": bool(extra),
        "it is lazy and not initialised yet": isinstance(weight, nn.UninitializedParameter),
    }
    first_reason = next((reason for reason, holds in properties.items() if holds), None)
    if first_reason is not None:
        return first_reason
    why_untrained = untrained(f"{prefix}weight")
    return f"its weight was not trained: {why_untrained}" if why_untrained else None


def _identity(parameter: nn.Parameter) -> Hashable:
    """What is equal for parameters that share memory, also where two Parameter objects do."""
    if isinstance(parameter, nn.UninitializedParameter) or parameter.data_ptr() == 0:
        return id(parameter)
    return parameter.device, parameter.data_ptr()


def _owners(model: nn.Module) -> dict[Hashable, list[str]]:
    """The modules that hold each parameter, by the parameter's identity."""
    owners: dict[Hashable, list[str]] = {}
    for name, module in named_modules(model).items():
        for parameter in (p for p in module._parameters.values() if p is not None):
            owners.setdefault(_identity(parameter), []).append(name)
    return owners


def _why_shared(module: nn.Module, name: str, owners: dict[Hashable, list[str]]) -> str | None:
    """Why a module that shares a parameter with another one cannot be tracked; None if it shares none."""
    identities = [_identity(p) for p in module._parameters.values() if p is not None]
    others = [owner for identity in identities for owner in owners[identity] if owner != name]
    if not others:
        return None
    other = others[0] or "the model itself"
    return f"it shares a tensor with {other!r}, so its own calls do not make up the tensor's gradient"
