"""SOURCE for preconditioned optimizers: dense formulas, unrolled training, limits, options, estimated moments."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.curvature.preconditioner import MeanDenominator, preconditioner_block

from ..support import oracles
from ..support.dense import Quantities, quantities
from ..support.helpers import (
    FixedLabels,
    analyzer_of,
    apart,
    example_loss,
    mlp,
    perturbed_states,
    trajectory_of,
    vectors,
)
from ..support.linear import DESIGN, FEATURES, QUERY, TRAIN, Linear, losses, measure
from ..support.linear import GROUPS as LINEAR_GROUPS
from ..support.linear import N as LINEAR_N
from ..support.naive import grouped_rows, problem, tracked_modules

N, QUERIES, LR, DECAY, EPS = 20, 4, 2e-3, 0.3, 1e-3
WEIGHTS = (0.75, 0.25)  # of a segment's two checkpoints: 15 and 5 of 20 steps are nearest to them
GROUPS = sf.Groups.from_lists([[0, 3, 5], range(6, 20), [1], [2, 4]], N)


def _moments(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    """Second moments of no particular form, a few zeros among them."""
    generator = torch.Generator().manual_seed(11)
    return [
        {
            name: 0.02 * torch.rand(value.shape, generator=generator, dtype=torch.float64).square() + 1e-6
            for name, value in model.named_parameters()
        }
        for _ in range(count)
    ]


def _run(
    folder: Path,
    method: Any,
    *,
    net: str = "mlp",
    name: str = "AdamW",
    lr: Any = LR,
    store: Path | None = None,
    **constants: Any,
) -> sf.Scores:
    model, train, query = problem(net)
    states, moments = perturbed_states(model, 4), _moments(model, 4)
    constants = {"weight_decay": DECAY, "eps": EPS, "beta1": 0.0, **constants}
    trajectory = trajectory_of(folder / "run", states, N, lr=lr, second_moments=moments, name=name, **constants)
    analyzer = analyzer_of(model, trajectory, store or folder / "store", method=method)
    analyzer.fit(train, batch_size=7)
    return analyzer.score(GROUPS, train, query, batch_size=6, keep=("term", "layer"))


def _curvatures(exact: Quantities, net: str, pool: tuple[int, int], form: str) -> dict[str, dict[str, Any]]:
    """By layer P, the curvatures of a segment of two checkpoints, each [P, ...], and what the layers' shares are of."""
    (model, *_), found = problem(net), {}
    moments, modules = _moments(model, 4), tracked_modules(model)
    for name in exact.layers:
        own = [(moments[i][f"{name}.weight"], moments[i].get(f"{name}.bias")) for i in pool]
        P = oracles.preconditioner([oracles.layer_matrix(modules[name], *pair) for pair in own], EPS, WEIGHTS)
        plain = [exact.fits(name)[i] for i in pool]
        scaled = oracles.pooled_ekfac([oracles.scaled_fit(fit, P) for fit in plain], WEIGHTS)
        diagonal = sum(w * fit[2].square().mean(0) for w, fit in zip(WEIGHTS, plain, strict=True))
        found[name] = {
            "P": P,
            "scaled": scaled,
            "plain": oracles.dense_curvature(*oracles.pooled_ekfac(plain, WEIGHTS)),
            "diagonal": diagonal,
            "trace": float((scaled[2] if form == "kronecker" else P * diagonal).sum()),
        }
    return found


def _segment(exact: Quantities, net: str, pool: tuple[int, int], form: str, default: bool) -> dict[str, Any]:
    """By layer, of each part, a segment as `oracles.preconditioned_source_scores` takes it."""
    curvatures, segments = _curvatures(exact, net, pool, form), {}
    shares = oracles.trace_shares(
        {name: own["trace"] for name, own in curvatures.items()}, dict.fromkeys(curvatures, 1)
    )
    for name, own in curvatures.items():
        share, (Q_A, Q_S, sigma) = shares[name] if default else 1.0, own["scaled"]
        segments[name] = [
            {
                "P": P.flatten(),
                "basis": (sigma[part].flatten() / share, torch.kron(Q_S[part], Q_A[part])),
                "curvature": own["plain"][part] / share,
                "diagonal": own["diagonal"][part].flatten() / share,
                "lr_steps": 20 * LR,
                "decay_steps": 20 * LR * DECAY,
                "weights": WEIGHTS,
                "group_gradients": [grouped_rows(exact.real[i][name][:, part].flatten(1), GROUPS) for i in pool],
            }
            for part, P in enumerate(own["P"])
        ]
    return segments


