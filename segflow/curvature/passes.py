"""Passes over training data at one point: sums that each rank makes of its share, reduced once a pass.

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
from ..model.finite import FiniteCheck
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.tokens import Tokens, joined_examples
from ..runtime.ranks import Ranks
from ..store.files import Tensors
from ..tasks.task import attention_mask
from .kronecker import Covariance, Eigenbasis, add_squared_projections_
from .projection import Probes, joined, probes

BATCHING_ERROR = "error of batching"  # beside second moments of batches, by what they differ from exact ones
_COMPARED = 2048  # examples on each rank that tell it


def covariances(view: LossView, data: Iterable[Batch], ranks: Ranks, where: str) -> dict[str, Covariance]:
    """Covariance sums of every layer over one pass with pseudo-labels, of what all `ranks` walk.

    where: names the checkpoint in errors.
    """
    totals = {name: Covariance.zeros(layer.shape, view.dtype, view.device) for name, layer in view.layers.items()}
    finite = FiniteCheck(f"covariance pass, {where}")
    masks = used = 0
    for batch in data:
        mask = attention_mask(view.task, batch.content)
        _check_mask(mask, view)
        masks += mask is not None and not batch.idle

        def consume(layer: TrackedLayer, tokens: Tokens, mask: Any = mask) -> None:
            nonlocal used
            own = _mask_of(layer, tokens, mask)
            used += own is not None
            totals[layer.name].add_(tokens, own)

        view.capture(batch, consume, finite)
    finite.finish(view.layers, ranks)
    of_ranks = ranks.gather([masks, used])
    if any(masks for masks, _ in of_ranks) and not any(used for _, used in of_ranks):
        raise TaskError(
            f"{finite.where}: get_attention_mask() fits no tracked layer's [examples, positions], so it would be "
            "ignored. Return the mask of the positions that the layers see (shifted as the inputs are), or None."
        )
    ranks.sum_([total for sums in totals.values() for total in vars(sums).values()])
    return totals


def corrected_eigenvalues(
    view: LossView,
    data: Iterable[Batch],
    bases: Mapping[str, Eigenbasis] | None,
    ranks: Ranks,
    where: str,
    budget: int,
    batch: int = 1,
) -> dict[str, Tensor]:
    """Lambda [P, O, I] of every layer: the mean over examples of (Q_S^T G Q_A)^2, over one pass with pseudo-labels.

    bases: None for the mean of G^2, the diagonal of the curvature. ranks: those that share the data; budget: bytes for
    gradients of sequence and convolution layers. batch: G are sums over so many examples, and so many examples' squares
    are counted at once; with what this changes, on some examples, as BATCHING_ERROR. Pseudo-gradients have mean zero,
    so that the squares have the same expectation.
    """
    totals = _zeros(view)
    compared = _Compared(totals, batch)
    finite = FiniteCheck(f"{'corrected-eigenvalue' if bases else 'diagonal'} pass, {where}")

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        basis = bases[layer.name] if bases else None

        def add_(total: Tensor, size: int) -> None:
            add_squared_projections_(total, joined_examples(tokens, size), basis, budget)

        add_(totals[layer.name], batch)
        compared.see(layer.name, tokens.a_PBSI.shape[1], add_)

    examples = _walked(view, data, consume, finite)
    finite.finish(view.layers, ranks)
    return _means(totals, examples, "corrected eigenvalues", finite, ranks) | compared.error(ranks)


def gradient_moments(view: LossView, data: Iterable[Batch], ranks: Ranks, where: str, budget: int) -> Tensors:
    """Each layer's mean training gradient and mean squared gradient, `<layer>.mean` and `.square` [P, O, I]."""
    means, squares = _zeros(view), _zeros(view)
    finite = FiniteCheck(f"gradient moments, {where}")

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        means[layer.name] += torch.einsum("pbso,pbsi->poi", tokens.g_PBSO, tokens.a_PBSI)
        add_squared_projections_(squares[layer.name], tokens, None, budget)

    examples = _walked(view, data, consume, finite)
    finite.finish(view.layers, ranks)
    both = {f"{n}.mean": t for n, t in means.items()} | {f"{n}.square": t for n, t in squares.items()}
    return _means(both, examples, "moments", finite, ranks)


