"""SOURCE against unrolled training and real retraining on problems where EK-FAC is exact; its limits and options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf

from ..support import oracles
from ..support.helpers import analyzer_of, apart, mlp, perturbed_states, trajectory_of, vectors
from ..support.linear import FEATURES, GROUPS, QUERIES, QUERY, TRAIN, Linear, N, losses, measure, optimum


def _path(theta: Tensor, lr: float, steps: int, weights: Tensor | None = None, **sgd: Any) -> list[Tensor]:
    """theta after every step of full-batch SGD by torch.optim itself."""
    theta = theta.clone().requires_grad_(True)
    optimizer = torch.optim.SGD([theta], lr=lr, **sgd)
    visited = []
    for _ in range(steps):
        optimizer.zero_grad()
        (losses(theta) * (1.0 if weights is None else weights)).mean().backward()
        optimizer.step()
        visited.append(theta.detach().clone())
    return visited


def _scores(
    folder: Path, visited: dict[int, Tensor], lr: float, method: Any, groups: sf.Groups = GROUPS, **sgd: Any
) -> Tensor:
    model = nn.Linear(FEATURES, 1).double()
    states = [{"weight": theta[None, :-1], "bias": theta[-1:]} for theta in visited.values()]
    trajectory = trajectory_of(folder / "run", states, N, steps=list(visited), lr=lr, **sgd)
    analyzer = analyzer_of(model, trajectory, folder / "store", task=Linear(), method=method)
    analyzer.fit(TRAIN)
    return analyzer.score(groups, TRAIN, QUERY).values


def _unrolled(theta: Tensor, lr: float, steps: int, **sgd: Any) -> Tensor:
    return oracles.unrolled_influence(
        measure,
        theta,
        oracles.weighted_gradient(losses),
        [list(m) for m in GROUPS.members],
        N,
        [lr] * steps,
        **sgd,
    )


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


SGD_FORMS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.2},
    "heavy ball": {"momentum": 0.8},
    "dampened": {"momentum": 0.8, "dampening": 0.5},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
}


@pytest.mark.parametrize("form", SGD_FORMS)
def test_scores_converge_to_unrolled_sgd_as_the_step_size_goes_to_zero(tmp_path: Path, form: str) -> None:
    """From the optimum the group gradients are constant, so one segment suffices; the error is of the step's order."""
    sgd = SGD_FORMS[form]
    start = optimum(sgd.get("weight_decay", 0.0))
    effective = (1 - sgd.get("dampening", 0.0)) / (1 - sgd.get("momentum", 0.0)) if "momentum" in sgd else 1.0
    errors = []
    for steps in (100, 200, 400):
        lr = 0.6 / effective / steps
        visited = dict.fromkeys((steps // 2, steps), start)
        found = _scores(tmp_path / str(steps), visited, lr, sf.Source(segments=1), **sgd)
        errors.append(_error(found, _unrolled(start, lr, steps, **sgd)))
    assert errors[-1] < 0.03
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]


def test_one_segment_a_step_follows_a_run_from_its_start(tmp_path: Path) -> None:
    """Far from the optimum the gradients change; with a segment for every step SOURCE is unrolling in the limit."""
    start, errors = torch.zeros(FEATURES + 1).double(), []
    for steps in (8, 16, 32):
        lr = 0.4 / steps
        visited = dict(enumerate(_path(start, lr, steps), start=1))
        found = _scores(tmp_path / str(steps), visited, lr, sf.Source(segments=steps))
        errors.append(_error(found, _unrolled(start, lr, steps)))
    assert errors[-1] < 0.05
    assert errors[2] < 0.65 * errors[1] < 0.43 * errors[0]


def test_predicted_change_agrees_with_retraining_without_the_group(tmp_path: Path) -> None:
    """Twenty copies of the data, jittered, so that one group weighs little; the rest is the group's own curvature."""
    n, lr, steps, weight_decay = 20 * N, 0.005, 400, 0.1
    x = (
        TRAIN.tensors[0].repeat(20, 1)
        + 0.3 * torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(2)).double()
    )
    y = x @ torch.arange(1.0, FEATURES + 1).double() + 2 * torch.sin(5 * x[:, 0])
    model, query = nn.Linear(FEATURES, 1).double(), QUERY.tensors[0]
    groups = sf.Groups.random(n, size=6)
    inputs = torch.cat([x, torch.ones(n, 1).double()], 1)
    recipe = {"lr": lr, "weight_decay": weight_decay}

    def retrained(kept: Tensor) -> Tensor:
        """The queries' predictions [Q, runs] after training from zero on the kept examples [n, runs], apart."""
        theta = torch.zeros(FEATURES + 1, kept.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([theta], **recipe)
        for _ in range(steps):
            optimizer.zero_grad()
            ((inputs @ theta - y[:, None]).square() * kept).mean(0).sum().backward()
            optimizer.step()
        return (query @ theta[:-1] + theta[-1]).detach()

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = torch.optim.SGD(model.parameters(), **recipe)
    with sf.record(model, optimizer, tmp_path / "run", dataset_size=n, total_steps=steps, checkpoints=20):
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x)[:, 0] - y).square().mean().backward()
            optimizer.step()
    train, trajectory = TensorDataset(x, y[:, None]), sf.Trajectory.load(tmp_path / "run")
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", task=Linear(), method=sf.Source(segments=20))
    analyzer.fit(train)
    found = analyzer.score(groups, train, QUERY).values
    kept = torch.ones(n, 21, dtype=torch.float64)  # the mean is over all examples, as in the first run
    for run, members in enumerate(groups.members[:20], start=1):
        kept[members, run] = 0.0
    model.load_state_dict(trajectory.state(len(trajectory) - 1))
    predictions = retrained(kept)
    torch.testing.assert_close(predictions[:, 0], model(query)[:, 0].detach(), rtol=1e-9, atol=1e-12)
    assert _error(found[:, :20], predictions[:, 1:] - predictions[:, :1]) < 0.05


