"""One forward and one backward that hand each layer's tokens to a consumer, and leave the model as it was.

Parameters are frozen meanwhile, so that the backward computes no weight gradients. A tap on the output of every tracked
layer keeps the graph alive and catches the output's gradient.
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
from .plain_running import running_plainly
from .tokens import Tokens

_COARSE = {torch.bfloat16, torch.float16}
Consumer = Callable[[TrackedLayer, Tokens], None]


class DetachedError(TaskError):
    """A loss depends on no tracked layer."""


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
    fused = torch.backends.mha.get_fastpath_enabled()
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices), running_plainly(model):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            model.requires_grad_(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for register, content in registers:
                register.clear()
                register.update(content)  # type: ignore[arg-type]
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
    """One call of a layer within a forward: its input, and its output's gradient once the backward came by.

    version: torch's count of in-place changes of the input, at the time of the call.
    """

    value: Tensor
    version: int
    gradient: Tensor | None = None


@dataclass
class _LayerCalls:
    """All calls of one layer within one batch; axis: where its input counts the examples, dtype: of the tokens."""

    layer: TrackedLayer
    axis: int
    dtype: torch.dtype
    calls: list[_Call] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the backward has come by every call."""
        return all(call.gradient is not None for call in self.calls)

    def tokens(self) -> Tokens | None:
        """The tokens of every call that the loss depends on, joined along the positions; the calls are forgotten."""
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
    """Inside, each call of a layer runs `hook(layer, input tensor, output)`; what it returns replaces the output."""

    def forward_hook(layer: TrackedLayer) -> Callable[..., Any]:
        def run(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            value = args[0] if args else kwargs["input"]
            return hook(layer, value, output)

        return run

    with ExitStack() as stack:
        for layer in layers.values():
            handle = layer.module.register_forward_hook(forward_hook(layer), prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield


class _Capture:
    """One forward and backward over a batch: records each layer's calls, and hands on their tokens."""

    def __init__(
        self, layers: Mapping[str, TrackedLayer], axes: Mapping[str, int], consume: Consumer, dtype: torch.dtype
    ):
        self._calls_of = {name: _LayerCalls(layers[name], axis, dtype) for name, axis in axes.items() if name in layers}
        self._consume = consume
        self._in_backward = False  # True only during our own, to tell it from a backward inside the loss
        weight = next(iter(layers.values())).module.get_parameter("weight")
        self._anchor = torch.zeros((), dtype=weight.dtype, device=weight.device, requires_grad=True)

    def tap(self, layer: TrackedLayer, value: Tensor, output: Tensor) -> Tensor:
        """Record one call of a layer; returns its output with a tap that catches its gradient."""
        if layer.name not in self._calls_of:
            raise LayerError(
                f"layer {layer.name!r}: not reached by the first example, but by another one. Put an example that "
                "reaches every layer first, or leave it out of get_influence_tracked_modules()."
            )
        calls = self._calls_of[layer.name]
        call = _Call(value.detach(), value._version)
        calls.calls.append(call)

        def receive(gradient: Tensor) -> None:
            if not self._in_backward:
                _refuse_double_backward(layer)
                return
            call.gradient = gradient
            if calls.complete:
                self._hand_on(calls)

        return _Tap.apply(output, self._anchor, receive)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Walk back from the loss, handing on each layer's tokens as soon as its last call has its gradient."""
        if not loss.requires_grad:
            raise DetachedError(
                "the loss does not depend on any tracked layer's output: the task detaches it, runs the model under "
                "no_grad, or uses none of the tracked layers. Return a differentiable loss."
            )
        self._in_backward = True
        torch.autograd.grad(loss, self._anchor, allow_unused=True)

    def hand_on_rest(self) -> None:
        """Hand on the tokens of layers some of whose calls the loss does not depend on."""
        for calls in self._calls_of.values():
            self._hand_on(calls)

    def _hand_on(self, calls: _LayerCalls) -> None:
        tokens = calls.tokens()
        if tokens is not None:
            self._consume(calls.layer, tokens)


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

    Raises:
        LayerError: a layer is reached that `axes` lacks, its input was changed after the call, or the loss
            differentiates through its gradient.
        TaskError: the loss depends on no tracked layer.
    """
    captured = _Capture(layers, axes, consume, dtype)
    with torch.enable_grad(), _forward_hooks(layers, captured.tap):
        total = loss()
        captured.backward(total)
    captured.hand_on_rest()
    return total.detach()


def _refuse_double_backward(layer: TrackedLayer) -> None:
    """Raise LayerError if the loss differentiates through a backward of its own.

    Without that, a backward inside the loss is harmless, as for an adversarial example.
    """
    if torch.is_grad_enabled():  # create_graph=True
        raise LayerError(
            f"layer {layer.name!r}: the loss differentiates through its gradient (create_graph=True), so the layer's "
            "calls do not make up its weight's gradient. Leave such a penalty out of the task, or the layer out of "
            "get_influence_tracked_modules()."
        )


class Layout(NamedTuple):
    """How the layers see a batch.

    axes: the axis of each layer's input that counts the examples; shapes: the shape of its input for two examples;
    coarse: True if some layer computes in 16 bits. Layers that are not reached are absent.
    """

    axes: dict[str, int]
    shapes: dict[str, torch.Size]
    coarse: bool


def example_axes(layers: Mapping[str, TrackedLayer], run: Callable[[int], Any]) -> Layout:
    """Find which axis of each layer's input counts the examples, by running batches of two and of three.

    Args:
        run: runs the model on a batch of that many copies of one example.

    Raises:
        LayerError: no axis of a layer's input counts the examples, as when examples and positions are flattened
            together, or the layer's calls differ in their layout.
    """
    precisions: set[torch.dtype] = set()
    shapes_of_two, shapes_of_three = (_input_shapes(layers, run, copies, precisions) for copies in (2, 3))
    axes = {}
    for name, two in shapes_of_two.items():
        three = shapes_of_three.get(name, [])
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
    return Layout(axes, {name: two[0] for name, two in shapes_of_two.items()}, bool(precisions & _COARSE))


def _input_shapes(
    layers: Mapping[str, TrackedLayer], run: Callable[[int], Any], copies: int, precisions: set[torch.dtype]
) -> dict[str, list[torch.Size]]:
    """The shape of each call's input in a batch of `copies` examples; adds the outputs' dtypes to `precisions`."""
    shapes: dict[str, list[torch.Size]] = {}

    def note(layer: TrackedLayer, value: Tensor, output: Tensor) -> None:
        shapes.setdefault(layer.name, []).append(value.shape)
        precisions.add(output.dtype)

    with torch.enable_grad(), _forward_hooks(layers, note):  # a loss may differentiate inside
        run(copies)
    return shapes


def _example_axis(two: torch.Size, three: torch.Size) -> int | None:
    """The one axis on which a batch of two has length 2 and a batch of three length 3; None if there is none."""
    if len(two) != len(three):
        return None
    differing = [axis for axis, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    if len(differing) != 1 or (two[differing[0]], three[differing[0]]) != (2, 3):
        return None
    return differing[0]
