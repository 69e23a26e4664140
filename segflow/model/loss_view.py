"""A model seen through one of its task's losses: its tracked layers, and a forward and backward that are checked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch_faults import naming
from ..data.batches import Batch
from ..data.draws import drawing, seeded
from ..data.readers import Reader
from ..errors import LayerError
from ..runtime.sharding import is_sharded
from ..tasks.task import summed_loss, task_name
from .capture import Consumer, Layout, called_parameters, capture, example_axes, requiring_grad
from .finite_check import FiniteCheck
from .layers.tracked import TrackedLayer
from .tokens import Tokens


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
        return self.layers[name].positions(self.layout.shapes[name])

    def loss(self, batch: Batch) -> Tensor:
        """The summed loss of one batch; TaskError, naming the batch and what is in it, where that raises an error."""
        draws = drawing(self.seed, self.place, batch.examples) if self.kind == "sample" else nullcontext()
        with _naming_loss(self.task, self.kind, batch, self.model), draws:
            return summed_loss(self.task, batch.content, self.model, kind=self.kind)

    def capture(self, batch: Batch, consume: Consumer, finite: FiniteCheck) -> Tensor:
        """Run one batch forward and back, handing each layer's tokens to `consume`; returns the loss.

        All numbers are noted in `finite`. Nothing is handed on of an idle batch. Raises LayerError where a layer's
        input does not have one row (or slice) for each example.
        """

        def checked(layer: TrackedLayer, tokens: Tokens) -> None:
            if tokens.a_PBSI.shape[1] != batch.size:
                raise LayerError(
                    f"layer {layer.name!r}: its input has {tokens.a_PBSI.shape[1]} rows in {batch}, expected one for "
                    "each example. Give it inputs [examples, ..., features] (not flattened, routed or repeated), or "
                    "leave it out of get_influence_tracked_modules()."
                )
            finite.see(layer.name, _magnitude(tokens))
            consume(layer, tokens)

        receive = _ignore if batch.idle else checked
        loss = capture(self.layers, self.layout.axes, lambda: self.loss(batch), receive, self.dtype)
        if not batch.idle:
            finite.see_loss(batch, loss)
        return loss


def make_loss_view(
    model: nn.Module,
    task: Any,
    kind: str,
    layers: Mapping[str, TrackedLayer],
    reader: Reader,
) -> LossView:
    """A view of the model, whose layout is found with a dataset's first example; call it inside `observing(model)`.

    Raises LayerError where a layer is not reached by the loss, its input has no axis of examples, or its weight is
    used outside its calls as well. A measurement may leave layers out: their share of its gradient is zero.
    """
    device = _reference(layers).device

    def run(copies: int) -> None:
        [batch] = reader.probes([[0] * copies], device)
        with _naming_loss(task, kind, batch, model):
            summed_loss(task, batch.content, model, kind=kind)

    layout = example_axes(layers, run)
    unreached = [name for name in layers if name not in layout.axes]
    if unreached and (kind != "measurement" or not layout.axes):
        raise LayerError(
            f"layer {unreached[0]!r}: never reached by the {kind} loss's forward"
            f"{f' (nor {unreached[1:]})' if unreached[1:] else ''}. Leave out what is not used: "
            f"Analyzer(..., exclude={unreached})."
        )
    view = LossView(model, task, kind, layers, layout)
    if kind != "sample":  # pseudo-labels may differ between two evaluations
        [batch] = reader.probes([[0, 0]], device)
        _require_whole_gradients(view, batch)
    return view


def _naming_loss(task: Any, kind: str, batch: Batch, model: nn.Module) -> AbstractContextManager[None]:
    return naming(f"{task_name(task)}: the {kind} loss", batch, model)


def _reference(layers: Mapping[str, TrackedLayer]) -> Tensor:
    """The weight whose dtype and device are those of the view."""
    return next(iter(layers.values())).module.get_parameter("weight")


def _require_whole_gradients(view: LossView, batch: Batch) -> None:
    """Raise LayerError unless each layer's tokens make up the gradient of its parameters, as autograd computes it.

    They do not where the loss uses a weight outside the layer's own calls, as in F.linear(x, self.head.weight).
    """
    from_tokens: dict[str, Tensor] = {}
    scales: dict[str, float] = {}

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        from_tokens[layer.name] = torch.einsum("pbso,pbsi->poi", tokens.g_PBSO, tokens.a_PBSI)
        scales[layer.name] = _magnitude(tokens).sqrt().item()

    with seeded(0):
        view.capture(batch, consume, FiniteCheck(""))
    exact = _autograd_gradients(view, batch)
    relative, rounding = view.tolerance, 0.01 * view.tolerance
    for name, gradient in exact.items():
        norm = torch.linalg.vector_norm(gradient).item()
        off = torch.linalg.vector_norm(gradient - from_tokens.get(name, 0.0)).item()
        if off > relative * norm + rounding * scales.get(name, 0.0):
            raise LayerError(
                f"layer {name!r}: its calls do not make up its gradient of the {view.kind} loss (they differ by "
                f"{off / max(norm, 1e-300):.1%}), so the loss uses its weight outside of them. Call the module "
                "wherever its weight is used, or leave it out of get_influence_tracked_modules()."
            )


def _autograd_gradients(view: LossView, batch: Batch) -> dict[str, Tensor]:
    """The gradient [P, O, I] of a batch's loss in each layer, by autograd; inside `observing(model)`."""
    by_layer = {} if is_sharded(view.model) else {name: layer.parameters for name, layer in view.layers.items()}
    with ExitStack() as stack:
        stack.enter_context(requiring_grad(_flat(by_layer)))
        by_layer = by_layer or stack.enter_context(called_parameters(view.layers))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(seeded(0))
        loss = view.loss(batch)
        slopes = torch.autograd.grad(loss, _flat(by_layer), allow_unused=True, materialize_grads=True)
    gradients = iter(gradient.to(view.dtype) for gradient in slopes)
    return {
        name: view.layers[name].gradient_matrix(
            next(gradients), next(gradients) if view.layers[name].has_bias else None
        )
        for name in by_layer
    }


def _flat(by_layer: Mapping[str, list[Tensor]]) -> list[Tensor]:
    return [parameter for parameters in by_layer.values() for parameter in parameters]


def _ignore(_layer: TrackedLayer, _tokens: Tokens) -> None:
    """The consumer of an idle batch, of which nothing counts."""


def _magnitude(tokens: Tokens) -> Tensor:
    """|a|^2 |g|^2: not finite if a token is not, or if a square or a product of squares may overflow."""
    a, g = (torch.linalg.vector_norm(side) for side in tokens)
    return (a * g).square()
