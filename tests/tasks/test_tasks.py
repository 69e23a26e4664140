"""Tasks: losses are sums, measurements follow their formulas, and sample=True has the exact curvature."""

from __future__ import annotations

import itertools
import math
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from kronfluence.task import Task as KronfluenceTask
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.tasks.task import summed_loss

from ..support import oracles
from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

Classification, Regression = sf.tasks.Classification, sf.tasks.Regression


def _batch(n: int = 6) -> tuple[Tensor, Tensor]:
    inputs, labels = vectors(n).tensors
    return inputs, labels


def _regression(n: int = 6, outputs: int = 3) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    return model, (_batch(n)[0], torch.randn(n, outputs, dtype=torch.float64))


# ---- sums and formulas ----


@pytest.mark.parametrize("kind", ["train", "measurement"])
@pytest.mark.parametrize(
    "task",
    [*(Classification(m) for m in ("loss", "margin", "log_probability"))]
    + [Regression(r, m) for r in ("sum", "mean") for m in ("loss", "prediction")],
    ids=lambda task: (
        f"{type(task).__name__}-{task.measurement}-{getattr(task, 'reduction', '')}"
        if isinstance(task, sf.Task)
        else None
    ),
)
def test_losses_are_sums_over_the_batch(task: sf.Task, kind: str) -> None:
    model, batch = (mlp(), _batch()) if isinstance(task, Classification) else _regression()
    whole = summed_loss(task, batch, model, kind=kind)
    each = [summed_loss(task, [side[i : i + 1] for side in batch], model, kind=kind) for i in range(6)]
    assert whole.shape == ()
    torch.testing.assert_close(whole, torch.stack(each).sum(), rtol=1e-12, atol=1e-12)


def test_classification_follows_its_formulas() -> None:
    model, (inputs, labels) = mlp(), _batch()
    probabilities = [row[label].item() for row, label in zip(model(inputs).softmax(1), labels, strict=True)]
    formulas = {
        "loss": sum(-math.log(p) for p in probabilities),
        "log_probability": sum(math.log(p) for p in probabilities),
        "margin": sum(math.log(p) - math.log(1 - p) for p in probabilities),
    }
    for measurement, expected in formulas.items():
        task = Classification(measurement)
        assert task.compute_measurement((inputs, labels), model).item() == pytest.approx(expected, rel=1e-12)
        assert task.compute_train_loss((inputs, labels), model).item() == pytest.approx(formulas["loss"], rel=1e-12)


def test_the_margin_is_finite_where_the_probability_rounds_to_one() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0]])
    margin = Classification("margin").compute_measurement((logits, torch.tensor([0])), nn.Identity())
    assert margin.item() == pytest.approx(200 - math.log(2))


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_follows_its_formulas(outputs: int) -> None:
    model, (inputs, targets) = _regression(outputs=outputs)
    squares = (model(inputs) - targets).square().sum().item()
    for reduction, weight in (("sum", 1.0), ("mean", 1 / outputs)):
        task = Regression(reduction)
        assert task.compute_train_loss((inputs, targets), model).item() == pytest.approx(weight * squares, rel=1e-12)
        assert task.compute_measurement((inputs, targets), model).item() == pytest.approx(weight * squares, rel=1e-12)
        predicted = Regression(reduction, "prediction").compute_measurement((inputs, targets), model)
        assert predicted.item() == pytest.approx(model(inputs).sum().item(), rel=1e-12)
    mean = functional.mse_loss(model(inputs), targets).item()
    assert Regression().compute_train_loss((inputs, targets), model).item() == pytest.approx(6 * mean, rel=1e-12)


def test_regression_takes_flat_targets_for_one_output_and_casts_them() -> None:
    model, (inputs, targets) = _regression(outputs=1)
    column = Regression().compute_train_loss((inputs, targets), model)
    torch.testing.assert_close(Regression().compute_train_loss((inputs, targets[:, 0]), model), column)
    whole_numbers = targets.round().long()
    rounded = Regression().compute_train_loss((inputs, whole_numbers), model)
    torch.testing.assert_close(rounded, Regression().compute_train_loss((inputs, targets.round()), model))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_any_integer_type_are_taken(dtype: torch.dtype) -> None:
    model, (inputs, labels) = mlp(), _batch()
    for task in (Classification(), Classification("margin")):
        torch.testing.assert_close(
            task.compute_measurement((inputs, labels.to(dtype)), model),
            task.compute_measurement((inputs, labels), model),
        )