def projected_kernel(
    view: LossView, data: Iterable[Batch], projection: Projection, ranks: Ranks, where: str, batch: int = 1
) -> Tensors:
    """`kernel` [k, k]: the mean over examples of the outer product of their projected gradients.

    batch: outer products are those of so many examples' sums, counted as so many; with what this changes, on some
    examples, as BATCHING_ERROR (a mean gradient m adds (batch - 1) m m^T).
    """
    shapes = {name: layer.shape for name, layer in view.layers.items()}
    probes_of = probes(projection, shapes, view.dtype, view.device)
    finite = FiniteCheck(f"projected gradients, {where}")
    k = projection.dimension or sum(probe.features for probe in probes_of.values())
    total = torch.zeros(k, k, dtype=view.dtype, device=view.device)
    examples = torch.zeros((), dtype=torch.float64, device=view.device)
    compared = _Compared({"kernel": total}, batch)
    for of, rows in _projected(view, data, probes_of, finite, lambda: 1 if compared.open("kernel") else batch):
        features = joined(rows, projection)
        alone = len(features) == of.size  # a row for each example

        def add_(into: Tensor, size: int, features: Tensor = features, alone: bool = alone) -> None:
            sums = _row_sums(features, size) if alone else features
            into.addmm_(sums.mT, sums)

        add_(total, batch)
        compared.see("kernel", of.size, add_)
        examples += of.size
    finite.finish(view.layers, ranks, every=view.kind != "output")
    return _means({"kernel": total}, examples, "projected gradients", finite, ranks) | compared.error(ranks)


def sketches(view: LossView, data: Iterable[Batch], projection: Projection, ranks: Ranks, where: str) -> Tensors:
    """Each layer's projected gradients of every example that all `ranks` walk, in the dataset's order, [B, k]."""
    shapes = {name: layer.shape for name, layer in view.layers.items()}
    probes_of = probes(projection, shapes, view.dtype, view.device)
    finite = FiniteCheck(f"sketches of gradients, {where}")
    own: dict[int, dict[str, list[float]]] = {}
    for batch, found in _projected(view, data, probes_of, finite):
        rows = {name: part.cpu().double().tolist() for name, part in found.items()}
        own |= {example: {n: rows[n][place] for n in rows} for place, example in enumerate(batch.examples)}
    finite.finish(view.layers, ranks)
    every = {example: rows for of_rank in ranks.gather(own) for example, rows in of_rank.items()}
    return {
        name: torch.tensor([every[example][name] for example in sorted(every)], dtype=torch.float64) for name in shapes
    }