def _reference(net: str, form: str, coupled: bool, default: bool) -> Tensor:
    """The dense formulas for two segments of two checkpoints, layer by layer, from naive per-example loops.

    coupled: weight decay goes through P. default: layers are coupled, and the query gradient is the mean of those at
    all checkpoints, of which 15, 10, 10 and 5 steps are nearest to each.
    """
    model, train, query = problem(net)
    exact = quantities(model, perturbed_states(model, 4), train, query)
    segments = [_segment(exact, net, pool, form, default) for pool in ((0, 1), (2, 3))]
    formula = {"kronecker": oracles.preconditioned_source_scores, "diagonal": oracles.hybrid_source_scores}[form]
    total = torch.zeros(QUERIES, len(GROUPS), dtype=torch.float64)
    for name in exact.layers:
        along = (15 / 40, 10 / 40, 10 / 40, 5 / 40) if default else (0, 0, 0, 1)
        asked = sum(weight * at[name] for weight, at in zip(along, exact.asked, strict=True))
        for part in range(asked.shape[1]):
            own = [{**segment[name][part], "coupled": coupled} for segment in segments]
            total += sum(formula(asked[:, part].flatten(1), own, N))
    return total


@pytest.mark.parametrize("default", [True, False], ids=["default", "apart"])
@pytest.mark.parametrize("form", ["kronecker", "diagonal"])
@pytest.mark.parametrize("name", ["AdamW", "Adam", "RMSprop"])
def test_scores_equal_the_dense_formulas(tmp_path: Path, form: str, name: str, default: bool) -> None:
    method = sf.Source(2, preconditioner=form) if default else apart(2, preconditioner=form)
    found, expected = _run(tmp_path, method, name=name).values, _reference("mlp", form, name != "AdamW", default)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_scores_of_convolutions_equal_the_dense_formulas(tmp_path: Path, name: str) -> None:
    found = _run(tmp_path, sf.Source(2), net="conv", name=name).values
    expected = _reference("conv", "kronecker", name != "AdamW", default=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_scores_converge_to_unrolled_preconditioned_steps_on_a_quadratic(
    tmp_path: Path, coupled: bool, decay: float
) -> None:
    """One output: P is rank one and EK-FAC is exact, so only the step size is left, and the error halves with it.

    From the optimum the gradients are constant. Coupled decay is not diagonal in the eigenbasis, which leaves an error.
    """
    P = torch.tensor([0.3, 2.0, 0.7, 1.5, 1.0], dtype=torch.float64)
    moment = (1 / P - 1e-8).square()
    identity = torch.eye(FEATURES + 1).double()
    shift = identity if coupled else torch.diag(1 / P)
    hessian = 2 * DESIGN.mT @ DESIGN / LINEAR_N
    start = torch.linalg.solve(hessian + decay * shift, 2 * DESIGN.mT @ TRAIN.tensors[1][:, 0] / LINEAR_N)
    errors = []
    for steps in (100, 200, 400):
        lr = 0.6 / steps
        state = {"weight": start[None, :-1], "bias": start[-1:]}
        moments = {"weight": moment[None, :-1], "bias": moment[-1:]}
        trajectory = trajectory_of(
            tmp_path / f"{steps}",
            [state],
            LINEAR_N,
            steps=[steps],
            lr=lr,
            second_moments=[moments],
            name="Adam" if coupled else "AdamW",
            weight_decay=decay,
        )
        model = nn.Linear(FEATURES, 1).double()
        store = tmp_path / f"store-{steps}"
        analyzer = analyzer_of(model, trajectory, store, task=Linear(), method=sf.Source(segments=1))
        analyzer.fit(TRAIN)
        found = analyzer.score(LINEAR_GROUPS, TRAIN, QUERY).values
        options = {"weight_decay": decay} if coupled else {"decoupled": decay}
        gradient = oracles.weighted_gradient(losses)
        groups = [list(m) for m in LINEAR_GROUPS.members]
        exact = oracles.unrolled_influence(
            measure, start, gradient, groups, LINEAR_N, [lr] * steps, preconditioner=P, **options
        )
        errors.append(((found - exact).norm() / exact.norm()).item())
    if coupled and decay:
        assert errors[-1] < 0.05
    else:
        assert errors[-1] < 0.01
        assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]


