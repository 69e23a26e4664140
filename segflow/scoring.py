"""The train side, and the product where it meets the query side.

Axes: Q queries, K groups, P parts, O outputs, I inputs, L layers; a block of gradients is [Q or K, P, O, I].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Subset

from .data import Batch, digest, in_order
from .errors import ScoreError
from .factors import Pool, pooled_curvature
from .groups import GroupBatch, Groups, Tile, tiles
from .kronecker import Eigenbasis
from .layers import Tokens, TrackedLayer
from .lens import FiniteWatch, Lens
from .methods import Plan
from .queries import Curvature, Gradients, QuerySide, meeting, query_gradients
from .workspace import Workspace

# Shares of the memory budget: a half for queries, a quarter for groups, an eighth for what is formed on the way.
_QUERY_SHARE, _GROUP_SHARE, _PASSING_SHARE = 2, 4, 8
_QUERY_COPIES = 4  # the gradients, those of two operators, and a temporary


@dataclass
class TrainSide:
    """Summed gradients of a tile's groups, met with a query side: scores [Q, K] for each layer.

    queries: the query side; bases: of the layers whose queries stand in an eigenbasis; count: K, the tile's groups;
    budget: bytes for what is formed on the way.
    """

    queries: Gradients
    bases: Mapping[str, Eigenbasis]
    count: int
    budget: int
    _sums: Gradients = field(default_factory=dict)
    _scores: Gradients = field(default_factory=dict)

    def add(self, layer: TrackedLayer, tokens: Tokens, batch: GroupBatch) -> None:
        """Add one layer's tokens of one batch."""
        sizes = batch.sizes
        if layer.name in self.bases:
            tokens = self.bases[layer.name].rotate_tokens(tokens)
        if tokens.a_PBSI.shape[2] == 1 and len(sizes) > 1 and max(sizes) == 1:
            self._add_single_tokens(layer, tokens, batch.first)
            return
        P, O, I = layer.shape
        if layer.name not in self._sums:
            self._sums[layer.name] = tokens.a_PBSI.new_zeros(self.count, P, O, I)
        sums_KPOI = self._sums[layer.name][batch.first : batch.first + len(sizes)]
        a, g = (_by_group(side, sizes) for side in tokens)
        sums_KPOI.view(-1, O, I).baddbmm_(g.mT, a)

    def _add_single_tokens(self, layer: TrackedLayer, tokens: Tokens, first: int) -> None:
        """Groups of one example of one token: g^T R a, which never forms the example's gradient."""
        a_PKI, g_PKO = tokens.a_PBSI.squeeze(2), tokens.g_PBSO.squeeze(2)
        queries, K = self.queries[layer.name], a_PKI.shape[1]
        scores = self._scores_of(layer.name)[:, first : first + K]
        step = max(1, self.budget // (g_PKO.numel() * g_PKO.element_size()))
        for start in range(0, len(queries), step):
            answered_QPOK = torch.einsum("qpoi,pki->qpok", queries[start : start + step], a_PKI)
            scores[start : start + step].add_(answered_QPOK.mul_(g_PKO.mT).sum((1, 2)))

    def _scores_of(self, name: str) -> Tensor:
        if name not in self._scores:
            queries = self.queries[name]
            self._scores[name] = queries.new_zeros(queries.shape[0], self.count)
        return self._scores[name]

    def scores(self) -> Tensor:
        """[L, Q, K]: for each layer the product of all queries with the tile's groups."""
        for name, sums_KPOI in self._sums.items():
            self._scores_of(name).addmm_(self.queries[name].flatten(1), sums_KPOI.flatten(1).mT)
        return torch.stack([self._scores_of(name) for name in self.queries])


def _by_group(side_PBSD: Tensor, sizes: Sequence[int]) -> Tensor:
    """Tokens as [K * P, N, D]: each group's own, padded with zeros to the largest group of the batch."""
    P, _, S, D = side_PBSD.shape
    K, most = len(sizes), max(sizes)
    if min(sizes) < most:
        within = torch.arange(most)[None, :] < torch.tensor(sizes)[:, None]
        places = torch.nonzero(within.flatten()).flatten().to(side_PBSD.device)
        side_PBSD = side_PBSD.new_zeros(P, K * most, S, D).index_copy_(1, places, side_PBSD)
    return rearrange(side_PBSD, "p (k n) s d -> (k p) (n s) d", k=K)


def tile_scores(
    lens: Lens,
    data: Iterable[Batch],
    tile: Tile,
    queries: Gradients,
    bases: Mapping[str, Eigenbasis],
    budget: int,
    where: str,
) -> Tensor:
    """Scores [L, Q, K] of one tile's groups: <query side, summed training gradients>, for each layer in order.

    bases: of the layers whose queries stand in an eigenbasis (training tokens are rotated into it).
    """
    side = TrainSide(queries, bases, len(tile.groups), budget)
    watch = FiniteWatch(f"training gradients, {where}")
    for batch, plan in zip(data, tile.batches, strict=True):

        def consume(layer: TrackedLayer, tokens: Tokens, plan: GroupBatch = plan) -> None:
            side.add(layer, tokens, plan)

        lens.capture(batch, consume, watch)
    watch.drain()
    return side.scores()


def score_parts(
    work: Workspace, plan: Plan, groups: Groups, train: Any, query: Any, batch_size: int, per_layer: bool
) -> Tensor:
    """Scores [T, L, Q, K] of a plan's terms (L = 1, the layers' sum, unless per_layer); inside `observing(model)`.

    Queries and groups are taken in tiles that fit the workspace's memory; each term, checkpoint and tile of queries
    is a unit of the store, so that a run that was stopped goes on where it was.
    """
    stage = _Stage(work, plan, groups, train, batch_size, per_layer)
    count = len(query)
    gradient_bytes = work.parameters * stage.lens.dtype.itemsize
    tile = max(1, min(count, work.memory // _QUERY_SHARE // (_QUERY_COPIES * gradient_bytes)))
    parts = []
    for start in range(0, count, tile):
        indices = range(start, min(start + tile, count))
        parts.append(stage.run(Subset(query, indices)))
    return torch.cat(parts, 2)


class _Stage:
    """One scoring run: walks the plan for a tile of queries."""

    def __init__(self, work: Workspace, plan: Plan, groups: Groups, train: Any, batch_size: int, per_layer: bool):
        self.work, self.plan, self.groups, self.train = work, plan, groups, train
        self.batch_size, self.per_layer = batch_size, per_layer
        work.load(len(work.trajectory) - 1)
        self.lens = work.lens("train", train)
        self.made_from = work.made_from(train, self.lens)
        self.scored_from = {
            **self.made_from,
            "groups": digest([groups.members]),
            "batch_size": batch_size,
            "per_layer": per_layer,
        }
        gradient_bytes = work.parameters * self.lens.dtype.itemsize
        size = max(1, min(len(groups), work.memory // _GROUP_SHARE // gradient_bytes))
        self.tiles = tiles(groups, batch_size, size - size % batch_size if size > batch_size else size)

    def run(self, query: Any) -> Tensor:
        """Scores [T, L, Q, K] of these queries."""
        curvature = lru_cache(2)(lambda pool: pooled_curvature(self.work, pool, self.made_from, self.lens))
        gradients = lru_cache(1)(partial(self._gradients, query, curvature))
        parts: dict[int, Tensor] = {}
        for place, queries in QuerySide(self.plan, gradients, curvature, self.work.parameter_groups).walk():
            term = self.plan[place]
            examples = int(self.groups.sizes.sum()) * len(term.train_checkpoints)
            blocks = curvature(queries.pool) if queries.pool else {}
            values, bases = meeting(queries.values, blocks, {n: examples * self.lens.positions(n) for n in blocks})
            made_from = {
                **self.scored_from,
                "term": term.label,
                "queries": digest(values),
                "in an eigenbasis": sorted(bases),
            }
            scores = [self._unit(index, made_from, values, bases) for index in term.train_checkpoints]
            parts[place] = torch.stack(scores).mean(0) / self.work.trajectory.dataset_size
        return torch.stack([parts[place] for place in range(len(self.plan))])

    def _gradients(self, query: Any, curvature: Callable[[Pool], Curvature], index: int, pool: Pool) -> Gradients:
        self.work.load(index)
        lens = self.work.lens("measurement", query)
        data = self.work.walk(lens, query, in_order(len(query), self.batch_size), f"queries, {self.work.where(index)}")
        bases = {name: block.basis for name, block in curvature(pool).items()} if pool else {}
        return query_gradients(lens, data, bases, self.work.where(index))

    def _unit(
        self, index: int, term_from: Mapping[str, Any], queries: Gradients, bases: Mapping[str, Eigenbasis]
    ) -> Tensor:
        """<query side, group gradients at a checkpoint>, [L, Q, K], from the store or computed into it."""
        made_from = {**term_from, "checkpoint": self.work.trajectory.digest(index)}
        unit = f"scores/{digest(json.dumps(made_from, sort_keys=True))[:16]}/step-{self.work.step(index)}"
        made = self.work.store.get_or_make(unit, made_from, lambda: {"scores": self._scores(index, queries, bases)})
        return made["scores"]

    def _scores(self, index: int, queries: Gradients, bases: Mapping[str, Eigenbasis]) -> Tensor:
        work, where = self.work, self.work.where(index)
        work.load(index)
        layers = len(self.lens.layers) if self.per_layer else 1
        first = next(iter(queries.values()))
        scores = first.new_zeros(layers, len(first), len(self.groups))
        for number, tile in enumerate(self.tiles, start=1):
            label = f"groups, {where}" + (f", tile {number}/{len(self.tiles)}" if len(self.tiles) > 1 else "")
            data = work.walk(self.lens, self.train, [batch.examples for batch in tile.batches], label)
            part = tile_scores(self.lens, data, tile, queries, bases, work.memory // _PASSING_SHARE, where)
            columns = torch.from_numpy(tile.groups).to(scores.device)
            scores[:, :, columns] = part if self.per_layer else part.sum(0, keepdim=True)
        if not torch.isfinite(scores).all():
            raise ScoreError(
                f"scores at the {where} are not finite: gradients or the method's operator overflow. "
                "Use a model in float64, or more damping."
            )
        return scores
