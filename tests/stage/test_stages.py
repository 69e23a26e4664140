"""Training in several stages, ensembles of runs, and automatic segments; `test_earlier_stages` has dense formulas."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.report import segmentation_figure
from segflow.training.segments import covered, cut, segmentation

from ..support import oracles
from ..support.helpers import analyzer_of, apart, mlp, perturbed_states, trajectory_of, vectors
from ..support.linear import DESIGN, FEATURES, GROUPS, QUERY, TRAIN, Linear, measure, optimum
from ..support.linear import N as LINEAR_N

N, QUERIES = 20, 4
SOME = sf.Groups.from_lists([[0, 3, 5], range(6, 20), [1], [2, 4]], N)


def _other_data() -> TensorDataset:
    """Another regression problem of another size, for a second stage."""
    x = vectors(24, features=FEATURES, seed=13).tensors[0] * torch.tensor([0.5, 2.0, 1.0, 0.7]).double()
    return TensorDataset(x, (x @ torch.arange(4.0, 0.0, -1.0).double() + torch.cos(4 * x[:, 1]))[:, None])


def _stage(folder: Path, theta: Tensor, steps: int, lr: float, size: int, stage: str, **sgd: Any) -> sf.Trajectory:
    state = {"weight": theta[None, :-1], "bias": theta[-1:]}
    made = trajectory_of(folder, [state], size, steps=[steps], lr=lr, **sgd)
    return sf.Trajectory(made.checkpoints, made.steps, lr, size, made.optimizer, stage=stage)


def test_first_stage_data_reaches_the_final_model_through_the_second_stages_decay(tmp_path: Path) -> None:
    """From the first stage's optimum its gradients are constant; the second stage has another dataset, rate, decay."""
    other, start, errors = _other_data(), optimum(0.1), []
    design = torch.cat([other.tensors[0], torch.ones(24, 1).double()], 1)

    def losses(theta: Tensor) -> Tensor:
        return (TRAIN.tensors[1][:, 0] - DESIGN @ theta).square()

    def later(theta: Tensor) -> Tensor:
        return (other.tensors[1][:, 0] - design @ theta).square()

    for steps in (50, 100, 200):
        first, second = 0.5 / steps, 0.2 / steps
        weights = torch.ones(LINEAR_N, dtype=torch.float64, requires_grad=True)
        gradient, ones = oracles.weighted_gradient(losses), torch.ones(24).double()
        middle = oracles.train_sgd(start, gradient, weights, [first] * steps, weight_decay=0.1)
        final = oracles.train_sgd(
            middle, oracles.weighted_gradient(later), ones, [second] * steps, momentum=0.5, weight_decay=0.3
        )
        rows = [torch.autograd.grad(value, weights, retain_graph=True)[0] for value in measure(final)]
        exact = torch.stack([torch.stack([-row[list(m)].sum() for m in GROUPS.members]) for row in rows])
        pretrain = _stage(tmp_path / f"a{steps}", middle.detach(), steps, first, LINEAR_N, "pretrain", weight_decay=0.1)
        finetune = _stage(
            tmp_path / f"b{steps}", final.detach(), steps, second, 24, "finetune", momentum=0.5, weight_decay=0.3
        )
        run = finetune.after(pretrain)
        analyzer = analyzer_of(
            nn.Linear(FEATURES, 1).double(), run, tmp_path / f"s{steps}", task=Linear(), method=sf.Source(segments=1)
        )
        data = {"pretrain": TRAIN, "finetune": other}
        analyzer.fit(data)
        found = analyzer.score(GROUPS, data, QUERY, stage="pretrain")
        assert found.provenance["stage"] == "pretrain"
        errors.append(((found.values - exact).norm() / exact.norm()).item())
    assert errors[-1] < 0.02
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]


def _two_stages(tmp_path: Path) -> tuple[sf.Trajectory, sf.Trajectory]:
    model = mlp()
    states = perturbed_states(model, 6)
    first = trajectory_of(tmp_path / "a", states[:3], N, lr=0.2, weight_decay=0.02)
    second = trajectory_of(tmp_path / "b", states[3:], 15, lr=0.05, momentum=0.3)
    names = ((first, "pretrain"), (second, "finetune"))
    return tuple(
        sf.Trajectory(t.checkpoints, t.steps, t.learning_rates[0, 0].item(), t.dataset_size, t.optimizer, stage=name)
        for t, name in names
    )


