"""Features: numbers that tell training examples apart, from one pass at the end of training.

Gradients with respect to the penultimate activations are the features that group best in Ley et al. 2024
(arXiv 2410.09940). Axes: N examples, B of a batch, S positions, O outputs, D features.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..curvature.projection import probes
from ..data.batches import Batch, in_order
from ..errors import LayerError, SegflowError, StoreError, TaskError, check_choice
from ..methods.plan import Projection
from ..model.capture import Consumer
from ..model.finite_check import FiniteCheck
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.representation_view import last_matrix, representation_view
from ..model.tokens import Tokens
from ..runtime.ranks import Ranks
from ..runtime.sharding import whole
from ..stage.context import StageContext
from ..store.files import writing_array

KINDS = ("gradient", "weight gradient", "representation", "input")
_SKETCH = 64  # features of a weight gradient
_PIECE = 64 << 20  # bytes that travel in one go


def check_kind(kind: str, layer: str | None) -> None:
    """Raise SegflowError unless there are features of this kind, and of a layer if one is named."""
    check_choice("of", kind, KINDS, SegflowError)
    if kind == "input" and layer is not None:
        raise SegflowError(f'layer={layer!r}: the model\'s input is of no layer. Ask for of="representation".')


def example_features(
    context: StageContext, train: Any, kind: str, layer: str | None, batch_size: int, out: str | os.PathLike[str] | None
) -> np.ndarray:
    """Features [N, D] of the training examples at the stage's last checkpoint, in single precision and their order.

    Inside `observing(model)`; the ranks share the pass, and all get all features.

    Args:
        context: of the stage whose training examples these are.
        train: the stage's training data.
        kind: one of KINDS.
        layer: a tracked layer's name; None: the last one.
        batch_size: examples in one forward and backward.
        out: a file to write instead.
    """
    context.load(context.last)
    path, ranks = None if out is None else Path(out), context.ranks
    where = f"features, {context.where(context.last)}"
    finite = FiniteCheck(where)
    context.train_reader(train).check_steady(ranks)
    with _extracting(context, train, kind, layer, finite) as (view, extractor):
        lists = in_order(len(train), batch_size)
        views = context.settings.views
        data = context.walk(view, context.train_reader(train), ranks.share(lists), where, views)
        parts = _collected(
            zip(*[data] * views, strict=True), extractor.features_of, ranks, -(-len(lists) // ranks.count)
        )
        checked = _finished(parts, finite, () if kind == "input" else view.layers, ranks)
        shape = (len(train), extractor.width)
        if path is None:
            return _gathered(checked, shape, ranks)
        _written(checked, shape, path, ranks)
    return _opened(path, ranks)


class _Extractor(NamedTuple):
    """How a batch becomes features: D of them for each example, by a function from the batch to [B, D]."""

    width: int
    features_of: Callable[[Batch], Tensor]


@contextmanager
def _extracting(
    context: StageContext, train: Any, kind: str, layer: str | None, finite: FiniteCheck
) -> Iterator[tuple[LossView, _Extractor]]:
    """The training loss's view with the layer alone, and the extractor of its features."""
    tracked = context.layers.tracked
    name = last_matrix(tracked) if layer is None else layer
    if name not in tracked:
        raise LayerError(f"layer={name!r} is not tracked. Choose one of {list(tracked)[:8]}.")
    if kind == "gradient" and not isinstance(tracked[name].module, nn.Linear):
        raise LayerError(
            f"layer {name!r} is a {type(tracked[name].module).__name__}: gradients with respect to its input are known "
            'for nn.Linear only. Name a linear layer with layer=, or take of="representation".'
        )
    view = context.loss_view("train", train, {name: tracked[name]})
    if kind != "input":
        make = {"gradient": _gradients, "weight gradient": _weight_gradients, "representation": _representations}
        yield view, make[kind](view, finite)
        return
    with _watching(context.model) as given:
        [first] = context.train_reader(train).probes([[0]], view.device)
        width = _inputs(view, first, given, finite).shape[1]
        yield view, _Extractor(width, lambda batch: _inputs(view, batch, given, finite))


def _only(view: LossView) -> TrackedLayer:
    return next(iter(view.layers.values()))


def _weight_gradients(view: LossView, finite: FiniteCheck) -> _Extractor:
    """Random projections of the gradient of the layer's weight and bias; all of it where it has few numbers."""
    layer = _only(view)
    projection = Projection(_SKETCH if layer.size > _SKETCH else None, 0)
    probe = probes(projection, {layer.name: layer.shape}, view.dtype, view.device)[layer.name]
    none_D = torch.zeros(probe.features, dtype=view.dtype, device=view.device)
    return _Extractor(probe.features, _captured(view.capture, probe.of_tokens, none_D, finite))


def _gradients(view: LossView, finite: FiniteCheck) -> _Extractor:
    """g W of each example, summed over positions: the backward ends at the layer's output."""
    layer = _only(view)
    weight_OD = whole(layer.module.get_parameter("weight")).detach().to(view.dtype)

    def of_tokens(tokens: Tokens) -> Tensor:
        return tokens.g_PBSO[0].sum(1) @ weight_OD

    return _Extractor(
        weight_OD.shape[1], _captured(view.capture, of_tokens, weight_OD.new_zeros(weight_OD.shape[1]), finite)
    )


