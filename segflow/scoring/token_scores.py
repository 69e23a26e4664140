"""Scores of the tokens of training examples: their positions' shares of each layer's product with the queries.

Axes: Q queries, K examples of a tile, B examples of a batch, S positions of a layer, W tokens of the longest example, L
layers. Columns of an example's scores are what is of no token, and then its tokens: [1 + W].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ..data.batches import Batch
from ..errors import ScoreError
from ..groups.groups import Groups
from ..methods.plan import Plan
from ..model.finite_check import FiniteCheck
from ..model.layers.embedding import EmbeddingLayer
from ..model.layers.function import FunctionLayer
from ..model.layers.tracked import TrackedLayer, VectorLayer
from ..model.loss_view import LossView
from ..model.masks import checked_mask
from ..model.tokens import Tokens, scaled_examples
from .meeting import MetQueries
from .outer_products import token_products
from .tiles import Tile

Products = dict[str, Tensor]  # by layer, [Q, B, S]


def check_tokens(groups: Groups, plan: Plan) -> None:
    """Raise ScoreError unless the groups are single examples, and the plan's scores are sums over their tokens."""
    large = torch.nonzero(torch.from_numpy(groups.sizes) > 1).flatten().tolist()
    if large:
        raise ScoreError(
            f'keep=("token",): group {groups.labels[large[0]]!r} has {groups.sizes[large[0]]} examples. Tokens are '
            "scored of single examples: Groups.singletons(n), or Groups.from_lists([[i] for i in chosen], n, "
            "partial=True)."
        )
    if any(term.side != "gradient" or term.normalized for term in plan):
        raise ScoreError(
            'keep=("token",): the method\'s scores are no sums over tokens (cosines, or representations). Use a method '
            "of gradients, such as Source, InfluenceFunction or GradientDot."
        )


def by_position(view: LossView) -> LossView:
    """The view whose norms and biases keep the positions of a sequence apart."""
    layers = {
        name: replace(layer, each_position=True)
        if isinstance(layer, VectorLayer) and not isinstance(layer, FunctionLayer)
        else layer
        for name, layer in view.layers.items()
    }
    return replace(view, layers=layers)