@pytest.mark.parametrize("mapping", [dict, UserDict])
def test_mapping_batches_are_read_by_the_names_given(mapping: Any) -> None:
    model, (inputs, labels) = mlp(), _batch()
    expected = Classification().compute_train_loss((inputs, labels), model)
    found = Classification().compute_train_loss(mapping(inputs=inputs, labels=labels), model)
    assert found.equal(expected)
    renamed = Classification(inputs="pixels", targets="y")
    assert renamed.compute_train_loss(mapping(pixels=inputs, y=labels, extra=0), model).equal(expected)
    model, (inputs, targets) = _regression()
    named = Regression(inputs="x", targets="y").compute_train_loss(mapping(x=inputs, y=targets), model)
    assert named.equal(Regression().compute_train_loss((inputs, targets), model))


# ---- the curvature of sample=True ----


def _gradient(task: sf.Task, batch: Any, model: nn.Module) -> Tensor:
    gradients = torch.autograd.grad(task.compute_train_loss(batch, model, sample=True), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def _exact(task: sf.Task, inputs: Tensor, targets: Tensor, model: nn.Module) -> Tensor:
    """Gauss-Newton matrix of the task's own training loss."""

    def loss(outputs: Tensor) -> Tensor:
        return task.compute_train_loss((outputs, targets), nn.Identity())

    return oracles.gauss_newton(model, list(model.parameters()), lambda: model(inputs), loss)


def test_drawn_labels_have_the_exact_curvature_by_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    task, model, (inputs, labels) = Classification(), mlp(), _batch(4)
    moment = 0
    for example in range(4):
        one = (inputs[[example]], labels[[example]])
        chances = model(one[0]).detach().softmax(1)[0]
        for label in range(3):

            def draw(weights: Tensor, count: int, label: int = label, chances: Tensor = chances) -> Tensor:
                assert count == 1
                torch.testing.assert_close(weights.double()[0], chances, rtol=1e-5, atol=1e-6)
                return torch.full((1, 1), label)

            monkeypatch.setattr(torch, "multinomial", draw)
            moment = moment + chances[label] * (g := _gradient(task, one, model))[:, None] * g
    torch.testing.assert_close(moment, _exact(task, inputs, labels, model), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_drawn_noise_has_the_exact_curvature_by_enumeration(
    reduction: str, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Regression(reduction)
    model, (inputs, targets) = _regression(4, outputs)
    moment = 0
    signs = list(itertools.product((-1.0, 1.0), repeat=outputs))  # they have the normal distribution's second moment
    for example in range(4):
        for sign in signs:
            noise = torch.tensor([sign], dtype=torch.float64)
            monkeypatch.setattr(torch, "randn_like", lambda like, noise=noise: noise.reshape(like.shape))
            g = _gradient(task, (inputs[[example]], targets[[example]]), model)
            moment = moment + g[:, None] * g / len(signs)
    torch.testing.assert_close(moment, _exact(task, inputs, targets, model), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("task", [Classification(), Regression("sum"), Regression("mean")])
def test_drawn_losses_have_the_exact_curvature_by_monte_carlo(task: sf.Task) -> None:
    """Nothing is patched here: many copies of one example are drawn at once, along random directions."""
    model, (inputs, targets) = _regression(1) if isinstance(task, Regression) else (mlp(), _batch(1))
    draws = 4000
    exact = _exact(task, inputs, targets, model)
    copies = (inputs.repeat(draws, 1), targets.repeat(draws, *[1] * (targets.ndim - 1)))
    torch.manual_seed(3)
    parameters = list(model.parameters())
    v = torch.randn(len(exact), dtype=torch.float64)
    rows = [torch.autograd.grad(output, parameters, retain_graph=True) for output in model(inputs)[0]]
    pushed = torch.stack([torch.cat([g.flatten() for g in row]) @ v for row in rows])
    outputs = model(copies[0])
    leaf = outputs.detach().requires_grad_()
    loss = task.compute_train_loss((leaf, copies[1]), nn.Identity(), sample=True)
    squares = (torch.autograd.grad(loss, leaf)[0] * pushed).sum(1).square()
    error = squares.std() / draws**0.5
    assert 0 < error < 0.05 * squares.mean()
    assert (squares.mean() - v @ exact @ v).abs() < 4 * error


def test_sampled_losses_ignore_the_given_targets_and_vary() -> None:
    for task, (model, (inputs, targets)) in (
        (Classification(), (mlp(), _batch(40))),
        (Regression(), _regression(40)),
    ):
        drawn = []
        for seed, given in ((0, targets), (0, targets.flip(0)), (1, targets)):
            torch.manual_seed(seed)
            drawn.append(task.compute_train_loss((inputs, given), model, sample=True).item())
        assert drawn[0] == drawn[1] != drawn[2]


# ---- errors ----


def _dictionary(x: Tensor) -> dict[str, Tensor]:
    return {"scores": x}


class _Returning(nn.Module):
    def __init__(self, change: Any):
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(x)


X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
FAULTS = {
    "measurement": (
        lambda: Classification("accuracy"),
        r"measurement='accuracy' is not known\. Choose one of: 'log_probability', 'loss', 'margin'",
    ),
    "regression measurement": (lambda: Regression(measurement="margin"), "Choose one of: 'loss', 'prediction'"),
    "reduction": (lambda: Regression("none"), r"reduction='none' is not known\. Choose one of: 'mean', 'sum'"),
    "three parts": (
        lambda: Classification().compute_train_loss((X, Y, Y), nn.Identity()),
        r"expected a batch \(inputs, targets\) or a mapping, found tuple",
    ),
    "a tensor": (lambda: Regression().compute_measurement(X, nn.Identity()), "found Tensor"),
    "missing key": (
        lambda: Classification().compute_train_loss({"x": X, "labels": Y}, nn.Linear(3, 3)),
        r"the model's forward takes \['input'\], and the batch has \['labels', 'x'\]\. Say what it is given: inputs=",
    ),
    "missing named key": (
        lambda: Classification(inputs="z").compute_train_loss({"x": X, "labels": Y}, nn.Identity()),
        r"the batch has no 'z', only \['labels', 'x'\]\. Give its key in the task: inputs=",
    ),
    "token logits": (
        lambda: Classification().compute_train_loss((X[None], Y[None]), nn.Identity()),
        r"expected logits \[B, C\] and labels \[B\], found \(1, 4, 3\) and \(1, 4\)",
    ),
    "one-hot labels": (
        lambda: Classification().compute_train_loss((X, X), nn.Identity()),
        r"found \(4, 3\) and \(4, 3\)\. Take MultiLabel for several labels of an example",
    ),
    "float labels": (
        lambda: Classification().compute_train_loss((X, Y.float()), nn.Identity()),
        "expected integer labels, found torch.float32",
    ),
    "mapping output": (
        lambda: Classification().compute_train_loss((X, Y), _Returning(_dictionary)),
        "Classification: expected the model to return logits .*, found dict with",
    ),
    "tuple output": (
        lambda: Regression().compute_train_loss((X, X), _Returning(lambda x: [x, x])),
        r"Regression: expected the model to return logits .*, found list of \['Tensor', 'Tensor'\]",
    ),
    "broadcast": (
        lambda: Regression().compute_train_loss((X[:, :1], X[:, 0]), _Returning(lambda x: x[:, 0:1].expand(4, 4))),
        r"predictions and targets of one shape, found \(4, 4\) and \(4,\)",
    ),
    "flat predictions": (
        lambda: Regression().compute_train_loss((X, X[:, :1]), _Returning(lambda x: x[:, 0])),
        r"found \(4,\) and \(4, 1\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_a_task_is_refused_with_what_was_found(fault: str) -> None:
    make, text = FAULTS[fault]
    with pytest.raises(sf.TaskError, match=text):
        make()


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (torch.zeros(4), r"expected one number, the sum over the batch, found a tensor of shape \(4,\)"),
        (1.5, "found float"),
        (torch.tensor(1), r"found a tensor of shape \(\)"),
        (None, "found NoneType"),
    ],
)
@pytest.mark.parametrize(("kind", "name"), [("train", "compute_train_loss"), ("measurement", "compute_measurement")])
def test_a_loss_that_is_not_one_number_is_refused_by_name(returned: Any, text: str, kind: str, name: str) -> None:
    class Odd(sf.Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Any:
            return returned

        def compute_measurement(self, batch: Any, model: nn.Module) -> Any:
            return returned

    with pytest.raises(sf.TaskError, match=rf"Odd\.{name}: .*{text}"):
        summed_loss(Odd(), None, nn.Identity(), kind=kind)


def test_an_object_without_the_methods_is_refused(tmp_path: Path) -> None:
    trajectory = trajectory_of(tmp_path, [mlp().state_dict()], 5)
    with pytest.raises(sf.TaskError, match="object has no method compute_train_loss and no compute_measurement"):
        analyzer_of(mlp(), trajectory, tmp_path / "store", object())


# ---- stores and measurements ----


def test_another_measurement_reuses_the_factors_and_changes_the_scores(tmp_path: Path) -> None:
    model, train, query = mlp(), vectors(20), vectors(3, seed=5)
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 2), 20)
    groups, method = sf.Groups.random(20, 6), sf.Source(segments=1)
    analyzer_of(model, trajectory, tmp_path / "store", Classification(), method=method).fit(train)

    def score(measurement: str) -> Tensor:
        task = Classification(measurement)
        return (
            analyzer_of(model, trajectory, tmp_path / "store", task, method=method).score(groups, train, query).values
        )

    torch.testing.assert_close(score("log_probability"), -score("loss"))
    assert not torch.allclose(score("margin"), score("log_probability"))


def test_another_training_loss_refuses_the_factors(tmp_path: Path) -> None:
    model, (inputs, targets) = _regression(8)
    train = TensorDataset(inputs, targets)
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], 8)
    analyzers = [
        analyzer_of(model, trajectory, tmp_path / "store", Regression(reduction), method=sf.Source(segments=1))
        for reduction in ("mean", "sum")
    ]
    analyzers[0].fit(train)
    for use in (lambda: analyzers[1].fit(train), lambda: analyzers[1].score(sf.Groups.singletons(8), train, train)):
        with pytest.raises(sf.StoreError, match=r"made from something else \(task: .*'mean'.*, now .*'sum'"):
            use()


# ---- Kronfluence ----


class TheirClassification(KronfluenceTask):
    """As in Kronfluence's CIFAR example."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, labels = batch
        logits = model(inputs)
        if not sample:
            return functional.cross_entropy(logits, labels, reduction="sum")
        with torch.no_grad():
            probabilities = torch.nn.functional.softmax(logits.detach(), dim=-1)
            sampled = torch.multinomial(probabilities, num_samples=1).flatten()
        return functional.cross_entropy(logits, sampled, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        inputs, labels = batch
        logits = model(inputs)
        rows = torch.arange(logits.shape[0])
        correct = logits[rows, labels]
        others = logits.clone()
        others[rows, labels] = torch.tensor(-torch.inf, dtype=logits.dtype)
        return -(correct - others.logsumexp(dim=-1)).sum()


class TheirLastLayers(TheirClassification):
    def get_influence_tracked_modules(self) -> list[str]:
        return ["2", "4"]


class TheirPostProcessing(TheirClassification):
    enable_post_process_per_sample_gradient = True

    def post_process_per_sample_gradient(self, module_name: str, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_a_kronfluence_task_runs_unchanged(tmp_path: Path) -> None:
    model, train, query = mlp(), vectors(20), vectors(3, seed=5)
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 2), 20)
    groups, scores = sf.Groups.random(20, 6), {}
    for name, task in (
        ("theirs", TheirClassification()),
        ("ours", Classification("margin")),
        ("last", TheirLastLayers()),
    ):
        analyzer = analyzer_of(model, trajectory, tmp_path / name, task, method=sf.Source(segments=2))
        report = analyzer.check(train, query, curvature=True)
        assert report.curvature.factor == pytest.approx(1, abs=3 * report.curvature.error)
        analyzer.fit(train)
        scores[name] = analyzer.score(groups, train, query, keep=("layer",))
    assert list(scores["last"].by_layer) == ["2", "4"]
    tracin = [
        analyzer_of(model, trajectory, tmp_path / f"t{name}", task, method=sf.TracIn()).score(groups, train, query)
        for name, task in (("theirs", TheirClassification()), ("ours", Classification("margin")))
    ]
    torch.testing.assert_close(tracin[0].values, -tracin[1].values)
    assert (scores["theirs"].values + scores["ours"].values).abs().max() < 0.2 * scores["ours"].values.abs().max()


def test_post_processing_of_per_example_gradients_is_refused(tmp_path: Path) -> None:
    trajectory = trajectory_of(tmp_path, [mlp().state_dict()], 5)
    with pytest.raises(sf.TaskError, match="TheirPostProcessing post-processes per-example gradients, which segflow"):
        analyzer_of(mlp(), trajectory, tmp_path / "store", TheirPostProcessing())
