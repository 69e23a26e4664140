"""Scoring: walks a plan, term by term and checkpoint by checkpoint, and lets queries meet groups.

Groups are dealt out to the ranks. Queries that fit one rank are worked on in shares and then held by every rank;
others stay apart, a block on each rank, and go round when a tile of groups is ready to meet them.

Axes: Q queries, K groups, P parts, O outputs, I inputs, L layers, T terms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from .data import dataset_fingerprint, digest, in_order
from .errors import ScoreError
from .factors import Pool, StoredCurvature
from .files import Tensors
from .groups import Groups, Tile, shares, tiles
from .methods import Operator, Plan, Term
from .queries import Gradients, Queries, QuerySide, meeting, query_gradients
from .ranks import Ranks
from .task import measurement_fingerprint
from .trainside import MetQueries, tile_scores
from .units import Planned
from .workspace import Workspace

# Shares of the memory budget: a half for queries, a quarter for groups, an eighth for what is formed on the way.
_QUERY_SHARE, _GROUP_SHARE, _PASSING_SHARE = 2, 4, 8
_QUERY_COPIES = 4  # the gradients, those of two operators, and a temporary (or a block that passes by)
_NO_TILE = Tile(np.arange(0), ())
_ROUNDED = ("training losses",)  # differs slightly on another machine: compared, but not in a unit's name


def score_parts(
    work: Workspace, plan: Plan, groups: Groups, train: Any, query: Any, batch_size: int, per_layer: bool
) -> Tensor:
    """Scores [T, L, Q, K] of a plan's terms (L = 1, the layers' sum, unless per_layer); inside `observing(model)`.

    Queries and groups are taken in blocks and tiles that fit the workspace's memory; each term, checkpoint and block of
    queries is a unit of the store, so that a run that was stopped goes on where it was, on any number of ranks.
    """
    stage = _Stage(work, plan, groups, train, batch_size, per_layer)
    blocks = in_order(len(query), max(1, work.memory // _QUERY_SHARE // (_QUERY_COPIES * stage.gradient_bytes)))
    together = work.ranks.count if len(blocks) > 1 else 1  # blocks that are on their ranks at a time
    rounds = [blocks[start : start + together] for start in range(0, len(blocks), together)]
    passes = len(rounds) * sum(len(term.train_checkpoints) for term in plan)
    work.units.journal.expect({"groups": stage.examples * passes})
    return torch.cat([stage.run(query, some) for some in rounds], 2)


class _Stage:
    """One scoring run: walks the plan for some blocks of queries."""

    def __init__(self, work: Workspace, plan: Plan, groups: Groups, train: Any, batch_size: int, per_layer: bool):
        self.work, self.plan, self.groups, self.train = work, plan, groups, train
        self.batch_size, self.per_layer = batch_size, per_layer
        chosen = digest([groups.members])
        work.ranks.agree("the groups (made with the same seed on every rank?)", chosen)
        work.load(len(work.trajectory) - 1)
        self.lens = work.lens("train", train)
        self.made_from = work.made_from(train, self.lens)
        self.scored_from = {
            **self.made_from,
            "dtype": str(self.lens.dtype),
            "groups": chosen,
            "per_layer": per_layer,
            "measurement": measurement_fingerprint(work.task),
        }
        self.gradient_bytes = work.parameters * self.lens.dtype.itemsize
        size = max(1, min(len(groups), work.memory // _GROUP_SHARE // self.gradient_bytes))
        size = size - size % batch_size if size > batch_size else size
        self.tiles = [tiles(pieces, batch_size, size) for pieces in shares(groups, work.ranks.count)]
        self.examples = sum(len(batch.examples) for tile in self.tiles[work.ranks.index] for batch in tile.batches)

    def run(self, query: Any, blocks: Sequence[range]) -> Tensor:
        """Scores [T, L, Q, K] of these queries: one block for each rank, or one block that all ranks share."""
        work, ranks = self.work, self.work.ranks
        rows = blocks if len(blocks) > 1 else _split(blocks[0], ranks.count)
        own = rows[ranks.index] if ranks.index < len(rows) else range(0)
        asked = _Asked(
            tuple(map(len, blocks)),
            [dataset_fingerprint(Subset(query, block), "query", ranks, work.progress) for block in blocks],
        )
        curvature = lru_cache(2)(lambda pool: StoredCurvature(work, pool, self.made_from, self.lens))
        gradients = lru_cache(1)(partial(self._gradients, query, own, curvature))
        parts: dict[int, Tensor] = {}
        for place, queries in QuerySide(self.plan, gradients, curvature, work.parameter_groups).walk():
            term = self.plan[place]
            met = self._met(queries, curvature, asked, len(term.train_checkpoints))
            pools = dict.fromkeys(operator.checkpoints for operator in term.operators if operator.checkpoints)
            inputs = tuple(unit for pool in pools for unit in curvature(pool).units)
            parts[place] = self._term(term, met, asked, inputs)
        return torch.stack([parts[place] for place in range(len(self.plan))])

    def _gradients(
        self, query: Any, own: range, curvature: Callable[[Pool], StoredCurvature], index: int, pool: Pool
    ) -> Queries:
        """This rank's query gradients at a checkpoint, in the pool's eigenbasis if that fits."""
        work, where = self.work, self.work.where(index)
        work.load(index)
        lens = work.lens("measurement", query)
        lists = [own[part.start : part.stop] for part in in_order(len(own), self.batch_size)]
        data = work.walk(lens, query, lists, f"queries, {where}")
        blocks = curvature(pool) if pool else None
        bases = {name: block.basis for name, block in blocks.items()} if blocks is not None and blocks.fits else {}
        return Queries(query_gradients(lens, data, bases, work.ranks, where), pool if bases else ())

    def _met(
        self, queries: Queries, curvature: Callable[[Pool], StoredCurvature], asked: _Asked, checkpoints: int
    ) -> MetQueries:
        """The query side where training gradients will meet it; one block becomes known to every rank."""
        ranks = self.work.ranks
        blocks = curvature(queries.pool) if queries.pool else None
        examples = int(self.groups.sizes.sum()) * checkpoints
        tokens = {name: examples * self.lens.positions(name) for name in queries.values}
        values, bases = meeting(queries.values, blocks, sum(asked.sizes), tokens)
        if len(asked.sizes) == 1:
            values = {name: _from_all(value_QPOI, ranks) for name, value_QPOI in values.items()}
        return MetQueries(values, bases, len(asked.sizes), ranks)

    def _term(self, term: Term, met: MetQueries, asked: _Asked, inputs: tuple[str, ...]) -> Tensor:
        """One term's scores [L, Q, K] on every rank, from the store or computed into it."""
        work, units, starts = self.work, self.work.units, np.cumsum([0, *asked.sizes]).tolist()
        term_from = {
            **self.scored_from,
            "operators": [_described(operator, work) for operator in term.operators],
            "query checkpoint": work.checkpoint_digest(term.query_checkpoint),
        }
        layers = len(self.lens.layers) if self.per_layer else 1
        sketches = work.ranks.gather(_sketch(met.values))
        at_checkpoints = []
        for index in term.train_checkpoints:
            compute = lru_cache(1)(partial(self._scores, index, met))
            at_checkpoint = term_from | {"checkpoint": work.checkpoint_digest(index)}
            planned = []
            for block, size in enumerate(asked.sizes):
                made_from = at_checkpoint | {"queries": asked.fingerprints[block], "sketch": sketches[block]}
                make = partial(_rows, compute, starts[block], size)
                planned.append(Planned("groups", self._name(made_from, index), made_from, inputs, self.examples, make))
            units.settle(planned, units.held(planned))
            found = [units.open(unit.name, unit.made_from) for unit in planned]
            shapes = [(layers, size, len(self.groups)) for size in asked.sizes]
            of_blocks = [unit.tensor("scores", shape) for unit, shape in zip(found, shapes, strict=True)]
            at_checkpoints.append(torch.cat(of_blocks, 1))
        return torch.stack(at_checkpoints).mean(0) / work.trajectory.dataset_size

    def _name(self, made_from: Mapping[str, Any], index: int) -> str:
        exact = {key: value for key, value in made_from.items() if key not in _ROUNDED}
        return f"scores/{digest(json.dumps(exact, sort_keys=True))[:16]}/step-{self.work.step(index)}"

    def _scores(self, index: int, met: MetQueries) -> Tensor | None:
        """<query side, group gradients at a checkpoint>, [L, Q, K] on rank 0: each rank's groups, tile by tile."""
        work, ranks, where = self.work, self.work.ranks, self.work.where(index)
        work.load(index)
        scores: Tensor | None = None
        for number in range(max(map(len, self.tiles))):
            in_turn = [tiles[number] if number < len(tiles) else _NO_TILE for tiles in self.tiles]
            tile = in_turn[ranks.index]
            data = work.walk(self.lens, self.train, [batch.examples for batch in tile.batches], f"groups, {where}")
            part_LQK = tile_scores(self.lens, data, tile, met, work.memory // _PASSING_SHARE, where)
            part_LQK = part_LQK if self.per_layer else part_LQK.sum(0, keepdim=True)
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


def _from_all(value_QPOI: Tensor, ranks: Ranks) -> Tensor:
    """Every rank's queries, in rank order, on every rank."""
    own, device = ranks.index, value_QPOI.device
    return torch.cat(
        [ranks.broadcast(value_QPOI if own == rank else None, rank, device) for rank in range(ranks.count)]
    )


def _rows(compute: Callable[[], Tensor | None], start: int, size: int) -> Tensors:
    scores = compute()
    return {} if scores is None else {"scores": scores[:, start : start + size]}


def _described(operator: Operator, work: Workspace) -> dict[str, Any]:
    """What an operator does, without reference to where its checkpoints stand in a trajectory."""
    return {**asdict(operator), "checkpoints": [work.checkpoint_digest(index) for index in operator.checkpoints]}


def _sketch(values: Gradients) -> list[str]:
    """Two numbers that hardly any change of the queries leaves alone, rounded so that another number of ranks does."""
    if not len(next(iter(values.values()))):
        return []
    generator = torch.Generator().manual_seed(0)
    norm = torch.stack([torch.linalg.vector_norm(value).double() for value in values.values()]).norm().item()
    projected = 0.0
    for value_QPOI in values.values():
        weights = torch.randn(value_QPOI[0].numel(), generator=generator).to(value_QPOI)
        rows = torch.linspace(1, 2, len(value_QPOI)).to(value_QPOI)
        projected += (rows @ (value_QPOI.flatten(1) @ weights)).item()
    return [f"{norm:.3e}", f"{projected / max(norm, 1e-300):.2f}"]