@dataclass(frozen=True)
class Sequences:
    """The tokens of a batch's examples.

    column_BS: of each position of the batch its token's column, 0 where it is masked; counts_B: tokens of each example.
    """

    column_BS: Tensor
    counts_B: Tensor

    @classmethod
    def of(cls, view: LossView, batch: Batch, products: Mapping[str, Tensor]) -> Sequences:
        """As the task's mask says, or for a task without one as many tokens as most layers have positions."""
        mask = checked_mask(view, batch)
        if isinstance(mask, Mapping):
            raise ScoreError(
                'keep=("token",): the task gives masks by modules, which may see other sequences. Give a '
                "task that gives one mask of positions."
            )
        if mask is None or len(mask) != batch.size:  # texts that are packed into other rows have no positions
            positions = _usual_positions(view, products) if mask is None else 0
            mask = torch.ones(batch.size, positions, device=view.device)
        real_BS = mask.to(view.device) != 0
        column_BS = torch.where(real_BS, real_BS.long().cumsum(1), 0)
        return cls(column_BS, real_BS.sum(1))

    @property
    def width(self) -> int:
        """1 + W, of this batch."""
        return 1 + int(self.counts_B.max()) if self.column_BS.shape[1] else 1

    def columns(self, view: LossView, layer: TrackedLayer, positions: int) -> Tensor:
        """The column [B, S] of each of a layer's positions: 0 where it is of no token.

        A layer's calls have all positions each. Rows of examples that are run alone may be any positions: they are
        routed or sorted.
        """
        B, S = self.column_BS.shape
        times = max(1, view.layout.times.get(layer.name, 1))
        fits = S > 0 and positions in {S * calls for calls in range(1, times + 1)}
        if not fits or layer.name in view.layout.alone or not _sees_positions(view, layer):
            return self.column_BS.new_zeros(B, positions)
        return self.column_BS.repeat(1, positions // S)


def _sees_positions(view: LossView, layer: TrackedLayer) -> bool:
    """Whether a layer's input has an axis for positions, as the first example showed: not so for pooled features."""
    shape = view.layout.shapes.get(layer.name)
    if shape is None or isinstance(layer, FunctionLayer):
        return False
    of_indices = any(isinstance(getattr(use, "of", None) or use, EmbeddingLayer) for use in layer.uses)
    return len(shape) > 1 if of_indices else len(shape) > 2


def _usual_positions(view: LossView, products: Mapping[str, Tensor]) -> int:
    """How many positions most layers have in a call, of those that are not run alone and have several."""
    counts = Counter[int]()
    for name, products_QBS in products.items():
        times = max(1, view.layout.times.get(name, 1))
        if name not in view.layout.alone and products_QBS.shape[2] % times == 0:
            counts[products_QBS.shape[2] // times] += 1
    several = {positions: count for positions, count in counts.items() if positions > 1} or counts
    return max(several, key=lambda positions: (several[positions], positions), default=1)


@dataclass
class TokenScores:
    """The scores of a tile's examples, one after the other in its order, [L, Q, K, 1 + W].

    queries: ready to be met, all on this rank; count: K; budget: bytes for temporaries.
    """

    view: LossView
    queries: MetQueries
    count: int
    budget: int
    _scores: Tensor | None = None

    def of_batch(self, batch: Batch, first: int, finite: FiniteCheck) -> None:
        """Add the scores of a batch's examples, the first of which has a place in the tile."""
        products: Products = {}

        def consume(layer: TrackedLayer, tokens: Tokens) -> None:
            basis = self.queries.bases.get(layer.name) or self.queries.sum_bases.get(layer.name)
            scaled = scaled_examples(tokens, batch.weights)
            rotated = scaled if basis is None else basis.rotate_tokens(scaled)
            products[layer.name] = token_products(self.queries.values[layer.name], rotated, self.budget)

        self.view.capture(batch, consume, finite)
        if batch.idle:
            return
        sequences = Sequences.of(self.view, batch, products)
        scores_LQKW = self._room(sequences.width, next(iter(products.values())) if products else None)
        for place, name in enumerate(self.queries.values):
            if name in products:
                products_QBS = products[name]
                index_BS = sequences.columns(self.view, self.view.layers[name], products_QBS.shape[2])
                rows_QBW = scores_LQKW[place, :, first : first + batch.size, : sequences.width]
                rows_QBW.scatter_add_(2, index_BS.expand_as(products_QBS), products_QBS)

    def _room(self, width: int, like: Tensor | None) -> Tensor:
        """The scores, with room for examples of so many columns."""
        if self._scores is None:
            queries = next(iter(self.queries.values.values()))
            reference = like if like is not None else torch.zeros(0, dtype=self.view.dtype, device=self.view.device)
            self._scores = reference.new_zeros(len(self.queries.values), len(queries), self.count, width)
        self._scores = widened(self._scores, width)
        return self._scores

    def scores(self, views: int) -> Tensor:
        """[L, Q, K, 1 + W], averaged over the views of the examples."""
        return self._room(1, None) / views


def widened(scores: Tensor, width: int) -> Tensor:
    """Scores with at least so many columns; those of shorter examples are 0."""
    return functional.pad(scores, (0, max(0, width - scores.shape[-1])))


def tile_token_scores(
    data: Iterable[Batch], tile: Tile, scores: TokenScores, finite: FiniteCheck, views: int = 1
) -> Tensor:
    """Scores [L, Q, K, 1 + W] of a tile's examples; as `group_gradients.tile_scores`."""
    group_batches = (batch for batch in tile.batches for _ in range(views))
    for batch in data:
        scores.of_batch(batch, 0 if batch.idle else next(group_batches).first, finite)
    finite.drain()
    return scores.scores(views)
