"""Whitening: features brought to unit variance without correlation, read and transformed in chunks.

Axes: N examples, n examples of a chunk, D features, E features that are used, R whitened features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import GroupError, check_choice

KINDS = ("full", "scale", "none")
_CHUNK = 32 << 20  # bytes of float64 that are read at a time
_LARGEST = 1e140  # magnitudes from its inverse up to it have squares, and sums of these, in double precision
_COARSE = 1e-3  # relative rounding that hides dimensions
_SAMPLE = 64  # rows that tell whether features span few dimensions
_ROUNDINGS = 4  # a feature that differs by up to so many roundings does not vary


def feature_rows(features: Any) -> np.ndarray | Tensor:
    """Features [N, ...] as [N, D], without a copy where possible; GroupError for anything else."""
    if not isinstance(features, Tensor):
        features = features if isinstance(features, np.ndarray) else _array(features)
        numeric = features.dtype.kind in "fiub"
    else:
        numeric = not features.is_complex()
    if not numeric or features.ndim < 1 or not len(features) or 0 in features.shape:
        raise GroupError(
            f"features: found {features.dtype} of shape {tuple(features.shape)}, expected real numbers of shape "
            "[examples, ...], a row for each example."
        )
    rows: np.ndarray | Tensor = features.reshape(len(features), -1)
    return rows


def _array(features: Any) -> np.ndarray:
    try:
        return np.asarray(features)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise GroupError(f"features: expected an array of shape [examples, ...] ({problem}).") from problem


@dataclass(frozen=True)
class Moments:
    """The mean [D] and the scatter of some rows, in float64: their squares about the mean, or products, summed.

    count: the number of rows. scatter: [D] of squares, or [D, D] of products.
    """

    count: int
    mean_D: Tensor
    scatter: Tensor

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of rows together (Chan, Golub, LeVeque 1979)."""
        count = self.count + other.count
        off_D = other.mean_D - self.mean_D
        between = torch.outer(off_D, off_D) if self.scatter.ndim == 2 else off_D.square()
        scatter = self.scatter + other.scatter + between * (self.count * other.count / count)
        return Moments(count, self.mean_D + off_D * (other.count / count), scatter)


def moments(features_ND: np.ndarray | Tensor, products: bool, span_DR: Tensor | None = None) -> Moments:
    """Moments over all rows, chunk by chunk.

    Args:
        features_ND: the rows.
        products: the scatter has the products of features, [D, D]; otherwise their squares alone, [D].
        span_DR: orthonormal columns; the moments are then those of the rows' R coordinates in them.

    Raises:
        GroupError: there is no row, a feature is not finite, or squares are out of double precision's range.
    """
    total: Moments | None = None
    largest = 0.0
    for start, x_nD in _chunks(features_ND):
        finite_n = torch.isfinite(x_nD).all(1)
        if not finite_n.all():
            example = start + int(torch.argmin(finite_n.int()))
            raise GroupError(f"features: example {example} has NaN or infinite ones. Expected finite numbers.")
        largest = max(largest, x_nD.abs().max().item())
        if largest > _LARGEST:
            break
        rows_nD = x_nD if span_DR is None else x_nD @ span_DR
        mean_D = rows_nD.mean(0)
        centred_nD = rows_nD - mean_D
        chunk = Moments(len(rows_nD), mean_D, centred_nD.mT @ centred_nD if products else centred_nD.square().sum(0))
        total = chunk if total is None else total.merged(chunk)
    if largest and not 1 / _LARGEST <= largest <= _LARGEST:
        raise GroupError(
            f"features: the largest magnitude is {largest:.3g}, expected {1 / _LARGEST:.0e} to {_LARGEST:.0e}, so that "
            "squares are finite and not zero. Multiply all features by one number."
        )
    if total is None:
        raise GroupError("features: no rows were given. Expected a row for each example.")
    return total


