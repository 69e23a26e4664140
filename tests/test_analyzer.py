"""The analyzer as a user meets it: bad input, exceptions in user code, and what it leaves behind."""

from __future__ import annotations

import json
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from segflow.examples import digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf
from segflow import cli

from .support import oracles
from .support.helpers import (
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

N = 12


def _setting(folder: Path, task: Any = None, model: nn.Module | None = None, **options: Any) -> sf.Analyzer:
    model = model or mlp()
    trajectory = trajectory_of(folder / "run", perturbed_states(model, 2), N)
    options = {"method": sf.Source(segments=1), **options}
    return analyzer_of(model, trajectory, folder / "store", task=task, **options)


def _score(analyzer: sf.Analyzer, train: Any = None, query: Any = None, **options: Any) -> sf.Scores:
    groups = sf.Groups.random(N, 5)
    return analyzer.score(groups, train or vectors(N), query or vectors(3, seed=4), **options)


class Failing(FixedLabels):
    """Raises in the chosen loss."""

    def __init__(self, loss: str):
        super().__init__()
        self.loss = loss

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        loss = super().compute_train_loss(batch, model, sample)
        if self.loss == ("sample" if sample else "train") and len(batch[0]) > 3:
            raise ZeroDivisionError("user code")
        return loss

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        if self.loss == "measurement":
            raise ZeroDivisionError("user code")
        return super().compute_measurement(batch, model)


def _snapshot(model: nn.Module) -> Any:
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(p.requires_grad, p.grad is None) for p in model.parameters()],
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        torch.get_rng_state().tolist(),
    )


def _same(first: Any, second: Any) -> bool:
    tensors = all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    return tensors and first[1:] == second[1:]


# What check, fit and score raise when a loss does: scoring looks in vain for what fitting could not make.
RAISES: dict[str, tuple[type[BaseException] | None, ...]] = {
    "sample": (sf.TaskError, sf.TaskError, sf.StoreError),
    "train": (sf.TaskError, sf.TaskError, sf.TaskError),
    "measurement": (sf.TaskError, None, sf.TaskError),
    "none": (None, None, None),
}


@pytest.mark.parametrize("loss", RAISES)
def test_the_model_is_untouched_also_after_an_exception_in_user_code(tmp_path: Path, loss: str) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3)).double()
    model[1].eval()
    next(model[3].parameters()).requires_grad_(False)
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], N)
    good = analyzer_of(model, trajectory, tmp_path / "store", method=sf.InfluenceFunction())
    analyzer = analyzer_of(model, trajectory, tmp_path / "bad", task=Failing(loss), method=sf.InfluenceFunction())
    before = _snapshot(model)
    good.fit(vectors(N))
    actions = (
        lambda: analyzer.check(vectors(N), vectors(3), curvature_tolerance=float("inf")),
        lambda: analyzer.fit(vectors(N)),
        lambda: _score(analyzer),
    )
    for action, raised in zip(actions, RAISES[loss], strict=True):
        with pytest.raises(raised) if raised else nullcontext():
            action()
        assert _same(before, _snapshot(model))


@pytest.mark.parametrize("call", ["check", "fit", "score"])
def test_a_dataset_of_another_length_is_refused(tmp_path: Path, call: str) -> None:
    analyzer = _setting(tmp_path)
    train = vectors(N + 1)
    with pytest.raises(
        sf.TrajectoryError, match=rf"has {N + 1} examples, but the run was recorded with dataset_size={N}"
    ):
        _score(analyzer, train) if call == "score" else getattr(analyzer, call)(train)


def test_scoring_before_fitting_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(sf.StoreError, match=r"no unit 'eigenbasis/steps-10-20-w[0-9a-f]{8}'. Run Analyzer.fit\(\)"):
        _score(_setting(tmp_path))


def test_an_empty_query_set_is_refused_and_a_small_one_is_not(tmp_path: Path) -> None:
    analyzer = _setting(tmp_path)
    analyzer.fit(vectors(N))
    with pytest.raises(sf.TaskError, match="the query dataset is empty"):
        analyzer.score(sf.Groups.random(N, 5), vectors(N), TensorDataset(torch.empty(0, 5), torch.empty(0)))
    many = _score(analyzer, query=vectors(3, seed=4), batch_size=1)
    assert torch.allclose(many.values, _score(analyzer, query=vectors(3, seed=4), batch_size=100).values)


def _broken(place: int, value: float) -> TensorDataset:
    x, y = vectors(N).tensors
    x[place, 2] = value
    return TensorDataset(x, y)


