"""Walks a plan, term by term and checkpoint by checkpoint, and lets queries meet groups.

Groups are dealt out to the ranks. Queries that fit one rank are worked on in shares and then held by every rank;
others stay apart, a block on each rank, and go round when a tile of groups is ready to meet them.

Axes: Q queries, K groups, P parts, O outputs, I inputs, L layers, T terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..curvature.fitted_factors import FittedFactors
from ..curvature.kronecker import weighted_mean
from ..data.batches import Batch, in_order
from ..errors import ScoreError
from ..groups.groups import Groups
from ..methods.plan import Plan, Point, Term, curvatures, mixes_layers
from ..model.finite_check import FiniteCheck
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.representation_view import representation_view
from ..stage.context import StageContext
from ..stage.unit_identity import checkpoint_digest
from ..store.files import Tensors
from ..store.shared_store import UnitRecipe
from ..training.segments import for_group
from .group_gradients import AnyView, GroupGradients, tile_scores
from .meeting import MetQueries, Traffic, met_queries, outer_layers
from .query_operators import Queries, QueryOperators
from .query_sets import QuerySet, QueryShare
from .tiles import Tile, shares, tiles
from .token_scores import TokenScores, by_position, check_tokens, tile_token_scores, widened
from .unit_names import groups_identity, score_unit, sketch, term_identity

# Shares of the memory budget: a half for queries, a quarter for groups, an eighth for what is formed on the way.
_QUERY_SHARE, _GROUP_SHARE, _PASSING_SHARE = 2, 4, 8
_QUERY_COPIES = 4  # the gradients, those of two operators, and a temporary (or a block that passes by)
_NO_TILE = Tile(np.arange(0), ())


@dataclass(frozen=True)
class ScoringRequest:
    """What is scored: groups of a stage's training data against queries, by a plan.

    fitted: what `fit` left for every stage; stage: whose data; batch_size: examples in one forward and backward;
    per_layer: keep the layers' scores apart; per_token: and those of the examples' tokens; layers: of which scores are
    made, all or some of those that were fitted.
    """

    fitted: FittedFactors
    stage: int
    plan: Plan
    groups: Groups
    queries: QuerySet
    batch_size: int
    per_layer: bool
    layers: Mapping[str, TrackedLayer]
    per_token: bool = False

    @property
    def context(self) -> StageContext:
        """The context of the stage whose data is scored."""
        return self.fitted.contexts[self.stage]


class QueryBlocks(NamedTuple):
    """The blocks of queries of one round: how many queries each holds, and a function that says what identifies them.

    The function is called once their gradients have been taken, so that the data need not be read for it.
    """

    sizes: tuple[int, ...]
    identities: Callable[[], list[dict[str, Any]]]


def score_parts(request: ScoringRequest) -> Tensor:
    """Scores [T, L, Q, K] of a plan's terms (L = 1, the layers' sum, unless per_layer); only inside `observing(model)`.

    With per_token [T, L, Q, K, 1 + W]: what is of no token, and then each token's (see `token_scores`).

    Queries and groups are taken in blocks and tiles that fit the memory budget; each term, checkpoint and block of
    queries is a unit of the store, so that a run that was stopped goes on where it was, on any number of ranks.
    """
    context, walk = request.context, _PlanWalk(request)
    blocks = in_order(len(request.queries), walk.room(walk.query_bytes()))
    alone = len(blocks) == 1 or request.per_token  # tokens meet all queries of a round at once
    at_a_time = 1 if alone else context.ranks.count  # blocks of one round, each on a rank of its own
    rounds = [blocks[start : start + at_a_time] for start in range(0, len(blocks), at_a_time)]
    passes = len(rounds) * sum(len(term.train) for term in request.plan)
    context.store.journal.expect({"groups": walk.examples * passes})
    return torch.cat([walk.scores(of_round) for of_round in rounds], 2)


class _PlanWalk:
    """One call of `score`: walks the plan for the blocks of queries of one round after another."""

    def __init__(self, request: ScoringRequest):
        self.request, self.context, self.fitted = request, request.context, request.fitted
        self.plan, self.groups = request.plan, request.groups
        context, batch_size = self.context, request.batch_size
        members = self.groups.digest
        context.ranks.agree("the groups (made with the same seed on every rank?)", members)
        context.ranks.agree("the method's plan", repr(self.plan))
        if request.per_layer and len({(term.side, term.layer) for term in self.plan}) > 1:
            raise ScoreError(
                'keep=("layer",): the method\'s terms compare gradients and representations, or those of different '
                "layers, whose parts do not belong together. Leave it out."
            )
        if request.per_token:
            check_tokens(self.groups, self.plan)
        self.view = self.fitted.loss_view(request.stage).only(request.layers)
        self.scored_from = groups_identity(self.fitted, request.queries, request.stage, members, request.per_layer)
        if self.view.layers.keys() != context.layers.tracked.keys():
            self.scored_from["layers"] = list(self.view.layers)
        if request.per_token:
            self.scored_from["per_token"] = True
        self.gradient_bytes = sum(layer.size for layer in self.view.layers.values()) * self.view.dtype.itemsize
        size = max(1, min(len(self.groups), context.memory // _GROUP_SHARE // self.gradient_bytes))
        size = size - size % batch_size if size > batch_size else size
        self.tiles = {
            whole: [tiles(pieces, batch_size, size) for pieces in shares(self.groups, context.ranks.count, whole)]
            for whole in {term.normalized for term in self.plan}
        }
        on_this_rank = next(iter(self.tiles.values()))[context.ranks.index]
        walked = sum(len(batch.examples) for tile in on_this_rank for batch in tile.batches)
        self.examples = context.settings.views * walked

    def room(self, query_bytes: int) -> int:
        """How many queries of so many bytes may be held at a time."""
        return max(1, self.context.memory // _QUERY_SHARE // (_QUERY_COPIES * query_bytes))

    def query_bytes(self) -> int:
        """Bytes of one query's gradient: of a layer where it stays an outer product, its two sides only."""
        fits = all(self.fitted.curvature(curvature).fits for curvature in curvatures(self.plan))
        outer = outer_layers(self.plan, self.view, fits) if self.request.queries.made_of_tokens else {}
        sizes = {name: (layer.shape, layer.size) for name, layer in self.view.layers.items()}
        numbers = sum(P * outer[name] * (O + I) if name in outer else size for name, ((P, O, I), size) in sizes.items())
        return numbers * self.view.dtype.itemsize

    def scores(self, blocks: Sequence[range]) -> Tensor:
        """Scores [T, L, Q, K] of these queries: one block for each rank, or one block that all ranks share."""
        ranks, queries = self.context.ranks, self.request.queries
        rows = blocks if len(blocks) > 1 else _split(blocks[0], ranks.count)
        here = rows[ranks.index] if ranks.index < len(rows) else range(0)

        @cache
        def identities() -> list[dict[str, Any]]:
            return [queries.identity(block, self.fitted.contexts[-1]) for block in blocks]

        query_blocks = QueryBlocks(tuple(map(len, blocks)), identities)
        every = range(blocks[0].start, blocks[-1].stop)
        layers = self.context.layers.tracked if mixes_layers(self.plan) else self.view.layers
        share = QueryShare(queries, every, here, layers, self.request.batch_size)
        by_place: dict[int, Tensor] = {}
        for place, operated in QueryOperators(self.plan, self.fitted, share).walk():
            scored = {name: value for name, value in operated.values.items() if name in self.view.layers}
            met = self._met(Queries(scored, operated.basis), query_blocks, len(self.plan[place].train))
            by_place[place] = self._term(self.plan[place], met, query_blocks)
        return torch.stack([by_place[place] for place in range(len(self.plan))])

    def _met(self, queries: Queries, query_blocks: QueryBlocks, points: int) -> MetQueries:
        """The queries in the bases and on the ranks where training gradients will meet them, at so many points."""
        blocks = self.fitted.curvature(queries.basis) if queries.basis else None
        examples = int(self.groups.sizes.sum()) * points
        tokens = {name: examples * self.view.positions(name) for name in queries.values}
        sums = max(tokens.values()) if self.request.per_token else len(self.groups) * points
        traffic = Traffic(sum(query_blocks.sizes), sums, tokens)
        room, holders = self.room(self.gradient_bytes), len(query_blocks.sizes)
        return met_queries(queries.values, blocks, traffic, room, holders, self.context.ranks)

    def _term(self, term: Term, met: MetQueries, query_blocks: QueryBlocks) -> Tensor:
        """One term's scores [L, Q, K] on every rank, from the store or computed into it.

        Where the layers' parameter groups weigh the points otherwise, and the units hold the layers' sums, these are
        weighted when they are made, and their weights are part of what they are made of.
        """
        context = self.context
        identity = self.scored_from | term_identity(self.fitted, context, term, list(met.values))
        inputs, sketches = self.fitted.unit_names(term), context.ranks.gather(sketch(met.values))
        layers = len(met.values) if self.request.per_layer else 1
        columns = (None,) if self.request.per_token else ()
        shapes = [(layers, size, len(self.groups), *columns) for size in query_blocks.sizes]
        by_layer = self._layer_weights(term, list(met.values))
        at_points = []
        for place, point in enumerate(term.train):
            weights_L = None if by_layer is None or self.request.per_layer else by_layer[place]
            compute = lru_cache(1)(partial(self._at_point, term, point, met, weights_L))
            made_from = identity if weights_L is None else identity | {"weights": _as_json(weights_L)}
            recipes = self._recipes(compute, point, query_blocks, made_from, sketches, inputs)
            context.store.settle(recipes, context.store.held(recipes))
            units = [context.store.open(recipe.name, recipe.made_from) for recipe in recipes]
            of_blocks = [unit.tensor("scores", shape) for unit, shape in zip(units, shapes, strict=True)]
            at_points.append(torch.cat(of_blocks, 1))
        total = self._over_points(at_points, term, by_layer)
        return total if term.normalized else total / context.trajectory.dataset_size

    def _layer_weights(self, term: Term, layers: Sequence[str]) -> list[Tensor] | None:
        """The weight [L] of each layer at each of a term's points; None where a point weighs the same for all."""
        if not any(isinstance(weight, tuple) for weight in term.weights):
            return None
        groups = [self.context.parameter_groups[name] for name in layers]
        rows = zip(*(for_group(term.weights, group) for group in groups), strict=True)
        return [torch.tensor(row, dtype=torch.float64) for row in rows]

    def _over_points(self, at_points: list[Tensor], term: Term, by_layer: list[Tensor] | None) -> Tensor:
        """The weighted sum over a term's points of scores [L, Q, K], or their sum where units are weighted already."""
        if by_layer is None:
            return weighted_mean(at_points, for_group(term.weights, 0))
        if self.request.per_layer:
            pairs = zip(by_layer, at_points, strict=True)
            at_points = [_weighted(weights_L, scores) for weights_L, scores in pairs]
        return torch.stack(at_points).sum(0)

    def _recipes(
        self,
        compute: Callable[[], Tensor | None],
        point: Point,
        query_blocks: QueryBlocks,
        made_from: dict[str, Any],
        sketches: list[Any],
        inputs: tuple[str, ...],
    ) -> list[UnitRecipe]:
        """The recipe of each block's unit at a point; all are computed together, when the first is made."""
        context, starts = self.context, np.cumsum([0, *query_blocks.sizes]).tolist()
        at_point = made_from | {"checkpoint": checkpoint_digest(context, point)}
        recipes = []
        for block, size in enumerate(query_blocks.sizes):
            made_from = at_point | {"queries": query_blocks.identities()[block], "sketch": sketches[block]}
            make = partial(_rows, compute, starts[block], size)
            name = score_unit(context, made_from, point)
            recipes.append(UnitRecipe("groups", name, made_from, inputs, self.examples, make, True))
        return recipes

    def _at_point(self, term: Term, point: Point, met: MetQueries, weights_L: Tensor | None) -> Tensor | None:
        """<query, group gradients at a point>, [L, Q, K] on rank 0: each rank's groups, tile by tile.

        weights_L: of the layers in their sum, where they are not kept apart; None for ones.
        """
        context, ranks, where = self.context, self.context.ranks, self.context.where(point)
        context.load(point)
        view, weights_N = self._seen(term, point)
        normalized, views = term.normalized and term.side == "gradient", context.settings.views
        train = context.train_reader(self.fitted.trains[self.request.stage])
        tiles_of_ranks, scores = self.tiles[term.normalized], None
        finite = FiniteCheck(f"training gradients, {where}")
        for number in range(max(map(len, tiles_of_ranks))):
            tile_of_rank = [of_rank[number] if number < len(of_rank) else _NO_TILE for of_rank in tiles_of_ranks]
            tile = tile_of_rank[ranks.index]
            lists = [batch.examples for batch in tile.batches]
            data = context.walk(self.view, train, lists, f"groups, {where}", views, weights_N)
            of_tile = self._of_tile(view, data, tile, (met, normalized), finite)
            of_tile = of_tile if self.request.per_layer else _summed(of_tile, weights_L)
            for scored, columns in zip(tile_of_rank, ranks.collect(of_tile), strict=False):
                if columns is not None:
                    scores = _placed(scores, columns, scored.groups, len(self.groups))
        in_groups = int(self.groups.sizes.sum())  # some examples alone may reach few layers
        finite.finish(view.layers, ranks, every=in_groups == context.trajectory.dataset_size)
        if scores is not None and not torch.isfinite(scores).all():
            raise ScoreError(
                f"scores at the {where} are not finite: gradients or the method's operator overflow. "
                "Use a model in float64, or more damping."
            )
        return scores

    def _of_tile(
        self, view: AnyView, data: Iterable[Batch], tile: Tile, met: tuple[MetQueries, bool], finite: FiniteCheck
    ) -> Tensor:
        """Scores [L, Q, K] of a tile's pieces, or with per_token [L, Q, K, 1 + W] of its examples.

        met: the queries, and whether groups' gradients are normalized.
        """
        (queries, normalized), settings = met, self.context.settings
        count, budget = len(tile.groups), self.context.memory // _PASSING_SHARE
        if self.request.per_token and isinstance(view, LossView):
            of_tokens = TokenScores(by_position(view), queries, count, budget)
            return tile_token_scores(data, tile, of_tokens, finite, settings.views)
        gradients = GroupGradients(queries, count, budget, normalized)
        return tile_scores(view, data, tile, gradients, finite, settings.views)

    def _seen(self, term: Term, point: Point) -> tuple[AnyView, Tensor | None]:
        """What a term's training data is seen through at a point, and the weights [N] of the examples' gradients."""
        if term.side == "representation":
            return representation_view(self.view, term.layer, term.normalized), None
        return self.view, self.context.example_weights(point)


