"""What happens to gradients between a backward pass and the optimizer's step: clipping by norm, and changes by others.

While a watch is active, torch's backward, its clipping functions and GradScaler's unscaling tell of their calls; what
they do is unchanged. The clipping functions are patched where they look names up, in their own module, so that it does
not matter when or from where the training script imported them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from ..runtime.sharding import whole

Factor = float | Tensor  # what clipping left of a gradient; a tensor of one number where it was computed on a device
ONE: Factor = 1.0  # the factor of a gradient that was not clipped, which this very object marks
Signature = tuple[int, int] | None  # which tensor a gradient is, and how often it was written to; None without one

_ACTIVE: list[GradientWatch] = []  # the watches of all recordings under way
_UNDO: list[Callable[[], None]] = []  # puts torch's own functions back when the last watch ends
BY_VALUE, BY_HAND = "clipped by value", "changed between the backward pass and the step"
ON_CLIPPED = "accumulated onto a clipped gradient"


class GradientWatch:
    """Follows the gradients of some parameters, each told by its place.

    `factors`: what clipping by norm left of each gradient as it stands. `strange`: what was done to gradients that no
    factor follows. Both are read, and never written, by others. All this runs in every step, so it is written for
    speed.
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
        self.factors += [ONE] * len(parameters)
        self._last += _signatures(parameters)
        self._stepped += [self._passes] * len(parameters)
        self._reached += [0] * len(parameters)

    @property
    def told(self) -> bool:
        """Whether backward passes are seen at all; they are not where gradients are made without torch's `backward`."""
        return self._passes > 0

    def replace(self, place: int, parameter: Tensor) -> None:
        """Another parameter has this place now; its gradient, if it has one, is taken as a backward pass left it."""
        self.parameters[place], self.factors[place] = parameter, ONE
        [self._last[place]] = _signatures([parameter])
        self._reached[place] = self._passes if self._last[place] is not None else 0

    def reached(self, places: Sequence[int]) -> list[bool]:
        """Whether a backward pass left parameters with a gradient since they were stepped last."""
        reached, stepped, parameters = self._reached, self._stepped, self.parameters
        return [reached[place] > stepped[place] and parameters[place].grad is not None for place in places]

    def stepped(self, places: Sequence[int]) -> None:
        """These parameters were stepped; what counts from now on is what later passes reach."""
        parameters, last, stepped, passes = self.parameters, self._last, self._stepped, self._passes
        for place in places:
            gradient = parameters[place].grad
            last[place] = None if gradient is None else (id(gradient), gradient._version)
            stepped[place] = passes

    def check(self, places: Sequence[int]) -> None:
        """Before a step: note it if a gradient was changed since it was seen last."""
        parameters, last = self.parameters, self._last
        for place in places:
            gradient = parameters[place].grad
            if gradient is not None and last[place] != (id(gradient), gradient._version):
                self._changed(place, gradient)

    def _changed(self, place: int, gradient: Tensor) -> None:
        """Nobody told how a gradient came to be another: somebody changed it, if there was a backward pass."""
        if self._passes > self._stepped[place]:
            self.strange.add(BY_HAND)
        last = self._last[place]
        if not self.told or last is None or last[0] != id(gradient):  # another gradient, which nothing clipped
            self.factors[place] = ONE
        self._last[place] = id(gradient), gradient._version

    def before_backward(self) -> None:
        """Note which gradients stand, and which were made anew since they were seen last."""
        self._depth += 1
        if self._depth == 1:
            self._before = now = _signatures(self.parameters)
            if now != self._last:
                for place, (new, old) in enumerate(zip(now, self._last, strict=True)):
                    if new != old:  # gone, zeroed, or another's
                        self.factors[place], self._reached[place] = ONE, 0

    def after_backward(self, done: bool) -> None:
        """Note which gradients the backward pass reached; done: False where it raised an error."""
        self._depth -= 1
        if self._depth or not done:
            return
        self._passes += 1
        before, now = self._before, _signatures(self.parameters)
        before += [None] * (len(now) - len(before))  # of parameters that came within the pass
        passes, factors = self._passes, self.factors
        for place, (old, new) in enumerate(zip(before, now, strict=True)):
            if old != new:
                self._reached[place] = passes
                if factors[place] is not ONE:
                    self.strange.add(ON_CLIPPED)
        self._last = now

    def clipped(self, clipped: Collection[int], factor: Tensor) -> None:
        """Gradients, told by their ids, are about to be multiplied by a factor."""
        last, factors = self._last, self.factors
        for place, parameter in enumerate(self.parameters):
            gradient = parameter.grad
            if gradient is None or id(gradient) not in clipped:
                continue
            if last[place] != (id(gradient), gradient._version):
                self._changed(place, gradient)
            factors[place] = factor if factors[place] is ONE else factors[place] * factor
            last[place] = id(gradient), gradient._version + 1

    def clipped_by_value(self, clamped: Collection[int]) -> None:
        """Gradients, told by their ids, are about to be clamped from below, and then from above."""
        self.strange.add(BY_VALUE)
        for place, signature in enumerate(_signatures(self.parameters)):
            if signature is not None and signature[0] in clamped:
                self._last[place] = signature[0], signature[1] + 2

    def rewritten(self) -> None:
        """Gradients were rewritten in a way that needs no factor: GradScaler undid the loss's scale."""
        self._last = _signatures(self.parameters)


def _signatures(parameters: Sequence[Tensor]) -> list[Signature]:
    return [None if (g := parameter.grad) is None else (id(g), g._version) for parameter in parameters]


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
        done = False
        for watch in _ACTIVE:
            watch.before_backward()
        try:
            backward(*arguments, **options)
            done = True
        finally:
            for watch in _ACTIVE:
                watch.after_backward(done)

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
    listed: set[int] = set()  # ids, for nothing may keep gradients alive

    def group_and_note(tensors: Any, *arguments: Any, **options: Any) -> Any:
        listed.clear()
        listed.update(map(id, tensors[0]))
        return group(tensors, *arguments, **options)

    def clamp(value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        factor = torch.clamp(value, *arguments, **options)
        for watch in _ACTIVE:
            watch.clipped(listed, whole(factor.detach()))
        return factor

    def clamp_values(gradients: list[Tensor], *arguments: Any, **options: Any) -> Any:
        for watch in _ACTIVE:
            watch.clipped_by_value(listed)
        return torch._foreach_clamp_min_(gradients, *arguments, **options)

    stand_in = _StandIn({"clamp": clamp, "_foreach_clamp_min_": clamp_values})
    return [(clip_grad, "_group_tensors_by_device_and_dtype", group_and_note), (clip_grad, "torch", stand_in)]


class _StandIn(ModuleType):
    """torch, as one module sees it, with some functions replaced."""

    def __init__(self, replaced: dict[str, Any]):
        super().__init__("torch")
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        value = vars(self)[name] = getattr(torch, name)  # looked up once
        return value
