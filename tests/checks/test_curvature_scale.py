"""The scale of the pseudo-labels' curvature is measured, and a wrong one is refused with the fix."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.checks.directions import random_probes
from segflow.checks.gauss_newton import gauss_newton
from segflow.data.batches import Batch
from segflow.model.observing import observing

from ..support import oracles
from ..support.check_tasks import (
    N,
    TaskOf,
    check,
)
from ..support.exactness import view_of
from ..support.helpers import ConvNet, images, mlp, vectors


class Attention(nn.Module):
    """One attention head over positions, a class for each position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.head = nn.Linear(5, 6), nn.Linear(6, 18), nn.Linear(6, 3)
        self.double()

    def forward(self, x_BSF: Tensor) -> Tensor:
        q, k, v = self.qkv(torch.tanh(self.embed(x_BSF))).chunk(3, -1)
        return self.head(functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class Tokens(sf.Task):
    """A class for each of T tokens, averaged over the tokens; `weight` scales the sampled loss."""

    def __init__(self, weight: float):
        self.weight = weight

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(batch[0]).flatten(0, 1)
        labels = batch[1].flatten()
        if sample:
            labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
        weight = self.weight if sample else 1 / batch[1].shape[1]
        return weight * functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def _sequences(n: int = N, T: int = 4) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, T, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 3, (n, T), generator=generator))


def _flags(labels: int, n: int = N) -> TensorDataset:
    x, _ = vectors(n).tensors
    return TensorDataset(x, (x[:, :labels] > 0).long())


def _targets(n: int = N) -> TensorDataset:
    x = vectors(n).tensors[0]
    return TensorDataset(x, torch.stack([x.sum(1), x.prod(1), x[:, 0]], 1))


def _unit_noise(batch: Any, model: nn.Module) -> Tensor:
    outputs = model(batch[0])
    return (outputs - (outputs + torch.randn_like(outputs)).detach()).square().sum()


class UnitNoise(sf.tasks.Regression):
    """The common mistake: noise of variance 1 under a squared error without the factor 1/2."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return _unit_noise(batch, model) if sample else super().compute_train_loss(batch, model)


RIGHT: dict[str, Callable[[], tuple[Any, nn.Module, Any]]] = {
    "classification": lambda: (sf.tasks.Classification(), mlp(), vectors(N)),
    "float32": lambda: (sf.tasks.Classification(), mlp(torch.float32), vectors(N, torch.float32)),
    "regression, mean": lambda: (sf.tasks.Regression("mean"), mlp(), _targets()),
    "regression, sum": lambda: (sf.tasks.Regression("sum"), mlp(), _targets()),
    "convolutions": lambda: (sf.tasks.Classification(), ConvNet(), images(N)),
    "attention": lambda: (Tokens(0.5), Attention(), _sequences()),
    "sequences": lambda: (sf.tasks.SequenceClassification(label_smoothing=0.2), mlp(), vectors(N)),
    "class weights": lambda: (sf.tasks.Classification(class_weights=[1, 3, 0.5], mean_weight=1.4), mlp(), vectors(N)),
    "several labels": lambda: (sf.tasks.MultiLabel(pos_weight=[1, 3, 0.5]), mlp(), _flags(3)),
    "one logit": lambda: (sf.tasks.Binary(pos_weight=2), nn.Sequential(mlp(), nn.Linear(3, 1).double()), _flags(1)),
    "next words": lambda: (sf.tasks.CausalLM("batch token mean", mean_tokens=3), Attention(), _sequences()),
    "hidden words": lambda: (sf.tasks.MaskedLM(), Attention(), _sequences()),
    "token classes": lambda: (
        sf.tasks.TokenClassification("token sum", class_weights=[1, 3, 0.5], mean_weight=2),
        Attention(),
        _sequences(),
    ),
}
# Of ContrastivePairs the curvature is that in the logit, which embeddings bend: the measurement takes it in these.
PROVED_ELSEWHERE = {sf.tasks.ContrastivePairs}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_sampled_loss_has_factor_one(tmp_path: Path, name: str) -> None:
    task, model, train = RIGHT[name]()
    curvature = check(tmp_path, task, model, train, curvature=True).curvature
    assert curvature.factor is not None
    assert 0 < curvature.error < 0.1
    assert abs(curvature.factor - 1) < 3 * curvature.error


def test_every_ready_made_task_is_among_those_that_were_measured() -> None:
    """Their scale is not measured unless that is asked for; tests/tasks proves it by enumerating labels and noise."""
    measured = {type(make()[0]) for make in RIGHT.values()}
    named = [getattr(sf.tasks, name) for name in sf.tasks.__all__]
    tasks = {task for task in named if isinstance(task, type) and issubclass(task, sf.Task)} - {sf.Task}
    assert tasks - PROVED_ELSEWHERE <= measured


class Halved(sf.tasks.Classification):
    """A task of a user's own, which changes what a ready-made one samples."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return (0.5 if sample else 1.0) * super().compute_train_loss(batch, model, sample)


