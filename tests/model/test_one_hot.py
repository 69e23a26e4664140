"""One-hot inputs, kept as indices, give what the formed inputs do; so do joined, padded and regrouped tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from segflow.model import one_hot
from segflow.model.one_hot import OneHot
from segflow.model.tokens import (
    Tokens,
    joined_batches,
    joined_calls,
    joined_examples,
    no_tokens,
    regrouped,
    scaled_examples,
)

from ..support.exactness import RANDOMISED, example_matrices, normal

DTYPE = torch.float64
B, S, O, I = 4, 3, 2, 5


def _hot(examples: int = B, positions: int = S, seed: int = 0) -> OneHot:
    """Indices that repeat within an example, and weights of which some are zero."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, I, (examples, positions), generator=generator)
    weight = normal(examples, positions, seed=seed) * (torch.rand(examples, positions, generator=generator) > 0.3)
    return OneHot(index, weight, I)


def _tokens(examples: int = B, positions: int = S, seed: int = 0) -> Tokens:
    return Tokens(_hot(examples, positions, seed), normal(1, examples, positions, O, seed=seed + 1))


def _formed(tokens: Tokens) -> Tokens:
    return Tokens(tokens.dense_a, tokens.g_PBSO)


def _naive(a: OneHot) -> Tensor:
    formed = torch.zeros(1, *a.index_BS.shape, a.size)
    for b in range(formed.shape[1]):
        for s in range(formed.shape[2]):
            formed[0, b, s, a.index_BS[b, s]] = a.weight_BS[b, s]
    return formed


def test_one_hot_inputs_formed_hold_their_weight_at_their_index() -> None:
    a = _hot()
    assert_close(a.dense(), _naive(a))
    assert a.shape == a.dense().shape == (1, B, S, I)
    assert_close(_tokens().dense_a, _naive(_tokens().a_PBSI))


OPERATIONS: dict[str, tuple[Callable[[OneHot], Tensor], Callable[[Tensor], Tensor]]] = {
    "times": (lambda a: a.times(normal(1, I, 3)), lambda d: d @ normal(1, I, 3)),
    "scaled": (lambda a: a.scaled(normal(1, I)).dense(), lambda d: d * normal(1, I)),
    "masked": (lambda a: a.masked(normal(B, S)).dense(), lambda d: d * normal(B, S)[None, :, :, None]),
    "masked by example": (lambda a: a.masked(normal(B, 1)).dense(), lambda d: d * normal(B, 1)[None, :, :, None]),
    "examples": (lambda a: a.examples(slice(1, 3)).dense(), lambda d: d[:, 1:3]),
    "reshaped": (lambda a: a.reshaped(2, 6).dense(), lambda d: d.reshape(1, 2, 6, I)),
    "squares": (lambda a: a.squares(), lambda d: d.square().sum((1, 2))),
    "joined along examples": (
        lambda a: one_hot.cat([a, _hot(2, seed=5)], 0).dense(),
        lambda d: torch.cat([d, _hot(2, seed=5).dense()], 1),
    ),
    "joined along positions": (
        lambda a: one_hot.cat([a, _hot(positions=1, seed=5)], 1).dense(),
        lambda d: torch.cat([d, _hot(positions=1, seed=5).dense()], 2),
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_on_one_hot_inputs_are_those_on_the_formed_ones(operation: str) -> None:
    of_hot, of_formed = OPERATIONS[operation]
    assert_close(of_hot(_hot()), of_formed(_naive(_hot())))


@RANDOMISED
@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 20))
def test_columns_are_those_of_each_example_s_gradient_that_are_not_zero(
    examples: int, positions: int, seed: int
) -> None:
    a, g = _hot(examples, positions, seed), normal(examples, positions, O, seed=seed + 1)
    columns_TO, indices_T = a.columns(g)
    assert columns_TO.shape == (examples * positions, O) and indices_T.shape == (examples * positions,)
    gradients = torch.einsum("bso,bsi->boi", g, a.dense()[0])
    squares = torch.zeros(O, I).index_add_(1, indices_T, columns_TO.square().mT)
    assert_close(squares, gradients.square().sum(0))
    cubes = torch.zeros(O, I).index_add_(1, indices_T, columns_TO.pow(3).mT)
    assert_close(cubes, gradients.pow(3).sum(0))