def test_a_non_finite_loss_names_batch_and_checkpoint(tmp_path: Path) -> None:
    analyzer = _setting(tmp_path, task=sf.tasks.Regression("sum", "prediction"), model=nn.Linear(5, 1).double())
    x, _ = _broken(9, float("nan")).tensors
    train = TensorDataset(x, torch.zeros(N, 1).double())
    with pytest.raises(
        sf.TaskError, match=r"covariance pass, checkpoint at step 10: the loss of the batch of .* is not finite"
    ):
        analyzer.fit(train, batch_size=4)


def test_a_non_finite_gradient_names_layer_batch_and_checkpoint(tmp_path: Path) -> None:
    class Kinked(FixedLabels):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            loss = super().compute_train_loss(batch, model, sample)
            kink = (batch[0][:, 2].detach() * 0 + model(batch[0]).sum(1) * 0).clamp_min(0)
            return loss + kink[batch[0][:, 2] > 50].sqrt().sum()  # 0 * infinity at the kink

    with pytest.raises(
        sf.LayerError, match=r"checkpoint at step 10: the gradient or input of layer '4' of the batch of .* is"
    ):
        _setting(tmp_path, task=Kinked()).fit(_broken(5, 99.0), batch_size=4)


def test_a_factor_that_overflows_names_the_layer(tmp_path: Path) -> None:
    model = mlp(torch.float32)
    x, y = vectors(N, torch.float32).tensors
    with pytest.raises(sf.LayerError, match=r"layer '0' of the batch of .* is not finite"):
        _setting(tmp_path, model=model).fit(TensorDataset(x * 1e25, y))


def test_a_layer_that_is_never_reached_is_named(tmp_path: Path) -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(5, 3), nn.Linear(5, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    for call in ("check", "fit"):
        with pytest.raises(sf.LayerError, match="layer 'spare': never reached"):
            getattr(_setting(tmp_path, model=Spare()), call)(vectors(N))


def test_method_options_are_checked() -> None:
    with pytest.raises(sf.MethodError, match=r"damping='strong' is not known. Choose one of: 'heuristic'"):
        sf.InfluenceFunction(damping="strong")
    with pytest.raises(sf.MethodError, match=r"damping=-1\.0"):
        sf.InfluenceFunction(damping=-1.0)
    with pytest.raises(sf.MethodError, match="segments='many'"):
        sf.Source(segments="many")
    for options in ({"preconditioner": "dense"}, {"checkpoint_weights": "late"}, {"penalty": -1.0}):
        with pytest.raises(sf.MethodError, match=next(iter(options))):
            sf.Source(**options)
    with pytest.raises(sf.MethodError, match="curvature='hessian' is not known"):
        sf.InfluenceFunction(curvature="hessian")
    for wrong in (sf.TRAK, sf.ProjectedFisher):
        with pytest.raises(sf.MethodError, match="dimension=0"):
            wrong(dimension=0)
    with pytest.raises(sf.MethodError, match="steps=0"):
        sf.LiSSA(steps=0)
    with pytest.raises(sf.MethodError, match=r"scale=0\.0"):
        sf.LiSSA(scale=0.0)


def test_methods_share_one_store_and_its_passes(tmp_path: Path) -> None:
    model, train = mlp(), vectors(N)
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 2), N)
    analyzer_of(model, trajectory, tmp_path / "store", method=sf.Source(segments=2)).fit(train)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "units").rglob("*.safetensors")}
    influence = analyzer_of(model, trajectory, tmp_path / "store", method=sf.InfluenceFunction())
    influence.fit(train)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "units").rglob("*.safetensors")} == files
    assert _score(influence).provenance["method"] == "InfluenceFunction"


def test_collate_fn_and_mapping_batches(tmp_path: Path) -> None:
    class Named(FixedLabels):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return super().compute_train_loss((batch["x"], batch["y"]), model, sample)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return super().compute_measurement((batch["x"], batch["y"]), model)

    def collate(examples: list[Any]) -> dict[str, Tensor]:
        return {"x": torch.stack([x for x, _ in examples]), "y": torch.stack([y for _, y in examples])}

    plain, named = _setting(tmp_path / "a"), _setting(tmp_path / "b", task=Named(), collate_fn=collate)
    for analyzer in (plain, named):
        analyzer.fit(vectors(N))
    assert torch.equal(_score(plain).values, _score(named).values)


