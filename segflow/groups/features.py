"""Features: numbers that tell training examples apart, from one pass at the end of training.

Gradients with respect to the penultimate activations are the features that group best in Ley et al. 2024
(arXiv 2410.09940). Axes: N examples, B of a batch, S positions, O outputs, D features.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..curvature.projection import probes
from ..data.batches import Batch, in_order
from ..errors import LayerError, SegflowError, StoreError, TaskError, check_choice
from ..methods.plan import Projection
from ..model.capture import Consumer
from ..model.finite import FiniteCheck
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.representation_view import RepresentationView
from ..model.tokens import Tokens
from ..runtime.ranks import Ranks
from ..runtime.sharding import whole
from ..stage.context import StageContext
from ..store.files import writing_array

KINDS = ("gradient", "weight gradient", "representation", "input")
_SKETCH = 64  # features of a weight gradient
_PIECE = 64 << 20  # bytes that travel in one go
Path_ = str | os.PathLike[str]


@dataclass(frozen=True)
class Asked:
    """Which features: `of` is one of KINDS, layer a tracked layer's name (None: the last one)."""

    of: str = "gradient"
    layer: str | None = None

    def __post_init__(self) -> None:
        check_choice("of", self.of, KINDS, SegflowError)
        if self.of == "input" and self.layer is not None:
            raise SegflowError(f'layer={self.layer!r}: the model\'s input is of no layer. Ask for of="representation".')


