"""One forward and one backward that hand each layer's tokens to a consumer, and leave the model as it was.

Parameters are frozen meanwhile, so that the backward computes no weight gradients. A tap on the output of every tracked
layer keeps the graph alive and catches the output's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LayerError, TaskError
from ..runtime.sharding import local
from .function_calls import FunctionCalls
from .layers.function import FunctionLayer
from .layers.tracked import TrackedLayer
from .layout import ALL_ROWS, CallLayout, Layout, rows_first, spread
from .observing import requiring_grad
from .taps import Hook, Tap, anchor_like, forward_hooks
from .tokens import Tokens, joined_calls, no_tokens

Consumer = Callable[[TrackedLayer, Tokens], None]


class DetachedError(TaskError):
    """A loss depends on no tracked layer."""


@dataclass(eq=False)
class _Call:
    """One call of a layer within a forward: its input, and its output's gradient once the backward came by.

    version: torch's count of in-place changes of the input, at the time of the call.
    """

    value: Tensor
    version: int
    gradient: Tensor | None = None


@dataclass(eq=False)
class _Use:
    """All calls of one of a layer's uses within one batch; layout: where its input counts the examples."""

    layer: TrackedLayer
    layout: CallLayout
    calls: list[_Call] = field(default_factory=list)

    def tokens(self, dtype: torch.dtype, examples: int) -> list[Tokens]:
        """The tokens of every call that the loss depends on; the calls are forgotten."""
        used, self.calls = [call for call in self.calls if call.gradient is not None], []
        return [_checked(self.layer.name, self._of_call(call, dtype, examples)) for call in used]

    def _of_call(self, call: _Call, dtype: torch.dtype, examples: int) -> Tokens:
        if call.value._version != call.version:
            raise LayerError(
                f"layer {self.layer.name!r}: its input was changed in place after the call, so its tokens are "
                "lost. Make the operation that follows out of place."
            )
        value, gradient = call.value, call.gradient
        if examples == 1 and self.layout.axis == 0 and not self.layer.examples_first:
            return self.layer.tokens(value[None], gradient[None], dtype)  # type: ignore[index]
        value = rows_first(value, self.layout, examples)
        gradient = gradient if self.layout.axis is None else rows_first(gradient, self.layout, examples)  # type: ignore[arg-type]
        rows = self._rows(len(value), examples)
        if not rows:
            return no_tokens(self.layer.shape, examples, dtype, value.device)
        return self.layer.tokens(value, gradient, dtype, rows)  # type: ignore[arg-type]

    def _rows(self, given: int, examples: int) -> int:
        """How many rows each example has, where that is not one."""
        if not self.layout.folded and not (examples == 1 and self.layout.axis == 0):
            return 1
        rows, left = divmod(given, examples)
        if left:
            raise LayerError(
                f"layer {self.layer.name!r}: its input has {given} rows for {examples} examples, expected equally many "
                "for each, one example's after another's. Where rows are routed or packed, use batch_size=1, or leave "
                "the layer out with exclude=."
            )
        return rows


@dataclass(eq=False)
class _Block:
    """All calls of a block within one batch, over all of its uses."""

    layer: TrackedLayer
    uses: list[_Use]

    @property
    def complete(self) -> bool:
        """Whether the backward has come by every call."""
        return all(call.gradient is not None for use in self.uses for call in use.calls)

    def tokens(self, dtype: torch.dtype, examples: int) -> Tokens | None:
        """The tokens of every call that the loss depends on, joined along the positions; the calls are forgotten."""
        pieces = [tokens for use in self.uses for tokens in use.tokens(dtype, examples)]
        counts = sorted({piece.examples for piece in pieces})
        if len(counts) > 1:
            raise LayerError(
                f"layer {self.layer.name!r}: its calls saw {counts} examples, expected one number of them."
            )
        return _checked(self.layer.name, self.layer.together(joined_calls(pieces)), self.layer) if pieces else None


