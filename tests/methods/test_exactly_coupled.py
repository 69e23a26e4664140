"""`curvature="coupled"`: functions of the curvature of all layers together, against dense matrices."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import segflow as sf
from segflow.curvature.coupled import applied, gram, sampled_at, spectrum
from segflow.errors import FactorError, MethodError
from segflow.methods import CoupledFunction, Point, SampledFisher
from segflow.methods.spectra import decay_quotient, response_quotient
from segflow.model.tokens import Tokens, joined_batches

from ..support import oracles
from ..support.helpers import (
    ConvNet,
    FixedLabels,
    analyzer_of,
    example_loss,
    images,
    mlp,
    perturbed_states,
    trajectory_of,
    vectors,
)

N, QUERIES, GROUPS = 12, 3, sf.Groups.random(12, size=4)


def _exact(kind: str, sigma: float, shift: float) -> float:
    """(f(sigma) - f(0)) / sigma in fifty digits."""
    with localcontext() as context:
        context.prec = 50
        s, w = Decimal(sigma), Decimal(shift)

        def f(x: Decimal) -> Decimal:
            total = x + w
            if kind == "decay":
                return (-total).exp()
            return (1 - (-total).exp()) / total if total else Decimal(1)

        return float((f(s) - f(Decimal(0))) / s)


@pytest.mark.parametrize("shift", [0.0, 1e-6, 0.3, 4.0])
@pytest.mark.parametrize("sigma", [1e-9, 1e-4, 0.0999, 0.1001, 3.0, 1e5])
def test_quotients_lose_no_digits(sigma: float, shift: float) -> None:
    at = torch.tensor([sigma], dtype=torch.float64)
    assert decay_quotient(at, shift).item() == pytest.approx(_exact("decay", sigma, shift), rel=1e-13)
    assert response_quotient(at, shift).item() == pytest.approx(_exact("response", sigma, shift), rel=1e-12)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _dense(kind: str, rows_nD: Tensor, metric_D: Tensor, shift: float, v_QD: Tensor) -> Tensor:
    """The function of M^1/2 F M^1/2 + w by an eigendecomposition of all parameters; M is not zero."""
    root = metric_D.sqrt()
    sigma, U = torch.linalg.eigh(root[:, None] * (rows_nD.T @ rows_nD) * root)
    s = sigma.clamp_min(0) + shift
    f = (1 - torch.exp(-s)) / s if kind == "response" else torch.exp(-s)
    return (v_QD * root) @ U @ torch.diag(f) @ U.T * (root if kind == "response" else 1 / root)


@pytest.mark.parametrize("memory", [8, 1 << 30])
@pytest.mark.parametrize("kind", ["response", "decay"])
def test_functions_are_those_of_the_dense_matrix(kind: str, memory: int) -> None:
    """Two layers, of two parts and of two positions; gradients formed one at a time, or all at once."""
    shapes = {"first": (2, 3, 4, 1), "second": (1, 2, 5, 2)}  # parts, outputs, inputs, positions
    tokens = {
        name: Tokens(_normal(P, 7, S, I, seed=1), _normal(P, 7, S, O, seed=2)) for name, (P, O, I, S) in shapes.items()
    }
    metric = {name: _normal(P, O, I, seed=3).abs() + 0.1 for name, (P, O, I, _) in shapes.items()}
    values = {name: _normal(QUERIES, P, O, I, seed=4) for name, (P, O, I, _) in shapes.items()}
    rows = torch.cat([torch.einsum("pbso,pbsi->bpoi", t.g_PBSO, t.a_PBSI).flatten(1) for t in tokens.values()], 1)
    flat_metric, flat = (torch.cat([part.flatten(-3) for part in of.values()], -1) for of in (metric, values))
    gram_nn = gram(tokens, metric, memory)
    torch.testing.assert_close(gram_nn, rows * flat_metric @ rows.T)
    found = applied(kind, values, dict.fromkeys(shapes, 0.3), metric, tokens, spectrum(gram_nn, "here"), memory)
    expected = _dense(kind, rows, flat_metric, 0.3, flat)
    torch.testing.assert_close(torch.cat([part.flatten(1) for part in found.values()], 1), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("net", "segments", "optimizer"), [("mlp", 1, "SGD"), ("mlp", 2, "AdamW"), ("conv", 2, "SGD"), ("conv", 1, "AdamW")]
)
def test_scores_equal_the_dense_formulas(tmp_path: Path, net: str, segments: int, optimizer: str) -> None:
    model, data = (ConvNet(), images) if net == "conv" else (mlp(), vectors)
    states, rate, wd = perturbed_states(model, 4), 0.2, 0.05
    moments = None
    if optimizer == "AdamW":
        moments = [{n: 0.1 + value.square() for n, value in state.items()} for state in states]
    constants = {"weight_decay": wd} | ({"optimizer": "AdamW", "eps": 1e-8} if moments else {})
    trajectory = trajectory_of(tmp_path / "run", states, N, lr=rate, second_moments=moments, **_named(constants))
    method = sf.Source(segments, curvature="coupled", checkpoint_weights="equal", query_points="final")
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", method=method)
    analyzer.fit(data(N))
    found = analyzer.score(GROUPS, data(N), data(QUERIES, seed=5)).values
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}

    def rows(kind: str, state: int, of: Any) -> Tensor:
        model.load_state_dict(states[state])
        by_layer = oracles.example_gradients(model, layers, example_loss(model, of, FixedLabels(), kind), len(of))
        return torch.cat([by_layer[name].flatten(1) for name in layers], 1)

    v = rows("measurement", 3, data(QUERIES, seed=5))
    expected = torch.zeros(QUERIES, len(GROUPS), dtype=torch.float64)
    for pool in reversed(np.array_split(np.arange(4), segments)):
        [lr_steps] = trajectory.lr_steps(10 * int(pool[0]), 10 * int(pool[-1] + 1))
        shift = rate * 10 * len(pool) * wd
        P = torch.ones(v.shape[1], dtype=torch.float64)
        if moments:
            matrices = [
                [oracles.layer_matrix(layers[n], m[f"{n}.weight"], m.get(f"{n}.bias")) for n in layers]
                for m in (moments[i] for i in pool)
            ]
            P = torch.cat(
                [oracles.preconditioner(list(per_layer), 1e-8).flatten() for per_layer in zip(*matrices, strict=True)]
            )
        sampled = torch.cat([rows("sample", int(i), data(N)) for i in pool]) / (N * len(pool)) ** 0.5
        dense = partial(_dense, rows_nD=sampled, metric_D=lr_steps * P, shift=shift)
        real = torch.stack([rows("train", int(i), data(N)) for i in pool]).mean(0)
        grouped = torch.stack([real[list(m)].sum(0) for m in GROUPS.members])
        expected = expected + dense("response", v_QD=v) @ grouped.T / N
        v = dense("decay", v_QD=v)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def _named(constants: dict[str, Any]) -> dict[str, Any]:
    name = constants.pop("optimizer", None)
    return constants | ({"name": name} if name else {})


def test_provenance_says_what_was_sampled_and_fewer_examples_change_the_scores(tmp_path: Path) -> None:
    model, train, query = mlp(), vectors(N), vectors(QUERIES, seed=5)
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 2), N, lr=0.3)
    values = []
    for examples in (None, 5):
        method = sf.Source(curvature="coupled")
        analyzer = analyzer_of(model, trajectory, tmp_path / str(examples), method=method, curvature_examples=examples)
        analyzer.fit(train)
        scores = analyzer.score(GROUPS, train, query)
        values.append(scores.values)
        [of_run] = scores.provenance["coupled_curvature"]
        [(where, told)] = of_run.items()
        assert "step 10" in where and "step 20" in where
        assert list(scores.provenance["queries_at"]) == ["checkpoint at step 10", "checkpoint at step 20"]
        count = examples or N
        assert told["examples_at_each_point"] == count and told["of_examples"] == N
        assert told["pseudo_gradients"] == 2 * count
    assert not torch.allclose(values[0], values[1], rtol=1e-2, atol=0)


def test_where_there_are_too_many_each_point_has_examples_of_its_own() -> None:
    points = tuple(Point.at(0, place) for place in range(3))
    fisher = SampledFisher(stage=0, points=points, weights=(1 / 3,) * 3, rates=(0.1,), most=12)
    examples = sampled_at(fisher, np.arange(10), views=1)
    assert [part.tolist() for part in examples] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert [len(part) for part in sampled_at(fisher, np.arange(10), views=2)] == [2, 2, 2]


def test_tokens_of_fewer_positions_are_padded() -> None:
    short, long = (Tokens(_normal(1, 2, S, 3, seed=1), _normal(1, 2, S, 4, seed=2)) for S in (1, 3))
    both = joined_batches([short, long])
    assert both.a_PBSI.shape == (1, 4, 3, 3) and both.g_PBSO.shape == (1, 4, 3, 4)
    torch.testing.assert_close(both.a_PBSI[:, :2, :1], short.a_PBSI)
    assert not both.g_PBSO[:, :2, 1:].any()


def test_what_does_not_fit_the_memory_is_refused_before_any_pass(tmp_path: Path) -> None:
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 2), N, lr=0.3)
    method = sf.Source(curvature="coupled")
    analyzer = analyzer_of(mlp(), trajectory, tmp_path / "store", method=method, memory=10_000)
    with pytest.raises(FactorError, match=r"24 pseudo-gradients .* Give fewer curvature_examples="):
        analyzer.fit(vectors(N))
    assert not [row for row in analyzer.summary().rows if row.made]


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(FactorError, match="not finite"):
        spectrum(torch.full((2, 2), math.nan), "here")


@pytest.mark.parametrize(
    "options",
    [
        {"layers": "apart"},
        {"shares_power": 2},
        {"fisher_batch": 4},
        {"preconditioner": "diagonal"},
    ],
    ids=str,
)
def test_options_that_would_be_ignored_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=next(iter(options))):
        sf.Source(curvature="coupled", **options)


def test_weight_decay_that_differs_between_layers_is_refused() -> None:
    fisher = SampledFisher(stage=0, points=(Point.at(0, 0),), weights=(1.0,), rates=(0.1, 0.0, math.nan))
    response, decay = (
        CoupledFunction(stage=0, kind=kind, fisher=fisher, shift=(0.2, 0.0, math.nan)) for kind in ("response", "decay")
    )
    response.check_shifts((0, 1))  # the second group does not move
    decay.check_shifts((0, 0))  # no layer is in the others
    with pytest.raises(MethodError, match=r"weight decay adds \[0.0, 0.2\]"):
        decay.check_shifts((0, 1))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_rates_of_groups_without_layers_do_not_matter_and_two_horizons_share_a_store(
    tmp_path: Path, scale: float
) -> None:
    """A third group of parameters, with a weight decay and rates of its own, holds no tracked layer."""

    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.shift = mlp(), nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.shift

    model, train, query = Extra(), vectors(N), vectors(QUERIES, seed=5)
    made = trajectory_of(tmp_path / "run", perturbed_states(model, 2), N)
    of = {name: int(name == "shift") for name in model.state_dict()}
    found = []
    for other in (0.1, 0.3):
        rates = torch.tensor([[0.1, other]], dtype=torch.float64).expand(20, 2)
        decay = torch.tensor([[0.02, 0.1 * other]], dtype=torch.float64).expand(20, 2)
        trajectory = sf.Trajectory(
            made.checkpoints, made.steps, rates, N, sf.OptimizerConstants(weight_decay=decay), of
        )
        for factor in (scale, 2.0):
            method = sf.Source(curvature="coupled", checkpoint_weights="equal", lr_steps_scale=factor)
            analyzer = analyzer_of(model, trajectory, tmp_path / f"store-{other}", method=method, exclude="shift")
            analyzer.fit(train)
            found.append(analyzer.score(GROUPS, train, query).values)
    torch.testing.assert_close(found[0], found[2], rtol=1e-12, atol=0)
    assert not torch.allclose(found[0], found[1], rtol=1e-2)


def test_coupled_weight_decay_of_adam_is_refused(tmp_path: Path) -> None:
    model = mlp()
    states = perturbed_states(model, 2)
    moments = [{n: value.square() for n, value in state.items()} for state in states]
    trajectory = trajectory_of(tmp_path, states, N, second_moments=moments, name="Adam", weight_decay=0.1)
    with pytest.raises(MethodError, match="through Adam's P"):
        sf.Source(curvature="coupled").plan(trajectory)
