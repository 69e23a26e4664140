"""Tokens: what a layer's share of a batch is made of, whose product is the weight's gradient.

Axes: B examples, S positions, P parts (the groups of a grouped convolution; 1 elsewhere), I inputs of a part, O outputs
of a part, D either of these, K sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from . import one_hot
from .one_hot import OneHot


class Tokens(NamedTuple):
    """One layer's share of a batch: inputs a_PBSI (an embedding's are one-hot) and output gradients g_PBSO."""

    a_PBSI: Tensor | OneHot
    g_PBSO: Tensor

    @property
    def examples(self) -> int:
        """B."""
        return self.a_PBSI.shape[1]

    @property
    def positions(self) -> int:
        """S."""
        return self.a_PBSI.shape[2]

    @property
    def dense_a(self) -> Tensor:
        """The inputs [P, B, S, I], formed where they are one-hot."""
        return self.a_PBSI.dense() if isinstance(self.a_PBSI, OneHot) else self.a_PBSI

    def of_examples(self, chosen: slice) -> Tokens:
        """Those of some examples."""
        a = self.a_PBSI
        return Tokens(a.examples(chosen) if isinstance(a, OneHot) else a[:, chosen], self.g_PBSO[:, chosen])

    def times(self, matrix_PIk: Tensor) -> Tensor:
        """The inputs times a matrix, [P, B, S, k]."""
        if isinstance(self.a_PBSI, OneHot):
            return self.a_PBSI.times(matrix_PIk)
        return torch.einsum("pbsi,pik->pbsk", self.a_PBSI, matrix_PIk)

    def total(self) -> Tensor:
        """The sum of all examples' gradients, [P, O, I]."""
        if isinstance(self.a_PBSI, OneHot):
            sums = self.g_PBSO.new_zeros(1, self.g_PBSO.shape[3], self.a_PBSI.size)
            into_one_B = torch.zeros(self.examples, dtype=torch.long, device=sums.device)
            self.a_PBSI.add_sums_(sums, into_one_B, self.g_PBSO[0])
            return sums
        a, g = (side.flatten(1, 2) for side in (self.a_PBSI, self.g_PBSO))
        return torch.bmm(g.mT, a)

    def magnitude(self) -> Tensor:
        """|a|^2 |g|^2: not finite if a token is not, or if a square or a product of squares may overflow."""
        a = self.a_PBSI.weight_BS if isinstance(self.a_PBSI, OneHot) else self.a_PBSI
        return (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(self.g_PBSO)).square()

    def filled(self) -> Tensor:
        """Whether a position's input is not zero, [B, S], as it is where examples of more positions made others pad."""
        a = self.a_PBSI
        return a.weight_BS != 0 if isinstance(a, OneHot) else (a != 0).any(3).any(0)

    def live(self) -> Tensor:
        """Whether some position of an example has neither an input nor an output gradient of zero, [B]."""
        return (self.filled() & (self.g_PBSO != 0).any(3).any(0)).any(1)


def no_tokens(shape: tuple[int, int, int], examples: int, dtype: torch.dtype, device: torch.device) -> Tokens:
    """The tokens of examples whose loss does not reach a layer of shape [P, O, I]: zeros."""
    P, O, I = shape
    a, g = (torch.zeros(P, examples, 1, D, dtype=dtype, device=device) for D in (I, O))
    return Tokens(a, g)


def scaled_examples(tokens: Tokens, factors_B: Tensor | None) -> Tokens:
    """Tokens whose gradients are each example's times a factor; None: as they are."""
    if factors_B is None:
        return tokens
    return Tokens(tokens.a_PBSI, tokens.g_PBSO * factors_B[:, None, None])


def masked_outputs(tokens: Tokens, mask_BS: Tensor | None) -> Tokens:
    """Tokens whose output gradients are zero where a mask is 0; None masks nothing."""
    if mask_BS is None:
        return tokens
    return Tokens(tokens.a_PBSI, tokens.g_PBSO * mask_BS.to(tokens.g_PBSO.dtype)[None, :, :, None])


def masked_inputs(tokens: Tokens, mask_BS: Tensor) -> Tokens:
    """Tokens whose inputs are zero where a mask is 0, and so is the output gradient: their product is as before."""
    a, kept_BS = tokens.a_PBSI, (mask_BS != 0) | (tokens.g_PBSO != 0).any(3).any(0)
    factors_BS = kept_BS.to(tokens.g_PBSO.dtype)
    return Tokens(a.masked(factors_BS) if isinstance(a, OneHot) else a * factors_BS[None, :, :, None], tokens.g_PBSO)


def joined_examples(tokens: Tokens, size: int) -> Tokens:
    """Tokens in which every `size` examples in a row are one, with all of their positions: its gradient is their sum.

    The last one may be made of fewer examples.
    """
    if size == 1:
        return tokens
    missing = -tokens.examples % size
    whole = joined_batches([tokens, _none_of(tokens, missing)]) if missing else tokens
    return regrouped(whole, size)


def regrouped(tokens: Tokens, size: int) -> Tokens:
    """As many examples fewer: every `size` of them in a row become one, whose positions are theirs."""

    def join(side_PBSD: Tensor) -> Tensor:
        return rearrange(side_PBSD, "p (n b) s d -> p n (b s) d", b=size)

    a = tokens.a_PBSI
    joined = a.reshaped(tokens.examples // size, -1) if isinstance(a, OneHot) else join(a)
    return Tokens(joined, join(tokens.g_PBSO))


def joined_calls(pieces: Sequence[Tokens]) -> Tokens:
    """Several calls' tokens of the same examples, one after the other along the positions."""
    if len(pieces) == 1:
        return pieces[0]
    return Tokens(_cat([piece.a_PBSI for piece in pieces], 2), torch.cat([piece.g_PBSO for piece in pieces], 2))


def joined_batches(pieces: Sequence[Tokens]) -> Tokens:
    """Examples one after the other; those of fewer positions are padded with zeros."""
    positions = max(piece.positions for piece in pieces)
    padded = [_padded(piece, positions - piece.positions) for piece in pieces]
    return Tokens(_cat([piece.a_PBSI for piece in padded], 1), torch.cat([piece.g_PBSO for piece in padded], 1))


def _cat(sides: list[Tensor | OneHot], axis: int) -> Tensor | OneHot:
    hot = [side for side in sides if isinstance(side, OneHot)]
    if len(hot) == len(sides):
        return one_hot.cat(hot, axis - 1)
    return torch.cat([side.dense() if isinstance(side, OneHot) else side for side in sides], axis)


def _padded(tokens: Tokens, missing: int) -> Tokens:
    """With so many positions more, at which there is nothing."""
    if not missing:
        return tokens
    a, g = tokens.a_PBSI, functional.pad(tokens.g_PBSO, (0, 0, 0, missing))
    if isinstance(a, OneHot):
        index, weight = (functional.pad(side, (0, missing)) for side in (a.index_BS, a.weight_BS))
        return Tokens(OneHot(index, weight, a.size), g)
    return Tokens(functional.pad(a, (0, 0, 0, missing)), g)


def _none_of(tokens: Tokens, count: int) -> Tokens:
    """So many examples at which there is nothing."""
    P, _, S, _ = tokens.a_PBSI.shape
    g = tokens.g_PBSO.new_zeros(P, count, S, tokens.g_PBSO.shape[3])
    a = tokens.a_PBSI
    if isinstance(a, OneHot):
        return Tokens(OneHot(a.index_BS.new_zeros(count, S), a.weight_BS.new_zeros(count, S), a.size), g)
    return Tokens(a.new_zeros(P, count, S, a.shape[3]), g)
