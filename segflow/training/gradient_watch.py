"""What happens to gradients between a backward pass and the optimizer's step: clipping by norm, and changes by others.

While a watch is active, torch's backward, its clipping functions and GradScaler's unscaling tell of their calls; what
they do is unchanged. The clipping functions are patched where they look names up, in their own module, so that it does
not matter when or from where the training script imported them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from ..runtime.sharding import whole

Factor = float | Tensor  # what clipping left of a gradient; a tensor of one number where it was computed on a device
Signature = tuple[int, int] | None  # which tensor a gradient is, and how often it was written to; None without one

_ACTIVE: list[GradientWatch] = []  # the watches of all recordings under way
_UNDO: list[Callable[[], None]] = []  # puts torch's own functions back when the last watch ends
BY_VALUE, BY_HAND = "clipped by value", "changed between the backward pass and the step"
ON_CLIPPED = "accumulated onto a clipped gradient"


class GradientWatch:
    """Follows the gradients of some parameters, each told by its place.

    `factors`: what clipping by norm left of each gradient as it stands. `strange`: what was done to gradients that no
    factor follows. Both are read, and never written, by others.
    """

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.factors: list[Factor] = []
        self.strange: set[str] = set()
        self._last: list[Signature] = []  # after what was seen last
        self._before: list[Signature] = []  # before the backward pass under way
        self._depth = 0  # of backward passes within backward passes, as recomputed activations need them
        self._passes = 0  # backward passes so far
        self._stepped: list[int] = []  # the passes there had been when a parameter was stepped last
        self._reached: list[int] = []  # the number of the last pass that reached it

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Follow these parameters too."""
        self.parameters += parameters
        self.factors += [1.0] * len(parameters)
        self._last += [_signature(parameter) for parameter in parameters]
        self._stepped += [self._passes] * len(parameters)
        self._reached += [0] * len(parameters)

    def reached(self, place: int) -> bool:
        """Whether a backward pass reached a parameter since it was stepped last; True where no pass was seen at all."""
        stepped = self._stepped[place]
        return self._reached[place] > stepped or self._passes == stepped

    def stepped(self, places: Sequence[int]) -> None:
        """These parameters were stepped; what counts from now on is what later passes reach."""
        for place in places:
            self._stepped[place] = self._passes
            self._last[place] = _signature(self.parameters[place])

    def check(self, places: Sequence[int]) -> None:
        """Before a step: note it if a gradient was changed since it was seen last."""
        for place in places:
            if self._passes > self._stepped[place]:
                self._compare(place, _signature(self.parameters[place]))

    def _compare(self, place: int, signature: Signature) -> None:
        if signature is not None and signature != self._last[place]:
            self.strange.add(BY_HAND)
            self._last[place] = signature

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Around a backward pass: sees which gradients it reaches, and which were made anew before it."""
        self._depth += 1
        if self._depth == 1:
            self._before = [_signature(parameter) for parameter in self.parameters]
            for place, (now, last) in enumerate(zip(self._before, self._last, strict=True)):
                if now != last:  # gone, zeroed, or another's
                    self.factors[place] = 1.0
        try:
            yield
        finally:
            self._depth -= 1
        if self._depth == 0:
            self._after_backward()

    def _after_backward(self) -> None:
        self._passes += 1
        self._before += [None] * (len(self.parameters) - len(self._before))  # of parameters that came within the pass
        for place, (parameter, before) in enumerate(zip(self.parameters, self._before, strict=True)):
            now = self._last[place] = _signature(parameter)
            if now != before:
                self._reached[place] = self._passes
                if isinstance(self.factors[place], Tensor):
                    self.strange.add(ON_CLIPPED)

    def clipped(self, gradients: Sequence[Tensor], factor: Tensor) -> None:
        """These gradients are about to be multiplied by a factor."""
        clipped = set(map(id, gradients))
        for place, parameter in enumerate(self.parameters):
            signature = _signature(parameter)
            if signature is None or signature[0] not in clipped:
                continue
            if self._passes > self._stepped[place]:
                self._compare(place, signature)
            self.factors[place] = _product(self.factors[place], factor)
            self._last[place] = signature[0], signature[1] + 1

    def rewritten(self) -> None:
        """Gradients were rewritten in a way that needs no factor: GradScaler undid the loss's scale."""
        self._last = [_signature(parameter) for parameter in self.parameters]