def _projected(
    view: LossView,
    data: Iterable[Batch],
    probes_of: Mapping[str, Probes],
    finite: FiniteCheck,
    joins: Callable[[], int] = lambda: 1,
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Each batch that counts, with the features [B, k] of every layer; zeros where its loss does not reach a layer.

    joins: how many examples make one row, their gradients' sum.
    """
    for batch in data:
        found: dict[str, Tensor] = {}
        size = joins()

        def consume(layer: TrackedLayer, tokens: Tokens, found: Any = found, size: int = size) -> None:
            found[layer.name] = probes_of[layer.name].of_tokens(joined_examples(tokens, size))

        view.capture(batch, consume, finite)
        if not batch.idle:
            none = torch.zeros((), dtype=view.dtype, device=view.device)
            rows = -(-batch.size // size)
            yield batch, {n: found.get(n, none.expand(rows, of.features)) for n, of in probes_of.items()}


def _row_sums(features_Bk: Tensor, size: int) -> Tensor:
    """Sums of `size` rows each, [B / size, k]; the last one's may be fewer."""
    padded = torch.nn.functional.pad(features_Bk, (0, 0, 0, -len(features_Bk) % size))
    return padded.unflatten(0, (-1, size)).sum(1)


class _Compared:
    """Second moments of some examples, batched and exact, to tell how far the first are off.

    like: the totals that are compared, by name; batch: examples that are batched, 1 compares nothing.
    """

    def __init__(self, like: Mapping[str, Tensor], batch: int):
        self.batch, self.seen = batch, dict.fromkeys(like, 0)
        self.sides = {size: {n: torch.zeros_like(t) for n, t in like.items()} for size in {batch, 1} if batch > 1}

    def open(self, name: str) -> bool:
        """Whether more examples are wanted."""
        return self.batch > 1 and self.seen[name] < _COMPARED

    def see(self, name: str, examples: int, add_: Callable[[Tensor, int], None]) -> None:
        """Have `add_(total, size)` add some examples, `size` at a time, if they are wanted."""
        if self.open(name):
            self.seen[name] += examples
            for size, totals in self.sides.items():
                add_(totals[name], size)

    def error(self, ranks: Ranks) -> Tensors:
        """The relative error in Frobenius norm over all ranks, as BATCHING_ERROR; nothing where nothing is batched."""
        if self.batch == 1:
            return {}
        ranks.sum_([total for totals in self.sides.values() for total in totals.values()])
        batched, exact = (torch.cat([t.flatten().double() for t in self.sides[n].values()]) for n in (self.batch, 1))
        return {BATCHING_ERROR: ((batched - exact).norm() / exact.norm().clamp_min(1e-300))}


def _zeros(view: LossView) -> dict[str, Tensor]:
    return {name: torch.zeros(layer.shape, dtype=view.dtype, device=view.device) for name, layer in view.layers.items()}


def _walked(view: LossView, data: Iterable[Batch], consume: Any, finite: FiniteCheck) -> Tensor:
    """Walk the data; how many examples this rank saw."""
    examples = torch.zeros((), dtype=torch.float64, device=view.device)
    for batch in data:
        view.capture(batch, consume, finite)
        examples += 0 if batch.idle else batch.size
    return examples


def _means(
    totals: dict[str, Tensor], examples: Tensor, what: str, finite: FiniteCheck, ranks: Ranks
) -> dict[str, Tensor]:
    """Sums over all ranks divided by the number of examples; FactorError where one is not finite."""
    ranks.sum_([*totals.values(), examples])
    are_finite = torch.stack([torch.isfinite(total).all() for total in totals.values()]).tolist()
    if not all(are_finite):
        raise FactorError(
            f"{finite.where}: the {what} of layer {list(totals)[are_finite.index(False)]!r} are not finite. "
            "Their sum over the data overflows; use a model in float64."
        )
    return {name: total / examples.to(total.dtype) for name, total in totals.items()}


def _check_mask(mask: Any, view: LossView) -> None:
    """Raise TaskError unless the mask is None, a tensor, or a mapping from tracked layers' names to tensors."""
    masks = mask if isinstance(mask, Mapping) else {} if mask is None else {next(iter(view.layers)): mask}
    unknown = sorted(set(masks) - set(view.layers))
    if unknown or not all(isinstance(one, Tensor) for one in masks.values()):
        raise TaskError(
            f"get_attention_mask(): expected a tensor [examples, positions], or a mapping to such tensors from names "
            f"of {list(view.layers)[:8]}, found {f'names {unknown[:4]}' if unknown else type(mask).__name__}."
        )


def _mask_of(layer: TrackedLayer, tokens: Tokens, mask: Tensor | Mapping[str, Tensor] | None) -> Tensor | None:
    """The mask if it speaks of this layer's positions."""
    if isinstance(mask, Mapping):
        mask = mask.get(layer.name)
    return mask if mask is not None and mask.shape == tokens.a_PBSI.shape[1:3] else None
