"""Coupled layers: a function of the whole matrix where tangent kernels are proportional, and unrolled training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import segflow as sf
from segflow.curvature.layer_shares import couplings
from segflow.errors import MethodError
from segflow.methods import Curvature, Point, Spectral, TraceShares

from ..support import oracles
from ..support.helpers import analyzer_of, apart, mlp, perturbed_states, trajectory_of, vectors
from ..support.histories import by_span, history
from ..support.linear import FEATURES, GROUPS, QUERY, TRAIN, Linear, N, losses, measure, optimum

SCALES = (0.5, 1.2, 0.9)  # of layers that add up to one linear model


class Parallel(nn.Module):
    """The sum of linear layers of one input, each times a number: K_l = scale_l^2 K."""

    def __init__(self, outputs: int, features: int = FEATURES):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(features, outputs).double() for _ in SCALES)

    def forward(self, x: Tensor) -> Tensor:
        return sum(scale * layer(x) for scale, layer in zip(SCALES, self.layers, strict=True))  # type: ignore[return-value]


def _scores(folder: Path, model: nn.Module, states: Any, method: Any, data: Any, **options: Any) -> sf.Scores:
    trajectory = trajectory_of(folder / "run", states, len(data[0]), **options)
    analyzer = analyzer_of(model, trajectory, folder / "store", method=method)
    analyzer.fit(data[0])
    return analyzer.score(sf.Groups.random(len(data[0]), size=4), *data)


def _numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["response", "decay"])
def test_with_proportional_kernels_the_blocks_make_the_dense_function(kind: str) -> None:
    """Blocks F_l = c_l B of F = (s s^T) kron B, and gradients s_l g: sum_l v_l^T f(F_l / c_l) g_l = v^T f(F) g."""
    root, v, g = _numbers(6, 6, seed=0), _numbers(6, seed=1), _numbers(6, seed=2)
    s, block, curvature = (
        torch.tensor(SCALES, dtype=torch.float64),
        root @ root.T,
        Curvature(0, (Point.at(0, 0),), (1.0,)),
    )
    shares = TraceShares(stage=0, curvature=curvature, rates=(0.3,))
    f = Spectral(stage=0, kind=kind, curvature=curvature, amount=(0.3,), shift=(0.05,), trace_shares=shares)
    whole = torch.kron(torch.outer(s, s), block)
    sigma, U = torch.linalg.eigh(whole)
    plain = replace(f, trace_shares=None)
    expected = torch.kron(s, v) @ U @ torch.diag(plain.on(sigma.clamp_min(0), 0)) @ U.T @ torch.kron(s, g)
    of_layers = couplings({str(l): float(c**2 * block.trace()) for l, c in enumerate(s)}, dict.fromkeys("012", 0.3))
    found = torch.zeros(())
    for l, c in enumerate(s):
        sigma, U = torch.linalg.eigh(c**2 * block)
        found = found + (c * v) @ U @ torch.diag(f.on(sigma, 0, coupling=of_layers[str(l)].rate)) @ U.T @ (c * g)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_of_parallel_layers_it_is_the_function_of_the_whole_matrix(tmp_path: Path, segments: int, power: float) -> None:
    """F = (s s^T) kron B, B being the curvature of one layer alone, so it is one layer at |s|^2 times the rate.

    Divided by c_l^2, each layer's rate is that, divided by c_l once more.
    """
    model, data = Parallel(3, 5), (vectors(20), vectors(4, seed=5))
    states = perturbed_states(model, 4)
    method = sf.Source(segments, shares_power=power)
    found = _scores(tmp_path, model, states, method, data, lr=0.4, weight_decay=0.05)
    alone = nn.Linear(5, 3).double()
    by_layer = torch.zeros_like(found.values)
    squared = sum(scale**2 for scale in SCALES)
    for scale in SCALES:  # one layer that is the whole model, with the shares' curvature and its own gradients
        combined = [
            {
                side: sum(s * state[f"layers.{place}.{side}"] for place, s in enumerate(SCALES))
                for side in ("weight", "bias")
            }
            for state in states
        ]
        share = scale**2 / squared
        times, method = squared * share ** (1 - power), apart(segments, query_points="run")
        rate = {"lr": 0.4 * times, "weight_decay": 0.05 / times}
        by_layer += share**power * _scores(tmp_path / f"{scale}", alone, combined, method, data, **rate).values
    torch.testing.assert_close(found.values, by_layer, rtol=1e-10, atol=0)


def _whole(theta: Tensor) -> Tensor:
    """The linear model that three parallel layers' parameters add up to."""
    return sum(s * part for s, part in zip(SCALES, theta.chunk(len(SCALES)), strict=True))  # type: ignore[return-value]