def test_the_measurement_is_an_option_and_by_default_that_of_a_users_own_tasks(tmp_path: Path) -> None:
    ready = "not measured (segflow's own tests prove it for Classification; curvature=True measures it here)"
    assert ready in str(check(tmp_path, sf.tasks.Classification()))
    assert check(tmp_path, sf.tasks.Classification(), curvature=True).curvature.factor == pytest.approx(1, abs=0.2)
    with pytest.raises(sf.TaskError, match="Halved: the curvature of sample=True"):
        check(tmp_path, Halved())
    assert "curvature of sample=True: not measured (curvature=False)" in str(check(tmp_path, Halved(), curvature=False))


@pytest.mark.parametrize("task", [sf.tasks.Classification(), TaskOf()], ids=["ready made", "own"])
def test_without_the_measurement_it_is_still_tried_whether_sample_is_honoured(tmp_path: Path, task: sf.Task) -> None:
    task.draws_labels = True
    ignoring = TaskOf(sample=lambda batch, model: functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"))
    assert check(tmp_path, task, curvature=False).curvature.factor is None
    with pytest.raises(sf.TaskError, match="gives the same gradients in every draw"):
        check(tmp_path, ignoring, curvature=False)


WRONG: dict[str, tuple[Callable[[], tuple[Any, nn.Module, Any]], float]] = {
    "mean over tokens without the root": (lambda: (Tokens(0.25), Attention(), _sequences()), 1 / 4),
    "sum over tokens": (lambda: (Tokens(1.0), Attention(), _sequences()), 4.0),
    "noise of variance one": (lambda: (UnitNoise("sum"), mlp(), _targets()), 2.0),
    "noise of variance one, mean over outputs": (lambda: (UnitNoise("mean"), mlp(), _targets()), 6.0),
    "real labels' loss, halved": (
        lambda: (
            TaskOf(sample=lambda b, m: 0.5 * sf.tasks.Classification().compute_train_loss(b, m, True)),
            mlp(),
            None,
        ),
        1 / 4,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_sampled_loss_of_another_scale_is_refused_with_its_factor_and_the_fix(tmp_path: Path, name: str) -> None:
    make, factor = WRONG[name]
    task, model, train = make()
    with pytest.raises(sf.TaskError, match=r"times the exact Gauss-Newton curvature\. SOURCE puts") as caught:
        check(tmp_path, task, model, train)
    text = str(caught.value)
    measured, error = map(float, re.findall(r"sample=True: ([\d.]+) \+- ([\d.]+) times", text)[0])
    assert abs(measured - factor) < 3 * error + 0.01 * factor
    fix = float(re.findall(r"Multiply the sampled loss by ([\d.]+),", text)[0])
    assert fix == pytest.approx(factor**-0.5, rel=0.1)
    report = check(tmp_path, task, model, train, curvature_tolerance=1.2 * max(factor, 1 / factor))
    assert report.curvature.factor == pytest.approx(measured, rel=0.01), "the option accepts it, and the check repeats"


def test_the_fix_named_by_the_error_is_right(tmp_path: Path) -> None:
    with pytest.raises(sf.TaskError) as caught:
        check(tmp_path, Tokens(1.0), Attention(), _sequences())
    fix = float(re.findall(r"Multiply the sampled loss by ([\d.]+),", str(caught.value))[0])
    curvature = check(tmp_path, Tokens(fix), Attention(), _sequences()).curvature
    assert curvature.factor == pytest.approx(1, abs=0.02)


def test_a_tighter_tolerance_refuses_a_slightly_wrong_scale(tmp_path: Path) -> None:
    task = Tokens(0.5 * 1.2**0.5)
    assert check(tmp_path, task, Attention(), _sequences()).curvature.factor == pytest.approx(1.2, rel=0.1)
    with pytest.raises(sf.TaskError, match="times the exact Gauss-Newton"):
        check(tmp_path, task, Attention(), _sequences(), curvature_tolerance=1.01)


@pytest.mark.parametrize("tolerance", [0.0, 0.9, float("nan")])
def test_a_tolerance_below_one_is_refused(tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(sf.TaskError, match=f"curvature_tolerance={tolerance}: expected a number, at least 1"):
        check(tmp_path, TaskOf(), curvature_tolerance=tolerance)


@pytest.mark.parametrize("tolerance", [1.02, 1.25, 3.0])
def test_labels_are_drawn_until_the_error_is_a_quarter_of_what_is_allowed(tmp_path: Path, tolerance: float) -> None:
    drawn = []

    class Counted(sf.tasks.Classification):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            drawn.append(sample)
            return super().compute_train_loss(batch, model, sample)

    curvature = check(tmp_path, Counted(), curvature_tolerance=tolerance).curvature
    assert curvature.factor is not None
    if tolerance == 1.02:  # more than are ever made would be needed
        assert sum(drawn) > 128 and curvature.error / curvature.factor > 0.02 / 4
    else:
        assert sum(drawn) < 64 and curvature.error / curvature.factor <= 0.25 / 4


def test_of_long_outputs_fewer_examples_are_measured(tmp_path: Path) -> None:
    sizes: dict[str, set[int]] = {"few": set(), "many": set()}

    class Sized(sf.tasks.Classification):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            if sample:
                sizes["few" if model[-1].out_features == 3 else "many"].add(len(batch[0]))
            return super().compute_train_loss(batch, model, sample)

    def wide(outputs: int) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 2), nn.Linear(2, outputs)).double()

    for outputs in (3, 40_000):
        curvature = check(tmp_path, Sized(), wide(outputs)).curvature
        assert curvature.factor == pytest.approx(1, abs=3 * curvature.error)
    assert sizes == {"few": {1, 8}, "many": {1, 3, 8}}, "probes have 1 and 8"


def test_the_exact_curvature_along_directions_is_that_of_the_whole_matrix() -> None:
    model, data, task = mlp(), vectors(8), sf.tasks.Classification()
    inputs, labels = data.tensors
    with observing(model):
        view = view_of(model, task, data)
    found = gauss_newton(view, Batch(range(8), (inputs, labels)), along := random_probes(view))
    assert found is not None
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    def loss(outputs: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, labels, reduction="sum")

    exact = oracles.gauss_newton(model, list(model.parameters()), lambda: model(inputs), loss)
    directions = [
        torch.cat([part.flatten(1) for part in layer.by_parameter(along[name].gradients(torch.eye(8).double()))], 1)
        for name, layer in view.layers.items()
    ]
    v = torch.cat(directions, 1)
    assert found.curvature == pytest.approx(torch.einsum("ri,ij,rj->", v, exact, v).item(), rel=1e-10)


class Turned(nn.Module):
    """Gives the outputs of an attention head with the positions first, or with all positions of an example in a row."""

    def __init__(self, how: str):
        super().__init__()
        self.model, self.how = Attention(), how

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.model(x)
        return outputs.transpose(0, 1) if self.how == "positions first" else outputs.flatten(0, 1)


@pytest.mark.parametrize("how", ["positions first", "flattened"])
def test_outputs_may_have_their_examples_on_another_axis(tmp_path: Path, how: str) -> None:
    def back(logits: Tensor, n: int) -> Tensor:
        return logits.transpose(0, 1) if how == "positions first" else logits.unflatten(0, (n, -1))

    class OfTurned(Tokens):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return super().compute_train_loss((back(model(batch[0]), len(batch[0])), batch[1]), nn.Identity(), sample)

    plain = check(tmp_path / "plain", Tokens(0.5), Attention(), _sequences()).curvature
    found = check(tmp_path / "turned", OfTurned(0.5), Turned(how), _sequences()).curvature
    assert found.factor is not None and found.factor == pytest.approx(plain.factor, abs=0.3)
    assert found.factor == pytest.approx(1, abs=3 * found.error)


class Output(OrderedDict):
    """A mapping with attributes, as transformers' ModelOutput."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Named(NamedTuple):
    hidden: Tensor
    logits: Tensor


@dataclass
class Plain:
    hidden: Tensor
    logits: Tensor


class Wrapped(nn.Module):
    """Hands its hidden values out along with the logits that it made from them."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.wrap = nn.Linear(5, 6), nn.Linear(6, 3), wrap
        self.double()

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.first(x))
        return self.wrap(hidden, self.head(hidden))


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda h, z: z, lambda out: out),
    "tuple": (lambda h, z: (z, h, 3), lambda out: out[0]),
    "list": (lambda h, z: [h, None, z], lambda out: out[2]),
    "named tuple": (Named, lambda out: out.logits),
    "dict": (lambda h, z: {"hidden": h, "logits": z}, lambda out: out["logits"]),
    "nested": (lambda h, z: {"hidden": (h, h * 2), "out": {"logits": z}}, lambda out: out["out"]["logits"]),
    "mapping with attributes": (lambda h, z: Output(hidden=h, logits=z), lambda out: out.logits),
    "dataclass": (Plain, lambda out: out.logits),
}