class _Capture:
    """One forward and backward over a batch: records each layer's calls, and hands on their tokens."""

    def __init__(
        self, layers: Mapping[str, TrackedLayer], layout: Layout, consume: Consumer, dtype: torch.dtype, examples: int
    ):
        self._consume, self._dtype, self._examples = consume, dtype, examples
        self._in_backward = False  # True only during our own, to tell it from a backward inside the loss
        self._anchor = anchor_like(next(iter(layers.values())).parameters[0])
        self._blocks: list[_Block] = []
        self._of_module: dict[nn.Module, list[tuple[_Block, _Use]]] = {}
        self._functions = _function_calls(layers, layout, examples)
        self.unreached = [
            (layer, p) for layer in layers.values() if not _has_layout(layer, layout) for p in _own(layer)
        ]
        for layer in layers.values():
            self._add(layer, layout)

    def _add(self, layer: TrackedLayer, layout: Layout) -> None:
        """A block whose calls are to be recorded; one of a known model that no example reached so far is refused."""
        if isinstance(layer, FunctionLayer):
            if layer.name not in layout.functions:
                self._of_module.setdefault(layer.module, []).append((_Block(layer, []), _Use(layer, CallLayout(None))))
            return
        block = _Block(layer, [])
        for use in layer.uses:
            seen = _Use(use, layout.calls.get(use.name, CallLayout(None)))
            block.uses += [seen] if use.name in layout.calls else []
            self._of_module.setdefault(use.module, []).append((block, seen))
        self._blocks.append(block)

    def hooks(self) -> dict[nn.Module, Hook]:
        """For each module that is watched, what its calls run."""
        hooks: dict[nn.Module, Hook] = dict.fromkeys(self._of_module, self._see)
        return hooks | {module: calls.hook(self.records, self.tap) for module, calls in self._functions.items()}

    def records(self) -> bool:
        """Whether calls count now: a forward that is recomputed in the backward must only be as before."""
        return not self._in_backward

    def tap(self, output: Tensor, receive: Callable[[Tensor], None], layer: TrackedLayer) -> Tensor:
        """An output with a tap that catches its gradient."""

        def catch(gradient: Tensor) -> None:
            if self._in_backward:
                receive(gradient)
            else:
                _refuse_double_backward(layer)

        return Tap.apply(output, self._anchor, catch)  # type: ignore[no-any-return]

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Record one call of a module; returns its output with a tap."""
        if not torch.is_grad_enabled():
            return output
        if not isinstance(output, Tensor):
            raise LayerError(f"layer {self._of_module[module][0][0].layer.name!r}: returns no single tensor.")
        calls = self._recorded(module, args, kwargs) if self.records() else []
        block, use = self._of_module[module][0]

        def receive(gradient: Tensor) -> None:
            for block, call in calls:
                call.gradient = gradient
                if block.complete:
                    self._hand_on(block)

        copied = spread(output, use.layout, self._examples) if use.layout.axis is None else output
        return self.tap(copied, receive, block.layer)

    def _recorded(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[tuple[_Block, _Call]]:
        """One call of a module, for each block that it is of."""
        calls: list[tuple[_Block, _Call]] = []
        for block, use in self._of_module[module]:
            if use not in block.uses:
                raise _unexpected(block.layer)
            value = use.layer.call_value(args, kwargs)
            calls.append((block, _Call(value.detach(), value._version)))
            use.calls.append(calls[-1][1])
        return calls

    def backward(self, loss: Tensor) -> None:
        """Walk back from the loss, handing on each layer's tokens as soon as its last call has its gradient."""
        if not loss.requires_grad:
            raise DetachedError(
                "the loss does not depend on any tracked layer's output: the task detaches it, runs the model under "
                "no_grad, or uses none of the tracked layers. Return a differentiable loss."
            )
        self._in_backward = True
        _, *slopes = torch.autograd.grad(loss, [self._anchor, *(p for _, p in self.unreached)], allow_unused=True)
        for (layer, _), slope in zip(self.unreached, slopes, strict=True):
            if slope is not None and slope.any():
                raise _unexpected(layer)

    def hand_on_rest(self) -> None:
        """Hand on the tokens of layers some of whose calls the loss does not depend on, and of whole modules."""
        for block in self._blocks:
            self._hand_on(block)
        for calls in self._functions.values():
            for layer, gradient_BD in calls.gradients():
                self._consume(layer, layer.tokens(gradient_BD, gradient_BD, self._dtype))

    def _hand_on(self, block: _Block) -> None:
        tokens = block.tokens(self._dtype, self._examples)
        if tokens is not None:
            self._consume(block.layer, tokens)