def _mlp_scores(
    folder: Path, method: Any, lr: Any = 0.1, task: Any = None, store: Path | None = None, **sgd: Any
) -> Tensor:
    model, train, query = mlp(), vectors(N), vectors(QUERIES, seed=5)
    trajectory = trajectory_of(folder / "run", perturbed_states(model, 4), N, lr=lr, **sgd)
    analyzer = analyzer_of(model, trajectory, store or folder / "store", task=task, method=method)
    analyzer.fit(train)
    return analyzer.score(GROUPS, train, query).values


def test_small_lr_steps_give_learning_rates_times_plain_gradients(tmp_path: Path) -> None:
    lr = 1e-7
    source, final = (_mlp_scores(tmp_path / method.query_points, method, lr=lr) for method in (sf.Source(), apart()))
    model, train, query = mlp(), vectors(N), vectors(QUERIES, seed=5)
    parameters = list(model.parameters())

    def flat(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    states = perturbed_states(model, 4)
    x, y = train.tensors
    task, grads, asked = sf.tasks.Classification(), [], []
    for state in states:
        model.load_state_dict(state)
        asked.append(torch.stack([flat(task.compute_measurement((a[None], b[None]), model)) for a, b in query]))
        grads.append(torch.stack([flat(task.compute_train_loss((x[m], y[m]), model)) for m in GROUPS.members]))
    covered = torch.tensor([15.0, 10.0, 10.0, 5.0], dtype=torch.float64)  # steps nearest to each checkpoint
    learned = lr * torch.tensordot(covered, torch.stack(grads), 1).mT / N
    torch.testing.assert_close(final, asked[-1] @ learned, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        source, torch.tensordot(covered / 40, torch.stack(asked), 1) @ learned, rtol=1e-5, atol=0
    )


def test_large_lr_steps_give_the_undamped_influence_function(tmp_path: Path) -> None:
    """With one checkpoint; the objective's weight decay is the only damping. Of coupled layers each has its share c.

    (F / c + decay)^-1 = c (F + c decay)^-1.
    """
    model, train, query = mlp(), vectors(N), vectors(QUERIES, seed=5)
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 1), N, lr=1e7, weight_decay=1e-3)

    def scores(method: Any) -> sf.Scores:
        analyzer = analyzer_of(model, trajectory, tmp_path / "store", method=method)
        analyzer.fit(train)
        return analyzer.score(GROUPS, train, query, keep=("layer",))

    torch.testing.assert_close(scores(apart()).values, scores(sf.InfluenceFunction(1e-3)).values, rtol=1e-9, atol=0)
    coupled = scores(sf.Source())
    [[shares]] = [told.values() for told in coupled.provenance["trace_shares"]]
    for layer, share in shares.items():
        expected = share * scores(sf.InfluenceFunction(share * 1e-3)).by_layer[layer]
        torch.testing.assert_close(coupled.by_layer[layer], expected, rtol=1e-9, atol=0)


BASE: dict[str, Any] = {"method": sf.Source(segments=2), "lr": 0.5}
CHANGES: dict[str, dict[str, Any]] = {
    "segments": {"method": sf.Source(segments=4)},
    "cut points": {"method": sf.Source(segments=[30])},
    "learning rate": {"lr": 0.6},
    "a schedule": {"lr": [0.5] * 20 + [0.25] * 20},
    "momentum": {"momentum": 0.5},
    "dampening": {"momentum": 0.5, "dampening": 0.3},
    "weight decay": {"weight_decay": 0.05},
    "influence function": {"method": sf.InfluenceFunction()},
    "damping": {"method": sf.InfluenceFunction(damping=0.01)},
    "more damping": {"method": sf.InfluenceFunction(damping=0.02)},
    "TracIn": {"method": sf.TracIn()},
    "measurement": {"task": sf.tasks.Classification("margin")},
}


