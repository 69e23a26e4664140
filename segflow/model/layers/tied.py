"""A tensor that several modules use: the gradients of all uses are summed in an example before anything is squared.

Axes: P parts, R rows, S positions, O outputs, I inputs, Q gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..one_hot import OneHot
from ..tokens import Tokens
from .embedding import EmbeddingLayer
from .function import FunctionLayer
from .linear import LinearLayer, TransposedLinearLayer
from .tracked import TrackedLayer, VectorLayer, one_token

_MATRICES = (LinearLayer, EmbeddingLayer)


@dataclass(frozen=True)
class TurnedLayer(TrackedLayer):
    """A use of a tensor whose [O, I] is the transpose of the block's: inputs and output gradients change places."""

    of: TrackedLayer | None = None

    @classmethod
    def turned(cls, use: TrackedLayer) -> TurnedLayer:
        """The use, turned."""
        return cls(use.name, use.module, False, use.names, use.sizes, use)

    @property
    def use(self) -> TrackedLayer:
        """The use as it is."""
        assert self.of is not None  # noqa: S101
        return self.of

    def sides(self, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The sides exchanged, formed where they are one-hot."""
        a, g = self.use.sides(value, gradient)
        return g, a.dense() if isinstance(a, OneHot) else a


@dataclass(frozen=True)
class TiedLayer(TrackedLayer):
    """A block whose gradient is the sum over several modules' calls; its tokens are those of all of them.

    Its curvature has one basis for all uses: A and S are of all tokens alike. Eigenvalues are of the summed gradients,
    with the rank-one part of P inside: the exact P would take gradients out of S's span, where a basis is arbitrary.

    tied: each use, in the block's orientation, the first of which says how the gradient is laid out.
    """

    tied: tuple[TrackedLayer, ...] = ()

    @classmethod
    def of(cls, uses: Sequence[TrackedLayer]) -> TrackedLayer | None:
        """The block of uses of one tensor, in the orientation of the first that is no embedding; None if there is none.

        None as well unless all are matrices without a bias, or all vectors.
        """
        if any(isinstance(use, FunctionLayer) for use in uses):
            return None
        vectors = all(isinstance(use, VectorLayer) for use in uses)
        if not vectors and not all(isinstance(use, _MATRICES) and not use.has_bias for use in uses):
            return None
        heads = [use for use in uses if not isinstance(use, EmbeddingLayer)] or list(uses)
        first = heads[0]
        others = [use for use in uses if use is not first]
        turned = [use if _rows_first(use) == _rows_first(first) else TurnedLayer.turned(use) for use in others]
        tied = TiedVector if vectors else cls
        return tied(first.name, first.module, False, first.names, first.sizes, (first, *turned))

    @property
    def uses(self) -> tuple[TrackedLayer, ...]:
        """Each use."""
        return self.tied

    def sides(self, value: Tensor, gradient: Tensor) -> tuple[Tensor | OneHot, Tensor]:
        """As of the first use."""
        return self.tied[0].sides(value, gradient)

    def positions(self, shape: torch.Size) -> int:
        """Those of all uses, which are about as many."""
        return len(self.tied) * self.tied[0].positions(shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """As of the first use."""
        return self.tied[0].shape

    @property
    def diagonal_inputs(self) -> bool:
        """As of the first use."""
        return self.tied[0].diagonal_inputs

    @property
    def diagonal_outputs(self) -> bool:
        """As of the first use."""
        return self.tied[0].diagonal_outputs

    @property
    def parameters(self) -> list[Tensor]:
        """The tensor."""
        return self.tied[0].parameters

    def gradient_matrices(self, tensors_Q: Sequence[Tensor]) -> Tensor:
        """As of the first use."""
        return self.tied[0].gradient_matrices(tensors_Q)

    def by_parameter(self, gradient_QPOI: Tensor) -> list[Tensor]:
        """As of the first use."""
        return self.tied[0].by_parameter(gradient_QPOI)


class TiedVector(TiedLayer):
    """A vector that several modules use: one token for each example, whose gradient is the sum over the uses."""

    def together(self, tokens: Tokens) -> Tokens:
        """One token, summed over the uses."""
        return one_token(tokens)

    def positions(self, _shape: torch.Size) -> int:
        """One."""
        return 1


def _rows_first(use: TrackedLayer) -> bool:
    """Whether the tensor's rows are the block's outputs."""
    return not isinstance(use, EmbeddingLayer | TransposedLinearLayer)
