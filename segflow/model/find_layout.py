"""The layout of a model's calls, found by running batches of two and of three copies of one example.

A forward and a backward of each: a call that the loss does not depend on says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .layers.function import FunctionLayer, UnfollowedLayer
from .layers.tracked import TrackedLayer
from .layout import CallLayout, FunctionLayout, Layout, call_layout
from .taps import Tap, anchor_like, forward_hooks

_COARSE = {torch.bfloat16, torch.float16}
_Shapes = tuple[torch.Size | None, ...]


@dataclass
class _Seen:
    """The shapes of one call: of each of its inputs, and of each of its outputs, None for what is no tensor."""

    inputs: _Shapes
    outputs: _Shapes
    gradients: set[int] = field(default_factory=set)  # the outputs that the loss depends on


@dataclass
class _Run:
    """One run of so many copies: the calls of each use and of each whole module, by the name of a block of theirs."""

    calls: dict[str, list[_Seen]] = field(default_factory=dict)
    coarse: bool = False
    backward: bool = False


def find_layout(layers: Mapping[str, TrackedLayer], run: Callable[[int], Tensor]) -> Layout:
    """How the layers see a batch.

    A block some of whose calls have no layout is among the `alone`; one that is never called is not reached.

    Args:
        run: the loss of a batch of that many copies of one example.
    """
    two, three = (_run(layers, run, copies) for copies in (2, 3))
    calls: dict[str, CallLayout] = {}
    functions: dict[str, FunctionLayout] = {}
    shapes: dict[str, torch.Size] = {}
    reached, alone = [], {}
    for name, layer in layers.items():
        if isinstance(layer, UnfollowedLayer):
            reached.append(name)
            alone[name] = "gradient"
            continue
        if isinstance(layer, FunctionLayer):
            of_function = _function_layout(*(seen.calls.get(_key(layer), []) for seen in (two, three)))
            called, laid_out = _key(layer) in two.calls, of_function is not None
            if of_function is not None:
                functions[name] = of_function
        else:
            uses = {use.name: [seen.calls.get(use.name, []) for seen in (two, three)] for use in layer.uses}
            found = {use: _use_layout(*pair) for use, pair in uses.items() if any(pair)}
            called, laid_out = bool(found), all(found.values())
            if laid_out:
                calls |= {use: of_use for use, of_use in found.items() if of_use is not None}
            first = next((pair[0][0].inputs[0] for pair in uses.values() if pair[0]), None)
            shapes |= {} if first is None else {name: first}
        if called:
            reached.append(name)
            alone |= {} if laid_out else {name: "tokens"}
    counted = {n: sum(len(_used(two.calls.get(use.name, []))) for use in of.uses) for n, of in layers.items()}
    times = {name: count for name, count in counted.items() if count}
    return Layout(calls, functions, shapes, tuple(reached), alone, times, two.coarse)


def _key(layer: TrackedLayer) -> str:
    """What the calls of a module that is differentiated as a whole are known by."""
    return f"module {id(layer.module)}"


def _run(layers: Mapping[str, TrackedLayer], run: Callable[[int], Tensor], copies: int) -> _Run:
    """The calls of a batch of copies."""
    seen = _Run()
    anchor = anchor_like(next(iter(layers.values())).parameters[0])
    uses: dict[nn.Module, list[TrackedLayer]] = {}
    for layer in layers.values():
        for use in layer.uses if not isinstance(layer, UnfollowedLayer) else ():
            uses.setdefault(use.module, []).append(use)
    hooks = {module: partial(_see, seen, of_module, anchor) for module, of_module in uses.items()}
    with torch.enable_grad(), forward_hooks(hooks):
        loss = run(copies)
        seen.backward = True
        if loss.requires_grad:
            torch.autograd.grad(loss, anchor, allow_unused=True)
    return seen


def _see(
    seen: _Run,
    uses: list[TrackedLayer],
    anchor: Tensor,
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
) -> Any:
    """Note one call; its output comes back with taps that note which of its tensors the loss depends on."""
    if not torch.is_grad_enabled():
        return output
    leaves, spec = tree_flatten(output)
    of_uses = [] if seen.backward else _noted(seen, uses, args, kwargs, leaves)  # a forward that is recomputed
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            seen.coarse |= leaf.dtype in _COARSE
            leaves[place] = Tap.apply(leaf.clone(), anchor, partial(_note, of_uses, place))
    return tree_unflatten(leaves, spec)


def _noted(
    seen: _Run, uses: list[TrackedLayer], args: tuple[Any, ...], kwargs: Mapping[str, Any], leaves: list[Any]
) -> list[_Seen]:
    """What is noted of one call, for each use."""
    given, _ = tree_flatten((args, dict(kwargs)))
    whole = _Seen(_shapes(given), _shapes(leaves))
    if any(isinstance(use, FunctionLayer) for use in uses):
        seen.calls.setdefault(_key(uses[0]), []).append(whole)
    of_uses = [whole]
    for use in uses:
        if not isinstance(use, FunctionLayer):
            of_uses.append(_Seen(_shapes([use.call_value(args, kwargs)]), _shapes(leaves)))
            seen.calls.setdefault(use.name, []).append(of_uses[-1])
    return of_uses


def _note(of_uses: list[_Seen], place: int, _gradient: Tensor) -> None:
    for of_use in of_uses:
        of_use.gradients.add(place)


def _shapes(leaves: list[Any]) -> _Shapes:
    return tuple(leaf.shape if isinstance(leaf, Tensor) else None for leaf in leaves)


def _used(calls: list[_Seen]) -> list[_Seen]:
    """The calls that the loss depends on; all of them where it depends on none."""
    return [call for call in calls if call.gradients] or calls


def _use_layout(two: list[_Seen], three: list[_Seen]) -> CallLayout | None:
    """The one layout of all calls' first inputs, which their outputs must have as well; None where there is none."""
    if len(_used(two)) != len(_used(three)):
        return None
    found = set()
    for a, b in zip(_used(two), _used(three), strict=True):
        pairs = zip((a.inputs[0], *a.outputs), (b.inputs[0], *b.outputs), strict=False)
        given, *returned = (call_layout(x, y) if x is not None and y is not None else None for x, y in pairs)
        output = returned[0] if len(returned) == 1 else None  # says what a shared tensor's first axis is
        found.add(output if given and output and given[:2] == output[:2] else None)
    return found.pop() if len(found) == 1 else None


def _function_layout(two: list[_Seen], three: list[_Seen]) -> FunctionLayout | None:
    """The one layout of all calls of a module; None where there is none."""
    if len(_used(two)) != len(_used(three)) or not two:
        return None
    found: set[FunctionLayout | None] = set()
    for a, b in zip(_used(two), _used(three), strict=True):
        sides = []
        for x, y in ((a.inputs, b.inputs), (a.outputs, b.outputs)):
            if len(x) != len(y):
                return None
            sides.append(
                tuple(None if s is None or t is None else call_layout(s, t) for s, t in zip(x, y, strict=True))
            )
        odd = any(
            s is not None and of is None for s, of in zip((*a.inputs, *a.outputs), (*sides[0], *sides[1]), strict=True)
        )
        found.add(None if odd else FunctionLayout(*sides))
    return found.pop() if len(found) == 1 else None
