"""The mathematics of a Kronecker-factored curvature: covariances, eigenbases, and eigenvalues in them.

A side of a layer that is diagonal has no eigenvectors but the axes themselves: of it only a diagonal [P, D] is kept. A
is the covariance of a layer's inputs a, S that of its output gradients g; Q_A and Q_S are their eigenvectors. EK-FAC:
George et al. 2018, arXiv 1806.03884; over checkpoints: Bae et al. 2024, arXiv 2405.12186, Appendix D.

Axes: P parts, B examples, S positions, N = B * S tokens, I inputs, O outputs, D either of these, Q gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from ..errors import FactorError
from ..model.one_hot import OneHot
from ..model.tokens import Tokens
from .preconditioner import RankOne

if TYPE_CHECKING:
    from ..model.layers.tracked import TrackedLayer

SideShapes = tuple[tuple[int, ...], tuple[int, ...]]  # of a layer's A and S
Gradients = dict[str, Tensor]  # by layer, [Q, P, O, I] each


@dataclass(frozen=True)
class Covariance:
    """Sums over tokens of a a^T and g g^T, and the number of tokens in each; where examples have weights, weighted.

    Of a diagonal side a_PII, or g_POO, is the diagonal [P, D] alone.
    """

    a_PII: Tensor
    g_POO: Tensor
    a_rows: Tensor
    g_rows: Tensor

    @classmethod
    def zeros(cls, shapes: SideShapes, dtype: torch.dtype, device: torch.device) -> Covariance:
        """Empty sums of a layer with covariances of these shapes."""
        inputs, outputs = (torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
        rows = torch.zeros((), dtype=torch.float64, device=device)
        return cls(inputs, outputs, rows, rows.clone())

    def add_(self, tokens: Tokens, mask_BS: Tensor | None = None, weights_B: Tensor | None = None) -> None:
        """Add a batch's tokens, in place; an input token is padding where the mask is 0, and does not count.

        weights_B: how often each example counts; None for once.
        """
        a, g = tokens
        examples = tokens.examples if weights_B is None else weights_B.sum()
        if mask_BS is not None:
            mask = mask_BS.to(g.dtype)
            a = a.masked(mask) if isinstance(a, OneHot) else a * mask[None, :, :, None]
            self.a_rows.add_(mask.sum() if weights_B is None else weights_B @ mask.sum(1))
        else:
            self.a_rows.add_(examples * tokens.positions)
        self.g_rows.add_(examples * tokens.positions)
        if weights_B is not None:
            root = weights_B.sqrt()
            a = a.masked(root[:, None]) if isinstance(a, OneHot) else a * root[:, None, None]
            g = g * root[:, None, None]
        _add_side_(self.a_PII, a)
        _add_side_(self.g_POO, g)


@dataclass(frozen=True)
class Eigenbasis:
    """Orthonormal eigenvectors of A and S, in columns; of a diagonal side None (the axes), or factors [P, D]."""

    inputs_PII: Tensor | None
    outputs_POO: Tensor | None

    def rotate(self, gradient_QPOI: Tensor) -> Tensor:
        """Q_S^T G Q_A for each gradient."""
        left = _of_outputs("poj,qpoi->qpji", self.outputs_POO, gradient_QPOI)
        return _of_inputs("qpji,pik->qpjk", self.inputs_PII, left)

    def rotate_tokens(self, tokens: Tokens) -> Tokens:
        """Tokens whose gradients are those of the given tokens in this basis."""
        a, inputs = tokens.a_PBSI, self.inputs_PII
        if isinstance(a, OneHot):
            a = a if inputs is None else a.scaled(inputs) if inputs.ndim == 2 else a.times(inputs)
        else:
            a = _side_in("pbsi,pij->pbsj", a, inputs)
        return Tokens(a, _side_in("pbso,poj->pbsj", tokens.g_PBSO, self.outputs_POO))

    def scaled(self, preconditioner: RankOne) -> Eigenbasis:
        """P^1/2 times this basis: rotating tokens by it scales them by P^1/2 and then rotates them by this basis."""
        inputs, outputs = preconditioner.inputs_PI.sqrt(), preconditioner.outputs_PO.sqrt()
        return Eigenbasis(_scaled_side(self.inputs_PII, inputs), _scaled_side(self.outputs_POO, outputs))

    def diagonal(self, matrix_POI: Tensor) -> Tensor:
        """The diagonal, in this basis, of the operator that multiplies gradients elementwise by `matrix_POI`."""
        squares = (None if side is None else side.square() for side in (self.inputs_PII, self.outputs_POO))
        return Eigenbasis(*squares).rotate(matrix_POI[None])[0]

    def to(self, other: Eigenbasis) -> Eigenbasis:
        """The change of basis whose `rotate` takes gradients from this basis into the other one."""
        pairs = ((self.inputs_PII, other.inputs_PII), (self.outputs_POO, other.outputs_POO))
        return Eigenbasis(*(None if a is None or b is None else a.mT @ b for a, b in pairs))

    def unrotate(self, rotated_QPOI: Tensor) -> Tensor:
        """Q_S G Q_A^T: back from the basis."""
        left = _of_outputs("poj,qpji->qpoi", self.outputs_POO, rotated_QPOI)
        return _of_inputs("qpok,pik->qpoi", self.inputs_PII, left)

    def token_cost(self) -> int:
        """Multiplications that rotating one token costs."""
        return sum(side.shape[-1] ** 2 for side in (self.inputs_PII, self.outputs_POO) if _is_dense(side))

    def gradient_cost(self, O: int, I: int) -> int:
        """Multiplications that rotating one gradient costs."""
        return O * I * sum(side.shape[-1] for side in (self.inputs_PII, self.outputs_POO) if _is_dense(side))


def _is_dense(side: Tensor | None) -> TypeGuard[Tensor]:
    return side is not None and side.ndim == 3


def _of_inputs(equation: str, side: Tensor | None, gradient_QPOI: Tensor) -> Tensor:
    if side is None:
        return gradient_QPOI
    return torch.einsum(equation, gradient_QPOI, side) if _is_dense(side) else gradient_QPOI * side[:, None, :]


def _of_outputs(equation: str, side: Tensor | None, gradient_QPOI: Tensor) -> Tensor:
    if side is None:
        return gradient_QPOI
    return torch.einsum(equation, side, gradient_QPOI) if _is_dense(side) else side[:, :, None] * gradient_QPOI


def _side_in(equation: str, tokens_PBSD: Tensor, side: Tensor | None) -> Tensor:
    if side is None:
        return tokens_PBSD
    return torch.einsum(equation, tokens_PBSD, side) if _is_dense(side) else tokens_PBSD * side[:, None, None]


def _scaled_side(side: Tensor | None, roots_PD: Tensor) -> Tensor:
    return roots_PD if side is None else roots_PD[:, :, None] * side


def _add_side_(total: Tensor, side: Tensor | OneHot) -> None:
    """Add a side's tokens to its covariance [P, D, D], or to the diagonal [P, D] of it."""
    if isinstance(side, OneHot):
        total += side.squares()
    elif total.ndim == 2:
        total += side.square().sum((1, 2))
    else:
        tokens_PND = side.flatten(1, 2)
        total.baddbmm_(tokens_PND.mT, tokens_PND)


