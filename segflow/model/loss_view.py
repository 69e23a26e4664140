"""A model seen through one of its task's losses: its tracked layers, and a forward and backward that are checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch_faults import naming
from ..data.batches import Batch
from ..data.draws import drawing
from ..errors import LayerError
from ..tasks.task import summed_loss, task_name
from .capture import Consumer, DetachedError, capture, of_one
from .finite_check import FiniteCheck
from .function_calls import how_repeated
from .gradient_tokens import autograd_gradients, gradient_tokens
from .layers.tracked import TrackedLayer
from .layout import Layout
from .masks import checked_mask, masked_alone
from .tokens import Tokens, joined_batches, no_tokens


@dataclass(frozen=True)
class LossView:
    """What a pass over data needs: the model, its layers, and one of the task's losses.

    Args:
        kind: "train", "sample" (with pseudo-labels), "measurement" or "output".
        layout: how the layers see a batch.
        seed, place: with an example's index, all that its pseudo-labels depend on; place: a checkpoint's step.
    """

    model: nn.Module
    task: Any
    kind: str
    layers: Mapping[str, TrackedLayer]
    layout: Layout
    seed: int = 0
    place: int = 0

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return _reference(self.layers).device

    @property
    def dtype(self) -> torch.dtype:
        """Of tokens and of what is made of them: the layers' own, but single precision where they have 16 bits."""
        of_layers = _reference(self.layers).dtype
        return of_layers if of_layers in (torch.float32, torch.float64) else torch.float32

    @property
    def tolerance(self) -> float:
        """The relative difference that rounding may make between two ways to compute one gradient."""
        if self.layout.coarse:
            return 0.1
        exact = self.device.type == "cpu"  # accelerators may multiply in reduced precision
        return 1e-6 if self.dtype == torch.float64 else 1e-3 if exact else 1e-2

    def positions(self, name: str) -> int:
        """About how many positions an example has in a layer: those of the first example, in a convolution's input."""
        shape = self.layout.shapes.get(name)
        return 1 if shape is None else self.layers[name].positions(shape)

    def loss(self, batch: Batch) -> Tensor:
        """The summed loss of one batch; TaskError, naming the batch and what is in it, where that raises an error."""
        draws = drawing(self.seed, self.place, batch.examples) if self.kind == "sample" else nullcontext()
        with naming_loss(self.task, self.kind, batch, self.model), draws:
            return summed_loss(self.task, batch.content, self.model, kind=self.kind)

    def gradients(self, batch: Batch, layers: Mapping[str, TrackedLayer]) -> dict[str, Tensor]:
        """The loss's gradient [P, O, I] in some layers as autograd has it; TaskError as for `loss`."""
        with naming_loss(self.task, self.kind, batch, self.model):
            return autograd_gradients(self.model, layers, lambda: self.loss(batch), self.dtype)

    def only(self, names: Collection[str]) -> LossView:
        """The same with some of its layers alone."""
        alone = {name: how for name, how in self.layout.alone.items() if name in names}
        reached = tuple(name for name in self.layout.reached if name in names)
        layers = {name: layer for name, layer in self.layers.items() if name in names}
        return replace(self, layers=layers, layout=self.layout._replace(alone=alone, reached=reached))

    @property
    def slower(self) -> dict[str, str]:
        """How the layers are computed that take longer than a forward and a backward, by name."""
        alone = dict.fromkeys(self.layout.alone, "example by example, in batches of one")
        whole = {name: how_repeated(self.layers[name].module) for name in self.layout.functions if name in self.layers}
        return whole | alone

    @cached_property
    def _together(self) -> dict[str, TrackedLayer]:
        """The layers whose examples are told apart in a batch."""
        return {name: layer for name, layer in self.layers.items() if name not in self.layout.alone}

    def capture(self, batch: Batch, consume: Consumer, finite: FiniteCheck) -> Tensor:
        """Run one batch forward and back, handing each layer's tokens to `consume`; returns the loss.

        All numbers are noted in `finite`. Nothing is handed on of an idle batch. Raises LayerError where a layer's
        input does not have one row (or slice) for each example.
        """

        def checked(layer: TrackedLayer, tokens: Tokens) -> None:
            if tokens.examples != batch.size:
                raise LayerError(
                    f"layer {layer.name!r}: its input has {tokens.examples} rows in {batch}, expected one for "
                    "each example. Where rows are routed or repeated, use batch_size=1, or leave the layer out with "
                    "exclude=."
                )
            finite.see(layer.name, tokens.magnitude())
            consume(layer, tokens)

        receive = _ignore if batch.idle else checked
        loss = self._captured(batch, receive)
        if self.layout.alone and not batch.idle:
            for name, tokens in self._alone(batch).items():
                checked(self.layers[name], tokens)
        if not batch.idle:
            finite.see_loss(batch, loss)
        return loss

    def _captured(self, batch: Batch, receive: Consumer) -> Tensor:
        """Hand on the tokens of layers whose examples are told apart in a batch; returns the loss."""
        together = self._together
        try:
            if together:
                return capture(together, self.layout, lambda: self.loss(batch), receive, self.dtype, batch.size)
        except DetachedError:
            if len(together) == len(self.layers):
                raise
        return self.loss(batch).detach()

    def _alone(self, batch: Batch) -> dict[str, Tokens]:
        """The tokens of layers whose examples cannot be told apart in a batch: of each example in a batch of one."""
        singles = [batch] if batch.size == 1 or batch.alone is None else batch.alone()
        pieces: dict[str, list[Tokens]] = {}
        for single in singles:
            of_single, mask = self.of_one(single), checked_mask(self, single)
            for name in self.layout.alone:
                nothing = no_tokens(self.layers[name].shape, 1, self.dtype, self.device)
                tokens = masked_alone(self, self.layers[name], of_single.get(name, nothing), mask)
                pieces.setdefault(name, []).append(tokens)
        return {name: joined_batches(tokens) for name, tokens in pieces.items()}

    def of_one(self, single: Batch) -> dict[str, Tokens]:
        """The tokens of a batch of one example, in the layers that are run so."""
        found: dict[str, Tokens] = {}
        of_kind = {
            kind: {name: self.layers[name] for name, of in self.layout.alone.items() if of == kind}
            for kind in ("tokens", "gradient")
        }
        if by_calls := of_kind["tokens"]:
            layout = of_one(list(by_calls.values()))
            with suppress(DetachedError):  # one example's loss may be a constant

                def receive(layer: TrackedLayer, tokens: Tokens) -> None:
                    found[layer.name] = tokens

                capture(by_calls, layout, lambda: self.loss(single), receive, self.dtype, 1)
        if by_gradient := of_kind["gradient"]:
            matrices = self.gradients(single, by_gradient)
            found |= {name: gradient_tokens(matrix, by_gradient[name]) for name, matrix in matrices.items()}
        return found


def naming_loss(task: Any, kind: str, batch: Batch, model: nn.Module) -> AbstractContextManager[None]:
    """Inside, errors of a loss name the batch, and what is in it."""
    return naming(f"{task_name(task)}: the {kind} loss", batch, model)


def _reference(layers: Mapping[str, TrackedLayer]) -> Tensor:
    """The parameter whose dtype and device are those of the view."""
    return next(iter(layers.values())).parameters[0]


def _ignore(_layer: TrackedLayer, _tokens: Tokens) -> None:
    """The consumer of an idle batch, of which nothing counts."""
