"""Making a view of a model: how its layers see a batch is found by runs of a few examples, and compared with autograd.

Where a layer's tokens do not give an example's gradient exactly as autograd does, the layer is run example by example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch, evenly_spaced
from ..data.draws import seeded
from ..data.readers import Reader
from ..errors import JoinError, LayerError, SegflowError
from ..runtime.sharding import is_sharded
from ..tasks.task import summed_loss
from .capture import DetachedError
from .find_layout import find_layout
from .finite_check import FiniteCheck
from .layers.function import FunctionLayer
from .layers.tracked import TrackedLayer
from .layout import Layout
from .loss_view import LossView, naming_loss
from .row_moves import moved_layers
from .tokens import Tokens

_TRIED = 4  # examples of which one is looked for that can be joined with the first
_ROUNDING = 100  # units in the last place
_FAULTS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, SegflowError)  # of a model run otherwise


def make_loss_view(
    model: nn.Module,
    task: Any,
    kind: str,
    layers: Mapping[str, TrackedLayer],
    reader: Reader,
) -> LossView:
    """A view of the model, whose layout is found with a dataset's first example; call it inside `observing(model)`.

    Raises LayerError where a layer is not reached by the loss. A measurement may leave layers out: their share of its
    gradient is zero.
    """
    device = next(iter(layers.values())).parameters[0].device

    def run(copies: int) -> Tensor:
        [batch] = reader.probes([[0] * copies], device)
        with naming_loss(task, kind, batch, model):
            return summed_loss(task, batch.content, model, kind=kind)

    view = LossView(model, task, kind, layers, find_layout(layers, run))
    if kind == "sample":  # what is drawn for an example may depend on its batch, what a loss does with it does not
        view = replace(view, layout=_compared(replace(view, kind="train"), reader).layout)
    view = _compared(view, reader)
    unreached = [name for name in layers if name not in view.layout.reached]
    if unreached and (kind != "measurement" or not view.layout.reached):
        raise LayerError(
            f"layer {unreached[0]!r}: never reached by the {kind} loss"
            f"{f' (nor {unreached[1:]})' if unreached[1:] else ''}. Leave out what is not used: "
            f"Analyzer(..., exclude={unreached})."
        )
    return view


def _compared(view: LossView, reader: Reader) -> LossView:
    """The view in which every layer gives what autograd does, those that do not in a batch example by example."""
    batches = _batches(reader, view.device)
    if view.kind == "sample" and not _repeats(view, batches[0]):
        return _settled(view, reader)
    if view.kind != "sample":
        view = _with_alone(view, _used_elsewhere(view, reader), "gradient")
        view = _with_alone(view, _moved(view, batches[-1]))
        view = _with_alone(view, _mixed(view, reader))
    for batch in batches:
        view = _with_alone(view, _off(view, batch))
    return _settled(view, reader)


def _batches(reader: Reader, device: torch.device) -> list[Batch]:
    """The first example twice, and some others in a batch, or alone where they cannot be joined."""
    chosen = evenly_spaced(len(reader), _TRIED)
    try:
        return reader.probes([[0, 0], chosen], device)
    except JoinError:
        return reader.probes([[0, 0], *([index] for index in chosen)], device)


def _moved(view: LossView, batch: Batch) -> list[str]:
    """The layers that get rows which the model has moved, so that their order tells nothing."""
    if is_sharded(view.model):
        return []
    layers = {name: view.layers[name] for name in view.layout.reached if name not in view.layout.alone}
    return moved_layers(layers, batch.content, partial(view.loss, batch)) if layers else []


def _settled(view: LossView, reader: Reader) -> LossView:
    """The view in which of layers that are run example by example, those whose calls do not suffice give gradients."""
    by_tokens = [name for name, how in view.layout.alone.items() if how == "tokens"]
    if not by_tokens:
        return view
    if is_sharded(view.model):
        raise LayerError(
            f"layer {by_tokens[0]!r}: its calls in a batch do not make up its gradient of the {view.kind} loss, so "
            "its examples have to be run one by one, which a sharded model does not allow. Call the module "
            "wherever its weight is used, on inputs [examples, ..., features], or leave it out with exclude=."
        )
    chosen = {name: view.layers[name] for name in by_tokens}
    odd = {name for name, layer in chosen.items() if isinstance(layer, FunctionLayer)}
    for single in reader.probes([[index] for index in evenly_spaced(len(reader), _TRIED)], view.device):
        exact = view.gradients(single, chosen)
        odd |= {name for name in by_tokens if name not in odd and not _alone_agrees(view, name, single, exact)}
    return _with_alone(view, [name for name in by_tokens if name in odd], "gradient")


def _repeats(view: LossView, batch: Batch) -> bool:
    """Whether the loss of a batch is the same again, as where all that is drawn depends on its examples."""
    with torch.enable_grad():  # a task may differentiate by itself
        first, second = (view.loss(batch).detach().double() for _ in range(2))
    return bool((first - second).abs() <= view.tolerance * first.abs())


def _used_elsewhere(view: LossView, reader: Reader) -> list[str]:
    """The layers that are never called, and on whose parameters the loss of some examples depends all the same."""
    uncalled = {name: layer for name, layer in view.layers.items() if name not in view.layout.reached}
    used: set[str] = set()
    for index in evenly_spaced(len(reader), _TRIED) if uncalled else ():
        [single] = reader.probes([[index]], view.device)
        slopes = view.gradients(single, uncalled)
        used |= {name for name, slope in slopes.items() if bool(slope.any())}
    return [name for name in uncalled if name in used]


def _with_alone(view: LossView, names: Sequence[str], how: str = "tokens") -> LossView:
    """The view with these layers run example by example; how: as `Layout.alone` says."""
    alone = dict.fromkeys(names, how)
    reached = (*view.layout.reached, *(name for name in alone if name not in view.layout.reached))
    return replace(view, layout=view.layout._replace(alone={**view.layout.alone, **alone}, reached=reached))


def _unsure(layout: Layout, layers: Mapping[str, TrackedLayer]) -> list[str]:
    """The layers whose examples are told apart by their order alone, or by copies of what they share."""
    unsure = []
    for name in layout.reached:
        layer = layers[name]
        uses = [layout.calls[use.name] for use in layer.uses if use.name in layout.calls]
        if name not in layout.alone and (isinstance(layer, FunctionLayer) or not all(use.plain for use in uses)):
            unsure.append(name)
    return unsure


def _mixed(view: LossView, reader: Reader) -> list[str]:
    """The layers in which two examples' gradients in a batch are not those of each alone.

    Of layers that are unsure, all where no two examples can be joined; none of any where there is one example. Others
    are compared where the loss of both is the sum of theirs: rows that are routed may be as many as the examples are.
    """
    unsure, pair = _unsure(view.layout, view.layers), _pair(reader, view.device)
    if pair is None:
        return unsure if len(reader) > 1 else []
    singles = reader.probes([[index] for index in pair.examples], view.device)
    names = [name for name in view.layout.reached if name not in view.layout.alone]
    names = names if _separate(view, pair, singles) else unsure
    if not names:
        return []
    chosen = {name: view.layers[name] for name in names}
    exact = [view.gradients(single, chosen) for single in singles]
    found = _found(view, chosen, pair)
    return [name for name in names if not _agree(view, name, found.get(name), exact)]


def _separate(view: LossView, batch: Batch, singles: Sequence[Batch]) -> bool:
    """Whether a batch's loss is the sum of its examples' losses alone; not so where one cannot be run alone."""
    losses = []
    try:
        for one in (batch, *singles):
            with torch.enable_grad(), seeded(0):  # a task may differentiate by itself
                losses.append(view.loss(one).detach().double())
    except torch.OutOfMemoryError:
        raise
    except _FAULTS:
        return False
    off = losses[0] - torch.stack(losses[1:]).sum()
    return bool(off.abs() <= view.tolerance * torch.stack(losses[1:]).abs().sum())


def _found(view: LossView, layers: Mapping[str, TrackedLayer], batch: Batch) -> dict[str, Tokens]:
    """The tokens of these layers in a batch, of each that the model can be run with."""
    found = _tried(view, layers, batch)
    if found is None and len(layers) > 1:  # one of them cannot be run so: which?
        each = {name: _tried(view, {name: layer}, batch) for name, layer in layers.items()}
        found = {name: of[name] for name, of in each.items() if of is not None and name in of}
    return found or {}


def _pair(reader: Reader, device: torch.device) -> Batch | None:
    """The first example and another one, joined; None where none of some others can be joined with it."""
    for other in evenly_spaced(len(reader), _TRIED)[:0:-1]:
        try:
            [batch] = reader.probes([[0, other]], device)
        except JoinError:
            continue
        return batch
    return None


def _tried(view: LossView, layers: Mapping[str, TrackedLayer], batch: Batch) -> dict[str, Tokens] | None:
    """The tokens of these layers alone in a batch; None where the model cannot be run so, or gives another loss."""
    found: dict[str, Tokens] = {}
    trial = replace(view, layers=layers, layout=view.layout._replace(alone={}, reached=tuple(layers)))
    with torch.enable_grad(), seeded(0):  # a task may differentiate by itself
        expected = view.loss(batch).detach().double()
    try:
        with seeded(0):
            loss = trial.capture(batch, lambda layer, tokens: found.update({layer.name: tokens}), FiniteCheck(""))
    except DetachedError:
        return {}
    except torch.OutOfMemoryError:
        raise
    except _FAULTS:
        return None
    same = (loss.double() - expected).abs() <= view.tolerance * expected.abs().clamp_min(1e-30)
    return found if bool(same) else None


def _agree(view: LossView, name: str, tokens: Tokens | None, exact: list[dict[str, Tensor]]) -> bool:
    """Whether each example's gradient of a layer is the exact one."""
    if tokens is None:
        return not any(bool(of_example[name].any()) for of_example in exact)
    if tokens.examples != len(exact):
        return False
    singles = [tokens.of_examples(slice(b, b + 1)) for b in range(len(exact))]
    return all(_close(view, of, e[name], _scale(e)) for of, e in zip(singles, exact, strict=True))


