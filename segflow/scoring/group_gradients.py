"""Summed training gradients of groups, and the products in which they meet the queries.

Axes: Q queries, K pieces of groups in a tile, B examples, P parts, O outputs, I inputs, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..curvature.kronecker import Gradients
from ..data.batches import Batch
from ..model.finite_check import FiniteCheck
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.one_hot import OneHot
from ..model.representation_view import FeatureLayer, RepresentationView
from ..model.tokens import Tokens, scaled_examples
from .meeting import MetQueries
from .outer_products import Stack, example_products, products, reference, token_cost
from .tiles import GroupBatch, Tile

AnyView = LossView | RepresentationView


@dataclass
class GroupGradients:
    """The summed gradients of a tile's pieces, and their products with the queries: [Q, K] for each layer.

    queries: ready to be met; count: K; budget: bytes for temporaries; normalized: divide each piece's products by the
    norm of its summed gradient.
    """

    queries: MetQueries
    count: int
    budget: int
    normalized: bool = False
    _sums: Gradients = field(default_factory=dict)
    _scores: Gradients = field(default_factory=dict)

    def add(self, layer: TrackedLayer | FeatureLayer, tokens: Tokens, batch: GroupBatch) -> None:
        """Add one layer's tokens of one batch."""
        sizes = batch.sizes
        if layer.name in self.queries.bases:
            tokens = self.queries.bases[layer.name].rotate_tokens(tokens)
        if self._meets_tokens(layer, tokens, len(sizes)):
            self._add_products(layer, tokens, batch)
            return
        P, O, I = layer.shape
        if layer.name not in self._sums:
            self._sums[layer.name] = tokens.g_PBSO.new_zeros(self.count, P, O, I)
        sums_KPOI = self._sums[layer.name][batch.first : batch.first + len(sizes)]
        if isinstance(tokens.a_PBSI, OneHot):
            groups_B = _groups_of(sizes).to(tokens.g_PBSO.device)
            tokens.a_PBSI.add_sums_(sums_KPOI[:, 0], groups_B, tokens.g_PBSO[0])
            return
        a, g = _by_group(tokens.a_PBSI, sizes), _by_group(tokens.g_PBSO, sizes)
        sums_KPOI.view(-1, O, I).baddbmm_(g.mT, a)

    def _meets_tokens(self, layer: TrackedLayer | FeatureLayer, tokens: Tokens, groups: int) -> bool:
        """Whether queries meet the tokens themselves: where that costs less than summing and meeting the sums.

        It does for groups of one example of one token, and for few queries.
        """
        if not self.queries.here or self.normalized or layer.name in self.queries.sum_bases:
            return False
        queries, (_, O, I) = self.queries.values[layer.name], layer.shape
        count, one_hot = tokens.examples * tokens.positions, isinstance(tokens.a_PBSI, OneHot)
        of_token = O if one_hot else O * I
        return count * token_cost(queries, one_hot) <= count * of_token + len(queries) * groups * O * I

    def _add_products(self, layer: TrackedLayer | FeatureLayer, tokens: Tokens, batch: GroupBatch) -> None:
        """Add the products of all queries with each example, summed over the groups' examples."""
        products_QB, K = example_products(self.queries.values[layer.name], tokens, self.budget), len(batch.sizes)
        if layer.name not in self._scores:
            self._scores[layer.name] = products_QB.new_zeros(len(products_QB), self.count)
        scores_QK = self._scores[layer.name][:, batch.first : batch.first + K]
        if max(batch.sizes) == 1:
            scores_QK += products_QB
        else:
            scores_QK.index_add_(1, _groups_of(batch.sizes).to(products_QB.device), products_QB)

    def scores(self) -> Tensor:
        """[L, Q, K]: for each layer the products of all queries with the tile's pieces."""
        for name, basis in self.queries.sum_bases.items():
            if name in self._sums:
                self._sums[name] = basis.rotate(self._sums[name])
        blocks = [
            torch.stack([self._product(name, queries_QPOI) for name, queries_QPOI in block.items()])
            for block in self.queries.blocks()
        ]
        product_LQK = torch.cat(blocks, 1)
        if not self.normalized or not self._sums:  # a tile without pieces has no sums
            return product_LQK
        square_K = torch.stack([sums_KPOI.flatten(1).square().sum(1) for sums_KPOI in self._sums.values()]).sum(0)
        return product_LQK / square_K.sqrt().clamp_min(torch.finfo(square_K.dtype).tiny)

    def _product(self, name: str, queries_QPOI: Stack) -> Tensor:
        product_QK = self._scores.get(name, reference(queries_QPOI).new_zeros(len(queries_QPOI), self.count))
        if name in self._sums:
            product_QK += products(queries_QPOI, self._sums[name], self.budget)
        return product_QK


def _groups_of(sizes: Sequence[int]) -> Tensor:
    """The place [B] of each example's group among a batch's."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def _by_group(side_PBSD: Tensor, sizes: Sequence[int]) -> Tensor:
    """Tokens [P, B, S, D] as [K * P, N, D]: group by group, padded with zeros to the largest group of the batch."""
    P, _, S, D = side_PBSD.shape
    K, largest = len(sizes), max(sizes)
    if min(sizes) < largest:
        within = torch.arange(largest)[None, :] < torch.tensor(sizes)[:, None]
        places = torch.nonzero(within.flatten()).flatten().to(side_PBSD.device)
        side_PBSD = side_PBSD.new_zeros(P, K * largest, S, D).index_copy_(1, places, side_PBSD)
    return rearrange(side_PBSD, "p (k n) s d -> (k p) (n s) d", k=K)


def tile_scores(
    view: AnyView, data: Iterable[Batch], tile: Tile, gradients: GroupGradients, finite: FiniteCheck, views: int = 1
) -> Tensor:
    """Scores [L, Q, K] of one tile's pieces: <query, summed training gradients>, for each layer in order.

    data: the tile's batches, then idle ones; where they have weights, gradients are multiplied by their examples'.
    gradients: collects the tile's; finite: sees all numbers, of this tile and of others; views: how many batches there
    are of each of the tile's in a row, over whose views of the examples gradients are averaged.
    """
    group_batches = (batch for batch in tile.batches for _ in range(views))
    for batch in data:
        group_batch = None if batch.idle else next(group_batches)

        def consume(
            layer: TrackedLayer, tokens: Tokens, group_batch: Any = group_batch, weights_B: Any = batch.weights
        ) -> None:
            gradients.add(layer, scaled_examples(tokens, weights_B), group_batch)

        view.capture(batch, consume, finite)
    finite.drain()
    return gradients.scores() / (1 if gradients.normalized else views)  # a norm is divided out with the views
