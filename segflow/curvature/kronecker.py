"""The mathematics of a Kronecker-factored curvature: covariances, eigenbases, and eigenvalues in them.

A is the covariance of a layer's inputs a, S that of its output gradients g; Q_A and Q_S are their eigenvectors. EK-FAC:
George et al. 2018, arXiv 1806.03884; over checkpoints: Bae et al. 2024, arXiv 2405.12186, Appendix D.

Axes: P parts, B examples, S positions, N = B * S tokens, I inputs, O outputs, D either of these, Q gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FactorError
from ..model.tokens import Tokens
from .preconditioner import RankOne

Gradients = dict[str, Tensor]  # by layer, [Q, P, O, I] each


@dataclass(frozen=True)
class Covariance:
    """Sums over tokens of a a^T and g g^T, and the number of tokens in each; where examples have weights, weighted."""

    a_PII: Tensor
    g_POO: Tensor
    a_rows: Tensor
    g_rows: Tensor

    @classmethod
    def zeros(cls, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Covariance:
        """Empty sums for a layer of shape [P, O, I]."""
        P, O, I = shape
        inputs = torch.zeros(P, I, I, dtype=dtype, device=device)
        outputs = torch.zeros(P, O, O, dtype=dtype, device=device)
        rows = torch.zeros((), dtype=torch.float64, device=device)
        return cls(inputs, outputs, rows, rows.clone())

    def add_(self, tokens: Tokens, mask_BS: Tensor | None = None, weights_B: Tensor | None = None) -> None:
        """Add a batch's tokens, in place; an input token is padding where the mask is 0, and does not count.

        weights_B: how often each example counts; None for once.
        """
        a, g = tokens
        examples = a.shape[1] if weights_B is None else weights_B.sum()
        if mask_BS is not None:
            mask = mask_BS.to(a.dtype)
            a = a * mask[None, :, :, None]
            self.a_rows.add_(mask.sum() if weights_B is None else weights_B @ mask.sum(1))
        else:
            self.a_rows.add_(examples * a.shape[2])
        self.g_rows.add_(examples * g.shape[2])
        if weights_B is not None:
            a, g = (side * weights_B.sqrt()[:, None, None] for side in (a, g))
        a_PNI, g_PNO = a.flatten(1, 2), g.flatten(1, 2)
        self.a_PII.baddbmm_(a_PNI.mT, a_PNI)
        self.g_POO.baddbmm_(g_PNO.mT, g_PNO)


@dataclass(frozen=True)
class Eigenbasis:
    """Orthonormal eigenvectors of A and S, in columns."""

    inputs_PII: Tensor
    outputs_POO: Tensor

    def rotate(self, gradient_QPOI: Tensor) -> Tensor:
        """Q_S^T G Q_A for each gradient."""
        left = torch.einsum("poj,qpoi->qpji", self.outputs_POO, gradient_QPOI)
        return torch.einsum("qpji,pik->qpjk", left, self.inputs_PII)

    def rotate_tokens(self, tokens: Tokens) -> Tokens:
        """Tokens whose gradients are those of the given tokens in this basis."""
        a = torch.einsum("pbsi,pij->pbsj", tokens.a_PBSI, self.inputs_PII)
        return Tokens(a, torch.einsum("pbso,poj->pbsj", tokens.g_PBSO, self.outputs_POO))

    def scaled(self, preconditioner: RankOne) -> Eigenbasis:
        """P^1/2 times this basis: rotating tokens by it scales them by P^1/2 and then rotates them by this basis."""
        inputs, outputs = preconditioner.inputs_PI.sqrt(), preconditioner.outputs_PO.sqrt()
        return Eigenbasis(inputs[:, :, None] * self.inputs_PII, outputs[:, :, None] * self.outputs_POO)

    def diagonal(self, matrix_POI: Tensor) -> Tensor:
        """The diagonal, in this basis, of the operator that multiplies gradients elementwise by `matrix_POI`."""
        return Eigenbasis(self.inputs_PII.square(), self.outputs_POO.square()).rotate(matrix_POI[None])[0]

    def to(self, other: Eigenbasis) -> Eigenbasis:
        """The change of basis whose `rotate` takes gradients from this basis into the other one."""
        return Eigenbasis(self.inputs_PII.mT @ other.inputs_PII, self.outputs_POO.mT @ other.outputs_POO)

    def unrotate(self, rotated_QPOI: Tensor) -> Tensor:
        """Q_S G Q_A^T: back from the basis."""
        left = torch.einsum("poj,qpji->qpoi", self.outputs_POO, rotated_QPOI)
        return torch.einsum("qpok,pik->qpoi", left, self.inputs_PII)


@dataclass(frozen=True)
class KroneckerBlock:
    """One layer's curvature: the basis Q_S, Q_A (None: the parameters' own axes), and the eigenvalues [P, O, I]."""

    basis: Eigenbasis | None
    eigenvalues_POI: Tensor


def mean_over(checkpoints: Iterable[tuple[Tensor, Tensor]], weights: Sequence[float]) -> Tensor:
    """A or S [P, D, D] averaged over checkpoints, in float64.

    checkpoints: the sum over tokens and the number of tokens of each.
    """
    return weighted_mean([total.double() / rows.double().clamp_min(1) for total, rows in checkpoints], weights)


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The tensors' sum with weights that add up to 1; where all weigh the same it is their mean, to the last bit."""
    stacked = torch.stack(list(tensors))
    if len(set(weights)) == 1:
        return stacked.mean(0)
    return torch.tensordot(torch.tensor(weights, dtype=stacked.dtype, device=stacked.device), stacked, 1)