def _representations(view: LossView, finite: FiniteCheck) -> _Extractor:
    """The layer's input, averaged over positions."""
    representations = representation_view(view, None, normalized=False)
    width = representations.layers[representations.layer.name].shape[-1]
    none_D = torch.zeros(width, dtype=view.dtype, device=view.device)
    return _Extractor(width, _captured(representations.capture, lambda tokens: tokens.dense_a[0, :, 0], none_D, finite))


def _captured(
    capture: Callable[[Batch, Consumer, FiniteCheck], Tensor],
    of_tokens: Callable[[Tokens], Tensor],
    none_D: Tensor,
    finite: FiniteCheck,
) -> Callable[[Batch], Tensor]:
    """A batch's features from the layer's tokens; zeros where its loss does not reach the layer."""

    def features_of(batch: Batch) -> Tensor:
        captured: list[Tensor] = []
        capture(batch, lambda _, tokens: captured.append(of_tokens(tokens)), finite)
        return captured[0] if captured else none_D.expand(batch.size, -1)

    return features_of


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[Tensor | None]]:
    """A list that grows by the first tensor argument of each of the model's calls; None where there is none."""
    given: list[Tensor | None] = []

    def note(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        tensor = next(tensors, None)
        given.append(None if tensor is None else tensor.detach().clone())  # a model may work in place

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield given
    finally:
        handle.remove()


def _inputs(view: LossView, batch: Batch, given: list[Tensor | None], finite: FiniteCheck) -> Tensor:
    """What the model is given first in a batch's loss, [B, D]; given: the list that `_watching` fills."""
    given.clear()
    with torch.enable_grad():  # a loss may differentiate by itself
        finite.see_loss(batch, view.loss(batch).detach())
    value = given[0] if given else None
    if value is None or not value.is_floating_point() or value.ndim < 2 or len(value) != batch.size:
        what = "no tensor" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
        raise TaskError(
            f"the model's input: found {what} for {batch.size} examples, expected floating-point numbers "
            '[examples, ...]. Take of="representation", which is the input of a layer.'
        )
    return value.flatten(1)


def _collected(
    data: Iterable[tuple[Batch, ...]], features_of: Callable[[Batch], Tensor], ranks: Ranks, rounds: int
) -> Iterator[list[Tensor | None]]:
    """Every rank's next batch of features, on rank 0: in the dataset's order, as batches are dealt out in turn.

    data: the views of each batch, whose features are averaged.
    """
    for views in chain(data, repeat(None)):
        if rounds == 0:
            return
        part_BD = None
        if views is not None:
            mean_BD = torch.stack([features_of(batch).to("cpu", torch.float32) for batch in views]).mean(0)
            part_BD = None if views[0].idle else mean_BD
        yield ranks.collect(part_BD)
        rounds -= 1


def _finished(
    parts: Iterator[list[Tensor | None]], finite: FiniteCheck, layers: Iterable[str], ranks: Ranks
) -> Iterator[list[Tensor | None]]:
    """The same; whether all was finite is known before they end, so that nothing else is ever committed."""
    yield from parts
    finite.finish(layers, ranks)


def _in_turn(parts: Iterator[list[Tensor | None]], width: int) -> Iterator[Tensor]:
    """The batches' features [B, D] one by one; none on other ranks than the first, which take part all the same."""
    for part_BD in chain.from_iterable(parts):
        if part_BD is None:
            continue
        if part_BD.shape[1] != width:
            raise TaskError(
                f"features of {part_BD.shape[1]} numbers for some examples, {width} for the first. Inputs that differ "
                'in size cannot be compared; take of="representation" or of="gradient".'
            )
        yield part_BD


def _gathered(parts: Iterator[list[Tensor | None]], shape: tuple[int, int], ranks: Ranks) -> np.ndarray:
    """All features [N, D] on every rank."""
    features_ND, start = torch.empty(shape), 0
    for part_BD in _in_turn(parts, shape[1]):
        features_ND[start : start + len(part_BD)] = part_BD
        start += len(part_BD)
    if ranks.count > 1:
        for piece_nD in features_ND.split(max(1, _PIECE // (4 * shape[1]))):
            piece_nD.copy_(ranks.broadcast(piece_nD if ranks.main else None))
    return features_ND.numpy()


def _written(parts: Iterator[list[Tensor | None]], shape: tuple[int, int], path: Path, ranks: Ranks) -> None:
    """All features [N, D] in a file, which rank 0 writes."""
    if not ranks.main:
        for _ in _in_turn(parts, shape[1]):
            pass
        return
    with writing_array(path, np.dtype(np.float32), shape, StoreError) as write:
        for part_BD in _in_turn(parts, shape[1]):
            write(part_BD.numpy())


def _opened(path: Path, ranks: Ranks) -> np.ndarray:
    """The file that rank 0 wrote, read only."""
    ranks.same()  # it is there before anybody looks
    try:
        features_ND: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as problem:
        raise StoreError(
            f"{path}: cannot be read ({problem}). Give out= on a file system that every process sees."
        ) from problem
    return features_ND
