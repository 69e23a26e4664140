"""Summed training gradients of groups, and the product where they meet the queries.

Axes: Q queries, K groups, P parts, O outputs, I inputs, L layers; a block of gradients is [Q or K, P, O, I].
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
from ..model.finite import FiniteCheck
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.representation_view import FeatureLayer, RepresentationView
from ..model.tokens import Tokens
from .meeting import MetQueries
from .outer_products import Stack, products, reference, token_cost, token_products
from .tiles import GroupBatch, Tile

AnyView = LossView | RepresentationView


@dataclass
class GroupGradients:
    """Summed gradients of a tile's pieces of groups, met with a query side: scores [Q, K] for each layer.

    queries: the query side; count: K, the tile's pieces; budget: bytes for what is formed on the way; normalized: bring
    each piece's summed gradient to norm 1.
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
            self._sums[layer.name] = tokens.a_PBSI.new_zeros(self.count, P, O, I)
        sums_KPOI = self._sums[layer.name][batch.first : batch.first + len(sizes)]
        a, g = (_by_group(side, sizes) for side in tokens)
        sums_KPOI.view(-1, O, I).baddbmm_(g.mT, a)

    def _meets_tokens(self, layer: TrackedLayer | FeatureLayer, tokens: Tokens, groups: int) -> bool:
        """Whether queries meet the tokens themselves: where that costs less than summing and meeting the sums.

        It does for groups of one example of one token, and for few queries.
        """
        if not self.queries.here or self.normalized or layer.name in self.queries.sum_bases:
            return False
        queries, (_, O, I) = self.queries.values[layer.name], layer.shape
        count = tokens.a_PBSI.shape[1] * tokens.a_PBSI.shape[2]
        return count * token_cost(queries) <= (count + len(queries) * groups) * O * I

    def _add_products(self, layer: TrackedLayer | FeatureLayer, tokens: Tokens, batch: GroupBatch) -> None:
        """Add the products of all queries with each example, summed over the groups' examples."""
        found_QB, K = token_products(self.queries.values[layer.name], tokens, self.budget), len(batch.sizes)
        if layer.name not in self._scores:
            self._scores[layer.name] = found_QB.new_zeros(len(found_QB), self.count)
        scores_QK = self._scores[layer.name][:, batch.first : batch.first + K]
        if max(batch.sizes) == 1:
            scores_QK += found_QB
        else:
            group_B = torch.arange(K).repeat_interleave(torch.tensor(batch.sizes)).to(found_QB.device)
            scores_QK.index_add_(1, group_B, found_QB)

    def scores(self) -> Tensor:
        """[L, Q, K]: for each layer the product of all queries with the tile's pieces."""
        for name, basis in self.queries.sum_bases.items():
            if name in self._sums:
                self._sums[name] = basis.rotate(self._sums[name])
        blocks = [
            torch.stack([self._product(name, queries_QPOI) for name, queries_QPOI in block.items()])
            for block in self.queries.blocks()
        ]
        product_LQK = torch.cat(blocks, 1)
        if not self.normalized or not self._sums:  # without sums there is no piece
            return product_LQK
        square_K = torch.stack([sums_KPOI.flatten(1).square().sum(1) for sums_KPOI in self._sums.values()]).sum(0)
        return product_LQK / square_K.sqrt().clamp_min(torch.finfo(square_K.dtype).tiny)

    def _product(self, name: str, queries_QPOI: Stack) -> Tensor:
        product_QK = self._scores.get(name, reference(queries_QPOI).new_zeros(len(queries_QPOI), self.count))
        if name in self._sums:
            product_QK += products(queries_QPOI, self._sums[name], self.budget)
        return product_QK


def _by_group(side_PBSD: Tensor, sizes: Sequence[int]) -> Tensor:
    """Tokens as [K * P, N, D]: each group's own, padded with zeros to the largest group of the batch."""
    P, _, S, D = side_PBSD.shape
    K, most = len(sizes), max(sizes)
    if min(sizes) < most:
        within = torch.arange(most)[None, :] < torch.tensor(sizes)[:, None]
        places = torch.nonzero(within.flatten()).flatten().to(side_PBSD.device)
        side_PBSD = side_PBSD.new_zeros(P, K * most, S, D).index_copy_(1, places, side_PBSD)
    return rearrange(side_PBSD, "p (k n) s d -> (k p) (n s) d", k=K)


def tile_scores(view: AnyView, data: Iterable[Batch], tile: Tile, side: GroupGradients, where: str) -> Tensor:
    """Scores [L, Q, K] of one tile's pieces: <query side, summed training gradients>, for each layer in order."""
    finite = FiniteCheck(f"training gradients, {where}")
    plans = iter(tile.batches)
    for batch in data:
        plan = None if batch.idle else next(plans)

        def consume(layer: TrackedLayer, tokens: Tokens, plan: Any = plan) -> None:
            side.add(layer, tokens, plan)

        view.capture(batch, consume, finite)
    finite.drain()
    return side.scores()