def _shared_start(weight_decay: float) -> Tensor:
    """The layers' parameters whose sum is the optimum: the shortest way to it shares it out by the scales."""
    squared = sum(scale**2 for scale in SCALES)
    best = optimum(weight_decay / squared)
    return torch.cat([scale / squared * best for scale in SCALES])


def _state(theta: Tensor) -> dict[str, Tensor]:
    parts = theta.chunk(len(SCALES))
    state = {f"layers.{place}.weight": part[None, :-1] for place, part in enumerate(parts)}
    return state | {f"layers.{place}.bias": part[-1:] for place, part in enumerate(parts)}


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_it_converges_to_unrolled_training_where_layers_apart_do_not(tmp_path: Path, weight_decay: float) -> None:
    """Three parallel layers of one output; from the optimum, as the steps go to zero."""
    start = _shared_start(weight_decay)
    state = _state(start)
    errors: dict[str, list[float]] = {"coupled": [], "apart": [], "exactly coupled": []}
    for steps in (100, 200, 400):
        lr = 0.4 / steps
        gradient = oracles.weighted_gradient(lambda theta: losses(_whole(theta)))
        members = [list(group) for group in GROUPS.members]
        expected = oracles.unrolled_influence(
            lambda theta: measure(_whole(theta)), start, gradient, members, N, [lr] * steps, weight_decay=weight_decay
        )
        for layers, found in errors.items():
            folder, options = tmp_path / f"{layers}-{steps}", {"lr": lr, "weight_decay": weight_decay}
            trajectory = trajectory_of(folder, [state, state], N, steps=[steps // 2, steps], **options)
            exactly = layers.startswith("exactly")
            method = sf.Source(curvature="coupled") if exactly else sf.Source(layers=layers)
            analyzer = analyzer_of(Parallel(1), trajectory, folder / "store", task=Linear(), method=method)
            analyzer.fit(TRAIN)
            values = analyzer.score(GROUPS, TRAIN, QUERY).values
            found.append(((values - expected).abs().max() / expected.abs().max()).item())
    for found in (errors["coupled"], errors["exactly coupled"]):
        assert found[2] < 0.02
        assert found[2] < 0.6 * found[1] < 0.36 * found[0]
    assert errors["apart"][2] > 0.1


def test_provenance_tells_shares_that_sum_to_one_and_follow_rates(tmp_path: Path) -> None:
    """Ten times the rate of one layer's parameter group gives it ten times its weight among the shares."""
    model, train, query = mlp(), vectors(20), vectors(4, seed=5)
    files = trajectory_of(tmp_path / "run", perturbed_states(model, 2), 20)
    groups = {name: int(name.startswith("4")) for name in model.state_dict()}
    shares = []
    for factor in (1.0, 10.0):
        rates = torch.tensor([[0.1, 0.1 * factor]], dtype=torch.float64).expand(20, 2)
        trajectory = sf.Trajectory(files.checkpoints, files.steps, rates, 20, sf.OptimizerConstants(), groups)
        analyzer = analyzer_of(model, trajectory, tmp_path / "store", method=sf.Source(checkpoint_weights="equal"))
        analyzer.fit(train)
        [told] = analyzer.score(sf.Groups.random(20, 4), train, query).provenance["trace_shares"]
        [(where, of_layers)] = told.items()
        assert "step 10" in where and "step 20" in where
        assert sum(of_layers.values()) == pytest.approx(1, abs=1e-12)
        shares.append(of_layers)
    odds = [share["4"] / share["0"] for share in shares]
    assert odds[1] == pytest.approx(10 * odds[0], rel=1e-12)
    scores = _scores(tmp_path / "apart", model, perturbed_states(model, 2), apart(), (train, query))
    assert "trace_shares" not in scores.provenance


def test_a_layer_without_a_rate_has_no_share_and_stays_a_number(tmp_path: Path) -> None:
    """A frozen layer takes nothing from the others: their scores are those of a model without it."""
    model, train, query = Parallel(3, 5), vectors(20), vectors(4, seed=5)
    states = perturbed_states(model, 2)
    files = trajectory_of(tmp_path / "run", states, 20)
    values = {}
    for name, rate in {"frozen": 0.0, "hardly trained": 1e-13}.items():
        rates = torch.tensor([[0.1, rate]], dtype=torch.float64).expand(20, 2)
        groups = {key: int(key.startswith("layers.2")) for key in model.state_dict()}
        trajectory = sf.Trajectory(files.checkpoints, files.steps, rates, 20, sf.OptimizerConstants(), groups)
        analyzer = analyzer_of(model, trajectory, tmp_path / name, method=sf.Source())
        analyzer.fit(train)
        values[name] = analyzer.score(sf.Groups.random(20, 4), train, query).values
    torch.testing.assert_close(values["frozen"], values["hardly trained"], rtol=1e-9, atol=1e-15)
    assert torch.isfinite(values["frozen"]).all() and values["frozen"].abs().max() > 0


@pytest.mark.parametrize("late", [0.0, 1e-9, 1e-3])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_what_a_layer_did_before_it_was_frozen_is_undone_by_the_others(
    tmp_path: Path, late: float, power: float
) -> None:
    """In the second half one of three parallel layers has no rate, or hardly any: unrolled training decides."""
    start, steps, lr = _shared_start(0.0), 400, 0.8 / 400
    frozen = torch.ones_like(start)
    frozen[-(FEATURES + 1) :] = late
    gradient, weights = oracles.weighted_gradient(lambda theta: losses(_whole(theta))), torch.ones(N).double()
    theta, weights = start, weights.requires_grad_(True)
    for step in range(steps):
        theta = theta - lr * (frozen if step >= steps // 2 else 1) * gradient(theta, weights)
    slopes = [torch.autograd.grad(m, weights, retain_graph=True)[0] for m in measure(_whole(theta)).flatten()]
    exact = -torch.stack([torch.stack([slope[list(m)].sum() for m in GROUPS.members]) for slope in slopes])
    made = trajectory_of(tmp_path / "run", [_state(start)] * 4, N, steps=[100, 200, 300, 400])
    of = {name: int(name.startswith("layers.2")) for name in _state(start)}
    run = history(made, of, by_span((200, (lr, lr)), (200, (lr, lr * late))), optimizer=sf.OptimizerConstants())
    method = sf.Source(2, shares_power=power)
    analyzer = analyzer_of(Parallel(1), run, tmp_path / "store", task=Linear(), method=method)
    analyzer.fit(TRAIN)
    found = analyzer.score(GROUPS, TRAIN, QUERY).values
    assert torch.isfinite(found).all()
    if power == 1:
        assert (found - exact).norm() < 0.005 * exact.norm()


def _decay(power: float, amount: float = 0.2, rate: float = 0.2, dtype: torch.dtype = torch.float64) -> Any:
    """Decay at eigenvalues of which one is 0 to rounding, for a layer whose coupling is 3."""
    curvature = Curvature(0, (Point.at(0, 0),), (1.0,))
    shares = TraceShares(stage=0, curvature=curvature, rates=(rate,), power=power)
    f = Spectral(stage=0, kind="decay", curvature=curvature, amount=(amount,), shift=(0.0,), trace_shares=shares)
    return f.on(torch.tensor([0.0, 1e-34, 1.0, 3.0], dtype=dtype), 0, coupling=3.0)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 0.5])
def test_no_rate_is_the_limit_of_hardly_any(power: float) -> None:
    """Directions without curvature stay at any power."""
    limit, hardly = _decay(power, 0.0, 0.0), _decay(power, 1e-12, 1e-12)
    torch.testing.assert_close(limit, hardly, rtol=1e-4, atol=1e-9)
    assert limit[:2].tolist() == [1.0, 1.0]


def test_the_amount_counts_beside_the_rates_of_the_shares() -> None:
    torch.testing.assert_close(_decay(1.0, 0.4, 0.2), _decay(1.0).square())


def test_tiny_shares_are_no_numbers_out_of_range() -> None:
    for dtype in (torch.float32, torch.float64):
        found = _decay(2.0, 1e-30, 1e-30, dtype=dtype)
        assert torch.isfinite(found).all() and found[0] == 1


def test_a_frozen_group_takes_the_weights_of_what_moved(tmp_path: Path) -> None:
    """Of curvature and pseudo-gradients: no rate is the limit of hardly any."""
    states = perturbed_states(mlp(), 2)
    files = trajectory_of(tmp_path, states, 20)
    of = {name: int(name.startswith("4")) for name in states[0]}
    plans = []
    for rate in (0.0, 1e-10):
        rates = torch.tensor([[0.3, 0.3 * rate]] * 12 + [[0.003, 0.003 * rate]] * 8, dtype=torch.float64)
        trajectory = sf.Trajectory(files.checkpoints, files.steps, rates, 20, sf.OptimizerConstants(), of)
        [term] = sf.Source().plan(trajectory)
        plans.append(term.weights)
    assert plans[0] == pytest.approx(plans[1])


def test_shares_of_nothing_couple_nothing() -> None:
    assert set(couplings({"a": 0.0, "b": 2.0}, {"a": 0.1, "b": 0.0}).values()) == {(0.0, 0.0)}


@pytest.mark.parametrize(
    "change", [{"layers": "apart"}, {"shares_power": 2.0}, {"query_points": "final"}, {"lr_steps_scale": 0.5}], ids=str
)
def test_every_option_changes_the_scores(tmp_path: Path, change: dict[str, Any]) -> None:
    model, data = mlp(), (vectors(20), vectors(4, seed=5))
    states = perturbed_states(model, 3)
    default, changed = (
        _scores(tmp_path / str(len(options)), model, states, sf.Source(**options), data).values
        for options in ({}, change)
    )
    assert not torch.allclose(default, changed, rtol=1e-3, atol=0)


def test_half_the_steps_are_half_the_learning_rate(tmp_path: Path) -> None:
    model, data = mlp(), (vectors(20), vectors(4, seed=5))
    states, half_of = perturbed_states(model, 3), sf.Source(lr_steps_scale=0.5)
    half = _scores(tmp_path / "half", model, states, half_of, data, lr=0.4, weight_decay=0.1)
    slow = _scores(tmp_path / "slow", model, states, sf.Source(), data, lr=0.2, weight_decay=0.1)
    torch.testing.assert_close(half.values, slow.values, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": "together"},
        {"query_points": "mean"},
        {"shares_power": 0},
        {"lr_steps_scale": -1},
        {"layers": "apart", "shares_power": 2},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=next(reversed(options))):
        sf.Source(**options)


def test_shares_are_of_the_operators_stage_and_of_a_curvature() -> None:
    curvature = Curvature(0, (Point.at(0, 0),), (1.0,))
    shares = TraceShares(stage=0, curvature=curvature, rates=(0.1,))
    with pytest.raises(MethodError, match="of stage 0, expected stage 1"):
        TraceShares(stage=1, curvature=curvature, rates=(0.1,))
    with pytest.raises(MethodError, match="rates"):
        TraceShares(stage=0, curvature=curvature, rates=(-0.1,))
    with pytest.raises(MethodError, match="trace_shares without a curvature"):
        Spectral(stage=0, kind="decay", curvature=None, amount=(0.1,), shift=(0.0,), trace_shares=shares)