METHODS = [
    sf.Source(segments=2),
    sf.Source(segments=2, fast=True),
    sf.InfluenceFunction(0.01),
    sf.TracIn(),
    sf.Hydra(),
    sf.GradientCosine(),
    sf.TRAK(5, 0.01),
    sf.ProjectedFisher(5),
    sf.LiSSA(2.0, steps=3, sample_size=5),
    sf.RepresentationSimilarity(),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'fast', '')}")
def test_the_last_stage_is_scored_as_if_it_were_all(tmp_path: Path, method: Any) -> None:
    first, second = _two_stages(tmp_path)
    train, later, query = vectors(N), vectors(15, seed=3), vectors(QUERIES, seed=5)
    groups = sf.Groups.random(15, size=4)
    task = sf.tasks.Classification("margin")
    both = analyzer_of(mlp(), second.after(first), tmp_path / "both", task=task, method=method)
    alone = analyzer_of(mlp(), second, tmp_path / "alone", task=task, method=method)
    both.fit({"pretrain": train, "finetune": later})
    alone.fit(later)
    expected = alone.score(groups, later, query).values
    for data in ({"pretrain": train, "finetune": later}, {"finetune": later}):
        torch.testing.assert_close(both.score(groups, data, query).values, expected, rtol=1e-9, atol=1e-12)


def test_stages_have_tasks_and_layers_of_their_own_and_what_a_stage_did_not_train_stays_as_it_was(
    tmp_path: Path,
) -> None:
    """The second stage trains only the head: the body's share of the first stage's score does not decay."""
    first, second = _two_stages(tmp_path)
    head = {name: 0 for name, _ in mlp().named_parameters() if name.startswith("4.")}
    frozen = sf.Trajectory(
        second.checkpoints, second.steps, 0.05, 15, sf.OptimizerConstants(momentum=0.3), head, stage="finetune"
    )
    train, later, query = vectors(N), vectors(15, seed=3), vectors(QUERIES, seed=5)
    data = {"pretrain": train, "finetune": later}
    tasks = {"pretrain": sf.tasks.Classification(), "finetune": sf.tasks.Classification("margin")}
    scores = {}
    for name, last in (("whole", second), ("head", frozen)):
        analyzer = analyzer_of(mlp(), last.after(first), tmp_path / name, task=tasks, method=apart())
        report = analyzer.check(data, query, curvature_tolerance=float("inf"))
        assert "stage 'pretrain':" in str(report)
        analyzer.fit(data)
        scores[name] = analyzer.score(SOME, data, query, stage="pretrain", keep=("layer",))
    torch.testing.assert_close(scores["whole"].by_layer["4"], scores["head"].by_layer["4"], rtol=1e-9, atol=1e-14)
    for layer in ("0", "2"):
        assert not torch.allclose(scores["whole"].by_layer[layer], scores["head"].by_layer[layer], rtol=1e-3, atol=0)
    assert set(frozen.after(first).stages[1].parameter_groups) == {"4.weight", "4.bias"}


@pytest.mark.parametrize("segments", [1, 2])
def test_a_layer_that_a_stage_did_not_train_is_scored_as_one_that_it_trained_at_a_rate_of_0(
    tmp_path: Path, segments: int
) -> None:
    """Where layers are apart. Coupled, a layer without a rate decays, and one without curvature stays as it is."""
    first, second = _two_stages(tmp_path)
    groups = {name: int(name.startswith("4.")) for name, _ in mlp().named_parameters()}
    head, at_0 = {name: 0 for name, group in groups.items() if group}, torch.tensor([[0.0, 0.05]], dtype=torch.float64)
    later = {"without": (0.05, head), "at a rate of 0": (at_0.expand(30, 2), groups)}
    data = {"pretrain": vectors(N), "finetune": vectors(15, seed=3)}
    scores = {}
    for name, (rates, of) in later.items():
        last = sf.Trajectory(
            second.checkpoints, second.steps, rates, 15, sf.OptimizerConstants(momentum=0.3), of, stage="finetune"
        )
        analyzer = analyzer_of(mlp(), last.after(first), tmp_path / name, method=apart(segments))
        analyzer.fit(data)
        scores[name] = analyzer.score(SOME, data, vectors(QUERIES, seed=5), stage="pretrain", keep=("layer",)).by_layer
    for layer, expected in scores["at a rate of 0"].items():
        torch.testing.assert_close(scores["without"][layer], expected, rtol=1e-9, atol=1e-14)