def few_dimensions(features_ND: np.ndarray | Tensor) -> Tensor | None:
    """Orthonormal columns [D, R] that span all rows to rounding, if a sample says that they are few; else None.

    Gradients with respect to penultimate activations span as many as there are classes, however many features they are.
    """
    N, D = features_ND.shape
    rounding = max(_SAMPLE, D) * _eps(features_ND)
    if D <= _SAMPLE or N <= _SAMPLE or rounding > _COARSE:
        return None
    _, sample_nD = next(_chunks(features_ND, np.linspace(0, N - 1, _SAMPLE).round().astype(int)))
    if not torch.isfinite(sample_nD).all() or not sample_nD.any():
        return None
    _, sizes, axes_RD = torch.linalg.svd(sample_nD / sample_nD.abs().max(), full_matrices=False)
    rank = int((sizes > rounding * sizes[0]).sum())
    if rank > _SAMPLE // 2:
        return None
    span_DR = axes_RD[:rank].mT.contiguous()
    for _, x_nD in _chunks(features_ND):
        outside_nD = torch.addmm(x_nD, x_nD @ span_DR, span_DR.mT, alpha=-1)
        if not torch.linalg.vector_norm(outside_nD) <= rounding * torch.linalg.vector_norm(x_nD):
            return None
    return span_DR


@dataclass(frozen=True)
class Whitening:
    """Subtracts a mean and multiplies: by a matrix [E, R], or each feature by its own factor [E]; in float64.

    used_E: the features that vary; variance: the mean variance of what comes out.
    """

    used_E: Tensor
    mean_E: Tensor
    factors: Tensor
    variance: float

    @classmethod
    def fit(cls, features_ND: np.ndarray | Tensor, kind: str, memory: int = 1 << 30) -> Whitening:
        """Whitening of one kind, from moments in float64.

        Args:
            features_ND: the rows [N, D]; kind: "full" rotates to the principal axes and divides by their standard
                deviations, leaving out axes without variance up to rounding; "scale" divides each feature by its own,
                leaving out constant ones; "none" subtracts the mean and multiplies all features by one power of two
                that brings their mean variance near one, into the range of single precision.
            memory: bytes that the covariance [D, D] and its eigenvectors may take.

        Raises:
            GroupError: the kind is unknown, a feature is not finite, or the covariance does not fit the memory.
        """
        check_choice("whiten", kind, KINDS, GroupError)
        return cls._full(features_ND, memory) if kind == "full" else cls._by_feature(features_ND, kind)

    @classmethod
    def _full(cls, features_ND: np.ndarray | Tensor, memory: int) -> Whitening:
        D = features_ND.shape[1]
        if memory < 24 * D * D:
            raise GroupError(
                f'whiten="full": the covariance of {D:,} features needs {24 * D * D:,} bytes, memory={memory:,}. '
                'Use whiten="scale", features of fewer dimensions, or more memory.'
            )
        span_DR = few_dimensions(features_ND)
        total = moments(features_ND, True, span_DR)
        covariance, mean = total.scatter / total.count, total.mean_D
        moment_D = covariance.diagonal() + mean.square()
        sigma_D, axes_DD = torch.linalg.eigh(covariance)
        rounding = D * _squared_rounding(features_ND) * moment_D.max().item()
        floor = max(8 * D * _eps(np.empty(0)) * sigma_D[-1].item(), rounding)
        factors = (axes_DD / sigma_D.clamp_min(floor).sqrt())[:, sigma_D > floor].flip(1)
        if span_DR is not None:
            factors, mean = span_DR @ factors, span_DR @ mean
        used = torch.arange(D, device=mean.device)
        return cls(used, mean, factors, 1.0) if factors.numel() else cls._alike(mean)

    @classmethod
    def _by_feature(cls, features_ND: np.ndarray | Tensor, kind: str) -> Whitening:
        total = moments(features_ND, False)
        variance_D, mean_D = total.scatter / total.count, total.mean_D
        if kind == "none":
            variance = variance_D.mean().item()
            power = 2.0 ** -round(math.log2(variance) / 2) if variance else 1.0
            used = torch.arange(len(mean_D), device=mean_D.device)
            return cls(used, mean_D, torch.full_like(mean_D, power), variance * power**2)
        moment_D = variance_D + mean_D.square()
        used = torch.nonzero(variance_D > _squared_rounding(features_ND) * moment_D).flatten()
        return cls(used, mean_D[used], 1 / variance_D[used].sqrt(), 1.0) if len(used) else cls._alike(mean_D)

    @classmethod
    def _alike(cls, mean_D: Tensor) -> Whitening:
        """Of examples that are all alike: one feature, which is zero."""
        return cls(torch.tensor([0], device=mean_D.device), mean_D[:1], 0 * mean_D[:1], 0.0)

    @property
    def width(self) -> int:
        """R: the features that come out."""
        return self.factors.shape[-1]

    def __call__(self, x_nD: Tensor) -> Tensor:
        """Whitened rows [n, R] of rows [n, D] in float64, in single precision."""
        centred_nE = (x_nD if len(self.used_E) == x_nD.shape[1] else x_nD[:, self.used_E]) - self.mean_E
        white_nR = centred_nE @ self.factors if self.factors.ndim == 2 else centred_nE * self.factors
        return white_nR.float()


