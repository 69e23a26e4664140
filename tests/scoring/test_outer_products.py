"""Queries kept as outer products: the same numbers as formed gradients, without forming them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import segflow as sf
from segflow.curvature.kronecker import Eigenbasis
from segflow.data.readers import Reader
from segflow.model.one_hot import OneHot
from segflow.model.tokens import Tokens
from segflow.scoring import outer_products as outer
from segflow.scoring import query_gradients
from segflow.scoring.meeting import outer_layers
from segflow.scoring.outer_products import (
    OuterProducts,
    example_products,
    formed,
    plus,
    products,
    squared_norms,
    times,
    together,
)

from ..support.helpers import ConvNet, analyzer_of, images, mlp, perturbed_states, trajectory_of, vectors

P, Q, K, O, I = 2, 5, 4, 3, 6
N = 12


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _outer(scale: tuple[int, ...] | None, rank: int = 1) -> OuterProducts:
    scale_POI = None if scale is None else _random(*scale, seed=2)
    return OuterProducts(_random(P, Q, rank, O), _random(P, Q, rank, I, seed=1), scale_POI)


def _naive(stack: OuterProducts) -> Tensor:
    pairs = [[zip(stack.g_PQRO[p, q], stack.a_PQRI[p, q], strict=True) for p in range(P)] for q in range(Q)]
    rows = [[sum(torch.outer(g, a) for g, a in of_part) for of_part in of_query] for of_query in pairs]
    plain = torch.stack([torch.stack(row) for row in rows])
    return plain if stack.scale_POI is None else plain * stack.scale_POI


def _hot(examples: int = 3, positions: int = 4) -> Tokens:
    """Of an embedding: indices that repeat, with weights."""
    index = torch.randint(0, I, (examples, positions), generator=torch.Generator().manual_seed(5))
    return Tokens(OneHot(index, _random(examples, positions, seed=6), I), _random(1, examples, positions, O, seed=7))


@pytest.mark.parametrize("scale", [None, (1, O, I), ()], ids=["plain", "scaled", "by a number"])
@pytest.mark.parametrize("budget", [1, 1 << 20])
@pytest.mark.parametrize("kept", ["formed", "outer"])
def test_one_hot_tokens_meet_queries_as_the_formed_ones_do(scale: Any, budget: int, kept: str) -> None:
    scale_POI = None if scale is None else _random(*scale, seed=2)
    queries = OuterProducts(_random(1, Q, 1, O), _random(1, Q, 1, I, seed=1), scale_POI)
    tokens = _hot()
    gradients = torch.einsum("pbso,pbsi->bpoi", tokens.g_PBSO, tokens.dense_a)
    expected = torch.stack(
        [torch.stack([(query * gradient).sum() for gradient in gradients]) for query in queries.formed()]
    )
    stack = queries.formed() if kept == "formed" else queries
    torch.testing.assert_close(example_products(stack, tokens, budget), expected)


def test_one_hot_queries_are_kept_as_outer_products_of_formed_inputs() -> None:
    tokens = _hot(Q, 2)
    gradients = torch.einsum("pbso,pbsi->bpoi", tokens.g_PBSO, tokens.dense_a)
    basis = Eigenbasis(_random(1, I, seed=3), torch.linalg.qr(_random(1, O, O)).Q)
    torch.testing.assert_close(OuterProducts.of(tokens, None).formed(), gradients)
    torch.testing.assert_close(OuterProducts.of(tokens, basis).formed(), basis.rotate(gradients))


@pytest.mark.parametrize("scale", [None, (P, O, I), ()], ids=["plain", "scaled", "by a number"])
@pytest.mark.parametrize("budget", [1, 1 << 20])
@pytest.mark.parametrize("rank", [1, 2])
def test_products_and_norms_are_those_of_formed_gradients(scale: Any, budget: int, rank: int) -> None:
    stack = _outer(scale, rank)
    naive = _naive(stack)
    torch.testing.assert_close(stack.formed(), naive)
    assert len(stack) == Q and stack.shape == tuple(naive.shape)
    torch.testing.assert_close(squared_norms(stack), naive.flatten(1).square().sum(1))
    sums = _random(K, P, O, I, seed=3)
    expected = torch.einsum("qpoi,kpoi->qk", naive, sums)
    torch.testing.assert_close(products(stack, sums, budget), expected)
    torch.testing.assert_close(products(naive, sums, budget), expected)
    for positions in (1, 3):
        tokens = Tokens(_random(P, K, positions, I, seed=4), _random(P, K, positions, O, seed=5))
        examples = torch.einsum("pkso,pksi->kpoi", tokens.g_PBSO, tokens.a_PBSI)
        expected = torch.einsum("qpoi,kpoi->qk", naive, examples)
        torch.testing.assert_close(example_products(stack, tokens, budget), expected)
        torch.testing.assert_close(example_products(naive, tokens, budget), expected)


def test_factors_for_all_queries_and_for_each() -> None:
    stack, shared, own = _outer((P, O, I)), _random(P, O, I, seed=6), _random(Q, 1, 1, 1, seed=7)
    torch.testing.assert_close(formed(stack * shared * own), _naive(stack) * shared * own)
    torch.testing.assert_close(formed(stack.rows(1, 3)), _naive(stack)[1:3])


def test_stacks_are_put_together_formed_or_not() -> None:
    one, none = _outer(None), OuterProducts.zeros(0, (P, O, I), torch.float64, torch.device("cpu"))
    twice = together([none, one, one], form=False)
    assert isinstance(twice, OuterProducts)
    torch.testing.assert_close(formed(twice), torch.cat([_naive(one)] * 2))
    mixed = together([none, one, _naive(one)], form=True)
    assert isinstance(mixed, Tensor)
    torch.testing.assert_close(mixed, formed(twice))
    assert formed(together([none], form=True)).shape == (0, P, O, I)


def test_a_sum_stays_factored_while_that_takes_fewer_numbers() -> None:
    """Of 3 x 6 numbers: one outer product takes 9 of them, two would take as many."""
    tall = OuterProducts(_random(P, Q, 1, 9), _random(P, Q, 1, 9, seed=1))
    total: Any = times(tall, 0.25)
    for count, stays in ((2, True), (3, True), (4, True), (5, False)):
        total = plus(total, times(tall, 0.5))
        assert isinstance(total, OuterProducts) is stays, count
        torch.testing.assert_close(formed(total), (0.25 + 0.5 * (count - 1)) * formed(tall))
    assert isinstance(plus(_outer(None), _outer(None)), Tensor)
    mixed = plus(_outer(None), _naive(_outer(None)))
    torch.testing.assert_close(mixed, 2 * _naive(_outer(None)))


def test_a_basis_turns_the_two_sides() -> None:
    basis = Eigenbasis(torch.linalg.qr(_random(P, I, I))[0], torch.linalg.qr(_random(P, O, O))[0])
    stack = _outer(None)
    torch.testing.assert_close(formed(stack.rotated(basis)), basis.rotate(_naive(stack)))


METHODS: dict[str, tuple[Any, int]] = {  # and how many outer products queries stay all the way, 0 where they do not
    "one segment": (sf.Source(query_points="final"), 1),
    "queries along the run": (sf.Source(), 2),
    "two segments": (sf.Source(segments=2), 0),
    "influence": (sf.InfluenceFunction(), 1),
    "diagonal": (sf.InfluenceFunction(curvature="diagonal"), 1),
    "tracin": (sf.TracIn(), 1),
    "cosine": (sf.GradientCosine(), 1),
    "trak": (sf.TRAK(6, 0.02), 0),
}


@pytest.mark.parametrize("size", [1, 3, 12])
@pytest.mark.parametrize("name", METHODS)
def test_scores_do_not_depend_on_whether_queries_are_formed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    model, (method, stays) = mlp(), METHODS[name]
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 2), N, lr=0.3)
    plan = method.plan(trajectory)
    layers = {"wide": SimpleNamespace(shape=(1, 9, 9)), "narrow": SimpleNamespace(shape=(1, 2, 3))}
    view: Any = SimpleNamespace(layers=layers, positions=lambda _name: 1)
    assert outer_layers(plan, view, fits=True) == {0: {}, 1: {"wide": 1, "narrow": 1}, 2: {"wide": 2}}[stays]
    values, forms = [], []
    for force in (False, True):
        with monkeypatch.context() as patched:
            if force:
                patched.setattr(query_gradients.OuterProducts, "of", query_gradients.example_gradients)
            real = OuterProducts.formed
            patched.setattr(OuterProducts, "formed", lambda self, real=real: (forms.append(len(self)), real(self))[1])
            analyzer = analyzer_of(model, trajectory, tmp_path / f"store-{force}", method=method)
            analyzer.fit(vectors(N))
            groups = sf.Groups.random(N, size)
            forms.clear()
            values.append(analyzer.score(groups, vectors(N), vectors(30, seed=3)).values)
            if stays == 1 and not force and size > 1:
                assert not any(forms), "a query's gradient was formed"
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-12)


def test_more_queries_fit_the_memory_as_outer_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formed, these would be taken in blocks, each with a walk over the training data."""
    monkeypatch.setattr(outer, "_QUICK", 64)
    wide = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(wide, 2), N, lr=0.3)
    walks = []
    for method in (sf.Source(query_points="final"), sf.Source(segments=2)):
        analyzer = analyzer_of(wide, trajectory, tmp_path / str(method.segments), method=method, memory=400_000)
        analyzer.fit(vectors(N))
        analyzer.score(sf.Groups.random(N, 6), vectors(N), vectors(60, seed=3))
        walks += [row.made for row in analyzer.summary().rows if row.kind == "groups"]
    assert walks[0] == 2 and walks[1] > 2


def test_layers_with_positions_form_their_queries(tmp_path: Path) -> None:
    model = ConvNet()
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 2), N, lr=0.3)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", method=sf.InfluenceFunction())
    analyzer.fit(images(N))
    with analyzer._call("score"):
        view = analyzer.context.loss_view("measurement", images(4, seed=3))
        data = analyzer.context.walk(view, Reader(images(4, seed=3)), [range(4)], "queries")
        found = query_gradients.query_gradients(view, data, {}, analyzer.context.ranks, "here")
    assert {name: isinstance(stack, OuterProducts) for name, stack in found.items()} == {
        "first": False,
        "second": False,
        "head": True,
    }