def side_shapes(layer: TrackedLayer) -> SideShapes:
    """The shapes of A and of S: [P, D, D], or [P, D] where a side is diagonal."""
    P, O, I = layer.shape
    inputs = (P, I) if layer.diagonal_inputs else (P, I, I)
    return inputs, (P, O) if layer.diagonal_outputs else (P, O, O)


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
        side if vectors is None else torch.einsum("pij,pik,pkj->pj", vectors, side, vectors)
        for vectors, side in ((basis.inputs_PII, inputs_PII), (basis.outputs_POO, outputs_POO))
    )
    return outputs_PO[:, :, None] * inputs_PI[:, None, :]


def add_squared_projections_(
    total_POI: Tensor, tokens: Tokens, basis: Eigenbasis | None, budget: int, roots_POI: Tensor | None = None
) -> None:
    """Add sum_b (Q_S^T G_b Q_A)^2 of a batch, in place, without forming G_b where an example is one token.

    Args:
        basis: None for sum_b G_b^2.
        budget: bytes that the gradients of single examples may take at once; examples beyond it are taken in turn.
        roots_POI: what G_b is multiplied by first, elementwise (the root of an exact P); None for ones.
    """
    P, B, S, I = tokens.a_PBSI.shape
    O = tokens.g_PBSO.shape[-1]
    if isinstance(tokens.a_PBSI, OneHot):
        _add_squared_columns_(total_POI, tokens.a_PBSI, tokens.g_PBSO[0], basis, roots_POI)
        return
    if S == 1 and roots_POI is None:
        a_PBSI, g_PBSO = basis.rotate_tokens(tokens) if basis is not None else tokens
        total_POI.baddbmm_(g_PBSO.squeeze(2).square().mT, a_PBSI.squeeze(2).square())  # type: ignore[union-attr]
        return
    step = max(1, budget // (2 * P * O * I * tokens.g_PBSO.element_size()))
    for start in range(0, B, step):
        piece = tokens.of_examples(slice(start, start + step))
        if roots_POI is None:
            rotated = example_gradients(piece, basis)
        else:
            rotated = example_gradients(piece).mul_(roots_POI)
            rotated = rotated if basis is None else basis.rotate(rotated)
        total_POI.add_(rotated.square_().sum(0))


def _add_squared_columns_(
    total_POI: Tensor, a: OneHot, g_BSO: Tensor, basis: Eigenbasis | None, roots_POI: Tensor | None
) -> None:
    """As `add_squared_projections_`, of one-hot inputs: only the columns that an example has are formed."""
    columns_TO, indices_T = a.columns(g_BSO)
    if roots_POI is not None:
        columns_TO = columns_TO * roots_POI[0].mT[indices_T]
    if basis is not None:
        columns_TO = _side_in("pbso,poj->pbsj", columns_TO[None, :, None], basis.outputs_POO)[0, :, 0]
        if basis.inputs_PII is not None:
            columns_TO = columns_TO * basis.inputs_PII[0][indices_T, None]
    total_POI[0].index_add_(1, indices_T, columns_TO.square().mT)


def example_gradients(tokens: Tokens, basis: Eigenbasis | None = None) -> Tensor:
    """G_b [B, P, O, I] of every example, or Q_S^T G_b Q_A where a basis is given.

    Either the tokens or the gradients are rotated, whichever takes fewer multiplications.
    """
    (_, B, S, I), O = tokens.a_PBSI.shape, tokens.g_PBSO.shape[-1]
    rotate_tokens = basis is not None and S * basis.token_cost() <= basis.gradient_cost(O, I)
    a, g = basis.rotate_tokens(tokens) if basis is not None and rotate_tokens else tokens
    if isinstance(a, OneHot):
        gradient = g.new_zeros(B, 1, O, I)
        a.add_sums_(gradient[:, 0], torch.arange(B, device=g.device), g[0])
    else:
        gradient = torch.einsum("pbso,pbsi->bpoi", g, a)
    return gradient if basis is None or rotate_tokens else basis.rotate(gradient)