def test_every_option_changes_the_scores(tmp_path: Path) -> None:
    """Most share their factors, so one store holds them; a task is part of what factors are made from."""
    results: dict[str, Tensor] = {}
    for name, change in {"base": {}, **CHANGES}.items():
        options = {"task": sf.tasks.Classification(), **BASE, **change}
        store = tmp_path / f"store-{options['task'].measurement}"
        results[name] = _mlp_scores(tmp_path / name, store=store, **options)
    names = list(results)
    for place, first in enumerate(names):
        for second in names[:place]:
            assert not torch.allclose(results[first], results[second], rtol=1e-3, atol=0), (first, second)


def test_cut_points_equal_the_count_that_they_spell_out(tmp_path: Path) -> None:
    counted, cut = (_mlp_scores(tmp_path, sf.Source(segments=segments)) for segments in (2, [20]))
    assert torch.equal(counted, cut)


def test_parameter_groups_have_their_own_learning_rate_and_weight_decay(tmp_path: Path) -> None:
    """A layer in a group of its own is scored as if the whole model were trained with that group's constants."""
    model, train, query = mlp(), vectors(N), vectors(QUERIES, seed=5)
    states = perturbed_states(model, 4)
    groups = {name: int(name.startswith("4")) for name in model.state_dict()}
    by_layer: dict[str, dict[str, Tensor]] = {}
    rates, decays = (torch.tensor([pair], dtype=torch.float64).expand(40, 2) for pair in ([0.5, 0.05], [0.01, 0.2]))
    for name, (lr, decay, of) in {
        "both": (rates, decays, groups),
        "first": (0.5, 0.01, None),
        "second": (0.05, 0.2, None),
    }.items():
        made = trajectory_of(tmp_path / name, states, N)
        trajectory = sf.Trajectory(made.checkpoints, made.steps, lr, N, sf.OptimizerConstants(weight_decay=decay), of)
        analyzer = analyzer_of(model, trajectory, tmp_path / f"{name}-store", method=apart())
        analyzer.fit(train)
        by_layer[name] = dict(analyzer.score(GROUPS, train, query, keep=("layer",)).by_layer)
    for layer, expected in {"0": "first", "2": "first", "4": "second"}.items():
        torch.testing.assert_close(by_layer["both"][layer], by_layer[expected][layer], rtol=1e-9, atol=0)


@pytest.mark.parametrize("what", ["learning rate", "momentum", "dampening", "weight decay"])
def test_a_bias_trained_otherwise_than_its_weight_is_scored_with_its_own_constants(tmp_path: Path, what: str) -> None:
    """As if the whole model, with biases as blocks by themselves, were trained with the constants of each group."""
    model, train, query = mlp(), vectors(N), vectors(QUERIES, seed=5)
    groups = {name: int(name.endswith("bias")) for name in model.state_dict()}
    names = ("learning rate", "momentum", "dampening", "weight decay")
    same, pair = (torch.tensor([[0.1, second]], dtype=torch.float64).expand(20, 2) for second in (0.1, 0.2))
    files = trajectory_of(tmp_path, perturbed_states(model, 2), N).checkpoints

    def by_layer(label: str, constants: list[Tensor], of: dict[str, int] | None, **chosen: Any) -> dict[str, Tensor]:
        rates, *others = constants
        trajectory = sf.Trajectory(files, [10, 20], rates, N, sf.OptimizerConstants("SGD", *others), of)
        analyzer = analyzer_of(model, trajectory, tmp_path / label, method=apart(), **chosen)
        assert not analyzer.context.layers.skipped
        analyzer.fit(train)
        return dict(analyzer.score(GROUPS, train, query, keep=("layer",)).by_layer)

    both = by_layer("both", [pair if name == what else same for name in names], groups)
    assert list(both) == ["0", "0.bias", "2", "2.bias", "4", "4.bias"]
    split = {"layers": ["*.weight", "*.bias"]}
    weights, biases = (
        by_layer(f"group {g}", [(pair if name == what else same)[:, g : g + 1] for name in names], None, **split)
        for g in (0, 1)
    )
    for name, found in both.items():
        own, other = (biases, weights) if name.endswith("bias") else (weights, biases)
        torch.testing.assert_close(found, own[name], rtol=1e-9, atol=1e-14)
        assert not torch.allclose(found, other[name], rtol=1e-4, atol=0), "the constants count"
