"""Taps: identities on a layer's output whose backward hands the output's gradient on.

They keep the graph alive where parameters are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Hook = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Any], Any]


class Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward hands the output's gradient to `receive`.

    It works in place, so that a later in-place activation may still change the output.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        """The output itself; anchor: what makes it part of a graph."""
        ctx.receive = receive
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Hand the gradient on."""
        ctx.receive(gradient)
        return gradient, None, None


def anchor_like(parameter: Tensor) -> Tensor:
    """What taps hang on: a differentiable zero on a parameter's device, of its dtype where that is differentiable."""
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    return torch.zeros((), dtype=dtype, device=parameter.device, requires_grad=True)


@contextmanager
def forward_hooks(hooks: Mapping[nn.Module, Hook]) -> Iterator[None]:
    """Inside, each call of a module runs its hook; what that returns replaces the output."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield
