"""The curvature of all layers together, exactly in the span of the pseudo-gradients that it was sampled with.

With pseudo-gradients in the columns of G, each times the root of its weight, F = G G^T. With M = R P, the layers' rates
times the optimizer's P, elementwise, a segment's response and decay (Bae et al. 2024, arXiv 2405.12186, Eqs. 13 to 22)
are, with phi(s) = (1 - exp(-s)) / s and weight decay w,

    response(v) = M^1/2 phi(M^1/2 F M^1/2 + w) M^1/2 v = phi(w) M v + M G [phi] G^T M v
    decay(v)    = M^-1/2 exp(-(M^1/2 F M^1/2 + w)) M^1/2 v = exp(-w) v + G [exp] G^T M v

where [f] = V diag((f(lambda + w) - f(w)) / lambda) V^T is made of the eigenvalues and eigenvectors of the n x n matrix
G^T M G: nothing of the size of the parameters squared is ever made.
Axes: n pseudo-gradients, Q queries, P parts, O outputs, I inputs, D numbers of a layer's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Batch
from ..errors import FactorError
from ..methods.plan import Preconditioner, SampledFisher
from ..methods.spectra import decay, decay_quotient, response, response_quotient
from ..model.finite_check import FiniteCheck
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.tokens import Tokens, joined_batches, no_tokens, scaled_examples
from ..runtime.ranks import Ranks
from ..store.files import Tensors
from ..store.shared_store import StoredUnit
from .kronecker import Gradients, example_gradients
from .preconditioner import PreconditionerBlock

LayerTokens = Mapping[str, Tokens]  # of each layer, of the same examples
# Of each kind the function, and its quotients in the span of the pseudo-gradients.
_FUNCTIONS: dict[str, tuple[Callable[[Tensor, float, float], Tensor], Callable[[Tensor, float], Tensor]]] = {
    "response": (response, response_quotient),
    "decay": (decay, decay_quotient),
}


def pseudo_gradients(view: LossView, data: Iterable[Batch], where: str, ranks: Ranks) -> dict[str, Tokens]:
    """Each layer's tokens of every example on this rank, times the roots of their weights; zeros in an idle layer.

    where: names the point in errors; ranks: those that share the data.
    """
    pieces: dict[str, list[Tokens]] = {name: [] for name in view.layers}
    finite = FiniteCheck(f"pseudo-gradients, {where}")
    for batch in data:
        before = {name: len(tokens) for name, tokens in pieces.items()}

        def consume(layer: TrackedLayer, tokens: Tokens, batch: Batch = batch) -> None:
            formed = Tokens(tokens.dense_a, tokens.g_PBSO)
            pieces[layer.name].append(scaled_examples(formed, batch.root_weights))

        view.capture(batch, consume, finite)
        for name in view.layers:
            if len(pieces[name]) == before[name] and not batch.idle:
                pieces[name].append(_none(view, name, batch.size))
    finite.finish(view.layers, ranks)
    return {name: joined_batches(tokens or [_none(view, name, 0)]) for name, tokens in pieces.items()}


def gram(tokens: LayerTokens, metric: Mapping[str, Tensor], budget: int) -> Tensor:
    """G^T M G [n, n], in float64; budget: bytes for formed gradients at a time."""
    n = next(iter(tokens.values())).examples
    total_nn = torch.zeros(n, n, dtype=torch.float64, device=next(iter(tokens.values())).g_PBSO.device)
    for name, of_layer in tokens.items():
        for rows, first_bD in _formed(of_layer, budget // 2):
            scaled_bD = first_bD * metric[name].flatten()
            for columns, second_bD in _formed(of_layer, budget // 2, rows.stop):
                total_nn[rows, columns] += (scaled_bD @ second_bD.mT).double()
    lower = total_nn.tril()
    return lower + lower.tril(-1).mT


def spectrum(gram_nn: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """The eigenvalues [n], none below 0, and eigenvectors [n, n] of G^T M G; FactorError where it is not finite."""
    if not torch.isfinite(gram_nn).all():
        raise FactorError(
            f"{where}: products of pseudo-gradients are not finite. Squares overflow; use a model in float64, or look "
            "for a checkpoint that diverged."
        )
    sigma, vectors = torch.linalg.eigh(gram_nn)
    return sigma.clamp_min(0), vectors


def applied(
    kind: str,
    values: Gradients,
    shifts: Mapping[str, float],
    metric: Mapping[str, Tensor],
    tokens: LayerTokens,
    decomposed: tuple[Tensor, Tensor],
    memory: int,
) -> Gradients:
    """The response to, or the decay of, query gradients [Q, P, O, I].

    Args:
        shifts: each layer's weight decay w; of layers that move, and for decay of all, the same.
        metric: M of each layer, [P, O, I].
        decomposed: what `spectrum` gave; memory: bytes, of which gradients that are formed may take an eighth.
    """
    (sigma, vectors), budget, (function, quotient) = decomposed, memory // 8, _FUNCTIONS[kind]
    moved = {name: value * metric[name] for name, value in values.items()}
    products_Qn = torch.stack([_products(moved[name], tokens[name], budget) for name in values]).sum(0)
    shift = next((shifts[name] for name in values if metric[name].any()), 0.0)
    between = vectors * quotient(sigma, shift).to(vectors)
    combined_Qn = (products_Qn.to(vectors) @ between @ vectors.mT).to(products_Qn)
    result = {}
    for name, value in values.items():
        in_span = _combinations(combined_Qn, tokens[name], budget).view_as(value)
        outside = function(sigma.new_zeros(()), 1.0, shifts[name]).item()
        if kind == "decay":
            result[name] = outside * value + in_span
        else:
            result[name] = outside * moved[name] + metric[name] * in_span
    return result


def sampled_at(fisher: SampledFisher, drawn: np.ndarray, views: int) -> list[np.ndarray]:
    """The examples whose pseudo-gradients are taken at each point, in all no more than are wanted.

    drawn: the examples that curvature is fitted to, in a random order; where not all are taken, each point has others.
    """
    count = sample_size(fisher, len(drawn), views)
    starts = (place * count for place in range(len(fisher.points)))
    return [np.take(drawn, range(start, start + count), mode="wrap") for start in starts]


def sample_size(fisher: SampledFisher, examples: int, views: int) -> int:
    """How many of so many examples are taken at each point."""
    return min(examples, max(1, fisher.most // (len(fisher.points) * views)))


def on_main(tokens: Tokens, factor: float, ranks: Ranks) -> list[Tokens]:
    """Every rank's tokens, with gradients times a factor, on rank 0; elsewhere nothing."""
    scaled = Tokens(tokens.a_PBSI, tokens.g_PBSO * factor)
    sides = zip(*(ranks.collect(side) for side in (scaled.dense_a, scaled.g_PBSO)), strict=True)
    return [Tokens(a, g) for a, g in sides if a is not None and g is not None]


