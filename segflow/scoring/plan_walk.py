"""Scoring: walks a plan, term by term and checkpoint by checkpoint, and lets queries meet groups.

Groups are dealt out to the ranks. Queries that fit one rank are worked on in shares and then held by every rank;
others stay apart, a block on each rank, and go round when a tile of groups is ready to meet them.

Axes: Q queries, K groups, P parts, O outputs, I inputs, L layers, T terms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from ..curvature.kronecker import weighted_mean
from ..curvature.stored import FittedFactors
from ..data.batches import in_order
from ..data.fingerprints import dataset_fingerprint, digest, measurement_fingerprint
from ..errors import ScoreError
from ..groups.groups import Groups
from ..methods.plan import Plan, Point, Term, curvatures
from ..model.representation_view import representation_view
from ..properties.property import as_properties
from ..runtime.ranks import Ranks
from ..stage.context import StageContext
from ..stage.identity import checkpoint_digest, point_name
from ..store.files import Tensors
from ..store.shared import UnitRecipe
from .group_gradients import AnyView, GroupGradients, MetQueries, from_rank, tile_scores
from .meeting import meeting, outer_layers
from .names import ROUNDED, sketch
from .outer_products import OuterProducts, Stack, formed, together
from .property_gradients import property_fingerprint
from .query_gradients import AskedQueries
from .query_operators import Queries, QueryOperators
from .tiles import Tile, shares, tiles

# Shares of the memory budget: a half for queries, a quarter for groups, an eighth for what is formed on the way.
_QUERY_SHARE, _GROUP_SHARE, _PASSING_SHARE = 2, 4, 8


_QUERY_COPIES = 4  # the gradients, those of two operators, and a temporary (or a block that passes by)
_NO_TILE = Tile(np.arange(0), ())


@dataclass(frozen=True)
class Scoring:
    """What is scored: groups of a stage's training data, queries, and the plan.

    fitted: what `fit` left for every stage; stage: whose data.
    """

    fitted: FittedFactors
    stage: int
    plan: Plan
    groups: Groups
    batch_size: int
    per_layer: bool

    @property
    def context(self) -> StageContext:
        """The context of the stage whose data is scored."""
        return self.fitted.contexts[self.stage]

    @property
    def train(self) -> Any:
        """The training data that is scored."""
        return self.fitted.trains[self.stage]


def score_parts(asked: Scoring, query: Any) -> Tensor:
    """Scores [T, L, Q, K] of a plan's terms (L = 1, the layers' sum, unless per_layer); inside `observing(model)`.

    Queries and groups are taken in blocks and tiles that fit the memory budget; each term, checkpoint and block of
    queries is a unit of the store, so that a run that was stopped goes on where it was, on any number of ranks.
    """
    context = asked.context
    stage = _Stage(asked)
    blocks = in_order(len(query), stage.room(stage.query_bytes(query)))
    together = context.ranks.count if len(blocks) > 1 else 1  # blocks that are on their ranks at a time
    rounds = [blocks[start : start + together] for start in range(0, len(blocks), together)]
    passes = len(rounds) * sum(len(term.train) for term in asked.plan)
    context.store.journal.expect({"groups": stage.examples * passes})
    return torch.cat([stage.run(query, some) for some in rounds], 2)


class _Stage:
    """One scoring run: walks the plan for some blocks of queries."""

    def __init__(self, asked: Scoring):
        self.asked, self.context, self.plan, self.groups = asked, asked.context, asked.plan, asked.groups
        context = self.context
        chosen = digest([self.groups.members])
        context.ranks.agree("the groups (made with the same seed on every rank?)", chosen)
        self.resources = asked.fitted
        self.view = self.resources.loss_view(asked.stage)
        self.scored_from = {
            **self.resources.train_from(asked.stage),
            "dtype": str(self.view.dtype),
            "groups": chosen,
            "per_layer": asked.per_layer,
            "measurement": measurement_fingerprint(asked.fitted.contexts[-1].task),
        }
        self.gradient_bytes = context.parameters * self.view.dtype.itemsize
        size = max(1, min(len(self.groups), context.memory // _GROUP_SHARE // self.gradient_bytes))
        size = size - size % asked.batch_size if size > asked.batch_size else size
        self.tiles = {
            whole: [tiles(pieces, asked.batch_size, size) for pieces in shares(self.groups, context.ranks.count, whole)]
            for whole in {term.normalized for term in self.plan}
        }
        own = next(iter(self.tiles.values()))[context.ranks.index]
        self.examples = sum(len(batch.examples) for tile in own for batch in tile.batches)

    def room(self, query_bytes: int) -> int:
        """How many queries of so many bytes may be held at a time."""
        return max(1, self.context.memory // _QUERY_SHARE // (_QUERY_COPIES * query_bytes))

    def query_bytes(self, query: Any) -> int:
        """What one query's gradient takes: of a layer where it stays an outer product, its two sides only."""
        fits = all(self.resources.curvature(of).fits for of in curvatures(self.plan))
        outer = set() if as_properties(query) else outer_layers(self.plan, self.view, fits)
        sizes = {name: (layer.shape, layer.size) for name, layer in self.view.layers.items()}
        numbers = sum(P * (O + I) if name in outer else size for name, ((P, O, I), size) in sizes.items())
        return numbers * self.view.dtype.itemsize

    def run(self, query: Any, blocks: Sequence[range]) -> Tensor:
        """Scores [T, L, Q, K] of these queries: one block for each rank, or one block that all ranks share."""
        ranks = self.context.ranks
        rows = blocks if len(blocks) > 1 else _split(blocks[0], ranks.count)
        own = rows[ranks.index] if ranks.index < len(rows) else range(0)
        asked = _Asked(
            tuple(map(len, blocks)),
            [self._identified(query, block) for block in blocks],
        )
        whole = range(blocks[0].start, blocks[-1].stop)
        queries = AskedQueries(self.resources, query, whole, own, self.asked.batch_size, self.plan[0], self.view.layers)
        parts: dict[int, Tensor] = {}
        for place, found in QueryOperators(self.plan, queries).walk():
            term = self.plan[place]
            met = self._met(found, asked, len(term.train))
            parts[place] = self._term(term, met, asked, queries.unit_names(term))
        return torch.stack([parts[place] for place in range(len(self.plan))])

    def _identified(self, query: Any, block: range) -> dict[str, Any]:
        """What identifies a block of queries."""
        properties, last = as_properties(query), self.asked.fitted.contexts[-1]
        if properties is None:
            return dataset_fingerprint(
                Subset(query, block), "query", self.context.ranks, self.context.settings.progress
            )
        return {"properties": [property_fingerprint(properties[place], last) for place in block]}

    def _met(self, queries: Queries, asked: _Asked, points: int) -> MetQueries:
        """The query side where training gradients will meet it; one block becomes known to every rank."""
        ranks = self.context.ranks
        blocks = self.resources.curvature(queries.basis) if queries.basis else None
        examples = int(self.groups.sizes.sum()) * points
        tokens = {name: examples * self.view.positions(name) for name in queries.values}
        rows, room = len(self.groups) * points, self.room(self.gradient_bytes)
        values, bases, sum_bases = meeting(queries.values, blocks, sum(asked.sizes), rows, tokens, room)
        if len(asked.sizes) == 1 and ranks.count > 1:
            values = {name: _from_all(value_QPOI, ranks) for name, value_QPOI in values.items()}
        return MetQueries(values, bases, len(asked.sizes), ranks, sum_bases)

    def _term(self, term: Term, met: MetQueries, asked: _Asked, inputs: tuple[str, ...]) -> Tensor:
        """One term's scores [L, Q, K] on every rank, from the store or computed into it."""
        context, store, starts = self.context, self.context.store, np.cumsum([0, *asked.sizes]).tolist()
        term_from = {
            **self.scored_from,
            "operators": [self.resources.described(operator) for operator in term.operators],
            "query checkpoint": checkpoint_digest(context, term.query),
        }
        if term.side != "gradient" or term.normalized:
            term_from["side"] = [term.side, term.normalized, *met.values]
        layers = len(met.values) if self.asked.per_layer else 1
        sketches = context.ranks.gather(sketch(met.values))
        at_points = []
        for point in term.train:
            compute = lru_cache(1)(partial(self._scores, term, point, met))
            at_point = term_from | {"checkpoint": checkpoint_digest(context, point)}
            recipes = []
            for block, size in enumerate(asked.sizes):
                made_from = at_point | {"queries": asked.fingerprints[block], "sketch": sketches[block]}
                make = partial(_rows, compute, starts[block], size)
                recipes.append(
                    UnitRecipe("groups", self._name(made_from, point), made_from, inputs, self.examples, make)
                )
            store.settle(recipes, store.held(recipes))
            found = [store.open(recipe.name, recipe.made_from) for recipe in recipes]
            shapes = [(layers, size, len(self.groups)) for size in asked.sizes]
            of_blocks = [unit.tensor("scores", shape) for unit, shape in zip(found, shapes, strict=True)]
            at_points.append(torch.cat(of_blocks, 1))
        total = weighted_mean(at_points, term.weights)
        return total if term.normalized else total / context.trajectory.dataset_size

    def _name(self, made_from: Mapping[str, Any], point: Point) -> str:
        exact = {key: value for key, value in made_from.items() if key not in ROUNDED}
        hashed = digest(json.dumps(exact, sort_keys=True))[:16]
        return f"{self.context.prefix}scores/{hashed}/{point_name(self.context, point)}"

    def _scores(self, term: Term, point: Point, met: MetQueries) -> Tensor | None:
        """<query side, group gradients at a point>, [L, Q, K] on rank 0: each rank's groups, tile by tile."""
        context, ranks, where = self.context, self.context.ranks, self.context.where(point)
        context.load(point)
        view: AnyView = self.view
        if term.side == "representation":
            view = representation_view(self.view, term.layer, term.normalized)
        normalized = term.normalized and term.side == "gradient"
        shared, scores = self.tiles[term.normalized], None
        for number in range(max(map(len, shared))):
            in_turn = [of_rank[number] if number < len(of_rank) else _NO_TILE for of_rank in shared]
            tile = in_turn[ranks.index]
            data = context.walk(self.view, self.asked.train, [b.examples for b in tile.batches], f"groups, {where}")
            side = GroupGradients(met, len(tile.groups), context.memory // _PASSING_SHARE, normalized)
            part_LQK = tile_scores(view, data, tile, side, where)
            part_LQK = part_LQK if self.asked.per_layer else part_LQK.sum(0, keepdim=True)
            if scores is None and ranks.main:
                scores = part_LQK.new_zeros(*part_LQK.shape[:2], len(self.groups))
            for theirs, piece in zip(in_turn, ranks.collect(part_LQK), strict=False):
                if scores is not None and piece is not None:
                    scores.index_add_(2, torch.from_numpy(theirs.groups).to(scores.device), piece)
        if scores is not None and not torch.isfinite(scores).all():
            raise ScoreError(
                f"scores at the {where} are not finite: gradients or the method's operator overflow. "
                "Use a model in float64, or more damping."
            )
        return scores


class _Asked(NamedTuple):
    """Blocks of queries that are worked on at a time: how many queries each holds, and what identifies them."""

    sizes: tuple[int, ...]
    fingerprints: list[dict[str, Any]]


def _split(block: range, count: int) -> list[range]:
    """A block of queries in nearly even shares, one for each rank."""
    ends = [len(block) * rank // count for rank in range(count + 1)]
    return [block[start:end] for start, end in pairwise(ends)]


def _from_all(stack: Stack, ranks: Ranks) -> Stack:
    """Every rank's queries, in rank order, on every rank."""
    parts = [from_rank(stack, rank, ranks) for rank in range(ranks.count)]
    if not isinstance(stack, OuterProducts):
        return torch.cat([formed(part) for part in parts])
    every = together([replace(part, scale_POI=None) for part in parts if isinstance(part, OuterProducts)], False)
    return every if stack.scale_POI is None else every * stack.scale_POI


def _rows(compute: Callable[[], Tensor | None], start: int, size: int) -> Tensors:
    scores = compute()
    return {} if scores is None else {"scores": scores[:, start : start + size]}
