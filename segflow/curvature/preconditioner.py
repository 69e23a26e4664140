"""The optimizer's preconditioner P over checkpoints, and its rank-one part.

Axes: P parts, O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_ROUNDS = 20  # of a rank-one fit with missing entries


@dataclass(frozen=True)
class RankOne:
    """A positive matrix [P, O, I] as outputs_PO times inputs_PI."""

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
        rows = _mean(logs - columns[:, None, :], live, 2)
        columns = _mean(logs - rows[:, :, None], live, 1)
    return RankOne(columns.exp().to(matrix_POI.dtype), rows.exp().to(matrix_POI.dtype))


def _mean(values: Tensor, weights: Tensor, axis: int) -> Tensor:
    return (values * weights).sum(axis) / weights.sum(axis).clamp_min(1)


@dataclass(frozen=True)
class PreconditionerBlock:
    """One layer's P [P, O, I], and its rank-one part."""

    exact_POI: Tensor
    part: RankOne


@dataclass(frozen=True)
class Denominator:
    """The mean of sqrt(second moment) + eps over checkpoints so far, and which entries ever had a gradient."""

    mean_POI: Tensor = field(default_factory=lambda: torch.zeros(()))
    live_POI: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.bool))

    def plus(self, weight: float, moments_POI: Tensor, eps: float) -> Denominator:
        """With one more checkpoint; the weights add up to 1."""
        return Denominator(self.mean_POI + weight * (moments_POI.sqrt() + eps), self.live_POI | (moments_POI > 0))


def preconditioner_block(denominator: Denominator) -> PreconditionerBlock:
    """P over checkpoints, their harmonic mean, and its rank-one part.

    In the arithmetic mean a checkpoint at which an entry had not had a gradient yet, P = 1 / eps, would outweigh all
    others. An entry whose second moments are all zero never had a gradient, so that any P is right: it takes the
    rank-one part's rather than 1 / eps, which would only magnify rounding.
    """
    mean, live = 1 / denominator.mean_POI, denominator.live_POI
    part = rank_one(mean, live)
    fitted = part.outputs_PO[:, :, None] * part.inputs_PI[:, None, :]
    return PreconditionerBlock(torch.where(live, mean, fitted), part)
