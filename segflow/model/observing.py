"""A model while it is observed: in eval mode, its parameters frozen, everything put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import LayerError
from .layers.attention import called_projections
from .layers.tracked import TrackedLayer
from .plain_running import running_plainly


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and its parameters are frozen; afterwards it is as it was.

    Inside, checkpoints may be loaded into the model, and the fused attention that bypasses layers is off. Afterwards
    modes, flags, values and the random state are put back, also after an exception.

    Raises LayerError if a lazy module has no parameters yet.
    """
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise LayerError(f"parameter {lazy[0]!r} is lazy and not initialised yet. Run the model on one batch first.")
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    values = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    registers = [(register, dict(register)) for module in modes for register in (module._parameters, module._buffers)]
    computed = [(vars(module), {n: t for n, t in vars(module).items() if isinstance(t, Tensor)}) for module in modes]
    fused = torch.backends.mha.get_fastpath_enabled()
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices), running_plainly(model):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            model.requires_grad_(False)
            with called_projections(model):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for register, content in registers:
                register.clear()
                register.update(content)  # type: ignore[arg-type]
            for attributes, tensors in computed:  # such as the weights that weight norm computes in each call
                attributes.update(tensors)
            with torch.no_grad():
                for tensor, value in values:
                    tensor.copy_(value)
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            for module, training in modes.items():
                module.training = training


@contextmanager
def requiring_grad(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, gradients reach these parameters, which are frozen again afterwards."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


@contextmanager
def called_parameters(layers: Mapping[str, TrackedLayer]) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, each layer's parameters are collected as its calls see them, and gradients reach them.

    For a sharded model, whose layers hold whole parameters within their calls only, and shards between them.
    """
    by_layer: dict[str, list[Tensor]] = {}

    def pre_hook(layer: TrackedLayer) -> Callable[..., None]:
        def collect(_module: nn.Module, _args: Any) -> None:
            by_layer[layer.name] = [parameter.requires_grad_(True) for parameter in layer.parameters]

        return collect

    with ExitStack() as stack:
        for layer in layers.values():
            stack.callback(layer.module.register_forward_pre_hook(pre_hook(layer)).remove)
        try:
            yield by_layer
        finally:
            for parameter in (parameter for parameters in by_layer.values() for parameter in parameters):
                parameter.requires_grad_(False)
