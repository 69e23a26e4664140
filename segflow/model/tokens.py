"""Tokens: what a layer's share of a batch is made of, whose product is the weight's gradient.

Axes: B examples, S positions, P parts (the groups of a grouped convolution; 1 elsewhere), I inputs of a part, O outputs
of a part, D either of these.
"""

from __future__ import annotations

from typing import NamedTuple

from einops import rearrange
from torch import Tensor
from torch.nn import functional


class Tokens(NamedTuple):
    """One layer's share of a batch: inputs a_PBSI and output gradients g_PBSO."""

    a_PBSI: Tensor
    g_PBSO: Tensor


def scaled_examples(tokens: Tokens, factors_B: Tensor | None) -> Tokens:
    """Tokens whose gradients are each example's times a factor; None: as they are."""
    if factors_B is None:
        return tokens
    return Tokens(tokens.a_PBSI, tokens.g_PBSO * factors_B[:, None, None])


def joined_examples(tokens: Tokens, size: int) -> Tokens:
    """Tokens in which every `size` examples in a row are one, with all of their positions: its gradient is their sum.

    The last one may be made of fewer examples.
    """

    def join(side_PBSD: Tensor) -> Tensor:
        padded = functional.pad(side_PBSD, (0, 0, 0, 0, 0, -side_PBSD.shape[1] % size))
        return rearrange(padded, "p (n b) s d -> p n (b s) d", b=size)

    return tokens if size == 1 else Tokens(*map(join, tokens))