def _flat(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_small_lr_steps_give_lr_steps_times_the_exact_preconditioner(tmp_path: Path) -> None:
    found = _run(tmp_path, sf.Source(segments=1, checkpoint_weights="equal"), lr=1e-9, weight_decay=0.0).values
    model, (x, y), query, task = mlp(), vectors(N).tensors, vectors(QUERIES, seed=5), FixedLabels()
    moments = _moments(model, 4)
    blocks = [oracles.preconditioner([m[name] for m in moments], EPS) for name, _ in model.named_parameters()]
    P = torch.cat([block.flatten() for block in blocks])
    gradients, asked = [], []
    for state in perturbed_states(model, 4):
        model.load_state_dict(state)
        asked.append(torch.stack([_flat(model, task.compute_measurement((a[None], b[None]), model)) for a, b in query]))
        losses = [task.compute_train_loss((x[list(m)], y[list(m)]), model) for m in GROUPS.members]
        gradients.append(torch.stack([_flat(model, loss) for loss in losses]))
    expected = 40e-9 * (torch.stack(asked).mean(0) * P) @ torch.stack(gradients).mean(0).mT / N
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7 * expected.abs().max().item())


def test_large_lr_steps_give_the_inverse_of_the_scaled_curvature_whatever_the_learning_rate(tmp_path: Path) -> None:
    """One output: H~ is exact, and P^1/2 (P^1/2 H P^1/2)^-1 P^1/2 = H^-1: the influence function."""
    values = []
    for scale in (1.0, 30.0):
        moments = {"weight": torch.tensor([[1.0, 0.2, 3.0, 0.5]]).double() * scale, "bias": torch.ones(1).double()}
        model = nn.Linear(FEATURES, 1).double()
        state = {"weight": torch.ones(1, FEATURES).double(), "bias": torch.zeros(1).double()}
        trajectory = trajectory_of(
            tmp_path / f"{scale}", [state], LINEAR_N, lr=1e6, second_moments=[moments], name="AdamW"
        )
        for method in (sf.Source(segments=1), sf.InfluenceFunction(damping=0.0)):
            store = tmp_path / f"store-{scale}-{type(method).__name__}"
            analyzer = analyzer_of(model, trajectory, store, task=Linear(), method=method)
            analyzer.fit(TRAIN)
            values.append(analyzer.score(LINEAR_GROUPS, TRAIN, QUERY).values)
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=1e-7, atol=1e-10)


CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "diagonal": {"preconditioner": "diagonal"},
    "none": {"preconditioner": "none"},
    "fast": {"fast": True},
    "segments": {"segments": 4},
    "weights": {"checkpoint_weights": "equal"},
    "layers": {"layers": "apart"},
    "query points": {"query_points": "final"},
    "lr": {"lr": 2 * LR},
    "eps": {"eps": 0.1},
    "weight decay": {"weight_decay": 0.9},
    "coupled": {"name": "Adam"},
    "RMSprop with momentum": {"name": "RMSprop", "momentum": 0.9},
}


def test_every_option_changes_the_scores(tmp_path: Path) -> None:
    options = {"segments", "preconditioner", "fast", "checkpoint_weights", "layers", "query_points"}
    found: dict[str, Tensor] = {}
    for label, change in CHANGES.items():
        method = sf.Source(**{"segments": 2, **{k: v for k, v in change.items() if k in options}})
        run = {k: v for k, v in change.items() if k not in options}
        store = tmp_path / f"store-eps-{run.get('eps', EPS)}"  # factors depend on eps, on nothing else of the run
        found[label] = _run(tmp_path / label, method, store=store, **run).values
    for first, second in combinations(found, 2):
        assert not torch.allclose(found[first], found[second], rtol=1e-3, atol=0), (first, second)


def test_adam_with_decoupled_decay_is_adamw(tmp_path: Path) -> None:
    adamw, adam = (
        _run(tmp_path / "run", sf.Source(segments=2), name=name, decoupled=True).values for name in ("AdamW", "Adam")
    )
    assert torch.equal(adam, adamw)


def test_parts_add_up_by_term_and_by_layer(tmp_path: Path) -> None:
    scores = _run(tmp_path, sf.Source(segments=2))
    for parts in (scores.by_term, scores.by_layer):
        torch.testing.assert_close(torch.stack(list(parts.values())).sum(0), scores.values, rtol=1e-10, atol=1e-12)
    assert scores.provenance["second_moments"] == "recorded"


