"""The Kronecker mathematics against dense matrices, in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import segflow as sf
from segflow.curvature.kronecker import (
    Covariance,
    Eigenbasis,
    add_squared_projections_,
    eigenvectors,
    example_gradients,
    kfac_eigenvalues,
    mean_over,
    side_shapes,
    weighted_mean,
)
from segflow.model.one_hot import OneHot
from segflow.model.tokens import Tokens

P, B, S, O, I = 2, 5, 3, 4, 6


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _tokens(positions: int = S) -> Tokens:
    return Tokens(_random(P, B, positions, I), _random(P, B, positions, O, seed=1))


def _sums(parts: int, diagonal: bool = False) -> Covariance:
    """Empty sums for a layer of such sides."""
    layer: Any = SimpleNamespace(shape=(parts, O, I), diagonal_inputs=diagonal, diagonal_outputs=diagonal)
    return Covariance.zeros(side_shapes(layer), torch.float64, torch.device("cpu"))


def _basis() -> Eigenbasis:
    return Eigenbasis(*(torch.linalg.qr(_random(P, D, D, seed=D)).Q for D in (I, O)))


def _naive(tokens: Tokens) -> Tensor:
    return torch.einsum("pbso,pbsi->bpoi", tokens.g_PBSO, tokens.a_PBSI)


def test_a_basis_rotates_gradients_and_tokens_alike_and_back() -> None:
    basis, gradients = _basis(), _naive(_tokens())
    dense = torch.stack([basis.outputs_POO[p].T @ gradients[:, p] @ basis.inputs_PII[p] for p in range(P)], 1)
    torch.testing.assert_close(basis.rotate(gradients), dense)
    torch.testing.assert_close(_naive(basis.rotate_tokens(_tokens())), dense)
    torch.testing.assert_close(basis.unrotate(dense), gradients)
    other = Eigenbasis(*(torch.linalg.qr(_random(P, D, D, seed=10 + D)).Q for D in (I, O)))
    torch.testing.assert_close(basis.to(other).rotate(dense), other.rotate(gradients))


@pytest.mark.parametrize("positions", [1, S, 40])
@pytest.mark.parametrize("budget", [1, 1 << 20])
@pytest.mark.parametrize("rotated", [True, False])
def test_squared_projections_are_those_of_every_example(positions: int, budget: int, rotated: bool) -> None:
    tokens, basis, total = _tokens(positions), _basis() if rotated else None, torch.zeros(P, O, I).double()
    add_squared_projections_(total, tokens, basis, budget)
    gradients = _naive(tokens) if basis is None else basis.rotate(_naive(tokens))
    torch.testing.assert_close(total, gradients.square().sum(0))
    torch.testing.assert_close(example_gradients(tokens, basis), gradients)


# ---- diagonal sides and one-hot inputs ----


def _hot(positions: int = S) -> Tokens:
    """Fewer indices than positions, and weights of which some are zero."""
    index = torch.randint(0, I, (B, positions), generator=torch.Generator().manual_seed(2))
    weights = _random(B, positions, seed=3) * (_random(B, positions, seed=4) > -0.5)
    return Tokens(OneHot(index, weights, I), _random(1, B, positions, O, seed=1))


SIDES = ["dense", "axes", "factors"]


def _side(kind: str, parts: int, size: int) -> Tensor | None:
    """Eigenvectors, the axes, or the axes times factors."""
    if kind == "dense":
        return torch.linalg.qr(_random(parts, size, size, seed=size)).Q
    return None if kind == "axes" else _random(parts, size, seed=size)


def _matrix(side: Tensor | None, part: int, size: int) -> Tensor:
    """What a side multiplies by, as a matrix."""
    if side is None:
        return torch.eye(size).double()
    return side[part].diag() if side.ndim == 2 else side[part]


def _naive_rotated(basis: Eigenbasis | None, gradients_BPOI: Tensor) -> Tensor:
    if basis is None:
        return gradients_BPOI
    rows = []
    for gradient in gradients_BPOI:
        sides = [(_matrix(basis.outputs_POO, p, O), _matrix(basis.inputs_PII, p, I)) for p in range(len(gradient))]
        rows.append(torch.stack([left.T @ g @ right for g, (left, right) in zip(gradient, sides, strict=True)]))
    return torch.stack(rows)


@pytest.mark.parametrize("hot", [True, False])
@pytest.mark.parametrize("inputs", SIDES)
@pytest.mark.parametrize("outputs", SIDES)
@pytest.mark.parametrize("rooted", [True, False])
@pytest.mark.parametrize("positions", [1, S, 40])
def test_squared_projections_are_those_of_every_example_on_diagonal_sides_and_of_one_hot_inputs(
    hot: bool, inputs: str, outputs: str, rooted: bool, positions: int
) -> None:
    if hot and inputs == "dense":
        return  # an embedding's input side is diagonal always
    tokens = _hot(positions) if hot else _tokens(positions)
    parts = tokens.g_PBSO.shape[0]
    formed = _naive(Tokens(tokens.dense_a, tokens.g_PBSO))
    roots = _random(parts, O, I, seed=9).abs() if rooted else None
    for basis in (None, Eigenbasis(_side(inputs, parts, I), _side(outputs, parts, O))):
        gradients = _naive_rotated(basis, formed if roots is None else formed * roots)
        for budget in (1, 1 << 20):
            total = torch.ones(parts, O, I).double()
            add_squared_projections_(total, tokens, basis, budget, roots)
            torch.testing.assert_close(total, 1 + gradients.square().sum(0))
        torch.testing.assert_close(example_gradients(tokens, basis), _naive_rotated(basis, formed))


@pytest.mark.parametrize("inputs", SIDES)
@pytest.mark.parametrize("outputs", SIDES)
def test_a_basis_with_diagonal_sides_rotates_gradients_and_tokens_alike_and_back(inputs: str, outputs: str) -> None:
    basis, gradients = Eigenbasis(_side(inputs, P, I), _side(outputs, P, O)), _naive(_tokens())
    expected = _naive_rotated(basis, gradients)
    torch.testing.assert_close(basis.rotate(gradients), expected)
    torch.testing.assert_close(_naive(basis.rotate_tokens(_tokens())), expected)
    if "factors" not in (inputs, outputs):
        torch.testing.assert_close(basis.unrotate(expected), gradients)
    sides = (basis.outputs_POO, basis.inputs_PII)
    for p in range(P):
        Q = torch.kron(*(_matrix(side, p, size).contiguous() for side, size in zip(sides, (O, I), strict=True)))
        P_OI = _random(P, O, I, seed=8)
        dense = (Q.T @ P_OI[p].flatten().diag() @ Q).diagonal().reshape(O, I)
        torch.testing.assert_close(basis.diagonal(P_OI)[p], dense)


@pytest.mark.parametrize("outputs", SIDES)
@pytest.mark.parametrize("inputs", ["axes", "factors"])
def test_one_hot_tokens_are_rotated_as_the_formed_ones(inputs: str, outputs: str) -> None:
    basis, tokens = Eigenbasis(_side(inputs, 1, I), _side(outputs, 1, O)), _hot()
    rotated = basis.rotate_tokens(tokens)
    assert isinstance(rotated.a_PBSI, OneHot), "the inputs are not formed"
    formed = Tokens(tokens.dense_a, tokens.g_PBSO)
    torch.testing.assert_close(rotated.dense_a, basis.rotate_tokens(formed).a_PBSI)
    torch.testing.assert_close(rotated.g_PBSO, basis.rotate_tokens(formed).g_PBSO)


def test_covariances_of_diagonal_sides_are_the_diagonals_of_dense_ones() -> None:
    """With a mask and with weights, of one-hot and of other inputs."""
    mask, weights = torch.ones(B, S), _random(B, seed=5).abs()
    mask[1:, -1] = 0
    for tokens in (_hot(), Tokens(_hot().dense_a, _hot().g_PBSO)):
        for mask_BS, weights_B in ((None, None), (mask, None), (None, weights), (mask, weights)):
            dense, diagonal = (_sums(1, kind) for kind in (False, True))
            dense.add_(Tokens(tokens.dense_a, tokens.g_PBSO), mask_BS, weights_B)
            diagonal.add_(tokens, mask_BS, weights_B)
            for whole, axes in ((dense.a_PII, diagonal.a_PII), (dense.g_POO, diagonal.g_POO)):
                torch.testing.assert_close(axes, whole.diagonal(dim1=1, dim2=2))
            assert (diagonal.a_rows, diagonal.g_rows) == (dense.a_rows, dense.g_rows)


def test_kfac_s_eigenvalues_on_diagonal_sides_are_the_diagonals_themselves() -> None:
    A, S_ = _random(P, I, seed=1).abs(), _random(P, O, seed=2).abs()
    found = kfac_eigenvalues(Eigenbasis(None, None), A, S_)
    torch.testing.assert_close(found, torch.stack([torch.outer(S_[p], A[p]) for p in range(P)]))


def test_kfac_s_eigenvalues_are_the_diagonal_of_the_kronecker_product() -> None:
    sides = [_random(P, D, D, seed=D) for D in (I, O)]
    A, G = (side @ side.mT for side in sides)
    basis = Eigenbasis(*(eigenvectors(side, "here") for side in (A, G)))
    for p in range(P):
        Q = torch.kron(basis.outputs_POO[p], basis.inputs_PII[p])
        expected = (Q.T @ torch.kron(G[p], A[p]) @ Q).diagonal().reshape(O, I)
        torch.testing.assert_close(kfac_eigenvalues(basis, A, G)[p], expected, rtol=1e-9, atol=1e-9)


def test_covariances_count_tokens_that_are_no_padding() -> None:
    tokens, mask = _tokens(), torch.ones(B, S)
    mask[:, -1] = 0
    sums = _sums(P)
    sums.add_(tokens, mask)
    real = tokens.a_PBSI[:, :, :-1].flatten(1, 2)
    torch.testing.assert_close(sums.a_PII, real.mT @ real)
    assert (sums.a_rows.item(), sums.g_rows.item()) == (B * (S - 1), B * S)


def test_a_weighted_mean_is_the_sum_with_weights_and_the_plain_mean_to_the_last_bit_where_they_are_equal() -> None:
    tensors = [_random(3, seed=seed) for seed in range(3)]
    weights = (0.5, 0.3, 0.2)
    expected = sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))
    torch.testing.assert_close(weighted_mean(tensors, weights), expected)
    assert weighted_mean(tensors, (1 / 3,) * 3).equal(torch.stack(tensors).mean(0))
    sums = [(2 * tensor, torch.tensor(4.0)) for tensor in tensors]
    torch.testing.assert_close(mean_over(sums, (1 / 3,) * 3), torch.stack(tensors).mean(0) / 2)


def test_a_covariance_that_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(sf.FactorError, match="layer 'x', inputs: the covariance is not finite"):
        eigenvectors(torch.full((1, 2, 2), float("inf")), "layer 'x', inputs")