def example_features(context: StageContext, train: Any, asked: Asked, batch_size: int, out: Path_ | None) -> np.ndarray:
    """Features [N, D] of the training examples at the stage's last checkpoint, in single precision and their order.

    Inside `observing(model)`; the ranks share the pass, and all get all features. out: a file to write instead.
    """
    context.load(context.last)
    path, ranks = None if out is None else Path(out), context.ranks
    where = f"features, {context.where(context.last)}"
    finite = FiniteCheck(where)
    with _seeing(context, train, asked, finite) as (view, see):
        lists = in_order(len(train), batch_size)
        data = context.walk(view, train, ranks.share(lists), where)
        parts = _parts(data, see.rows, ranks, -(-len(lists) // ranks.count))
        checked = _finished(parts, finite, () if asked.of == "input" else view.layers, ranks)
        found = _gathered(checked, (len(train), see.width), path, ranks)
    return found if path is None else _opened(path, ranks)


@dataclass(frozen=True)
class _See:
    """How a batch becomes features: their width D, and a function from the batch to [B, D]."""

    width: int
    rows: Callable[[Batch], Tensor]


@contextmanager
def _seeing(context: StageContext, train: Any, asked: Asked, finite: FiniteCheck) -> Iterator[tuple[LossView, _See]]:
    tracked = context.layers.tracked
    name = list(tracked)[-1] if asked.layer is None else asked.layer
    if name not in tracked:
        raise LayerError(f"layer={name!r} is not tracked. Choose one of {list(tracked)[:8]}.")
    layer = tracked[name]
    if asked.of == "gradient" and not isinstance(layer.module, nn.Linear):
        raise LayerError(
            f"layer {name!r} is a {type(layer.module).__name__}: gradients with respect to its input are known for "
            'nn.Linear only. Name a linear layer with layer=, or take of="representation".'
        )
    view = context.loss_view("train", train, {name: layer})
    if asked.of != "input":
        see = {"gradient": _gradients, "weight gradient": _weight_gradients, "representation": _representations}
        yield view, see[asked.of](view, finite)
        return
    with _Inputs(context.model).watching() as inputs:
        [first] = context.walk(view, train, [[0]], "the first example")
        yield view, _See(inputs.rows(view, first, finite).shape[1], lambda batch: inputs.rows(view, batch, finite))


def _only(view: LossView) -> TrackedLayer:
    return next(iter(view.layers.values()))


def _weight_gradients(view: LossView, finite: FiniteCheck) -> _See:
    """Random projections of the gradient of the layer's weight and bias; all of it where it has few numbers."""
    layer = _only(view)
    projection = Projection(_SKETCH if layer.size > _SKETCH else None, 0)
    probe = probes(projection, {layer.name: layer.shape}, view.dtype, view.device)[layer.name]
    none_D = torch.zeros(probe.features, dtype=view.dtype, device=view.device)
    return _See(probe.features, _captured(view.capture, probe.of_tokens, none_D, finite))


def _gradients(view: LossView, finite: FiniteCheck) -> _See:
    """g W of each example, summed over positions: the backward ends at the layer's output."""
    layer = _only(view)
    weight_OD = whole(layer.module.get_parameter("weight")).detach().to(view.dtype)

    def of_tokens(tokens: Tokens) -> Tensor:
        return tokens.g_PBSO[0].sum(1) @ weight_OD

    return _See(weight_OD.shape[1], _captured(view.capture, of_tokens, weight_OD.new_zeros(weight_OD.shape[1]), finite))


def _representations(view: LossView, finite: FiniteCheck) -> _See:
    """The layer's input, averaged over positions."""
    seen = RepresentationView(view, normalized=False)
    width = next(iter(seen.layers.values())).shape[-1]
    none_D = torch.zeros(width, dtype=view.dtype, device=view.device)
    return _See(width, _captured(seen.capture, lambda tokens: tokens.a_PBSI[0, :, 0], none_D, finite))


def _captured(
    capture: Callable[[Batch, Consumer, FiniteCheck], Tensor],
    of_tokens: Callable[[Tokens], Tensor],
    none_D: Tensor,
    finite: FiniteCheck,
) -> Callable[[Batch], Tensor]:
    """A batch's features from the layer's tokens; zeros where its loss does not reach the layer."""

    def rows(batch: Batch) -> Tensor:
        found: list[Tensor] = []
        capture(batch, lambda _, tokens: found.append(of_tokens(tokens)), finite)
        return found[0] if found else none_D.expand(batch.size, -1)

    return rows


@dataclass
class _Inputs:
    """What a model is given: the first tensor argument of its first call in a batch."""

    model: nn.Module
    given: list[Tensor | None] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[_Inputs]:
        handle = self.model.register_forward_pre_hook(self._note, with_kwargs=True)
        try:
            yield self
        finally:
            handle.remove()

    def _note(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        tensor = next(tensors, None)
        self.given.append(None if tensor is None else tensor.detach().clone())  # a model may work in place

    def rows(self, view: LossView, batch: Batch, finite: FiniteCheck) -> Tensor:
        """The inputs [B, D] of a batch."""
        self.given.clear()
        with torch.enable_grad():  # a loss may differentiate by itself
            finite.see_loss(batch, view.loss(batch).detach())
        value = self.given[0] if self.given else None
        if value is None or not value.is_floating_point() or value.ndim < 2 or len(value) != batch.size:
            what = "no tensor" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
            raise TaskError(
                f"the model's input: found {what} for {batch.size} examples, expected floating-point numbers "
                '[examples, ...]. Take of="representation", which is the input of a layer.'
            )
        return value.flatten(1)


def _parts(
    data: Iterator[Batch], rows: Callable[[Batch], Tensor], ranks: Ranks, rounds: int
) -> Iterator[list[Tensor | None]]:
    """Every rank's next batch of features, on rank 0: in the dataset's order, as batches are dealt out in turn."""
    for batch in chain(data, repeat(None)):
        if rounds == 0:
            return
        part = None if batch is None else rows(batch).to("cpu", torch.float32)
        yield ranks.collect(None if batch is None or batch.idle else part)
        rounds -= 1


def _finished(
    parts: Iterator[list[Tensor | None]], finite: FiniteCheck, layers: Iterable[str], ranks: Ranks
) -> Iterator[list[Tensor | None]]:
    """The same; whether all was finite is known before they end, so that nothing else is ever committed."""
    yield from parts
    finite.finish(layers, ranks)


def _gathered(
    parts: Iterator[list[Tensor | None]], shape: tuple[int, int], path: Path | None, ranks: Ranks
) -> np.ndarray:
    """All features on every rank; with a path, written to it by rank 0 instead."""
    if path is not None and ranks.main:
        with writing_array(path, np.dtype(np.float32), shape, StoreError) as write:
            for part in chain.from_iterable(parts):
                if part is not None:
                    write(_checked(part, shape).numpy())
        return np.empty(0)
    found_ND, start = torch.empty(shape if path is None else (0, 0)), 0
    for part in chain.from_iterable(parts):
        if part is not None:
            found_ND[start : start + len(part)] = _checked(part, shape)
            start += len(part)
    if ranks.count > 1 and path is None:
        for piece_nD in found_ND.split(max(1, _PIECE // (4 * shape[1]))):
            piece_nD.copy_(ranks.broadcast(piece_nD if ranks.main else None))
    return found_ND.numpy()


def _checked(part_BD: Tensor, shape: tuple[int, int]) -> Tensor:
    if part_BD.shape[1] != shape[1]:
        raise TaskError(
            f"features of {part_BD.shape[1]} numbers for some examples, {shape[1]} for the first. Inputs that differ "
            'in size cannot be compared; take of="representation" or of="gradient".'
        )
    return part_BD


def _opened(path: Path, ranks: Ranks) -> np.ndarray:
    """The file that rank 0 wrote, read only."""
    ranks.same()  # it is there before anybody looks
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as problem:
        raise StoreError(
            f"{path}: cannot be read ({problem}). Give out= on a file system that every process sees."
        ) from problem
    return found
