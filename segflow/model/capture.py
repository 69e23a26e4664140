"""One forward and one backward that hand each layer's tokens to a consumer, leaving the model as it was.

Parameters are frozen while segflow looks on, so a backward computes no weight gradients; a tap on every tracked
layer's output keeps the graph alive and catches the output's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import LayerError, TaskError
from .layers.tracked import TrackedLayer
from .tokens import Tokens

_COARSE = {torch.bfloat16, torch.float16}
Consumer = Callable[[TrackedLayer, Tokens], None]


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Evaluate the model with frozen parameters, then put modes, flags, values and the random state back.

    Inside, checkpoints may be loaded into the model; also after an exception everything is as it was. Fused
    attention that bypasses layers is off meanwhile.

    Raises LayerError if a lazy module has no parameters yet.
    """
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise LayerError(f"parameter {lazy[0]!r} is lazy and not initialised yet. Run the model on one batch first.")
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    values = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    registers = [(held, dict(held)) for module in modes for held in (module._parameters, module._buffers)]
    fused = torch.backends.mha.get_fastpath_enabled()
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            model.requires_grad_(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for held, content in registers:
                held.clear()
                held.update(content)  # type: ignore[arg-type]
            with torch.no_grad():
                for tensor, value in values:
                    tensor.copy_(value)
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            for module, training in modes.items():
                module.training = training


@contextmanager
def requiring_grad(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let gradients reach these frozen parameters for a while."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


@contextmanager
def called_parameters(layers: Mapping[str, TrackedLayer]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect each layer's parameters as its calls see them, and let gradients reach them for a while.

    A sharded model's layers hold shards between their calls, and whole parameters only within them.
    """
    found: dict[str, list[Tensor]] = {}

    def adapt(layer: TrackedLayer) -> Callable[..., None]:
        def note(_module: nn.Module, _args: Any) -> None:
            found[layer.name] = [parameter.requires_grad_(True) for parameter in layer.parameters]

        return note

    with ExitStack() as stack:
        for layer in layers.values():
            stack.callback(layer.module.register_forward_pre_hook(adapt(layer)).remove)
        try:
            yield found
        finally:
            for parameter in (parameter for own in found.values() for parameter in own):
                parameter.requires_grad_(False)


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward hands the output's gradient to `receive`.

    It works in place, so that a later in-place activation may still change the output.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.receive = receive
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.receive(gradient)
        return gradient, None, None


@dataclass
class _Call:
    """One call of a layer within a forward."""

    value: Tensor
    version: int
    gradient: Tensor | None = None


@dataclass
class _Watch:
    """The calls of one layer within one batch."""

    layer: TrackedLayer
    axis: int
    dtype: torch.dtype
    calls: list[_Call] = field(default_factory=list)

    def tokens(self) -> Tokens | None:
        """The tokens of every call that the loss depends on, joined along the positions; frees them here."""
        used, self.calls = [call for call in self.calls if call.gradient is not None], []
        for call in used:
            if call.value._version != call.version:
                raise LayerError(
                    f"layer {self.layer.name!r}: its input was changed in place after the call, so its tokens are "
                    "lost. Make the operation that follows out of place."
                )
        pieces = [self.layer.tokens(call.value, call.gradient, self.axis, self.dtype) for call in used]  # type: ignore[arg-type]
        if len(pieces) <= 1:
            return pieces[0] if pieces else None
        counts = sorted({piece.a_PBSI.shape[1] for piece in pieces})
        if len(counts) > 1:
            raise LayerError(
                f"layer {self.layer.name!r}: its calls saw {counts} examples, expected one number of them."
            )
        return Tokens(torch.cat([p.a_PBSI for p in pieces], 2), torch.cat([p.g_PBSO for p in pieces], 2))


@contextmanager
def _forward_hooks(layers: Mapping[str, TrackedLayer], hook: Callable[..., Any]) -> Iterator[None]:
    """Call `hook(layer, input tensor, output)` at each call of each layer; what it returns replaces the output."""

    def adapt(layer: TrackedLayer) -> Callable[..., Any]:
        def run(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            value = args[0] if args else kwargs["input"]
            return hook(layer, value, output)

        return run

    with ExitStack() as stack:
        for layer in layers.values():
            handle = layer.module.register_forward_hook(adapt(layer), prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def capture(
    layers: Mapping[str, TrackedLayer],
    axes: Mapping[str, int],
    loss: Callable[[], Tensor],
    consume: Consumer,
    dtype: torch.dtype,
) -> Tensor:
    """Evaluate `loss()` and walk back through it, handing each layer's tokens to `consume` as they are complete.

    Call it inside `observing(model)`. A layer called several times has its tokens joined along the positions.

    Args:
        layers: tracked layers by name.
        axes: for each layer that is reached, which axis of its input counts the examples (from `example_axes`).
        loss: runs the model and returns the loss summed over the batch, shape [].
        consume: called once for each layer that the loss depends on.
        dtype: of the tokens.

    Returns:
        The loss, detached.
    """
    watches = {name: _Watch(layers[name], axis, dtype) for name, axis in axes.items() if name in layers}
    walking: list[bool] = []  # not empty during the backward below, to tell it from one inside the loss
    weight = next(iter(layers.values())).module.get_parameter("weight")
    anchor = torch.zeros((), dtype=weight.dtype, device=weight.device, requires_grad=True)

    def deliver(watch: _Watch) -> None:
        tokens = watch.tokens()
        if tokens is not None:
            consume(watch.layer, tokens)

    def tap(layer: TrackedLayer, value: Tensor, output: Tensor) -> Tensor:
        if layer.name not in watches:
            raise LayerError(
                f"layer {layer.name!r}: not reached by the first example, but by another one. Put an example that "
                "reaches every layer first, or leave it out of get_influence_tracked_modules()."
            )
        watch = watches[layer.name]
        call = _Call(value.detach(), value._version)
        watch.calls.append(call)

        def receive(gradient: Tensor) -> None:
            if not walking:
                _refuse_double_backward(layer)
                return
            call.gradient = gradient
            if all(other.gradient is not None for other in watch.calls):
                deliver(watch)

        return _Tap.apply(output, anchor, receive)  # type: ignore[no-any-return]

    with torch.enable_grad(), _forward_hooks(layers, tap):
        total = loss()
        if not total.requires_grad:
            raise TaskError(
                "the loss does not depend on any tracked layer's output: the task detaches it, runs the model under "
                "no_grad, or uses none of the tracked layers. Return a differentiable loss."
            )
        walking.append(True)
        torch.autograd.grad(total, anchor, allow_unused=True)
    for watch in watches.values():
        deliver(watch)
    return total.detach()


def _refuse_double_backward(layer: TrackedLayer) -> None:
    """A backward inside the loss is harmless (an adversarial example) unless the loss differentiates through it."""
    if torch.is_grad_enabled():  # create_graph=True
        raise LayerError(
            f"layer {layer.name!r}: the loss differentiates through its gradient (create_graph=True), so the layer's "
            "calls do not make up its weight's gradient. Leave such a penalty out of the task, or the layer out of "
            "get_influence_tracked_modules()."
        )


class Layout(NamedTuple):
    """How the layers see a batch.

    axes: the axis of each layer's input that counts the examples; shapes: its input's shape for two examples;
    coarse: True if some layer computes in 16 bits.
    """

    axes: dict[str, int]
    shapes: dict[str, torch.Size]
    coarse: bool


def example_axes(layers: Mapping[str, TrackedLayer], run: Callable[[int], Any]) -> Layout:
    """Which axis of each layer's input counts the examples, found by running batches of two and three.

    Args:
        run: runs the model on a batch of that many copies of one example.

    Returns:
        The layout; layers that were not reached are absent from it.

    Raises:
        LayerError: no axis of a layer's input counts the examples, as when examples and positions are flattened
            together, or the layer's calls differ in their layout.
    """
    shapes: list[dict[str, list[torch.Size]]] = [{}, {}]
    precisions: set[torch.dtype] = set()
    for copies, found in zip((2, 3), shapes, strict=True):

        def note(layer: TrackedLayer, value: Tensor, output: Tensor, found: Any = found) -> None:
            found.setdefault(layer.name, []).append(value.shape)
            precisions.add(output.dtype)

        with torch.enable_grad(), _forward_hooks(layers, note):  # a loss may differentiate inside
            run(copies)
    axes = {}
    for name, two in shapes[0].items():
        three = shapes[1].get(name, [])
        axis_of_calls = {_example_axis(a, b) for a, b in zip(two, three, strict=False)}
        axis = axis_of_calls.pop() if len(axis_of_calls) == 1 and len(two) == len(three) else None
        if axis is None or (layers[name].examples_first and axis != 0):
            raise LayerError(
                f"layer {name!r}: its input has shape {tuple(two[0])} for 2 examples and "
                f"{tuple(three[0]) if three else 'nothing'} for 3, so no axis of it counts the examples in every call. "
                "Give it inputs [examples, ..., features] (not flattened with the positions), or leave it out of "
                "get_influence_tracked_modules()."
            )
        axes[name] = axis
    return Layout(axes, {name: two[0] for name, two in shapes[0].items()}, bool(precisions & _COARSE))


def _example_axis(two: torch.Size, three: torch.Size) -> int | None:
    """The one axis on which a batch of two has length 2 and a batch of three length 3."""
    if len(two) != len(three):
        return None
    differing = [axis for axis, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    if len(differing) != 1 or (two[differing[0]], three[differing[0]]) != (2, 3):
        return None
    return differing[0]