def _signature(parameter: Tensor) -> Signature:
    gradient = parameter.grad
    return None if gradient is None else (id(gradient), gradient._version)


def _product(before: Factor, factor: Tensor) -> Factor:
    return factor if not isinstance(before, Tensor) and before == 1.0 else before * factor


@contextmanager
def watching(watch: GradientWatch) -> Iterator[GradientWatch]:
    """Let a watch see what the block does to gradients."""
    _ACTIVE.append(watch)
    undo = _install() if len(_ACTIVE) == 1 else None
    if undo is not None:
        _UNDO.append(undo)
    try:
        yield watch
    finally:
        _ACTIVE.remove(watch)
        if not _ACTIVE:
            _UNDO.pop()()


def _install() -> Callable[[], None]:
    """Put what tells of calls in the place of torch's functions; returns what puts these back."""
    scaler = torch.amp.grad_scaler.GradScaler
    places: list[tuple[Any, str, Any]] = [
        (torch.autograd, "backward", _telling_backward(torch.autograd.backward)),
        (scaler, "_unscale_grads_", _telling_unscale(scaler._unscale_grads_)),
        *_clipping_patches(),
    ]
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in places]
    for owner, name, patch in places:
        setattr(owner, name, patch)

    def undo() -> None:
        for owner, name, original in originals:
            setattr(owner, name, original)

    return undo


def _telling_backward(backward: Callable[..., None]) -> Callable[..., None]:
    def backward_and_tell(*arguments: Any, **options: Any) -> None:
        with ExitStack() as stack:
            for watch in _ACTIVE:
                stack.enter_context(watch.backward())
            backward(*arguments, **options)

    return backward_and_tell


def _telling_unscale(unscale: Callable[..., Any]) -> Callable[..., Any]:
    def unscale_and_tell(*arguments: Any, **options: Any) -> Any:
        result = unscale(*arguments, **options)
        for watch in _ACTIVE:
            watch.rewritten()
        return result

    return unscale_and_tell


def _clipping_patches() -> list[tuple[Any, str, Any]]:
    """What torch.nn.utils.clip_grad looks up: how it lists gradients, and the torch functions that clip them.

    All its functions list gradients by `_group_tensors_by_device_and_dtype`; those that clip by norm then make their
    factor by torch.clamp, and those that clip by value take torch._foreach_clamp_min_ (or Tensor.clamp_, which is seen
    as a change only).
    """
    group = clip_grad._group_tensors_by_device_and_dtype  # type: ignore[attr-defined]
    listed: list[Tensor] = []

    def group_and_note(tensors: Any, *arguments: Any, **options: Any) -> Any:
        listed[:] = tensors[0]
        return group(tensors, *arguments, **options)

    def clamp(value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        factor = torch.clamp(value, *arguments, **options)
        for watch in _ACTIVE:
            watch.clipped(listed, whole(factor.detach()))
        return factor

    def clamp_values(*arguments: Any, **options: Any) -> Any:
        for watch in _ACTIVE:
            watch.strange.add(BY_VALUE)
        return torch._foreach_clamp_min_(*arguments, **options)

    stand_in = _StandIn({"clamp": clamp, "_foreach_clamp_min_": clamp_values})
    return [(clip_grad, "_group_tensors_by_device_and_dtype", group_and_note), (clip_grad, "torch", stand_in)]


class _StandIn(ModuleType):
    """torch, as one module sees it, with some functions replaced."""

    def __init__(self, replaced: dict[str, Any]):
        super().__init__("torch")
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