TOKENS: dict[str, Callable[[Tokens], Tensor]] = {
    "times": lambda t: t.times(normal(1, I, 3)),
    "total": lambda t: t.total(),
    "magnitude": lambda t: t.magnitude(),
    "live": lambda t: t.live(),
    "of some examples": lambda t: example_matrices(t.of_examples(slice(1, 3))),
    "scaled": lambda t: example_matrices(scaled_examples(t, normal(B))),
    "regrouped": lambda t: example_matrices(regrouped(t, 2)),
    "joined examples": lambda t: example_matrices(joined_examples(t, 3)),
    "joined calls": lambda t: example_matrices(joined_calls([t, _like(t, _tokens(positions=1, seed=3))])),
    "joined batches": lambda t: example_matrices(joined_batches([t, _like(t, _tokens(2, 5, seed=3))])),
    "one kind and the other": lambda t: example_matrices(joined_calls([t, _formed(_tokens(seed=3))])),
    "none at all": lambda t: example_matrices(joined_batches([t, no_tokens((1, O, I), 2, DTYPE, torch.device("cpu"))])),
}


def _like(tokens: Tokens, other: Tokens) -> Tokens:
    return other if isinstance(tokens.a_PBSI, OneHot) else _formed(other)


@pytest.mark.parametrize("operation", TOKENS)
def test_operations_on_tokens_with_one_hot_inputs_are_those_on_the_formed_ones(operation: str) -> None:
    of = TOKENS[operation]
    assert_close(of(_tokens()), of(_formed(_tokens())))


def test_joined_tokens_make_up_the_sums_of_what_is_joined() -> None:
    whole = example_matrices(_tokens())
    assert_close(example_matrices(regrouped(_tokens(), 2)), whole.unflatten(0, (2, 2)).sum(1))
    assert_close(example_matrices(joined_examples(_tokens(), 3)), torch.stack([whole[:3].sum(0), whole[3]]))
    assert joined_examples(_tokens(), 1).examples == B
    other = example_matrices(_tokens(positions=1, seed=3))
    assert_close(example_matrices(joined_calls([_tokens(), _tokens(positions=1, seed=3)])), whole + other)
    batches = joined_batches([_tokens(), _tokens(2, 5, seed=3)])
    assert_close(example_matrices(batches), torch.cat([whole, example_matrices(_tokens(2, 5, seed=3))]))
    assert (batches.examples, batches.positions) == (B + 2, 5)
    assert_close(_tokens().total(), whole.sum(0))


def test_sums_of_groups_are_added_in_place() -> None:
    tokens, of_example = _tokens(), torch.tensor([1, 0, 1, 1])
    sums = normal(2, 1, O, I)
    expected = sums.index_add(0, of_example, example_matrices(tokens))
    tokens.a_PBSI.add_sums_(sums[:, 0], of_example, tokens.g_PBSO[0])
    assert_close(sums, expected)


def test_an_example_is_live_where_a_position_has_an_input_and_an_output_gradient() -> None:
    index, weight = torch.tensor([[0, 1], [2, 2], [3, 4], [0, 0]]), torch.tensor([[1.0, 0], [0, 0], [0, 2], [1, 1]])
    g = torch.ones(1, 4, 2, O)
    g[0, 0, 0] = 0  # where the first example has its input
    g[0, 3, 0] = 0
    for tokens in (Tokens(OneHot(index, weight, I), g), _formed(Tokens(OneHot(index, weight, I), g))):
        assert tokens.live().tolist() == [False, False, True, True]