@dataclass(frozen=True)
class Rows:
    """Features [N, D] that come out whitened, [n, R], when they are asked for.

    chosen_N: the places of the rows meant, in this order; None: all of them.
    """

    features_ND: np.ndarray | Tensor
    whitening: Whitening
    chosen_N: np.ndarray | None = None

    def __len__(self) -> int:
        """N: the number of rows."""
        return len(self.features_ND if self.chosen_N is None else self.chosen_N)

    @property
    def device(self) -> torch.device:
        """Where the rows come out."""
        return self.whitening.mean_E.device

    @property
    def nbytes(self) -> int:
        """Bytes of all rows whitened."""
        return 4 * len(self) * self.whitening.width

    def of(self, chosen_n: np.ndarray) -> Rows:
        """Some of the rows."""
        return replace(self, chosen_N=chosen_n if self.chosen_N is None else self.chosen_N[chosen_n])

    def chunks(self) -> Iterator[Tensor]:
        """All rows whitened, in order."""
        for _, x_nD in _chunks(self.features_ND, self.chosen_N):
            yield self.whitening(x_nD)

    def all(self) -> Tensor:
        """All rows whitened [N, R]."""
        white_NR = torch.empty(len(self), self.whitening.width, device=self.device)
        start = 0
        for white_nR in self.chunks():
            white_NR[start : start + len(white_nR)] = white_nR
            start += len(white_nR)
        return white_NR


def _chunks(features_ND: np.ndarray | Tensor, chosen_N: np.ndarray | None = None) -> Iterator[tuple[int, Tensor]]:
    """Rows in float64 with the place of their first, a chunk at a time."""
    step = max(1, _CHUNK // (8 * features_ND.shape[1]))
    for start in range(0, len(features_ND if chosen_N is None else chosen_N), step):
        places: Any = slice(start, start + step)
        places = places if chosen_N is None else chosen_N[places]
        if isinstance(features_ND, Tensor):
            yield start, features_ND.detach()[places].double()
        else:
            yield start, torch.from_numpy(np.array(features_ND[places], dtype=np.float64))


def _squared_rounding(features: np.ndarray | Tensor) -> float:
    """The share of a feature's second moment up to which its variance may be rounding alone."""
    return (_ROUNDINGS * _eps(features)) ** 2


def _eps(features: np.ndarray | Tensor) -> float:
    """The relative rounding of the features' type (of whole numbers: of float64, in which they are read)."""
    if isinstance(features, Tensor):
        return torch.finfo(features.dtype if features.is_floating_point() else torch.float64).eps
    return float(np.finfo(features.dtype if features.dtype.kind == "f" else np.float64).eps)