def metric_of(
    view: LossView,
    fisher: SampledFisher,
    parameter_groups: Mapping[str, int],
    preconditioner: Callable[[Preconditioner], Mapping[str, PreconditionerBlock]],
) -> dict[str, Tensor]:
    """M [P, O, I] of each layer: its parameter group's rate, times the optimizer's P where it has one.

    preconditioner: gives each layer's block of a P.
    """
    P = None if fisher.scaled is None else preconditioner(fisher.scaled)
    return {
        name: fisher.rates[parameter_groups[name]]
        * (P[name].exact_POI if P is not None else torch.ones(layer.shape, dtype=view.dtype, device=view.device))
        for name, layer in view.layers.items()
    }


def check_memory(n: int, view: LossView, memory: int, where: str) -> None:
    """Raise FactorError unless so many pseudo-gradients' tokens and products fit into so many bytes, by the shapes."""
    sizes = ((name, layer.shape) for name, layer in view.layers.items())
    tokens = sum(P * (O + I) * view.positions(name) for name, (P, O, I) in sizes) * view.dtype.itemsize
    needed = 3 * 8 * n**2 + n * tokens
    if needed > memory:
        raise FactorError(
            f"{where}: curvature='coupled' holds {n:,} pseudo-gradients and their products, about {needed:,} bytes, "
            f"and {memory:,} are allowed. Give fewer curvature_examples= or more memory=, or use curvature='ekfac'."
        )


def coupled_tensors(
    tokens: Mapping[str, Sequence[Tokens]], metric: Mapping[str, Tensor], memory: int, where: str
) -> Tensors:
    """What the store keeps: `<layer>.a`, `<layer>.g`, and the `eigenvalues` and `eigenvectors` of G^T M G.

    memory: bytes, of which gradients that are formed may take an eighth.
    """
    of_layers = {name: joined_batches(pieces) for name, pieces in tokens.items()}
    sigma, vectors = spectrum(gram(of_layers, metric, memory // 8), where)
    dtype = next(iter(metric.values())).dtype
    kept = {f"{name}.a": tokens.dense_a for name, tokens in of_layers.items()}
    kept |= {f"{name}.g": tokens.g_PBSO for name, tokens in of_layers.items()}
    return kept | {"eigenvalues": sigma, "eigenvectors": vectors.to(dtype)}


def stored_coupled(unit: StoredUnit, view: LossView) -> tuple[dict[str, Tokens], tuple[Tensor, Tensor]]:
    """Each layer's tokens, and the spectrum, as `coupled_tensors` made them; every rank must ask."""
    sigma = unit.tensor("eigenvalues", (None,), view.device, "nonnegative")
    n, tokens = len(sigma), {}
    for name, (P, O, I) in ((name, layer.shape) for name, layer in view.layers.items()):
        a, g = (unit.tensor(f"{name}.{side}", (P, n, None, D), view.device) for side, D in (("a", I), ("g", O)))
        tokens[name] = Tokens(a, g)
    return tokens, (sigma, unit.tensor("eigenvectors", (n, n), view.device))


def _products(values_QPOI: Tensor, tokens: Tokens, budget: int) -> Tensor:
    """[Q, n]: <query, pseudo-gradient>."""
    rows_QD = values_QPOI.flatten(1)
    return torch.cat([rows_QD @ block_bD.mT for _, block_bD in _formed(tokens, budget)], 1)


def _combinations(weights_Qn: Tensor, tokens: Tokens, budget: int) -> Tensor:
    """[Q, D]: sums of pseudo-gradients with weights."""
    blocks = (weights_Qn[:, rows] @ block_bD for rows, block_bD in _formed(tokens, budget))
    total = next(blocks)
    for block in blocks:
        total = total + block
    return total


def _formed(tokens: Tokens, budget: int, stop: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Gradients [b, D], so many at a time that they take at most `budget` bytes, or one; stop: before which example."""
    (P, n, _, I), O = tokens.a_PBSI.shape, tokens.g_PBSO.shape[3]
    step = max(1, budget // (P * O * I * tokens.g_PBSO.element_size()))
    for start in range(0, n if stop is None else stop, step):
        rows = slice(start, min(n, start + step))
        yield rows, example_gradients(tokens.of_examples(rows)).flatten(1)


def _none(view: LossView, name: str, examples: int) -> Tokens:
    return no_tokens(view.layers[name].shape, examples, view.dtype, view.device)