def _makes_up(view: LossView, tokens: Tokens | None, exact: Tensor, scale: Tensor) -> bool:
    """As `_close`; no tokens at all are a gradient of zero."""
    return not bool(exact.any()) if tokens is None else _close(view, tokens, exact, scale)


def _close(view: LossView, tokens: Tokens, exact: Tensor, scale: Tensor) -> bool:
    """Whether tokens make up a gradient, but for rounding; of one that is not finite nothing is said here.

    scale: the largest gradient of all layers: one that is zero but for rounding is what such numbers leave.
    """
    norm, off = torch.linalg.vector_norm(exact), torch.linalg.vector_norm(tokens.total() - exact)
    allowed = view.tolerance * norm + _ROUNDING * torch.finfo(view.dtype).eps * scale
    rounding = 0.01 * view.tolerance * tokens.magnitude().sqrt()  # no number where a factor overflows
    return bool((off <= allowed) | (off <= allowed + rounding) | ~torch.isfinite(norm))


def _scale(exact: Mapping[str, Tensor]) -> Tensor:
    """The norm of the largest layer's gradient."""
    return torch.stack([torch.linalg.vector_norm(gradient) for gradient in exact.values()]).amax()


def _off(view: LossView, batch: Batch) -> list[str]:
    """The layers whose tokens in a batch do not make up their gradients, as where a weight is used outside of calls."""
    exact = view.gradients(batch, view.layers)
    together = {name: layer for name, layer in view.layers.items() if name not in view.layout.alone}
    found = _found(view, together, batch) if together else {}
    return [name for name in together if not _makes_up(view, found.get(name), exact[name], _scale(exact))]


def _alone_agrees(view: LossView, name: str, single: Batch, exact: Mapping[str, Tensor]) -> bool:
    """Whether a layer's calls in a batch of one make up its gradient."""
    try:
        with seeded(0):
            tokens = view.of_one(single).get(name)
    except torch.OutOfMemoryError:
        raise
    except _FAULTS:
        return False
    return _makes_up(view, tokens, exact[name], _scale(exact))
