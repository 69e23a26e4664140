"""Gradients of one token each, kept as outer products: as many numbers as O + I, not O times I.

A query whose example is one token has the gradient g a^T in every layer. Operators that are elementwise in one basis
only scale it, alike for all queries, and it meets summed training gradients without ever being formed.
Axes: Q queries, K groups, P parts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .kronecker import Eigenbasis
from .layers import Tokens

_QUICK = 8 << 20  # bytes of temporaries that stay in a processor's caches


@dataclass(frozen=True)
class Outer:
    """Gradients scale * (g a^T), [Q, P, O, I]; scale_POI: what all share, None for 1."""

    g_PQO: Tensor
    a_PQI: Tensor
    scale_POI: Tensor | None = None

    @classmethod
    def of(cls, tokens: Tokens, basis: Eigenbasis | None) -> Outer:
        """Of examples of one token, in a basis where one is given."""
        a, g = tokens if basis is None else basis.rotate_tokens(tokens)
        return cls(g.squeeze(2), a.squeeze(2))

    @classmethod
    def zeros(cls, count: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Outer:
        """Gradients that are zero."""
        P, O, I = shape
        sides = (torch.zeros(P, count, D, dtype=dtype, device=device) for D in (O, I))
        return cls(*sides)

    def rotated(self, basis: Eigenbasis) -> Outer:
        """In an eigenbasis; only where nothing is scaled yet."""
        return Outer.of(Tokens(self.a_PQI[:, :, None], self.g_PQO[:, :, None]), basis)

    def __len__(self) -> int:
        """Q."""
        return self.g_PQO.shape[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Q, P, O, I."""
        P, Q, O = self.g_PQO.shape
        return Q, P, O, self.a_PQI.shape[2]

    def __mul__(self, factor: Tensor) -> Outer:
        """Elementwise by what all queries share, or by a number for each where it is [Q, 1, 1, 1]."""
        if factor.ndim == 4:
            return replace(self, g_PQO=self.g_PQO * factor[None, :, 0, 0])
        return replace(self, scale_POI=factor if self.scale_POI is None else self.scale_POI * factor)

    def rows(self, start: int, stop: int) -> Outer:
        """Some of the queries."""
        return replace(self, g_PQO=self.g_PQO[:, start:stop], a_PQI=self.a_PQI[:, start:stop])

    def formed(self) -> Tensor:
        """[Q, P, O, I]."""
        formed_QPOI = torch.einsum("pqo,pqi->qpoi", self.g_PQO, self.a_PQI)
        return formed_QPOI if self.scale_POI is None else formed_QPOI.mul_(self.scale_POI)

    def squared_norms(self) -> Tensor:
        """[Q]."""
        g, a = self.g_PQO.square(), self.a_PQI.square()
        if self.scale_POI is None:
            return (g.sum(2) * a.sum(2)).sum(0)
        scale_POI = self.scale_POI.expand(len(g), g.shape[2], a.shape[2])
        return (torch.bmm(g, scale_POI.square()) * a).sum((0, 2))

    def products(self, sums_KPOI: Tensor, budget: int) -> Tensor:
        """[Q, K]: <query, sum>, group by group in blocks whose temporaries take at most `budget` bytes."""
        Q, I = len(self), self.a_PQI.shape[2]
        step = max(1, _quick(budget, sums_KPOI) // max(1, Q * I * sums_KPOI.element_size()))
        found_KQ = self.g_PQO.new_empty(len(sums_KPOI), Q)
        for start in range(0, len(sums_KPOI), step):
            some_KPOI = sums_KPOI[start : start + step]
            some_KPOI = some_KPOI if self.scale_POI is None else some_KPOI * self.scale_POI
            totals = [
                torch.einsum("kqi,qi->kq", torch.matmul(g_QO, some_KPOI[:, part]), a_QI)
                for part, (g_QO, a_QI) in enumerate(zip(self.g_PQO, self.a_PQI, strict=True))
            ]
            found_KQ[start : start + step] = torch.stack(totals).sum(0)
        return found_KQ.mT

    def products_of_tokens(self, tokens: Tokens, budget: int) -> Tensor:
        """[Q, K]: with examples of one token each, g_k^T R_q a_k, some queries at a time; (g . g) (a . a) unscaled."""
        g_PKO, a_PKI = tokens.g_PBSO.squeeze(2), tokens.a_PBSI.squeeze(2)
        if self.scale_POI is None:
            return (torch.bmm(self.g_PQO, g_PKO.mT) * torch.bmm(self.a_PQI, a_PKI.mT)).sum(0)
        (P, K, O), I = g_PKO.shape, a_PKI.shape[2]
        step = max(1, _quick(budget, g_PKO) // max(1, P * O * (I + K) * g_PKO.element_size()))
        found_QK = g_PKO.new_empty(len(self), K)
        for start in range(0, len(self), step):
            some_QPOI = self.rows(start, start + step).formed()
            answered_PQOK = torch.bmm(some_QPOI.movedim(1, 0).flatten(1, 2), a_PKI.mT).unflatten(1, (-1, O))
            found_QK[start : start + step] = answered_PQOK.mul_(g_PKO.mT[:, None]).sum((0, 2))
        return found_QK


def _quick(budget: int, on: Tensor) -> int:
    """Bytes for temporaries: on a processor what its caches hold."""
    return min(budget, _QUICK) if on.device.type == "cpu" else budget


Stack = Tensor | Outer  # gradients of several queries, formed or not


def example(stack: Stack) -> Tensor:
    """A tensor of the stack's precision on its device."""
    return stack.g_PQO if isinstance(stack, Outer) else stack


def formed(stack: Stack) -> Tensor:
    """[Q, P, O, I]."""
    return stack.formed() if isinstance(stack, Outer) else stack


def squared_norms(stack: Stack) -> Tensor:
    """[Q]."""
    return stack.squared_norms() if isinstance(stack, Outer) else stack.flatten(1).square().sum(1)


def products(stack: Stack, sums_KPOI: Tensor, budget: int) -> Tensor:
    """[Q, K]: <query, sum>."""
    if isinstance(stack, Outer):
        return stack.products(sums_KPOI, budget)
    return stack.flatten(1) @ sums_KPOI.flatten(1).mT


def together(stacks: Sequence[Stack], form: bool) -> Stack:
    """Stacks after one another; form: as formed gradients. Outer products must have no scale."""
    if form:
        return torch.cat([formed(stack) for stack in stacks if len(stack)] or [formed(stacks[0])])
    outer = [stack for stack in stacks if isinstance(stack, Outer)]
    return Outer(torch.cat([one.g_PQO for one in outer], 1), torch.cat([one.a_PQI for one in outer], 1))
