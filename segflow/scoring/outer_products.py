"""Gradients of few tokens each, kept as sums of outer products: O + I numbers a token instead of O times I.

A query whose example is one token has the gradient g a^T in every layer, and R of them where it is taken at R points.
Operators that are elementwise in one basis only scale it, alike for all queries, and it meets summed training gradients
without being formed (R = 1), or formed for a block of queries at a time.
Axes: Q queries, R outer products of a query, K groups, P parts, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..curvature.kronecker import Eigenbasis
from ..model.one_hot import OneHot
from ..model.tokens import Tokens

_QUICK = 8 << 20  # bytes of temporaries that stay in a processor's caches


@dataclass(frozen=True)
class OuterProducts:
    """Gradients scale * (sum_r g_r a_r^T), [Q, P, O, I]; scale_POI: a factor that all queries share, None for 1."""

    g_PQRO: Tensor
    a_PQRI: Tensor
    scale_POI: Tensor | None = None

    @classmethod
    def of(cls, tokens: Tokens, basis: Eigenbasis | None) -> OuterProducts:
        """The gradients of examples of one token each, in a basis where one is given."""
        rotated = tokens if basis is None else basis.rotate_tokens(tokens)
        return cls(rotated.g_PBSO, rotated.dense_a)

    @classmethod
    def zeros(cls, count: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> OuterProducts:
        """Gradients that are zero."""
        P, O, I = shape
        sides = (torch.zeros(P, count, 1, D, dtype=dtype, device=device) for D in (O, I))
        return cls(*sides)

    def rotated(self, basis: Eigenbasis) -> OuterProducts:
        """The same gradients in an eigenbasis; only where nothing is scaled yet."""
        return OuterProducts.of(Tokens(self.a_PQRI, self.g_PQRO), basis)

    def __len__(self) -> int:
        """How many queries, Q."""
        return self.g_PQRO.shape[1]

    @property
    def rank(self) -> int:
        """How many outer products make a query's gradient, R."""
        return self.g_PQRO.shape[2]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the formed gradients: Q, P, O, I."""
        P, Q, _, O = self.g_PQRO.shape
        return Q, P, O, self.a_PQRI.shape[3]

    def __mul__(self, factor: Tensor) -> OuterProducts:
        """Times a factor that all queries share, elementwise, or times a number for each query, [Q, 1, 1, 1]."""
        if factor.ndim == 4:
            return replace(self, g_PQRO=self.g_PQRO * factor[None, :, 0])
        return replace(self, scale_POI=factor if self.scale_POI is None else self.scale_POI * factor)

    def rows(self, start: int, stop: int) -> OuterProducts:
        """The queries from `start` to `stop`."""
        return replace(self, g_PQRO=self.g_PQRO[:, start:stop], a_PQRI=self.a_PQRI[:, start:stop])

    def formed(self) -> Tensor:
        """The gradients as a tensor [Q, P, O, I]."""
        formed_QPOI = torch.einsum("pqro,pqri->qpoi", self.g_PQRO, self.a_PQRI)
        return formed_QPOI if self.scale_POI is None else formed_QPOI.mul_(self.scale_POI)

    def squared_norms(self) -> Tensor:
        """Each gradient's squared norm, [Q]."""
        if self.rank > 1:
            return torch.cat([block.flatten(1).square().sum(1) for block in self._formed_blocks(_QUICK)])
        g, a = self.g_PQRO.squeeze(2).square(), self.a_PQRI.squeeze(2).square()
        if self.scale_POI is None:
            return (g.sum(2) * a.sum(2)).sum(0)
        scale_POI = self.scale_POI.expand(len(g), g.shape[2], a.shape[2])
        return (torch.bmm(g, scale_POI.square()) * a).sum((0, 2))

    def _formed_blocks(self, budget: int) -> Iterator[Tensor]:
        """The gradients, so many queries at a time that they take at most `budget` bytes, or one."""
        _, *shape = self.shape
        step = max(1, budget // (math.prod(shape) * self.g_PQRO.element_size()))
        for start in range(0, max(1, len(self)), step):
            yield self.rows(start, start + step).formed()

    def products(self, sums_KPOI: Tensor, budget: int) -> Tensor:
        """[Q, K]: <query, sum>, group by group in blocks whose temporaries take at most `budget` bytes.

        Of several outer products the gradient is formed, of some queries at a time: meeting each by itself would take
        as many times the multiplications.
        """
        if self.rank > 1:
            sums_KD = sums_KPOI.flatten(1)
            room = min(budget, max(_QUICK, sums_KPOI.nbytes))  # the sums are read once for each block of queries
            return torch.cat([block.flatten(1) @ sums_KD.mT for block in self._formed_blocks(room)])
        Q, I = len(self), self.a_PQRI.shape[3]
        step = max(1, _quick(budget, sums_KPOI) // max(1, Q * I * sums_KPOI.element_size()))
        products_KQ = self.g_PQRO.new_empty(len(sums_KPOI), Q)
        for start in range(0, len(sums_KPOI), step):
            block_KPOI = sums_KPOI[start : start + step]
            block_KPOI = block_KPOI if self.scale_POI is None else block_KPOI * self.scale_POI
            totals = [
                torch.einsum("kqi,qi->kq", torch.matmul(g_QO, block_KPOI[:, part]), a_QI)
                for part, (g_QO, a_QI) in enumerate(zip(self.g_PQRO.squeeze(2), self.a_PQRI.squeeze(2), strict=True))
            ]
            products_KQ[start : start + step] = torch.stack(totals).sum(0)
        return products_KQ.mT


def _quick(budget: int, like: Tensor) -> int:
    """Bytes for temporaries on a tensor's device: on a CPU no more than its caches hold."""
    return min(budget, _QUICK) if like.device.type == "cpu" else budget


Stack = Tensor | OuterProducts  # gradients of several queries, formed or not
Stacks = dict[str, Stack]  # by layer


def reference(stack: Stack) -> Tensor:
    """A tensor of the stack's precision on its device."""
    return stack.g_PQRO if isinstance(stack, OuterProducts) else stack


def formed(stack: Stack) -> Tensor:
    """The gradients as a tensor [Q, P, O, I]."""
    return stack.formed() if isinstance(stack, OuterProducts) else stack


def squared_norms(stack: Stack) -> Tensor:
    """Each gradient's squared norm, [Q]."""
    return stack.squared_norms() if isinstance(stack, OuterProducts) else stack.flatten(1).square().sum(1)


def products(stack: Stack, sums_KPOI: Tensor, budget: int) -> Tensor:
    """[Q, K]: <query, sum>; budget: bytes for temporaries."""
    if isinstance(stack, OuterProducts):
        return stack.products(sums_KPOI, budget)
    return stack.flatten(1) @ sums_KPOI.flatten(1).mT


def example_products(stack: Stack, tokens: Tokens, budget: int) -> Tensor:
    """[Q, B]: <query, gradient of each example>, no example's gradient being formed."""
    return token_products(stack, tokens, budget).sum(2)


def token_products(stack: Stack, tokens: Tokens, budget: int) -> Tensor:
    """[Q, B, S]: g^T R a of each token, which add up to <query, gradient> of an example over its positions."""
    P, B, S, _ = tokens.a_PBSI.shape
    if isinstance(tokens.a_PBSI, OneHot):
        return _one_hot_products(stack, tokens.a_PBSI, tokens.g_PBSO[0], budget)
    a_PTI, g_PTO = tokens.a_PBSI.flatten(1, 2), tokens.g_PBSO.flatten(1, 2)
    if isinstance(stack, OuterProducts) and stack.scale_POI is None:
        sides = ((stack.g_PQRO, g_PTO), (stack.a_PQRI, a_PTI))
        with_g, with_a = (torch.bmm(side.flatten(1, 2), tokens_PTD.mT) for side, tokens_PTD in sides)
        products_QT = (with_g * with_a).sum(0).unflatten(0, (-1, stack.rank)).sum(1)
        return products_QT.unflatten(1, (B, S))
    O, room = g_PTO.shape[2], _quick(budget, g_PTO) // g_PTO.element_size()
    products_QT = g_PTO.new_empty(len(stack), B * S)
    tokens_at_once = max(1, room // (P * O))
    for start in range(0, B * S, tokens_at_once):
        stop = start + tokens_at_once
        a_PtI, g_PtO = a_PTI[:, start:stop], g_PTO[:, start:stop]
        step = max(1, room // (P * O * (a_PtI.shape[1] + a_PtI.shape[2])))
        for first in range(0, len(stack), step):
            block_QPOI = _formed_rows(stack, first, first + step)
            answered_PQOt = torch.bmm(block_QPOI.movedim(1, 0).flatten(1, 2), a_PtI.mT).unflatten(1, (-1, O))
            products_QT[first : first + step, start:stop] = answered_PQOt.mul_(g_PtO.mT[:, None]).sum((0, 2))
    return products_QT.unflatten(1, (B, S))


def _one_hot_products(stack: Stack, a: OneHot, g_BSO: Tensor, budget: int) -> Tensor:
    """As `token_products`, of one-hot inputs: a column of each query's gradient meets each token's."""
    (B, S), O = a.index_BS.shape, g_BSO.shape[2]
    index_T, weighted_TO = a.index_BS.flatten(), (g_BSO * a.weight_BS[..., None]).flatten(0, 1)
    products_QT = g_BSO.new_empty(len(stack), B * S)
    step = max(1, _quick(budget, g_BSO) // max(1, B * S * O * g_BSO.element_size()))
    for first in range(0, len(stack), step):
        columns_QOT = _formed_rows(stack, first, first + step)[:, 0].index_select(2, index_T)
        products_QT[first : first + step] = torch.einsum("qot,to->qt", columns_QOT, weighted_TO)
    return products_QT.unflatten(1, (B, S))


def _formed_rows(stack: Stack, start: int, stop: int) -> Tensor:
    return stack.rows(start, stop).formed() if isinstance(stack, OuterProducts) else stack[start:stop]


def token_cost(stack: Stack, one_hot: bool = False) -> int:
    """Multiplications that one training token costs in `token_products`."""
    Q, _, O, I = stack.shape
    if one_hot:
        return Q * O
    return Q * (stack.rank * (O + I) if isinstance(stack, OuterProducts) and stack.scale_POI is None else O * I)


def together(stacks: Sequence[Stack], form: bool) -> Stack:
    """Stacks one after the other, as formed gradients if `form`, else as outer products, which must have no scale."""
    if form:
        return torch.cat([formed(stack) for stack in stacks if len(stack)] or [formed(stacks[0])])
    outer = [stack for stack in stacks if isinstance(stack, OuterProducts)]
    return _joined(outer, 1)


def plus(first: Stack, second: Stack) -> Stack:
    """The sum of the same queries' gradients, which must have no scale.

    It stays a sum of outer products where both are, as long as these take fewer numbers than the formed gradient.
    """
    outer = [stack for stack in (first, second) if isinstance(stack, OuterProducts)]
    if len(outer) == 2 and fewer_factored(sum(stack.rank for stack in outer), *first.shape[2:]):
        return _joined(outer, 2)
    return formed(first) + formed(second)


def times(stack: Stack, weight: float) -> Stack:
    """Gradients times a number."""
    return stack if weight == 1 else stack * reference(stack).new_full((1, 1, 1, 1), weight)


def fewer_factored(rank: int, O: int, I: int) -> bool:
    """Whether so many outer products take fewer numbers than the gradient that is their sum."""
    return rank == 1 or rank * (O + I) < O * I


def _joined(stacks: Sequence[OuterProducts], axis: int) -> OuterProducts:
    """Along the queries (1) or their outer products (2)."""
    g, a = (torch.cat(sides, axis) for sides in zip(*((s.g_PQRO, s.a_PQRI) for s in stacks), strict=True))
    return OuterProducts(g, a)
