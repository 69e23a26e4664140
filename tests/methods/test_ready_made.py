"""The methods that SOURCE is compared with, each against a naive reference in float64, and against peer libraries."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import segflow as sf
from segflow.curvature.projection import probes
from segflow.methods.plan import Projection

from ..support import oracles
from ..support.helpers import (
    FixedLabels,
    analyzer_of,
    example_loss,
    mlp,
    perturbed_states,
    trajectory_of,
    vectors,
)
from ..support.naive import (
    GROUPS,
    LR,
    QUERIES,
    Margins,
    N,
    assert_near,
    exact_hessian,
    flat,
    grouped_rows,
    naive_gradients,
    problem,
    projected_scores,
    scored,
    tracked_modules,
)


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_gradient_dot_product_and_cosine(tmp_path: Path, net: str) -> None:
    asked, grouped = flat(naive_gradients(net, "measurement")), grouped_rows(flat(naive_gradients(net, "train")))
    assert_near(scored(tmp_path / "dot", sf.GradientDot(), net).values, asked @ grouped.mT / N)
    expected = nn.functional.normalize(asked, dim=1) @ nn.functional.normalize(grouped, dim=1).mT
    assert_near(scored(tmp_path / "cosine", sf.GradientCosine(), net).values, expected)
    single = scored(tmp_path / "single", sf.GradientCosine(), net, sf.Groups.singletons(N))
    rows = nn.functional.normalize(flat(naive_gradients(net, "train")), dim=1)
    assert_near(single.values, nn.functional.normalize(asked, dim=1) @ rows.mT)
    assert_near(torch.stack(list(single.by_layer.values())).sum(0), single.values)


def test_hydra_weighs_checkpoints_and_asks_at_the_end(tmp_path: Path) -> None:
    asked = flat(naive_gradients("mlp", "measurement"))
    covered = (15, 10, 5)  # of 30 steps those nearest to the checkpoints after 10, 20 and 30
    rows = [grouped_rows(flat(naive_gradients("mlp", "train", state))) for state in range(3)]
    total = sum(count * LR * grouped for count, grouped in zip(covered, rows, strict=True))
    assert_near(scored(tmp_path, sf.Hydra()).values, asked @ total.mT / N)


@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diagonal", "identity"])
@pytest.mark.parametrize("damping", [0.05, "heuristic"])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_influence_functions_equal_the_dense_inverse(tmp_path: Path, kind: str, damping: Any, net: str) -> None:
    asked, real, sampled = (naive_gradients(net, of) for of in ("measurement", "train", "sample"))
    model, train, _ = problem(net)
    model.load_state_dict(perturbed_states(model, 3)[2])
    cov = oracles.naive_covariances(model, tracked_modules(model), example_loss(model, train, Margins(), "sample"), N)
    expected = torch.zeros(QUERIES, len(GROUPS), dtype=torch.float64)
    for name, (A, S) in cov.items():
        if kind == "ekfac":
            blocks = oracles.dense_curvature(*oracles.pooled_ekfac([(A, S, sampled[name])]))
        elif kind == "kfac":
            positions = {"first": 9, "second": 9}.get(name, 1)
            blocks = torch.stack([positions * torch.kron(s, a) for s, a in zip(S, A, strict=True)])
        elif kind == "diagonal":
            blocks = torch.stack([torch.diag(g.square().mean(0).flatten()) for g in sampled[name].movedim(1, 0)])
        else:
            blocks = torch.stack([torch.eye(g[0].numel()).double() for g in sampled[name].movedim(1, 0)])
        mean = torch.stack([block.diagonal().mean() for block in blocks]).mean()
        for part, block in enumerate(blocks):
            damped = 0.1 * mean.item() if damping == "heuristic" else damping
            query, group = asked[name][:, part].flatten(1), grouped_rows(real[name][:, part].flatten(1))
            expected += oracles.influence_scores(query, block, damped, group, N)
    assert_near(scored(tmp_path, sf.InfluenceFunction(damping, curvature=kind), net).values, expected)


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("dimension", [None, 6])
@pytest.mark.parametrize(("method", "kind"), [(sf.TRAK, "output"), (sf.ProjectedFisher, "train")])
def test_projected_inverses(tmp_path: Path, method: Any, kind: str, dimension: int | None, net: str) -> None:
    asked, real, features = (naive_gradients(net, of) for of in ("measurement", "train", kind))
    if dimension is None:
        rows = [flat(of) for of in (features, asked, real)]
    else:
        shapes = {name: tuple(g.shape[1:]) for name, g in real.items()}
        made = probes(Projection(dimension, 3), shapes, torch.float64, torch.device("cpu"))
        rows = [
            sum(torch.einsum("npoi,kpo,kpi->nk", g, made[n].outputs_kPO, made[n].inputs_kPI) for n, g in of.items())
            for of in (features, asked, real)
        ]
    expected = projected_scores(rows[0], rows[1], grouped_rows(rows[2]), 0.02)
    assert_near(scored(tmp_path, method(dimension, 0.02, 3), net).values, expected, 1e-6)


def test_projected_products_estimate_products_without_bias() -> None:
    made = probes(Projection(200_000, 0), {"a": (1, 3, 4)}, torch.float64, torch.device("cpu"))["a"]
    G = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = made.of_gradients(G)
    torch.testing.assert_close(features @ features.mT, G.flatten(1) @ G.flatten(1).mT, rtol=0.05, atol=0.1)


def test_options_of_projections_change_the_scores(tmp_path: Path) -> None:
    variants = [
        sf.ProjectedFisher(6, 0.02, 3),
        sf.ProjectedFisher(7, 0.02, 3),
        sf.ProjectedFisher(6, 0.04, 3),
        sf.ProjectedFisher(6, 0.02, 4),
        sf.ProjectedFisher(6, "heuristic", 3),
        sf.TRAK(6, 0.02, 3),
    ]
    found = [scored(tmp_path / f"{place}", method).values for place, method in enumerate(variants)]
    for place, first in enumerate(found):
        assert not any(torch.allclose(first, second, rtol=1e-3, atol=0) for second in found[:place])


def test_lissa_converges_to_the_exact_damped_hessian_inverse(tmp_path: Path) -> None:
    hessian, asked, rows = exact_hessian()
    damping = 2.0 + max(0.0, -torch.linalg.eigvalsh(hessian).min().item())
    expected = oracles.influence_scores(asked, hessian, damping, grouped_rows(rows), N)
    found = scored(tmp_path / "all", sf.LiSSA(damping, steps=80, sample_size=N)).values
    assert_near(found, expected, 1e-6)
    fixed = scored(tmp_path / "fixed", sf.LiSSA(damping, steps=80, sample_size=N, scale=20.0)).values
    assert_near(fixed, expected, 1e-2)


def test_lissa_on_small_batches_averages_towards_the_inverse_and_every_option_counts(tmp_path: Path) -> None:
    hessian, asked, rows = exact_hessian()
    damping = 1.0 + max(0.0, -torch.linalg.eigvalsh(hessian).min().item())
    expected = oracles.influence_scores(asked, hessian, damping, grouped_rows(rows), N)
    base = {"damping": damping, "steps": 60, "sample_size": 2, "repetitions": 1, "scale": 8.0}
    changes = [{}, {"steps": 40}, {"sample_size": 3}, {"seed": 1}, {"scale": 9.0}, {"repetitions": 30}]
    found = [scored(tmp_path / f"{p}", sf.LiSSA(**{**base, **c})).values for p, c in enumerate(changes)]
    for place, first in enumerate(found):
        assert not any(torch.allclose(first, second, rtol=1e-6, atol=0) for second in found[:place])
    errors = [((values - expected).norm() / expected.norm()).item() for values in found]
    assert errors[-1] < 0.6 * errors[0]


def test_lissa_that_diverges_says_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(sf.MethodError, match="LiSSA diverged"):
        scored(tmp_path, sf.LiSSA(0.01, steps=60, sample_size=N, scale=0.05))


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("cosine", [True, False])
def test_representation_similarity_is_that_of_the_layers_inputs(tmp_path: Path, net: str, cosine: bool) -> None:
    model, train, query = problem(net)
    model.load_state_dict(perturbed_states(model, 3)[2])
    layer = "4" if net == "mlp" else "second"
    seen: list[Tensor] = []
    handle = tracked_modules(model)[layer].register_forward_hook(lambda _m, args, _o: seen.append(args[0].detach()))
    for data in (train, query):
        model(data.tensors[0])
    handle.remove()
    rows = [_mean_patch(model, value) if net == "conv" else value for value in seen]
    if cosine:
        rows = [nn.functional.normalize(row, dim=1) for row in rows]
    expected = rows[1] @ grouped_rows(rows[0]).mT / (1 if cosine else N)
    found = scored(tmp_path, sf.RepresentationSimilarity(layer, cosine=cosine), net)
    assert_near(found.values, expected)
    assert list(found.by_layer) == [layer]


def _mean_patch(model: nn.Module, value: Tensor) -> Tensor:
    """The mean receptive field of the second convolution: channels times taps."""
    unfolded = nn.functional.unfold(value, 3, padding=1)  # [B, C * taps, positions]
    return unfolded.mean(2)


def test_the_last_tracked_layer_is_the_default_representation(tmp_path: Path) -> None:
    default = scored(tmp_path / "a", sf.RepresentationSimilarity())
    assert torch.equal(default.values, scored(tmp_path / "b", sf.RepresentationSimilarity("4")).values)
    with pytest.raises(sf.MethodError, match="term 'final': layer='body' is not tracked"):
        scored(tmp_path / "c", sf.RepresentationSimilarity("body"))


ADDITIVE = {
    "dot": sf.GradientDot(),
    "hydra": sf.Hydra(),
    "kfac": sf.InfluenceFunction(curvature="kfac"),
    "trak": sf.TRAK(6, "heuristic"),
    "fisher": sf.ProjectedFisher(6),
    "representation": sf.RepresentationSimilarity(),
    "lissa": sf.LiSSA(2.0, steps=5, sample_size=7),
    "fast source": sf.Source(segments=2, fast=True),
}


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tensor]:
    """The scores of single examples by an additive method."""

    @cache
    def scores(name: str) -> Tensor:
        return scored(tmp_path_factory.mktemp("singles"), ADDITIVE[name], groups=sf.Groups.singletons(N)).values

    return scores


@pytest.mark.parametrize("name", ADDITIVE)
@pytest.mark.parametrize("memory", [2 << 30, 1])
def test_groups_are_the_sums_of_their_members_however_little_memory_there_is(
    tmp_path: Path, singles: Callable[[str], Tensor], name: str, memory: int
) -> None:
    found = scored(tmp_path, ADDITIVE[name], memory=memory).values
    assert_near(found, torch.stack([singles(name)[:, list(m)].sum(1) for m in GROUPS.members], 1))


def test_a_task_without_output_function_cannot_be_traced_and_says_so(tmp_path: Path) -> None:
    class Bare(sf.Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return FixedLabels().compute_train_loss(batch, model, sample)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return FixedLabels().compute_measurement(batch, model)

    model, train = mlp(), vectors(N)
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 1), N)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", task=Bare(), method=sf.TRAK(4))
    with pytest.raises(sf.TaskError, match=r"Bare has no compute_output\(\)"):
        analyzer.fit(train)


def test_fast_source_evaluates_gradients_and_curvature_at_the_mean_parameters(tmp_path: Path) -> None:
    """A trajectory whose only checkpoint is the weighted mean gives the same, but for the final query gradients."""
    model, train = mlp(), vectors(N)
    states = perturbed_states(model, 3)
    states[2] = model.state_dict()
    weights = (0.5, 1 / 3, 1 / 6)  # of 30 steps 15, 10 and 5
    mean = {name: sum(w * s[name] for w, s in zip(weights, states, strict=True)) for name in states[0]}
    values = []
    for folder, chosen, steps in (("run", states, None), ("mean", [mean], [30])):
        trajectory = trajectory_of(tmp_path / folder, chosen, N, steps=steps, lr=LR, weight_decay=0.01)
        method = sf.Source(segments=1, fast=folder == "run")
        analyzer = analyzer_of(model, trajectory, tmp_path / f"{folder}-store", method=method)
        analyzer.fit(train)
        constant = ConstantQueries()
        analyzer.context.task.compute_measurement = constant  # type: ignore[method-assign]
        values.append(analyzer.score(GROUPS, train, vectors(QUERIES, seed=5)).values)
    assert_near(values[0], values[1])


class ConstantQueries:
    """A measurement whose gradient is the same at all parameters: a linear function of the last layer's weight."""

    def __call__(self, batch: Any, model: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        handle = model[4].register_forward_pre_hook(lambda _m, args: (args[0] * 0 + batch[0][:, :4],))
        try:
            seen.append(model(batch[0]))
        finally:
            handle.remove()
        return seen[0][:, 0].sum()


@pytest.mark.parametrize("method", [sf.TRAK(60), sf.ProjectedFisher(60, 0.0)], ids=["trak", "fisher"])
def test_a_kernel_of_low_rank_is_inverted_where_it_is_not_rounding_in_float32_too(tmp_path: Path, method: Any) -> None:
    """More features than examples: the other directions hold rounding only."""
    values = []
    for dtype in (torch.float32, torch.float64):
        model, train, query = mlp(dtype), vectors(N, dtype), vectors(QUERIES, dtype, seed=5)
        trajectory = trajectory_of(tmp_path / f"{dtype}", perturbed_states(model, 1), N)
        analyzer = analyzer_of(model, trajectory, tmp_path / f"{dtype}-store", task=Margins(), method=method)
        analyzer.fit(train)
        values.append(analyzer.score(GROUPS, train, query).values.double())
    pair = torch.stack([value.flatten() for value in values])
    assert torch.corrcoef(pair)[0, 1] > 0.99
    assert 0.9 < values[0].norm() / values[1].norm() < 1.1


class Weighted(Margins):
    """An output function that depends on a tensor, which no fingerprint of attributes or code sees."""

    def __init__(self, weight: float, mean: bool = False) -> None:
        super().__init__()
        self.squares, self.mean = torch.full((3,), weight, dtype=torch.float64), mean

    def compute_output(self, batch: Any, model: nn.Module) -> Tensor:
        logits = model(batch[0])
        total = (self.squares * logits.square()).sum()
        return total / len(logits) if self.mean else total


def test_kernels_of_another_output_function_are_refused(tmp_path: Path) -> None:
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 1), N)
    for weight in (1.0, 2.0):
        analyzer = analyzer_of(mlp(), trajectory, tmp_path / "store", task=Weighted(weight), method=sf.TRAK(5, 0.01))
        if weight == 1.0:
            analyzer.fit(vectors(N))
        else:
            with pytest.raises(sf.StoreError, match="outputs"):
                analyzer.fit(vectors(N))
            with pytest.raises(sf.StoreError, match="outputs"):
                analyzer.score(GROUPS, vectors(N), vectors(QUERIES))