def _split(block: range, count: int) -> list[range]:
    """A block of queries in nearly even shares, one for each rank."""
    ends = [len(block) * rank // count for rank in range(count + 1)]
    return [block[start:end] for start, end in pairwise(ends)]


def _placed(scores: Tensor | None, columns: Tensor, groups: np.ndarray, count: int) -> Tensor:
    """Scores [L, Q, K] or [L, Q, K, 1 + W] with those of a tile's pieces added to their groups; count: K."""
    if scores is None:
        scores = columns.new_zeros(*columns.shape[:2], count, *columns.shape[3:])
    if columns.ndim == 4:
        width = max(scores.shape[3], columns.shape[3])
        scores, columns = widened(scores, width), widened(columns, width)
    return scores.index_add_(2, torch.from_numpy(groups).to(scores.device), columns)


def _weighted(weights_L: Tensor, scores: Tensor) -> Tensor:
    """Scores [L, ...] with each layer's times its weight."""
    return weights_L.to(scores).reshape(-1, *[1] * (scores.ndim - 1)) * scores


def _summed(scores_LQK: Tensor, weights_L: Tensor | None) -> Tensor:
    """The layers' sum [1, Q, K], weighted where there are weights."""
    if weights_L is None:
        return scores_LQK.sum(0, keepdim=True)
    return torch.tensordot(weights_L.to(scores_LQK), scores_LQK, 1)[None]


def _as_json(weights_L: Tensor) -> list[float]:
    """Weights as a unit's name has them: the same where they differ by rounding only."""
    return [float(f"{weight:.9g}") for weight in weights_L.tolist()]


def _rows(compute: Callable[[], Tensor | None], start: int, size: int) -> Tensors:
    """One block's rows of the scores that `compute` gives; nothing on ranks other than 0."""
    scores = compute()
    return {} if scores is None else {"scores": scores[:, start : start + size]}
