"""Modules that no kind of layer knows: each example's gradient of their parameters, by differentiating their calls.

A call's arguments and its outputs' gradients are kept, and the call is repeated for every example, for all of them at
once by torch.func.vmap where that has a rule for what the module does, one after the other elsewhere.
Axes: B examples, R rows, D numbers of a parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..errors import LayerError
from .layers.function import FunctionLayer
from .layout import CallLayout, FunctionLayout, spread
from .taps import Hook

_ONE_BY_ONE: WeakSet[nn.Module] = WeakSet()  # modules that vmap has no rule for
_NO_RULE = (RuntimeError, ValueError, NotImplementedError, TypeError, IndexError, UserWarning)


@dataclass
class _Call:
    """One call: its arguments as leaves of a tree, and the gradients of its outputs by their places."""

    leaves: list[Any]
    versions: list[int | None]
    spec: TreeSpec
    gradients: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class FunctionCalls:
    """All calls of one module within one batch; layers: the blocks of its parameters."""

    layers: Sequence[FunctionLayer]
    layout: FunctionLayout
    examples: int
    calls: list[_Call] = field(default_factory=list)

    def hook(self, records: Callable[[], bool], tap: Callable[..., Tensor]) -> Hook:
        """Records one call, and taps every output that is counted by examples or shared by them.

        records: whether calls count now; tap: given an output, what receives its gradient, and a layer.
        """

        def see(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled():
                return output
            leaves, spec = tree_flatten((args, dict(kwargs)))
            kept = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            versions = [leaf._version if isinstance(leaf, Tensor) else None for leaf in leaves]
            call = _Call(kept, versions, spec)
            if records():
                self.calls.append(call)
            outputs, out_spec = tree_flatten(output)
            layouts = self.layout.outputs
            if len(outputs) != len(layouts):
                raise LayerError(f"{self._where}: it returned {len(outputs)} things, expected {len(layouts)}.")
            for place, (leaf, layout) in enumerate(zip(outputs, layouts, strict=True)):
                if layout is not None and isinstance(leaf, Tensor) and leaf.is_floating_point():
                    copied = spread(leaf, layout, self.examples) if layout.axis is None else leaf.clone()
                    outputs[place] = tap(copied, _keep(call, place), self.layers[0])
            return tree_unflatten(outputs, out_spec)

        return see

    @property
    def _where(self) -> str:
        return f"layer {self.layers[0].name!r}"

    def gradients(self) -> Iterator[tuple[FunctionLayer, Tensor]]:
        """Each block with its gradient [B, D] of every example, summed over the calls that the loss depends on."""
        used, self.calls = [call for call in self.calls if call.gradients], []
        totals: dict[str, Tensor] = {}
        for call in used:
            for name, gradient in self._of_call(call).items():
                totals[name] = totals[name] + gradient if name in totals else gradient
        for layer in self.layers:
            if layer.attribute in totals:
                yield layer, totals[layer.attribute].reshape(self.examples, -1)

    def _of_call(self, call: _Call) -> dict[str, Tensor]:
        """The gradients [B, ...] of one call, by the parameters' names in the module."""
        for leaf, version in zip(call.leaves, call.versions, strict=True):
            if version is not None and leaf._version != version:
                raise LayerError(
                    f"{self._where}: an argument was changed in place after the call. Make the operation that follows "
                    "out of place."
                )
        module, places = self.layers[0].module, list(call.gradients)
        inputs = [_of_examples(call.leaves[i], layout, self.examples) for i, layout in self._batched(call)]
        outputs = [_gradient_of_examples(call.gradients[i], self._output(i), self.examples) for i in places]

        def one(of_example: list[Tensor], slopes: list[Tensor]) -> dict[str, Tensor]:
            leaves = list(call.leaves)
            for (place, layout), value in zip(self._batched(call), of_example, strict=True):
                leaves[place] = _single(value, layout)
            args, kwargs = tree_unflatten(leaves, call.spec)

            def output(parameters: dict[str, Tensor]) -> list[Tensor]:
                returned, _ = tree_flatten(functional_call(module, parameters, args, kwargs))
                return [returned[place] for place in places]

            found, pull = vjp(output, {layer.attribute: layer.parameters[0].detach() for layer in self.layers})[:2]
            slopes = [_single(g, self._output(i)).to(z.dtype) for i, g, z in zip(places, slopes, found, strict=True)]
            return dict(pull([g.reshape(z.shape) for g, z in zip(slopes, found, strict=True)])[0])

        return _for_each(one, inputs, outputs, module)

    def _batched(self, call: _Call) -> list[tuple[int, CallLayout]]:
        """The places among the arguments of the tensors that the examples are counted in."""
        if len(call.leaves) != len(self.layout.inputs):
            raise LayerError(f"{self._where}: called with {len(call.leaves)} arguments, not as with the first example.")
        given = zip(call.leaves, self.layout.inputs, strict=True)
        if self.examples > 1 and any(isinstance(leaf, Tensor) and layout is None for leaf, layout in given):
            raise LayerError(
                f"{self._where}: called with a tensor where the first example had none, as a mask that only ragged "
                "batches have, so that its examples cannot be told apart. Put an example first with which it has one, "
                "or use batch_size=1."
            )
        pairs = enumerate(self.layout.inputs)
        return [(place, layout) for place, layout in pairs if layout is not None and layout.axis is not None]

    def _output(self, place: int) -> CallLayout:
        layout = self.layout.outputs[place]
        return layout if layout is not None else CallLayout(None)


def _keep(call: _Call, place: int) -> Callable[[Tensor], None]:
    def receive(gradient: Tensor) -> None:
        call.gradients[place] = gradient

    return receive


def _of_examples(tensor: Tensor, layout: CallLayout, examples: int) -> Tensor:
    """[B, ...], or [B, rows, ...] where each example has several rows."""
    if layout.folded:
        if len(tensor) % examples:
            raise LayerError(
                f"a module's argument has {len(tensor)} rows for {examples} examples, expected equally many for each. "
                "Where rows are routed or packed, use batch_size=1."
            )
        return tensor.unflatten(0, (examples, -1))
    return tensor.movedim(layout.axis or 0, 0)


def _gradient_of_examples(gradient: Tensor, layout: CallLayout, examples: int) -> Tensor:
    """Likewise; the gradient of a tensor that was spread has a copy for each example already."""
    return gradient if layout.axis is None else _of_examples(gradient, layout, examples)


def _single(of_example: Tensor, layout: CallLayout) -> Tensor:
    """One example's part as the module sees it: a batch of one, or its rows."""
    if layout.folded or layout.axis is None:
        return of_example
    return of_example.unsqueeze(layout.axis)


def how_repeated(module: nn.Module) -> str:
    """In words how a module's calls are differentiated, as far as that is known by now."""
    way = "one example after the other" if _one_by_one(module) else "vmapped"
    return f"its module's calls repeated by torch.func, {way}"


def _one_by_one(module: nn.Module) -> bool:
    """Whether vmap is known to have no rule for a module."""
    return module in _ONE_BY_ONE or isinstance(module, nn.RNNBase)


def _for_each(one: Callable[..., Any], inputs: list[Tensor], outputs: list[Tensor], module: nn.Module) -> Any:
    """`one` of every example, for all at once where torch can."""
    if not _one_by_one(module):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "There is a performance drop")  # vmap's, where it has no rule
                return vmap(one)(inputs, outputs)
        except _NO_RULE:
            _ONE_BY_ONE.add(module)
    rows = [one([x[b] for x in inputs], [g[b] for g in outputs]) for b in range(len(outputs[0]))]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