def test_eps_is_that_of_the_layers_parameter_group(tmp_path: Path) -> None:
    """A layer in a group of its own is scored as if that group's eps had been the whole model's."""
    model, train, query = mlp(), vectors(N), vectors(QUERIES, seed=5)
    moments = _moments(model, 2)
    made = trajectory_of(tmp_path / "run", perturbed_states(model, 2), N, name="AdamW", second_moments=moments)
    groups = {name: int(name.startswith("4")) for name, _ in model.named_parameters()}
    by_layer = {}
    for label, eps in {"both": [1e-3, 0.1], "first": 1e-3, "second": 0.1}.items():
        of, count = (groups, 2) if label == "both" else (None, 1)
        rates = torch.full((20, count), LR, dtype=torch.float64)
        files = [tmp_path / "run" / f"moments-{index}.safetensors" for index in range(2)]
        adamw = sf.OptimizerConstants("AdamW", eps=eps)
        trajectory = sf.Trajectory(made.checkpoints, made.steps, rates, N, adamw, of, second_moments=files)
        analyzer = analyzer_of(model, trajectory, tmp_path / label, method=apart())
        analyzer.fit(train)
        by_layer[label] = analyzer.score(GROUPS, train, query, keep=("layer",)).by_layer
    for layer, expected in {"0": "first", "2": "first", "4": "second"}.items():
        torch.testing.assert_close(by_layer["both"][layer], by_layer[expected][layer], rtol=1e-9, atol=0)
    assert not torch.allclose(by_layer["first"]["4"], by_layer["second"]["4"], rtol=1e-3, atol=0)


def test_second_moments_that_are_not_finite_are_refused_before_the_first_pass(tmp_path: Path) -> None:
    model, train = mlp(), vectors(N)
    moments = _moments(model, 2)
    moments[1]["2.weight"][0, 0] = float("nan")
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 2), N, name="AdamW", second_moments=moments)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", method=sf.Source())
    for call in (analyzer.check, analyzer.fit):
        with pytest.raises(sf.TrajectoryError, match=r"moments-1.*1 of 24 second moments of '2.weight' are not finite"):
            call(train)
    assert not list((tmp_path / "store").glob("units/**/*.safetensors"))


def test_an_entry_that_never_had_a_gradient_does_not_matter_and_one_that_had_none_yet_does_not_take_over() -> None:
    moments = torch.tensor([[[4.0, 0.0], [16.0, 0.0]]], dtype=torch.float64)
    dead = preconditioner_block(MeanDenominator().plus(1.0, moments, 1e-8))
    torch.testing.assert_close(dead.exact_POI[0, :, 0], torch.tensor([0.5, 0.25]).double(), rtol=1e-6, atol=0)
    assert dead.exact_POI.max() < 10
    none, one = torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double()
    later = preconditioner_block(MeanDenominator().plus(0.5, none, 1e-8).plus(0.5, one, 1e-8))
    torch.testing.assert_close(later.exact_POI.item(), 2.0, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["AdamW", "Adagrad"])
def test_second_moments_that_were_not_saved_are_estimated_and_said_to_be(tmp_path: Path, name: str) -> None:
    model, train, query, B = mlp(), vectors(N), vectors(QUERIES, seed=5), 5
    states = perturbed_states(model, 2)
    constants = {"name": name, "eps": EPS, "weight_decay": DECAY}
    bare = trajectory_of(tmp_path / "bare", states, N, lr=LR, batch_size=B, **constants)
    estimated = []
    for index, state in enumerate(states):
        model.load_state_dict(state)
        loss = example_loss(model, train, FixedLabels())
        rows = [torch.autograd.grad(loss(i), list(model.parameters())) for i in range(N)]
        columns = [torch.stack(column) for column in zip(*rows, strict=True)]
        moments = [g.mean(0).square() + g.var(0, unbiased=False) / B for g in columns]
        times = 10 * (index + 1) if name == "Adagrad" else 1
        names = [name for name, _ in model.named_parameters()]
        estimated.append({n: times * m.detach() for n, m in zip(names, moments, strict=True)})
    from_rank = trajectory_of(tmp_path / "told", states, N, lr=LR, second_moments=estimated, **constants)
    analyzer = analyzer_of(model, bare, tmp_path / "store", method=sf.Source(segments=1))
    with pytest.warns(UserWarning, match=rf"{name}'s second moments were not saved at 2 checkpoints"):
        analyzer.fit(train)
    scores = analyzer.score(GROUPS, train, query)
    other = analyzer_of(model, from_rank, tmp_path / "other", method=sf.Source(segments=1))
    other.fit(train)
    torch.testing.assert_close(scores.values, other.score(GROUPS, train, query).values, rtol=1e-8, atol=1e-12)
    assert scores.provenance["second_moments"] == "estimated from gradients"