def test_training_data_of_stages_must_be_named_and_complete_from_the_attributed_stage_on(tmp_path: Path) -> None:
    first, second = _two_stages(tmp_path)
    train, later, query = vectors(N), vectors(15, seed=3), vectors(QUERIES, seed=5)
    analyzer = analyzer_of(mlp(), second.after(first), tmp_path / "s", method=sf.Source(segments=1))
    with pytest.raises(sf.TrajectoryError, match=r"the stages \['pretrain', 'finetune'\]: give training data as"):
        analyzer.fit(train)
    with pytest.raises(sf.TrajectoryError, match=r"given for \['pretrain'\]"):
        analyzer.fit({"pretrain": train})
    with pytest.raises(sf.TrajectoryError, match=r"there is no stage 'midtrain'"):
        analyzer.fit({"finetune": later, "midtrain": train})
    with pytest.raises(sf.TrajectoryError, match="has 20 examples, but the stage 'finetune' was recorded with"):
        analyzer.fit({"pretrain": train, "finetune": train})
    analyzer.fit({"finetune": later})
    with pytest.raises(sf.TrajectoryError, match="stage='pretrain': its training data is not given"):
        analyzer.score(SOME, {"finetune": later}, query, stage="pretrain")
    with pytest.raises(sf.TrajectoryError, match="stage='first' is not known"):
        analyzer.score(SOME, {"finetune": later}, query, stage="first")
    with pytest.raises(sf.MethodError, match="the run has 2 stages"):
        analyzer_of(mlp(), second.after(first), tmp_path / "s", method=sf.Source(segments=[10]))