@pytest.fixture(scope="module")
def plain_factor(tmp_path_factory: pytest.TempPathFactory) -> float | None:
    """The factor of `Wrapped` where it returns its logits alone."""
    report = check(tmp_path_factory.mktemp("plain"), TaskOf(), Wrapped(OUTPUTS["tensor"][0]))
    return report.curvature.factor


@pytest.mark.parametrize("name", OUTPUTS)
def test_models_may_return_nested_outputs_even_ones_made_from_each_other(
    tmp_path: Path, plain_factor: float, name: str
) -> None:
    wrap, read = OUTPUTS[name]

    def loss(batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return sf.tasks.Classification().compute_train_loss(batch, Reader(model, read), sample)

    class Reader(nn.Module):
        def __init__(self, model: nn.Module, read: Callable[[Any], Tensor]):
            super().__init__()
            self.model, self.read = model, read

        def forward(self, x: Tensor) -> Tensor:
            return self.read(self.model(x))

    report = check(tmp_path, TaskOf(loss, lambda b, m: loss(b, m, True), loss), Wrapped(wrap), query=vectors(5))
    assert report.curvature.factor == pytest.approx(plain_factor, rel=1e-9)
    assert report.curvature.factor == pytest.approx(1, abs=3 * report.curvature.error)


def test_a_task_may_change_the_outputs_in_place(tmp_path: Path) -> None:
    def loss(batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(batch[0])
        logits.mul_(3.0)
        return sf.tasks.Classification().compute_train_loss((logits, batch[1]), nn.Identity(), sample)

    report = check(tmp_path, TaskOf(loss, lambda b, m: loss(b, m, True), loss))
    assert report.curvature.factor == pytest.approx(1, abs=3 * report.curvature.error)


def test_a_loss_of_two_outputs_has_the_curvature_of_both(tmp_path: Path) -> None:
    """Squared errors of the logits and of the hidden values that they are made from, with noise on each."""

    def loss(batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        hidden, logits = model(batch[0])
        total = 0
        for output in (hidden, logits):
            target = output.detach() + 0.5**0.5 * torch.randn_like(output) if sample else torch.ones_like(output)
            total = total + (output - target).square().sum()
        return total

    report = check(tmp_path, TaskOf(loss, lambda b, m: loss(b, m, True), loss), Wrapped(lambda h, z: (h, z)))
    assert report.curvature.factor == pytest.approx(1, abs=3 * report.curvature.error)


class NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slope * (1 - x.tanh() ** 2)


class Once(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return NoSecondDerivative.apply(self.linear(x))


def _linear_loss(batch: Any, model: nn.Module) -> Tensor:
    return model(batch[0]).sum()


def _drawn(logits: Tensor) -> Tensor:
    labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
    return functional.cross_entropy(logits, labels, reduction="sum")


def _past_the_model(batch: Any, model: Any) -> Tensor:
    return functional.cross_entropy(model[2:](model[:2](batch[0])), batch[1], reduction="sum")


@pytest.mark.parametrize(
    ("task", "model", "note"),
    [
        (TaskOf(train=_linear_loss), None, "the loss has no curvature in any tensor that the model returned"),
        (TaskOf(_past_the_model), None, "the loss has no curvature in any tensor that the model returned"),
        (TaskOf(), Once(), "no second derivatives: "),
        (
            TaskOf(sample=lambda b, m: _drawn(m(b[0])) + _drawn(m[2:](m[:2](b[0])))),
            None,
            "with sample=True the loss depends on the parameters in another way",
        ),
        (TaskOf(sample=lambda b, m: _drawn(m(b[0])) + _drawn(m(-b[0]))), None, "with sample=True the model returns 2"),
        (
            TaskOf(sample=lambda b, m: _drawn(m(b[0][:, None]).flatten(0, 1))),
            None,
            "with sample=True the model's outputs have other shapes",
        ),
    ],
    ids=["linear", "parts of the model called alone", "not twice differentiable", "parts", "twice", "rows"],
)
def test_a_curvature_that_cannot_be_measured_is_said(
    tmp_path: Path, task: sf.Task, model: nn.Module | None, note: str
) -> None:
    report = check(tmp_path, task, model)
    assert report.curvature.factor is None
    assert re.search(rf"curvature of sample=True: not measured \({note}", str(report))
