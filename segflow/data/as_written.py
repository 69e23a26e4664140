"""What torch.compile was given: it counts as it is written, compiled or not, before its first run and after."""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import Any

from torch import nn

# What torch.compile leaves on modules, and Lightning's, which takes its place once Lightning is imported.
COMPILED = frozenset({"_compiled_call_impl", "_is_torch_compile", "_compile_kwargs"})


def as_written(value: Any) -> Any:
    """The function or module behind torch.compile's wrappers of it; any other value as it is."""
    while isinstance(value, FunctionType) and value.__globals__.get("__name__", "").startswith("torch._dynamo."):
        if not hasattr(value, "__wrapped__"):
            break
        value = value.__wrapped__
    return value._modules.get("_orig_mod", value) if isinstance(value, nn.Module) else value


def hides_method(subject: Any, name: str) -> bool:
    """Whether an object's own attribute hides its class's method of that name, and is not that method, compiled."""
    if name not in getattr(subject, "__dict__", {}):
        return False
    value, defined = as_written(vars(subject)[name]), getattr(type(subject), name, None)
    return not (isinstance(value, MethodType) and value.__self__ is subject and value.__func__ is defined)