def test_check_looks_at_the_output_function(tmp_path: Path) -> None:
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 1), N)
    analyzer = analyzer_of(
        mlp(), trajectory, tmp_path / "store", task=Weighted(1.0, mean=True), method=sf.TRAK(5, 0.01)
    )
    with pytest.raises(sf.TaskError, match="the output loss is a mean over the batch"):
        analyzer.check(vectors(N), curvature_tolerance=float("inf"))


def test_lissa_without_damping_refuses_an_answer_that_is_none(tmp_path: Path) -> None:
    hessian, _, _ = exact_hessian()
    assert torch.linalg.eigvalsh(hessian).min() < -0.01
    with pytest.raises(sf.MethodError, match="LiSSA diverged"):
        scored(tmp_path, sf.LiSSA(0.0, steps=400, sample_size=N))


@pytest.mark.parametrize(
    "make",
    [
        lambda: sf.TRAK(dimension=2.5),
        lambda: sf.ProjectedFisher(dimension="512"),
        lambda: sf.LiSSA(steps=1.5),
        lambda: sf.LiSSA(sample_size=0),
    ],
)
def test_counts_must_be_whole_numbers(make: Any) -> None:
    with pytest.raises(sf.MethodError, match="expected"):
        make()


def test_arrays_of_cut_points_are_taken(tmp_path: Path) -> None:
    import numpy as np

    assert sf.Source(segments=np.array([8, 16])).segments == (8, 16)


def test_a_layer_that_the_measurement_does_not_reach_has_no_representation_and_says_so(tmp_path: Path) -> None:
    class Early(Margins):
        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return model[0](batch[0]).sum()

    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 1), N)
    method = sf.RepresentationSimilarity()
    analyzer = analyzer_of(mlp(), trajectory, tmp_path / "store", task=Early(), method=method)
    with pytest.raises(sf.LayerError, match=r"layer '4': the measurement loss does not reach it"):
        analyzer.score(GROUPS, vectors(N), vectors(QUERIES))


def test_a_run_of_an_unknown_optimizer_is_scored_by_methods_that_need_no_learning_rates(tmp_path: Path) -> None:
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 2), N, name="NAdam")
    with pytest.raises(sf.TrajectoryError, match="NAdam"):
        analyzer_of(mlp(), trajectory, tmp_path / "store", method=sf.Source())
    analyzer = analyzer_of(mlp(), trajectory, tmp_path / "store", method=sf.InfluenceFunction())
    analyzer.fit(vectors(N))
    assert analyzer.score(GROUPS, vectors(N), vectors(QUERIES)).values.abs().max() > 0