@pytest.mark.parametrize(
    "method", [sf.Source(segments=2), sf.InfluenceFunction(), sf.TracIn()], ids=lambda m: type(m).__name__
)
def test_the_memory_budget_changes_no_number(tmp_path: Path, method: Any) -> None:
    model, train, query = ConvNet(), images(N), images(3, seed=4)
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 2), N)
    groups = sf.Groups.from_lists([[0, 1, 2, 3, 4, 5, 6], [7], [8], [9, 10], [11]], N)
    values = []
    for memory in (1, 30_000, 2 << 30):
        analyzer = analyzer_of(model, trajectory, tmp_path / str(memory), method=method, memory=memory)
        analyzer.fit(train)
        values.append(analyzer.score(groups, train, query, batch_size=4).values)
    torch.testing.assert_close(values[0], values[2], rtol=1e-10, atol=0)
    torch.testing.assert_close(values[1], values[2], rtol=1e-10, atol=0)


def test_progress_bars_show_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _setting(tmp_path / "quiet").fit(vectors(N))
    assert capsys.readouterr().err == ""
    _setting(tmp_path / "loud", progress=True).fit(vectors(N))
    assert "covariance, checkpoint at step 10" in capsys.readouterr().err


def test_the_demo_runs_and_leaves_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"HALVES": 6, "EPOCHS": 6, "STEPS": 96, "QUERIES": 20}.items():
        monkeypatch.setattr(digits, name, value)
    for _ in range(2):  # a second run in the same folder starts over
        arguments = ["demo", "--out", str(tmp_path), "--retrainings", "1", "--processes", "1", "--quiet"]
        assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "attributed: 8,970 of 8,970 trained parameters (100.0%)" in printed
    for method in ("Source", "InfluenceFunction", "TracIn"):
        assert f"\n| `{method}` | " in printed
    written = json.loads((tmp_path / "demo.json").read_text())
    assert digits.table(written) in printed
    assert (tmp_path / "influence.png").read_bytes().startswith(b"\x89PNG")
    assert sf.Scores.load(tmp_path / "scores.safetensors").values.shape == (20, 80)


def test_a_fault_in_the_demo_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise sf.TrajectoryError("no run here")

    monkeypatch.setattr(digits, "main", fail)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "segflow: no run here\n"


def test_a_source_tree_that_is_not_installed_scores_and_says_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    analyzer = _setting(tmp_path)
    analyzer.fit(vectors(N))
    assert _score(analyzer).provenance["segflow"] == sf.__version__


class Data(list):  # type: ignore[type-arg]
    """A plain list as a dataset."""


