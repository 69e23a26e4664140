"""Inputs that are zero but for one entry each, as an embedding's: kept as indices, never formed.

Axes: B examples, S positions, I inputs (the vocabulary), O outputs, K sums, k columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class OneHot:
    """Inputs a [1, B, S, I] that hold weight_BS at index_BS, and zeros elsewhere; size: I."""

    index_BS: Tensor
    weight_BS: Tensor
    size: int

    @property
    def shape(self) -> torch.Size:
        """[1, B, S, I], as of the inputs formed."""
        return torch.Size((1, *self.index_BS.shape, self.size))

    def dense(self) -> Tensor:
        """The inputs [1, B, S, I], formed: only where there are few."""
        formed_BSI = self.weight_BS.new_zeros(*self.index_BS.shape, self.size)
        return formed_BSI.scatter_(2, self.index_BS[..., None], self.weight_BS[..., None])[None]

    def times(self, matrix_PIk: Tensor) -> Tensor:
        """a times a matrix, [1, B, S, k]."""
        return (matrix_PIk[0][self.index_BS] * self.weight_BS[..., None])[None]

    def scaled(self, factors_PI: Tensor) -> OneHot:
        """Each input times its factor."""
        return replace(self, weight_BS=self.weight_BS * factors_PI[0][self.index_BS])

    def masked(self, factors_BS: Tensor) -> OneHot:
        """Each position's input times a factor."""
        return replace(self, weight_BS=self.weight_BS * factors_BS)

    def examples(self, chosen: slice) -> OneHot:
        """Those of some examples."""
        return replace(self, index_BS=self.index_BS[chosen], weight_BS=self.weight_BS[chosen])

    def reshaped(self, *shape: int) -> OneHot:
        """With the examples and positions divided otherwise."""
        return replace(self, index_BS=self.index_BS.reshape(shape), weight_BS=self.weight_BS.reshape(shape))

    def squares(self) -> Tensor:
        """The sum over examples and positions of a^2, [1, I]."""
        sums_I = self.weight_BS.new_zeros(self.size)
        return sums_I.index_add_(0, self.index_BS.flatten(), self.weight_BS.square().flatten())[None]

    def columns(self, g_BSO: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of the examples' gradients that are not zero: [T, O], and the index of each, [T]; T = B * S.

        An index that an example holds several times has one column, which is their sum; the columns that are left over
        are zero.
        """
        B = len(self.index_BS)
        keys_T = (self.index_BS + self.size * torch.arange(B, device=self.index_BS.device)[:, None]).flatten()
        sorted_T, order_T = torch.sort(keys_T, stable=True)
        begins_T = torch.ones_like(sorted_T, dtype=torch.bool)
        begins_T[1:] = sorted_T[1:] != sorted_T[:-1]
        places_T = begins_T.cumsum(0) - 1
        weighted_TO = (g_BSO * self.weight_BS[..., None]).flatten(0, 1)[order_T]
        columns_TO = torch.zeros_like(weighted_TO).index_add_(0, places_T, weighted_TO)
        indices_T = torch.zeros_like(sorted_T).index_copy_(0, places_T, sorted_T % self.size)
        return columns_TO, indices_T

    def add_sums_(self, sums_KOI: Tensor, of_example_B: Tensor, g_BSO: Tensor) -> None:
        """Add each example's sum over positions of g a^T to the sum that it belongs to, in place."""
        weighted_TO = (g_BSO * self.weight_BS[..., None]).flatten(0, 1)
        of_token_T = of_example_B[:, None].expand_as(self.index_BS).flatten()
        sums_KOI.mT.index_put_((of_token_T, self.index_BS.flatten()), weighted_TO, accumulate=True)


def cat(pieces: list[OneHot], axis: int) -> OneHot:
    """One after the other, along the examples (0) or the positions (1)."""
    index, weight = (torch.cat(side, axis) for side in zip(*((p.index_BS, p.weight_BS) for p in pieces), strict=True))
    return replace(pieces[0], index_BS=index, weight_BS=weight)