def _has_layout(layer: TrackedLayer, layout: Layout) -> bool:
    """Whether some of a layer's calls were seen when the layout was found."""
    return layer.name in layout.functions or any(use.name in layout.calls for use in layer.uses)


def _own(layer: TrackedLayer) -> list[Tensor]:
    """A layer's parameters, but for those that are spread over ranks, which are whole within calls only."""
    return [parameter for parameter in layer.parameters if local(parameter) is parameter]


def _unexpected(layer: TrackedLayer) -> LayerError:
    return LayerError(
        f"layer {layer.name!r}: not reached by the first example, but by another one. Put an example that reaches "
        "every layer first, or leave the layer out with exclude=."
    )


def _checked(name: str, tokens: Tokens, layer: TrackedLayer | None = None) -> Tokens:
    """The tokens; LayerError unless both sides have the same positions, and the widths of a block if one is given."""
    a, g = tokens.a_PBSI.shape, tokens.g_PBSO.shape
    if a[:3] == g[:3] and (layer is None or layer.shape == (a[0], g[3], a[3])):
        return tokens
    wanted = "those of one kind at the other's positions" if layer is None else f"P, O, I = {layer.shape}"
    raise LayerError(
        f"layer {name!r}: its calls give inputs [P, B, S, I] = {tuple(a)} and output gradients [P, B, S, O] = "
        f"{tuple(g)}, expected {wanted}. Its features stand on another axis than its kind has them, or, for a kind of "
        "your own, mend `sides`."
    )


def _function_calls(
    layers: Mapping[str, TrackedLayer], layout: Layout, examples: int
) -> dict[nn.Module, FunctionCalls]:
    """The calls of each module that is differentiated as a whole, for all of its blocks together."""
    of_module: dict[nn.Module, list[FunctionLayer]] = {}
    for layer in layers.values():
        if isinstance(layer, FunctionLayer) and layer.name in layout.functions:
            of_module.setdefault(layer.module, []).append(layer)
    return {
        module: FunctionCalls(blocks, layout.functions[blocks[0].name], examples)
        for module, blocks in of_module.items()
    }


def capture(
    layers: Mapping[str, TrackedLayer],
    layout: Layout,
    loss: Callable[[], Tensor],
    consume: Consumer,
    dtype: torch.dtype,
    examples: int,
) -> Tensor:
    """Evaluate `loss()` and walk back through it, handing each layer's tokens to `consume` as they are complete.

    Call it inside `observing(model)`. A layer called several times has its tokens joined along the positions.

    Args:
        layers: tracked layers by name.
        layout: how they see a batch (from `find_layout`).
        loss: runs the model and returns the loss summed over the batch, shape [].
        consume: called once for each layer that the loss depends on.
        dtype: of the tokens.
        examples: of the batch.

    Returns:
        The loss, detached.

    Raises:
        LayerError: a layer is reached that the layout lacks, its input was changed after the call, or the loss
            differentiates through its gradient.
        TaskError: the loss depends on no tracked layer.
    """
    captured = _Capture(layers, layout, consume, dtype, examples)
    watched = requiring_grad([parameter for _, parameter in captured.unreached])
    with torch.enable_grad(), watched, forward_hooks(captured.hooks()):
        total = loss()
        captured.backward(total)
    captured.hand_on_rest()
    return total.detach()


def of_one(layers: Sequence[TrackedLayer]) -> Layout:
    """The layout of a batch of one example, to which all rows of these layers' inputs belong."""
    uses = {use.name: ALL_ROWS for layer in layers for use in layer.uses}
    return Layout(uses, {}, {}, tuple(layer.name for layer in layers), {}, {}, False)


def _refuse_double_backward(layer: TrackedLayer) -> None:
    """Raise LayerError if the loss differentiates through a backward of its own.

    Without that, a backward inside the loss is harmless, as for an adversarial example.
    """
    if torch.is_grad_enabled():  # create_graph=True
        raise LayerError(
            f"layer {layer.name!r}: the loss differentiates through its gradient (create_graph=True), so the layer's "
            "calls do not make up its weight's gradient. Leave such a penalty out of the task, or the layer out with "
            "exclude=."
        )