@pytest.mark.parametrize("place", [0, 1, N // 2, N - 1])
def test_any_relabelled_example_is_seen_when_a_store_is_used_again(tmp_path: Path, place: int) -> None:
    analyzer = _setting(tmp_path)
    train = Data(vectors(N)[index] for index in range(N))
    analyzer.fit(train)
    _score(analyzer, train)
    train[place] = (train[place][0], (train[place][1] + 1) % 3)
    with pytest.raises(sf.StoreError, match=f"example {place} of the training data is not what it was"):
        _score(analyzer, train)
    with pytest.raises(sf.StoreError, match=r"was made from something else .*dataset: examples: stored"):
        _score(_setting(tmp_path), train)


def test_an_undamped_influence_function_ignores_directions_without_curvature(tmp_path: Path) -> None:
    x, y = vectors(N).tensors
    x[:, 3] = 0.0  # an input that is never there
    train = TensorDataset(x, y)
    analyzer = _setting(tmp_path, method=sf.InfluenceFunction(damping=0.0))
    analyzer.fit(train)
    scores = [
        analyzer.score(groups, train, vectors(3, seed=4))
        for groups in (sf.Groups.random(N, 5), sf.Groups.singletons(N))
    ]
    summed = torch.stack([scores[1].values[:, list(m)].sum(1) for m in sf.Groups.random(N, 5).members], 1)
    torch.testing.assert_close(scores[0].values, summed, rtol=1e-8, atol=0)


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_a_weight_used_outside_its_calls_is_attributed_exactly_in_float32(tmp_path: Path, share: float) -> None:
    class Reuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            return self.b(h + share * nn.functional.linear(torch.tanh(h), self.a.weight))

    model, train, query = Reuse(), vectors(N, torch.float32), vectors(3, torch.float32, seed=4)
    analyzer = _setting(tmp_path, model=model, method=sf.GradientDot())
    assert analyzer.check(train).slow == {"a": "example by example, in batches of one"}
    found = analyzer.score(sf.Groups.singletons(N), train, query, keep="layer").by_layer
    analyzer.context.trajectory.load_into(model, 1)
    losses = (
        example_loss(model.double(), vectors(N), FixedLabels()),
        example_loss(model, vectors(3, seed=4), FixedLabels(), "measurement"),
    )
    layers = {"a": model.a, "b": model.b}
    given, asked = (oracles.example_gradients(model, layers, loss, n) for loss, n in zip(losses, (N, 3), strict=True))
    for name, values in found.items():
        expected = asked[name].flatten(1) @ given[name].flatten(1).mT / N
        torch.testing.assert_close(values.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_examples_that_change_places_before_a_layer_are_scored_one_by_one(tmp_path: Path) -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            order = x[:, 0].argsort()
            return self.fc(x[order])[order.argsort()]

    sorting, plain, values = Sorted(), nn.Linear(5, 3).double(), []
    plain.load_state_dict(sorting.fc.state_dict())
    for name, model in (("sorted", sorting), ("plain", plain)):
        analyzer = _setting(tmp_path / name, model=model, method=sf.GradientDot())
        values.append(analyzer.score(sf.Groups.random(N, 4), vectors(N), vectors(3)).values)
        assert bool(analyzer.check(vectors(N), curvature=False).slow) == (name == "sorted")
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-14)


def test_a_task_that_ignores_sample_is_named(tmp_path: Path) -> None:
    task = FixedLabels()
    task.draws_labels = True  # it says so, and draws nothing
    with pytest.raises(sf.TaskError, match="gives the same gradients in every draw"):
        _setting(tmp_path, task).check(vectors(N))
    report = _setting(tmp_path, task).check(vectors(N), curvature_tolerance=float("inf"))
    assert "its pseudo-labels do not vary" in str(report.curvature)
    assert _setting(tmp_path).check(vectors(N), curvature_tolerance=float("inf")).curvature.factor


@pytest.mark.parametrize(
    "mask", [torch.ones(4, 9), {"nowhere": torch.ones(4, 1)}, "all"], ids=["shape", "name", "type"]
)
@pytest.mark.parametrize("call", ["check", "fit"])
def test_an_attention_mask_that_would_be_ignored_is_refused(tmp_path: Path, mask: Any, call: str) -> None:
    class Masked(sf.tasks.Classification):
        def get_attention_mask(self, batch: Any) -> Any:
            return mask

    with pytest.raises(sf.TaskError, match=r"get_attention_mask\(\)"):
        getattr(_setting(tmp_path, task=Masked()), call)(vectors(N))


def test_a_measurement_of_a_hidden_layer_gives_the_layers_behind_it_no_influence(tmp_path: Path) -> None:
    class Hidden(FixedLabels):
        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return model[:2](batch[0]).square().sum()

    analyzer = _setting(tmp_path, task=Hidden(), method=sf.TracIn())
    parts = _score(analyzer, keep=("layer",)).by_layer
    assert parts["0"].abs().min() > 0 and not parts["2"].any() and not parts["4"].any()


def test_arguments_of_another_kind_are_named(tmp_path: Path) -> None:
    good = _setting(tmp_path)
    trajectory, model = good.context.trajectory, good.context.model
    cases: list[tuple[type[Exception], str, tuple[Any, Any], dict[str, Any]]] = [
        (sf.TrajectoryError, "expected a segflow.Trajectory", (FixedLabels(), "run"), {}),
        (
            sf.MethodError,
            r"method='source': expected one of Source\(",
            (FixedLabels(), trajectory),
            {"method": "source"},
        ),
        (sf.MethodError, "expected one of Source", (FixedLabels(), trajectory), {"method": sf.Source}),
        (sf.TaskError, "the task is the class FixedLabels", (FixedLabels, trajectory), {}),
        (
            sf.SegflowError,
            "memory='2GB': expected a whole number, at least 1. It counts bytes",
            (FixedLabels(), trajectory),
            {"memory": "2GB"},
        ),
        (sf.SegflowError, "memory=0", (FixedLabels(), trajectory), {"memory": 0}),
    ]
    for error, text, (task, run), options in cases:
        with pytest.raises(error, match=text):
            sf.Analyzer(model, task, run, store=tmp_path / "s", **options)
    with pytest.raises(sf.GroupError, match="groups is a list: expected segflow"):
        good.score([[0, 1]], vectors(N), vectors(2))  # type: ignore[arg-type]
    known = dict.fromkeys(("0.wieght",), 0)
    with pytest.raises(
        sf.TrajectoryError, match=r"parameter_groups names \['0.wieght'\], which the model does not have"
    ):
        sf.Analyzer(
            model,
            FixedLabels(),
            sf.Trajectory(trajectory.checkpoints, trajectory.steps, 0.1, N, None, known),
            store=tmp_path / "s",
        )