def test_moments_that_cannot_be_estimated_say_what_to_give(tmp_path: Path) -> None:
    model, train = mlp(), vectors(N)
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 2), N, name="Adam")
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", method=sf.Source(segments=1))
    with pytest.raises(sf.TrajectoryError, match=r"OptimizerConstants\(batch_size="):
        analyzer.fit(train)


def test_stored_factors_of_other_second_moments_are_refused(tmp_path: Path) -> None:
    model, train = mlp(), vectors(N)
    states, moments = perturbed_states(model, 2), _moments(model, 2)
    method = sf.Source(segments=1)
    for eps in (1e-3, 1e-2):
        trajectory = trajectory_of(tmp_path / "run", states, N, second_moments=moments, name="AdamW", eps=eps)
        analyzer = analyzer_of(model, trajectory, tmp_path / "store", method=method)
        if eps == 1e-3:
            analyzer.fit(train)
        else:
            with pytest.raises(sf.StoreError, match="preconditioner"):
                analyzer.fit(train)


def test_an_end_to_end_adamw_run_agrees_with_retraining_without_a_group(tmp_path: Path) -> None:
    """A live AdamW run from the optimum on small batches, whose noise sets the second moments.

    Without the group the mean loss stays over all examples, and batches stay the same.
    """
    n, steps, size = 600, 300, 20
    order = torch.cat([torch.randperm(n, generator=torch.Generator().manual_seed(i)) for i in range(10)]).split(size)
    generator = torch.Generator().manual_seed(2)
    scales = torch.tensor([3.0, 1.0, 0.3, 0.1], dtype=torch.float64)
    x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64) * scales
    y = x @ torch.arange(1.0, FEATURES + 1).double() + 2 * torch.sin(5 * x[:, 0])
    optimum = torch.linalg.lstsq(torch.cat([x, torch.ones(n, 1).double()], 1), y[:, None]).solution[:, 0]
    model, groups = nn.Linear(FEATURES, 1).double(), sf.Groups.random(n, size=6)
    query = TensorDataset(QUERY.tensors[0] * scales, QUERY.tensors[1])

    inputs = torch.cat([x, torch.ones(n, 1).double()], 1)
    recipe = {"lr": 0.001, "weight_decay": 0.1, "betas": (0.9, 0.99)}

    def retrained(kept: Tensor) -> Tensor:
        """The queries' predictions [Q, runs] after training on the kept examples [n, runs]: AdamW is elementwise."""
        theta = optimum[:, None].repeat(1, kept.shape[1]).requires_grad_(True)
        optimizer = torch.optim.AdamW([theta], **recipe)
        for batch in order:
            optimizer.zero_grad()
            ((inputs[batch] @ theta - y[batch, None]).square() * kept[batch]).mean(0).sum().backward()
            optimizer.step()
        return (query.tensors[0] @ theta[:-1] + theta[-1]).detach()

    with torch.no_grad():
        model.weight.copy_(optimum[None, :-1])
        model.bias.copy_(optimum[-1:])
    optimizer = torch.optim.AdamW(model.parameters(), **recipe)
    with sf.record(model, optimizer, tmp_path / "run", dataset_size=n, total_steps=steps, checkpoints=10):
        for batch in order:
            optimizer.zero_grad()
            (model(x[batch])[:, 0] - y[batch]).square().mean().backward()
            optimizer.step()
    kept = torch.ones(n, 13, dtype=torch.float64)
    for run, members in enumerate(groups.members[:12], start=1):
        kept[members, run] = 0.0
    predictions = retrained(kept)
    torch.testing.assert_close(predictions[:, 0], model(query.tensors[0])[:, 0].detach(), rtol=1e-9, atol=1e-12)
    exact = predictions[:, 1:] - predictions[:, :1]
    data, errors = TensorDataset(x, y[:, None]), {}
    for method in (sf.Source(segments=10), sf.Source(segments=10, preconditioner="none")):
        trajectory = sf.Trajectory.load(tmp_path / "run")
        store = tmp_path / method.preconditioner
        analyzer = analyzer_of(model, trajectory, store, task=Linear(), method=method)
        analyzer.fit(data)
        found = analyzer.score(groups, data, query).values
        errors[method.preconditioner] = ((found[:, :12] - exact).norm() / exact.norm()).item()
    assert errors["kronecker"] < 0.08
    assert errors["none"] > 0.15
