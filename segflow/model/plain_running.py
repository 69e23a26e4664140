"""While segflow observes a model it runs plainly: as its forward is written, once.

torch.compile would leave hooks out. Activation checkpointing runs forwards again during the backward (non-reentrant),
or runs them without a graph first (reentrant); either computes the same gradients as running them plainly does, which
keeps their activations in memory instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint

from ..errors import LayerError


@contextmanager
def running_plainly(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is compiled, and `torch.utils.checkpoint` runs what it is given, of whichever kind.

    Raises LayerError for a compiled module where torch is too old to run it as it is written.
    """
    compiling, checkpointing = _eagerly(model), _uncheckpointed()
    with compiling, checkpointing:
        yield


def _eagerly(model: nn.Module) -> AbstractContextManager[Any]:
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled; the import takes a second
        return nullcontext()
    if hasattr(torch.compiler, "set_stance"):  # torch 2.6
        return torch.compiler.set_stance("force_eager")
    for name, module in model.named_modules():
        if _is_compiled(module):
            raise LayerError(
                f"module {name!r} ({type(module).__name__}) is compiled by torch.compile, which torch "
                f"{torch.__version__} cannot suspend while layers are observed. Give the model as it was before "
                "torch.compile (its checkpoints fit), or use torch 2.6 or later."
            )
    return nullcontext()


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module is torch.compile's wrapper, was compiled in place, or has a compiled forward of its own."""
    own = vars(module)
    in_place = own.get("_compiled_call_impl") is not None
    return in_place or "_orig_mod" in module._modules or hasattr(own.get("forward"), "_torchdynamo_orig_callable")


class _Direct:
    """Stands in for the function of reentrant checkpointing."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve_random_state: bool, *args: Any) -> Any:
        return function(*args)


def _nothing_around(*_args: Any, **_options: Any) -> Iterator[None]:
    """Stands in for what non-reentrant checkpointing does before and after it calls its function."""
    yield


@contextmanager
def _uncheckpointed() -> Iterator[None]:
    """Inside, `torch.utils.checkpoint.checkpoint` only calls its function; models hold references to it."""
    stand_ins = {"CheckpointFunction": _Direct, "_checkpoint_without_reentrant_generator": _nothing_around}
    before = {name: getattr(checkpoint, name) for name in stand_ins}
    try:
        for name, stand_in in stand_ins.items():
            setattr(checkpoint, name, stand_in)
        yield
    finally:
        for name, original in before.items():
            setattr(checkpoint, name, original)
