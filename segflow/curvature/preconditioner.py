"""The optimizer's preconditioner P = 1 / (sqrt(v_hat) + eps), made here and nowhere else, and its rank-one part.

Axes: P parts, O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_ROUNDS = 20  # of alternating row and column means, where entries are missing


@dataclass(frozen=True)
class RankOne:
    """A positive matrix [P, O, I] whose entries are outputs_PO times inputs_PI."""

    inputs_PI: Tensor
    outputs_PO: Tensor


def rank_one(matrix_POI: Tensor, live_POI: Tensor) -> RankOne:
    """The geometric row and column means of a positive matrix, the least-squares fit of its logarithm.

    live_POI: the entries that count (a preconditioner's entry means nothing where there never was a gradient).

    Example:
        >>> p = torch.tensor([[[1.0, 10.0], [2.0, 20.0]]])
        >>> fit = rank_one(p, p > 0)
        >>> (fit.outputs_PO[:, :, None] * fit.inputs_PI[:, None, :] / p).round(decimals=4)
        tensor([[[1., 1.],
                 [1., 1.]]])
    """
    live = live_POI.to(torch.float64)
    logs = torch.where(live_POI, matrix_POI.to(torch.float64), 1.0).log()
    rows, columns = (torch.zeros_like(logs.sum(axis)) for axis in (2, 1))
    for _ in range(_ROUNDS):  # one round is exact where every entry is live
        rows = _weighted_mean(logs - columns[:, None, :], live, 2)
        columns = _weighted_mean(logs - rows[:, :, None], live, 1)
    return RankOne(columns.exp().to(matrix_POI.dtype), rows.exp().to(matrix_POI.dtype))


def _weighted_mean(values: Tensor, weights: Tensor, axis: int) -> Tensor:
    return (values * weights).sum(axis) / weights.sum(axis).clamp_min(1)


@dataclass(frozen=True)
class PreconditionerBlock:
    """One layer's P [P, O, I], and its rank-one part."""

    exact_POI: Tensor
    part: RankOne


def no_preconditioner(shape: tuple[int, int, int]) -> PreconditionerBlock:
    """P = 1 of a layer of shape [P, O, I]: of an optimizer without second moments, or where nothing moved."""
    P, O, I = shape
    ones_POI = torch.ones(P, O, I, dtype=torch.float64)
    return PreconditionerBlock(ones_POI, RankOne(ones_POI[:, 0, :], ones_POI[:, :, 0]))


@dataclass(frozen=True)
class MeanDenominator:
    """The weighted mean of P's denominator sqrt(v_hat) + eps over the checkpoints so far.

    live_POI: the entries that have had a gradient at any of them.
    """

    mean_POI: Tensor = field(default_factory=lambda: torch.zeros(()))
    live_POI: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.bool))

    def plus(self, weight: float, moments_POI: Tensor, eps: float) -> MeanDenominator:
        """With one more checkpoint's second moments v_hat; all checkpoints' weights add up to 1."""
        return MeanDenominator(self.mean_POI + weight * (moments_POI.sqrt() + eps), self.live_POI | (moments_POI > 0))


def preconditioner_block(denominator: MeanDenominator) -> PreconditionerBlock:
    """P over checkpoints as their harmonic mean, and its rank-one part.

    In an arithmetic mean, a checkpoint at which an entry had not had a gradient yet, so that P = 1 / eps, would
    outweigh all others. An entry whose second moments are zero at all checkpoints never had a gradient, so that any P
    is right: it takes the rank-one part's, for 1 / eps would only magnify rounding.
    """
    mean, live = 1 / denominator.mean_POI, denominator.live_POI
    part = rank_one(mean, live)
    fitted = part.outputs_PO[:, :, None] * part.inputs_PI[:, None, :]
    return PreconditionerBlock(torch.where(live, mean, fitted), part)