def test_a_bias_that_one_stage_trained_otherwise_is_a_block_by_itself_in_all_stages(tmp_path: Path) -> None:
    """As in fine-tuning with AdamW without decay on biases, after pretraining with one parameter group.

    The second stage has no length: it changes only the parameters at which queries are measured. So the scores are
    those of one run whose biases are blocks by themselves too, and whose last step, of no length, leads to the same
    parameters.
    """
    first, second = _two_stages(tmp_path)
    groups = {name: int(name.endswith("bias")) for name, _ in mlp().named_parameters()}
    decays = torch.tensor([[0.1, 0.0]], dtype=torch.float64).expand(30, 2)
    rates = torch.full((30, 2), 1e-12, dtype=torch.float64)
    split = sf.Trajectory(
        second.checkpoints,
        second.steps,
        rates,
        15,
        sf.OptimizerConstants(weight_decay=decays),
        groups,
        stage="finetune",
    )
    train, later, query = vectors(N), vectors(15, seed=3), vectors(QUERIES, seed=5)
    data = {"pretrain": train, "finetune": later}
    method = sf.Source(query_points="final")
    analyzer = analyzer_of(mlp(), split.after(first), tmp_path / "both", method=method)
    analyzer.fit(data)
    scores = analyzer.score(SOME, data, query, stage="pretrain", keep=("layer",))
    assert not scores.provenance["not_attributed"]
    assert set(scores.by_layer) == {"0", "0.bias", "2", "2.bias", "4", "4.bias"}
    assert all(stage.layers.tracked["2"].size == 6 * 4 for stage in analyzer.runs[0])
    one_run = sf.Trajectory(
        [*first.checkpoints, second.checkpoints[-1]],
        [*first.steps, 31],
        [0.2] * 30 + [1e-12],
        N,
        first.optimizer,
    )
    options = {"method": replace(method, segments=[30]), "layers": ["*.weight", "*.bias"]}
    alone = analyzer_of(mlp(), one_run, tmp_path / "alone", **options)
    alone.fit(train)
    expected = alone.score(SOME, train, query, keep=("term",)).by_term["segment 1: steps 1-30"]
    torch.testing.assert_close(scores.values, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_stages_that_are_not_attributed_do_not_stand_in_the_way(tmp_path: Path) -> None:
    """The first stage has too few checkpoints, an optimizer that SOURCE does not know, and no task."""
    _, second = _two_stages(tmp_path)
    strange = trajectory_of(tmp_path / "c", perturbed_states(mlp(), 1), N, name="NAdam")
    first = sf.Trajectory(strange.checkpoints, strange.steps, 0.1, N, strange.optimizer, stage="pretrain")
    later, query = vectors(15, seed=3), vectors(QUERIES, seed=5)
    tasks = {"finetune": sf.tasks.Classification()}
    analyzer = analyzer_of(mlp(), second.after(first), tmp_path / "s", task=tasks, method=sf.Source(segments=2))
    analyzer.check({"finetune": later}, query)
    analyzer.fit({"finetune": later})
    groups = sf.Groups.random(15, size=4)
    assert analyzer.score(groups, {"finetune": later}, query).values.abs().max() > 0
    with pytest.raises(sf.TaskError, match="stage 'pretrain' has training data and no task"):
        analyzer.fit({"pretrain": vectors(N), "finetune": later})


def test_second_moments_that_are_missing_are_refused_before_the_first_pass(tmp_path: Path) -> None:
    first, second = _two_stages(tmp_path)
    moments = tmp_path / "moments.safetensors"
    from safetensors.torch import save_file

    save_file({"0.weight": torch.ones(6, 5).double(), "0.bias": torch.ones(6).double()}, moments)
    adam = sf.OptimizerConstants("Adam")
    partly = sf.Trajectory(
        second.checkpoints, second.steps, 0.05, 15, adam, stage="finetune", second_moments=[moments] * 3
    )
    bare = sf.Trajectory(second.checkpoints, second.steps, 0.05, 15, adam, stage="finetune")
    data = {"pretrain": vectors(N), "finetune": vectors(15, seed=3)}
    for last, message in ((partly, r"no second moments of \['2.bias'"), (bare, r"OptimizerConstants\(batch_size=")):
        store = tmp_path / f"store-{last is bare}"
        analyzer = analyzer_of(mlp(), last.after(first), store, method=sf.Source())
        for call in (analyzer.check, analyzer.fit):
            with pytest.raises(sf.TrajectoryError, match=message):
                call(data)
        assert not list(store.glob("units/**/*.safetensors"))


# ---- ensembles ----


def test_an_ensembles_scores_are_the_mean_of_its_runs_with_their_spread(tmp_path: Path) -> None:
    train, query = vectors(N), vectors(QUERIES, seed=5)
    states = perturbed_states(mlp(), 6)
    runs = [trajectory_of(tmp_path / f"run{r}", states[2 * r : 2 * r + 2], N, lr=0.3) for r in range(3)]
    method = sf.Source(segments=2)
    alone = []
    for number, run in enumerate(runs):
        analyzer = analyzer_of(mlp(), run, tmp_path / f"alone{number}", method=method)
        analyzer.fit(train)
        alone.append(analyzer.score(SOME, train, query, keep=("term", "layer")))
    together = analyzer_of(mlp(), runs, tmp_path / "together", method=method)
    together.fit(train)
    found = together.score(SOME, train, query, keep=("term", "layer", "run"))
    stacked = torch.stack([scores.values for scores in alone])
    torch.testing.assert_close(found.values, stacked.mean(0), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.spread, stacked.std(0), rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(torch.stack(list(found.by_run.values())), stacked, rtol=1e-10, atol=1e-14)
    for parts in (found.by_term, found.by_layer):
        torch.testing.assert_close(torch.stack(list(parts.values())).sum(0), found.values, rtol=1e-9, atol=1e-13)
    assert found.provenance["runs"] == 3 and alone[0].spread is None and not alone[0].by_run
    found.save(tmp_path / "scores.safetensors")
    loaded = sf.Scores.load(tmp_path / "scores.safetensors")
    assert torch.equal(loaded.spread, found.spread) and list(loaded.by_run) == ["run 1", "run 2", "run 3"]
    torch.testing.assert_close(found.total().spread, stacked.sum(1, keepdim=True).std(0), rtol=1e-8, atol=1e-14)
    assert found.to_xarray()["spread"].shape == (QUERIES, len(SOME))


def test_runs_of_different_recipes_are_no_ensemble(tmp_path: Path) -> None:
    states = perturbed_states(mlp(), 2)
    runs = [trajectory_of(tmp_path / f"run{n}", states, n) for n in (N, N + 1)]
    with pytest.raises(sf.TrajectoryError, match="the runs of an ensemble differ"):
        analyzer_of(mlp(), runs, tmp_path / "s")
    with pytest.raises(sf.TrajectoryError, match=r"expected a segflow.Trajectory"):
        analyzer_of(mlp(), [], tmp_path / "s")


# ---- checkpoint weights ----


def test_a_checkpoint_stands_for_the_steps_nearest_to_it(tmp_path: Path) -> None:
    """Against a naive assignment of every step, with a schedule and uneven checkpoints."""
    rates = np.linspace(1.0, 0.1, 40)
    states = perturbed_states(mlp(), 4)
    trajectory = trajectory_of(tmp_path, states, N, steps=[3, 10, 31, 40], lr=rates.tolist())
    for start, end, checkpoints in ((0, 40, (0, 1, 2, 3)), (10, 40, (2, 3)), (0, 10, (0, 1))):
        expected = dict.fromkeys(checkpoints, 0.0)
        for step in range(start + 1, end + 1):  # step t leads from parameters t - 1 to t: it lies at t - 1/2
            middle = step - 0.5
            nearest = min(checkpoints, key=lambda c: (abs(trajectory.steps[c] - middle), -c))
            expected[nearest] += rates[step - 1]
        found = [amount for (amount,) in covered(trajectory, checkpoints, start, end)]
        np.testing.assert_allclose(found, list(expected.values()), rtol=1e-12)
    [one] = cut(trajectory, 1)
    np.testing.assert_allclose(sum(one.weights), 1.0)
    assert cut(trajectory, 1, "equal")[0].weights == (0.25,) * 4


# ---- automatic segments ----


def _statistics(places: list[float]) -> Tensor:
    return torch.tensor(places, dtype=torch.float64)[:, None] * torch.ones(1, 3).double()


@pytest.mark.parametrize(
    ("places", "penalty", "cuts"),
    [
        ([0, 0, 0, 5, 5, 5], 0.1, (30,)),
        ([0, 0, 0, 0, 0, 0], 0.1, ()),
        ([0, 5, 5, 9, 9, 9], 0.1, (10, 30)),
        ([0, 5, 5, 9, 9, 9], 1e9, ()),
        ([0, 1, 2, 3, 4, 5], 0.0, (10, 20, 30, 40, 50)),
    ],
)
def test_cuts_stand_where_the_statistics_jump(
    tmp_path: Path, places: list[float], penalty: float, cuts: tuple[int, ...]
) -> None:
    trajectory = trajectory_of(tmp_path, perturbed_states(mlp(), 6), N)
    assert segmentation(trajectory, _statistics(places), penalty).cuts == cuts


def test_cuts_are_the_best_of_all_partitions(tmp_path: Path) -> None:
    """Dynamic programming against brute force over every way to cut."""
    trajectory = trajectory_of(tmp_path, perturbed_states(mlp(), 6), N, steps=[2, 5, 9, 20, 50, 60])
    weights = np.array([amount for (amount,) in covered(trajectory, range(6), 0, 60)])
    weights /= weights.sum()
    for seed in range(20):
        rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
        best, chosen = np.inf, ()
        for mask in range(32):
            starts = [0, *(place + 1 for place in range(5) if mask >> place & 1), 6]
            cost = 0.15 * (len(starts) - 1)
            for low, high in pairwise(starts):
                w, x = weights[low:high], rows[low:high]
                mean = (w[:, None] * x).sum(0) / w.sum()
                cost += (w * ((x - mean) ** 2).sum(1)).sum()
            if cost < best - 1e-12:
                best, chosen = cost, tuple(trajectory.steps[s - 1] for s in starts[1:-1])
        assert segmentation(trajectory, torch.from_numpy(rows), 0.15).cuts == chosen


def _jumping(tmp_path: Path) -> tuple[sf.Trajectory, TensorDataset]:
    """Two checkpoints near each other, then a large change, then two more."""
    model = mlp()
    near, far = model.state_dict(), perturbed_states(model, 1, scale=1.5)[0]
    nudged = [{k: v + 0.01 * i for k, v in state.items()} for i, state in enumerate((near, near, far, far))]
    return trajectory_of(tmp_path / "run", nudged, N, lr=0.3), vectors(N)


def test_automatic_segments_cut_at_the_jump_and_explain_themselves(tmp_path: Path) -> None:
    trajectory, train = _jumping(tmp_path)
    query = vectors(QUERIES, seed=5)
    found = {}
    for name, method in {"auto": sf.Source(segments="auto"), "by hand": sf.Source(segments=[20])}.items():
        analyzer = analyzer_of(mlp(), trajectory, tmp_path / name, method=method)
        analyzer.fit(train)
        found[name] = analyzer.score(SOME, train, query, keep=("term",))
    torch.testing.assert_close(found["auto"].values, found["by hand"].values, rtol=1e-10, atol=0)
    [explained] = found["auto"].provenance["segmentation"]
    assert explained["train"]["cuts"] == [20]
    assert np.array(explained["train"]["distances"]).shape == (4, 4)
    assert explained["train"]["penalty"] == 0.1
    segmentation_figure(found["auto"]).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    with pytest.raises(sf.ScoreError, match="segments='auto'"):
        segmentation_figure(found["by hand"])


def test_the_penalty_decides_how_many_segments_there_are(tmp_path: Path) -> None:
    trajectory, train = _jumping(tmp_path)
    for penalty, terms in ((0.0, 4), (1e6, 1)):
        analyzer = analyzer_of(
            mlp(), trajectory, tmp_path / "store", method=sf.Source(segments="auto", penalty=penalty)
        )
        analyzer.fit(train)
        scores = analyzer.score(SOME, train, vectors(QUERIES), keep=("term",))
        assert len(scores.by_term) == terms


def test_automatic_segments_need_fit_first(tmp_path: Path) -> None:
    trajectory, train = _jumping(tmp_path)
    analyzer = analyzer_of(mlp(), trajectory, tmp_path / "store", method=sf.Source(segments="auto"))
    with pytest.raises(sf.StoreError, match=r"no unit 'statistics/step-10'. Run Analyzer.fit\(\)"):
        analyzer.score(SOME, train, vectors(QUERIES))


def test_terms_that_differ_between_runs_have_no_mean(tmp_path: Path) -> None:
    states = perturbed_states(mlp(), 4)
    runs = [trajectory_of(tmp_path / f"{s}", states[:2], N, steps=[s, 2 * s]) for s in (6, 15)]
    analyzer = analyzer_of(mlp(), runs, tmp_path / "store", method=sf.TracIn())
    analyzer.fit(vectors(N))
    assert analyzer.score(SOME, vectors(N), vectors(QUERIES)).spread is not None
    with pytest.raises(sf.ScoreError, match="have different terms"):
        analyzer.score(SOME, vectors(N), vectors(QUERIES), keep=("term",))


def test_one_run_that_is_kept_has_no_spread(tmp_path: Path) -> None:
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 2), N)
    analyzer = analyzer_of(mlp(), trajectory, tmp_path / "store", method=sf.GradientDot())
    scores = analyzer.score(SOME, vectors(N), vectors(QUERIES), keep=("run",))
    assert scores.total().spread is None and list(scores.by_run) == ["run 1"]


def test_statistics_stand_in_the_order_of_the_data_whatever_the_batches(tmp_path: Path) -> None:
    """So that units made with other batch sizes or numbers of ranks can be compared."""
    from segflow.store.files import read_tensors

    trajectory, train = _jumping(tmp_path)
    found = []
    for batch_size in (3, 20):
        store = tmp_path / f"{batch_size}"
        analyzer = analyzer_of(mlp(), trajectory, store, method=sf.Source(segments="auto"))
        analyzer.fit(train, batch_size=batch_size)
        found.append(read_tensors(store / "units" / "statistics" / "step-10.safetensors", None, sf.StoreError))
    for name, rows in found[0].items():
        torch.testing.assert_close(rows, found[1][name], rtol=1e-9, atol=1e-12)