def eigenvectors(side_PDD: Tensor, where: str) -> Tensor:
    """Orthonormal eigenvectors of A or S, in columns, in the precision of the matrix.

    where: names the layer, the side and the checkpoints in errors. Raises FactorError if the matrix is not finite.
    """
    if not torch.isfinite(side_PDD).all():
        raise FactorError(
            f"{where}: the covariance is not finite. Squares overflow; use a model in float64, or look for a "
            "checkpoint that diverged."
        )
    return torch.linalg.eigh((side_PDD + side_PDD.mT) / 2).eigenvectors


def kfac_eigenvalues(basis: Eigenbasis, inputs_PII: Tensor, outputs_POO: Tensor) -> Tensor:
    """K-FAC's eigenvalues [P, O, I]: the products of those of S and A (Martens and Grosse 2015, arXiv 1503.05671)."""
    inputs_PI, outputs_PO = (
        torch.einsum("pij,pik,pkj->pj", vectors, side, vectors)
        for vectors, side in ((basis.inputs_PII, inputs_PII), (basis.outputs_POO, outputs_POO))
    )
    return outputs_PO[:, :, None] * inputs_PI[:, None, :]


def add_squared_projections_(total_POI: Tensor, tokens: Tokens, basis: Eigenbasis | None, budget: int) -> None:
    """Add sum_b (Q_S^T G_b Q_A)^2 of a batch, in place, without forming G_b where an example is one token.

    basis: None for sum_b G_b^2. budget: bytes that the gradients of single examples may take at once; examples beyond
    it are taken in turn.
    """
    a_PBSI, g_PBSO = tokens
    P, B, S, I = a_PBSI.shape
    O = g_PBSO.shape[-1]
    if S == 1:
        a_PBI, g_PBO = a_PBSI.squeeze(2), g_PBSO.squeeze(2)
        if basis is not None:
            a_PBI, g_PBO = torch.bmm(a_PBI, basis.inputs_PII), torch.bmm(g_PBO, basis.outputs_POO)
        total_POI.baddbmm_(g_PBO.square().mT, a_PBI.square())
        return
    step = max(1, budget // (2 * P * O * I * a_PBSI.element_size()))
    for start in range(0, B, step):
        piece = Tokens(a_PBSI[:, start : start + step], g_PBSO[:, start : start + step])
        total_POI.add_(example_gradients(piece, basis).square_().sum(0))


def example_gradients(tokens: Tokens, basis: Eigenbasis | None = None) -> Tensor:
    """G_b [B, P, O, I] of every example, or Q_S^T G_b Q_A where a basis is given.

    Either the tokens or the gradients are rotated, whichever takes fewer multiplications.
    """
    (_, _, S, I), O = tokens.a_PBSI.shape, tokens.g_PBSO.shape[-1]
    rotate_tokens = basis is not None and S * (I * I + O * O) <= O * I * (O + I)
    a, g = basis.rotate_tokens(tokens) if basis is not None and rotate_tokens else tokens
    gradient = torch.einsum("pbso,pbsi->bpoi", g, a)
    return gradient if basis is None or rotate_tokens else basis.rotate(gradient)
