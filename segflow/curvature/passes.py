"""Passes over training data at one point: each rank sums over its share of the data, and all ranks' sums are reduced.

In every pass, `data` is this rank's batches, `ranks` are those that share the data, and `where` names the point in
errors. Where batches have weights c, with a mean of 1 over all that is walked, means over examples are weighted:
gradients are multiplied by c, and by sqrt(c) before they are squared. Where second moments are batched, `summed` is
how many examples' gradients are summed before they are squared; each square then counts as so many examples.

Axes: P parts, O outputs, I inputs of a layer, B examples, k features of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batch
from ..errors import FactorError, TaskError
from ..methods.plan import Projection
from ..model.finite_check import FiniteCheck
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.masks import checked_mask, mask_of, takes_masks
from ..model.tokens import Tokens, joined_examples, masked_outputs, scaled_examples
from ..runtime.ranks import Ranks
from ..store.files import Tensors
from .kronecker import Covariance, Eigenbasis, add_squared_projections_, side_shapes
from .projection import Probes, join_layers, probes

BATCHING_ERROR = "error of batching"  # beside batched second moments: how far some of them are from exact ones
_COMPARED = 2048  # examples on each rank that this is measured on
BatchConsumer = Callable[[TrackedLayer, Tokens, Batch], None]


def covariances(view: LossView, data: Iterable[Batch], ranks: Ranks, where: str) -> dict[str, Covariance]:
    """Covariance sums of every layer, over one pass with pseudo-labels.

    Raises TaskError where the task's attention mask is none, or fits no tracked layer.
    """
    totals = {
        name: Covariance.zeros(side_shapes(layer), view.dtype, view.device) for name, layer in view.layers.items()
    }
    finite = FiniteCheck(f"covariance pass, {where}")
    masks = used = 0
    for batch in data:
        mask = checked_mask(view, batch)
        masks += mask is not None and not batch.idle

        def consume(layer: TrackedLayer, tokens: Tokens, mask: Any = mask, weights_B: Any = batch.weights) -> None:
            nonlocal used
            alone = layer.name in view.layout.alone
            mask_BS = tokens.filled() if alone else mask_of(view, layer, tokens.a_PBSI.shape[1:3], mask)
            used += mask_BS is not None and not alone
            tokens = masked_outputs(tokens, mask_BS) if len(layer.uses) > 1 else tokens
            totals[layer.name].add_(tokens, mask_BS, weights_B)

        view.capture(batch, consume, finite)
    finite.finish(view.layers, ranks)
    by_rank = ranks.gather([masks, used])
    if takes_masks(view) and any(masks for masks, _ in by_rank) and not any(used for _, used in by_rank):
        raise ignored_mask(finite.where)
    ranks.sum_([total for sums in totals.values() for total in vars(sums).values()])
    return totals


def ignored_mask(where: str) -> TaskError:
    """The error for an attention mask that fits no layer."""
    return TaskError(
        f"{where}: get_attention_mask() fits no tracked layer's [examples, positions], so it would be ignored. Return "
        "the mask of the positions that the layers see (shifted as the inputs are), or None."
    )


def corrected_eigenvalues(
    view: LossView,
    data: Iterable[Batch],
    bases: Mapping[str, Eigenbasis] | None,
    ranks: Ranks,
    where: str,
    budget: int,
    summed: int = 1,
    roots: Mapping[str, Tensor] | None = None,
) -> Tensors:
    """Lambda [P, O, I] of every layer: the mean over examples of (Q_S^T G Q_A)^2, over one pass with pseudo-labels.

    Pseudo-gradients have mean zero, so that the square of a sum of them, each times the root of its example's weight,
    has the expectation of the weighted sum of their squares; what summing changes on some examples is given as
    BATCHING_ERROR.

    Args:
        bases: None for the mean of G^2, the diagonal of the curvature.
        budget: bytes for gradients of single examples in layers with positions.
        roots: of layers that take the optimizer's P exactly, its root [P, O, I], by which gradients are multiplied.
    """
    totals = _zeros(view)
    check = _BatchingCheck(totals, summed)
    finite = FiniteCheck(f"{'corrected-eigenvalue' if bases else 'diagonal'} pass, {where}")

    def consume(layer: TrackedLayer, tokens: Tokens, batch: Batch) -> None:
        basis, tokens = bases[layer.name] if bases else None, scaled_examples(tokens, batch.root_weights)

        def add_(total: Tensor, size: int) -> None:
            add_squared_projections_(total, joined_examples(tokens, size), basis, budget, (roots or {}).get(layer.name))

        add_(totals[layer.name], summed)
        check.add(layer.name, tokens.examples, add_)

    examples = _walk(view, data, consume, finite)
    finite.finish(view.layers, ranks)
    return _means(totals, examples, "corrected eigenvalues", finite, ranks) | check.error(ranks)


def gradient_moments(view: LossView, data: Iterable[Batch], ranks: Ranks, where: str, budget: int) -> Tensors:
    """Each layer's mean training gradient `<layer>.mean` and mean squared gradient `<layer>.square`, [P, O, I].

    budget: bytes for gradients of single examples in layers with positions.
    """
    means, squares = _zeros(view), _zeros(view)
    finite = FiniteCheck(f"gradient moments, {where}")

    def consume(layer: TrackedLayer, tokens: Tokens, batch: Batch) -> None:
        means[layer.name] += scaled_examples(tokens, batch.weights).total()
        add_squared_projections_(squares[layer.name], scaled_examples(tokens, batch.root_weights), None, budget)

    examples = _walk(view, data, consume, finite)
    finite.finish(view.layers, ranks)
    moments = {f"{n}.mean": t for n, t in means.items()} | {f"{n}.square": t for n, t in squares.items()}
    return _means(moments, examples, "moments", finite, ranks)


def projected_kernel(
    view: LossView, data: Iterable[Batch], projection: Projection, ranks: Ranks, where: str, summed: int = 1
) -> Tensors:
    """`kernel` [k, k]: the mean over examples of the outer product of an example's projected gradient with itself.

    What summing changes on some examples is given as BATCHING_ERROR: a mean gradient m adds (summed - 1) m m^T.
    """
    shapes = {name: layer.shape for name, layer in view.layers.items()}
    probes_of = probes(projection, shapes, view.dtype, view.device)
    finite = FiniteCheck(f"projected gradients, {where}")
    k = projection.dimension or sum(probe.features for probe in probes_of.values())
    total = torch.zeros(k, k, dtype=view.dtype, device=view.device)
    examples = torch.zeros((), dtype=torch.float64, device=view.device)
    check = _BatchingCheck({"kernel": total}, summed)
    for batch, by_layer in _projected(view, data, probes_of, finite, lambda: 1 if check.wants("kernel") else summed):
        features = join_layers(by_layer, projection)
        row_for_each = len(features) == batch.size

        def add_(into: Tensor, size: int, features: Tensor = features, row_for_each: bool = row_for_each) -> None:
            sums = _row_sums(features, size) if row_for_each else features
            into.addmm_(sums.mT, sums)

        add_(total, summed)
        check.add("kernel", batch.size, add_)
        examples += batch.size
    finite.finish(view.layers, ranks, every=view.kind != "output")
    return _means({"kernel": total}, examples, "projected gradients", finite, ranks) | check.error(ranks)


def sketches(view: LossView, data: Iterable[Batch], projection: Projection, ranks: Ranks, where: str) -> Tensors:
    """Each layer's projected gradients [B, k] of every example that all ranks walk, in the dataset's order.

    Where batches have weights, a training gradient is multiplied by its example's, a pseudo-gradient by the root of it.
    """
    shapes = {name: layer.shape for name, layer in view.layers.items()}
    probes_of = probes(projection, shapes, view.dtype, view.device)
    finite = FiniteCheck(f"sketches of gradients, {where}")
    this_rank: dict[int, dict[str, list[float]]] = {}
    for batch, by_layer in _projected(view, data, probes_of, finite):
        root = batch.root_weights if view.kind == "train" else None  # features are multiplied by one root already
        scaled = by_layer if root is None else {name: rows_Bk * root[:, None] for name, rows_Bk in by_layer.items()}
        rows = {name: features.cpu().double().tolist() for name, features in scaled.items()}
        this_rank |= {example: {n: rows[n][place] for n in rows} for place, example in enumerate(batch.examples)}
    finite.finish(view.layers, ranks)
    sketch_of = {example: rows for of_rank in ranks.gather(this_rank) for example, rows in of_rank.items()}
    examples = sorted(sketch_of)
    return {
        name: torch.tensor([sketch_of[example][name] for example in examples], dtype=torch.float64) for name in shapes
    }


def _projected(
    view: LossView,
    data: Iterable[Batch],
    probes_of: Mapping[str, Probes],
    finite: FiniteCheck,
    examples_of_row: Callable[[], int] = lambda: 1,
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Each batch that counts, with the features [B, k] of every layer; zeros where its loss does not reach a layer.

    Gradients are multiplied by the roots of their examples' weights. examples_of_row: how many examples' gradients are
    summed in one row of the next batch.
    """
    for batch in data:
        features: dict[str, Tensor] = {}
        size = examples_of_row()

        def consume(
            layer: TrackedLayer, tokens: Tokens, batch: Batch = batch, features: Any = features, size: int = size
        ) -> None:
            tokens = scaled_examples(tokens, batch.root_weights)
            features[layer.name] = probes_of[layer.name].of_tokens(joined_examples(tokens, size))

        view.capture(batch, consume, finite)
        if not batch.idle:
            zero = torch.zeros((), dtype=view.dtype, device=view.device)
            rows = -(-batch.size // size)
            yield batch, {n: features.get(n, zero.expand(rows, of.features)) for n, of in probes_of.items()}


def _row_sums(features_Bk: Tensor, size: int) -> Tensor:
    """Sums of `size` rows each, [B / size, k]; the last sum may be of fewer."""
    padded = torch.nn.functional.pad(features_Bk, (0, 0, 0, -len(features_Bk) % size))
    return padded.unflatten(0, (-1, size)).sum(1)


class _BatchingCheck:
    """Second moments of some examples, both batched and exact, to measure how far the batched ones are off.

    totals: those whose like are compared, by name; summed: how many examples are summed, 1 compares nothing.
    """

    def __init__(self, totals: Mapping[str, Tensor], summed: int):
        self._summed, self._seen = summed, dict.fromkeys(totals, 0)
        sizes = {summed, 1} if summed > 1 else set()
        self._totals = {size: {name: torch.zeros_like(t) for name, t in totals.items()} for size in sizes}

    def wants(self, name: str) -> bool:
        """Whether more examples are wanted for a total."""
        return self._summed > 1 and self._seen[name] < _COMPARED

    def add(self, name: str, examples: int, add_: Callable[[Tensor, int], None]) -> None:
        """Have `add_(total, size)` add these examples, `size` of them summed at a time, if more are wanted."""
        if self.wants(name):
            self._seen[name] += examples
            for size, totals in self._totals.items():
                add_(totals[name], size)

    def error(self, ranks: Ranks) -> Tensors:
        """The relative error in Frobenius norm over all ranks, as BATCHING_ERROR; nothing where nothing is batched."""
        if self._summed == 1:
            return {}
        ranks.sum_([total for totals in self._totals.values() for total in totals.values()])
        batched, exact = (
            torch.cat([total.flatten().double() for total in self._totals[size].values()]) for size in (self._summed, 1)
        )
        return {BATCHING_ERROR: ((batched - exact).norm() / exact.norm().clamp_min(1e-300))}


def _zeros(view: LossView) -> dict[str, Tensor]:
    return {name: torch.zeros(layer.shape, dtype=view.dtype, device=view.device) for name, layer in view.layers.items()}


def _walk(view: LossView, data: Iterable[Batch], consume: BatchConsumer, finite: FiniteCheck) -> Tensor:
    """Run all batches forward and back; the number of examples in them, idle batches apart."""
    examples = torch.zeros((), dtype=torch.float64, device=view.device)
    for batch in data:

        def consume_batch(layer: TrackedLayer, tokens: Tokens, batch: Batch = batch) -> None:
            consume(layer, tokens, batch)

        view.capture(batch, consume_batch, finite)
        examples += 0 if batch.idle else batch.size
    return examples


def _means(totals: dict[str, Tensor], examples: Tensor, what: str, finite: FiniteCheck, ranks: Ranks) -> Tensors:
    """The sums over all ranks divided by all ranks' number of examples; FactorError where one is not finite."""
    ranks.sum_([*totals.values(), examples])
    are_finite = torch.stack([torch.isfinite(total).all() for total in totals.values()]).tolist()
    if not all(are_finite):
        raise FactorError(
            f"{finite.where}: the {what} of layer {list(totals)[are_finite.index(False)]!r} are not finite. "
            "Their sum over the data overflows; use a model in float64."
        )
    return {name: total / examples.to(total.dtype) for name, total in totals.items()}
