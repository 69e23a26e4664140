"""The Kronecker mathematics against dense matrices, in float64."""

from __future__ import annotations

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
    weighted_mean,
)
from segflow.model.tokens import Tokens

P, B, S, O, I = 2, 5, 3, 4, 6


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _tokens(positions: int = S) -> Tokens:
    return Tokens(_random(P, B, positions, I), _random(P, B, positions, O, seed=1))


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
    sums = Covariance.zeros(((P, I, I), (P, O, O)), torch.float64, torch.device("cpu"))
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
