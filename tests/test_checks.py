"""check() finds what would make scores wrong, names it, and leaves the model untouched."""

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
from torch.utils.data import Subset, TensorDataset

import segflow as sf

from .support.helpers import ConvNet, analyzer_of, images, mlp, trajectory_of, vectors

N = 48


class TaskOf(sf.Task):
    """Classification with any part replaced."""

    def __init__(
        self, train: Any = None, sample: Any = None, measurement: Any = None, tracked: list[str] | None = None
    ):
        self.train, self.sample, self.measurement, self.tracked = train, sample, measurement, tracked

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        loss = self.sample if sample else self.train
        return loss(batch, model) if loss else sf.tasks.Classification().compute_train_loss(batch, model, sample)

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return (self.measurement or sf.tasks.Classification().compute_measurement)(batch, model)

    def get_influence_tracked_modules(self) -> list[str] | None:
        return self.tracked


def _check(
    folder: Path, task: Any, model: nn.Module | None = None, train: Any = None, query: Any = None, **options: Any
) -> sf.analyzer.checks.CheckReport:
    model = mlp() if model is None else model
    train = vectors(N) if train is None else train
    trajectory = trajectory_of(folder / "run", [model.state_dict()], len(train))
    return analyzer_of(model, trajectory, folder / "store", task, method=sf.TracIn()).check(train, query, **options)


def _loss(batch: Any, model: nn.Module, reduction: str = "sum") -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction=reduction)


# ---- faults of the loss ----


def _mean(batch: Any, model: nn.Module) -> Tensor:
    return _loss(batch, model, "mean")


def _noisy(batch: Any, model: nn.Module) -> Tensor:
    return _loss((batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]), model)


def _functional_dropout(batch: Any, model: nn.Module) -> Tensor:
    return _loss((functional.dropout(batch[0], 0.5, training=True), batch[1]), model)


def _squared_sum(batch: Any, model: nn.Module) -> Tensor:
    return _loss(batch, model) ** 2


def _not_a_number(batch: Any, model: nn.Module) -> Tensor:
    return _loss(batch, model) * torch.nan


def _detached(batch: Any, model: nn.Module) -> Tensor:
    return _loss(batch, model).detach()


def _raising(batch: Any, model: nn.Module) -> Tensor:
    _loss(batch, model)
    raise KeyError("user code")


LOSS_FAULTS = {
    "mean": (
        _mean,
        r"TaskOf: the {kind} loss is a mean over the batch: a batch has 0\.(5|498) times .*reduction='sum'",
    ),
    "noise": (_noisy, r"the {kind} loss of one batch was [\d.]+, then [\d.]+\. Something is random: dropout left on"),
    "dropout": (_functional_dropout, "Something is random: dropout left on"),
    "batch": (_squared_sum, r"the {kind} loss of a batch is .* halves' losses add up to .*\(no batch statistics"),
    "nan": (_not_a_number, "the {kind} loss of the first batch is nan, not finite"),
    "detached": (_detached, "the loss does not depend on any tracked layer's output: the task detaches it"),
}


@pytest.mark.parametrize("fault", LOSS_FAULTS)
@pytest.mark.parametrize("kind", ["train", "measurement"])
def test_a_faulty_loss_is_caught_and_named(tmp_path: Path, fault: str, kind: str) -> None:
    loss, text = LOSS_FAULTS[fault]
    task = TaskOf(**{kind: loss})
    with pytest.raises(sf.TaskError, match=text.format(kind=kind)):
        _check(tmp_path, task, query=vectors(9, seed=3))


def test_the_measurement_is_evaluated_only_with_queries(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="user code"):
        _check(tmp_path, TaskOf(measurement=_raising), query=vectors(9, seed=3))
    assert _check(tmp_path, TaskOf(measurement=_raising)).attributed > 0


@pytest.mark.parametrize("n", [2, 3, 5, 15, 16, 48])
def test_a_mean_is_never_passed_whatever_the_length(tmp_path: Path, n: int) -> None:
    with pytest.raises(sf.TaskError, match=r"mean over the batch|halves' losses add up"):
        _check(tmp_path, TaskOf(train=_mean), train=vectors(n))


def test_a_sum_whose_terms_cancel_is_not_mistaken_for_an_interaction(tmp_path: Path) -> None:
    def signed(batch: Any, model: nn.Module) -> Tensor:
        outputs = model(batch[0])[:, 0]
        return (outputs - outputs.detach() + batch[1]).sum()

    half = 1000 * torch.rand(8, generator=torch.Generator().manual_seed(0))
    values = torch.cat([half, 1e-3 - half.flip(0)])  # halves of opposite sign, which float32 rounds
    assert not values.sum().equal(values[:8].sum() + values[8:].sum())
    model, query = mlp(torch.float32), TensorDataset(vectors(16, torch.float32).tensors[0], values)
    report = _check(tmp_path, TaskOf(measurement=signed), model, vectors(N, torch.float32), query)
    assert report.attributed > 0


class Regularised(nn.Module):
    """Linear layers around a module whose mode matters."""

    def __init__(self, middle: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.head = nn.Linear(5, 6), middle, nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(self.first(x))))


def _in_train_mode(batch: Any, model: nn.Module) -> Tensor:
    model.train()
    return _loss(batch, model)


def test_dropout_left_on_by_the_task_is_caught(tmp_path: Path) -> None:
    with pytest.raises(sf.TaskError, match="Something is random: dropout left on, or noise in the task"):
        _check(tmp_path, TaskOf(train=_in_train_mode), Regularised(nn.Dropout(0.5)))


def test_batch_norm_in_train_mode_inside_the_task_is_caught(tmp_path: Path) -> None:
    with pytest.raises(sf.TaskError, match=r"changes the buffer 'middle\.running_mean' although .* eval mode"):
        _check(tmp_path, TaskOf(train=_in_train_mode), Regularised(nn.BatchNorm1d(6)))
    with pytest.raises(sf.TaskError, match=r"examples that do not interact \(no batch statistics\)"):
        _check(tmp_path, TaskOf(train=_in_train_mode), Regularised(nn.BatchNorm1d(6, track_running_stats=False)))


@pytest.mark.parametrize("middle", [nn.Dropout(0.5), nn.BatchNorm1d(6)])
def test_dropout_and_batch_norm_in_eval_mode_are_in_order(tmp_path: Path, middle: nn.Module) -> None:
    report = _check(tmp_path, TaskOf(), Regularised(middle).train())
    assert report.curvature.factor == pytest.approx(1, abs=3 * report.curvature.error)


class Branches(nn.Module):
    def __init__(self, used: str):
        super().__init__()
        torch.manual_seed(0)
        self.main, self.side, self.used = nn.Linear(5, 3), nn.Linear(5, 3), used
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        side = self.side(x) if self.used != "no" else None
        return self.main(x) + 0 * side.detach() if self.used == "detached" else self.main(x)


@pytest.mark.parametrize(
    ("used", "text"),
    [
        ("no", "layer 'side': never reached by the train loss's forward. Leave it out with get_influence"),
        ("detached", r"check, train loss, checkpoint at step 10: layer 'side' was never reached: no batch's loss"),
    ],
)
def test_a_layer_that_is_never_reached_is_named_and_may_be_left_out(tmp_path: Path, used: str, text: str) -> None:
    with pytest.raises(sf.LayerError, match=text):
        _check(tmp_path, TaskOf(), Branches(used))
    report = _check(tmp_path, TaskOf(tracked=["main"]), Branches(used))
    assert "not attributed: side: not among the tracked modules that the task names" in str(report)


def test_a_measurement_may_leave_layers_out(tmp_path: Path) -> None:
    def of_main_alone(batch: Any, model: Any) -> Tensor:
        return functional.cross_entropy(model.main(batch[0]), batch[1], reduction="sum")

    def of_both(batch: Any, model: Any) -> Tensor:
        return functional.cross_entropy(model.main(batch[0]) + model.side(batch[0]), batch[1], reduction="sum")

    task = TaskOf(of_both, of_both, of_main_alone)
    assert _check(tmp_path, task, Branches("no")).attributed == 36
    assert _check(tmp_path, task, Branches("no"), query=vectors(4)).attributed == 36


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (torch.nan, sf.TaskError, "loss of the batch of 16 examples from 32 to 47 is not finite"),
        (
            torch.inf,
            sf.LayerError,
            "gradient or input of layer '0' of the batch of 16 examples from 32 to 47 is not finite",
        ),  # tanh hides it
    ],
)
def test_an_input_that_is_not_finite_is_named(tmp_path: Path, value: float, error: type[Exception], text: str) -> None:
    inputs, labels = vectors(N).tensors
    inputs = inputs.clone()
    inputs[40, 2] = value
    with pytest.raises(error, match=f"check, train loss, checkpoint at step 10: the {text}"):
        _check(tmp_path, TaskOf(), train=TensorDataset(inputs, labels))


# ---- the scale of sample=True ----


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
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_sampled_loss_has_factor_one(tmp_path: Path, name: str) -> None:
    task, model, train = RIGHT[name]()
    curvature = _check(tmp_path, task, model, train).curvature
    assert curvature.factor is not None
    assert 0 < curvature.error < 0.1
    assert abs(curvature.factor - 1) < 3 * curvature.error


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
        _check(tmp_path, task, model, train)
    text = str(caught.value)
    measured, error = map(float, re.findall(r"sample=True: ([\d.]+) \+- ([\d.]+) times", text)[0])
    assert abs(measured - factor) < 3 * error + 0.01 * factor
    fix = float(re.findall(r"Multiply the sampled loss by ([\d.]+),", text)[0])
    assert fix == pytest.approx(factor**-0.5, rel=0.1)
    report = _check(tmp_path, task, model, train, curvature_tolerance=1.2 * max(factor, 1 / factor))
    assert report.curvature.factor == pytest.approx(measured, rel=0.01), "the option accepts it, and the check repeats"


def test_the_fix_named_by_the_error_is_right(tmp_path: Path) -> None:
    with pytest.raises(sf.TaskError) as caught:
        _check(tmp_path, Tokens(1.0), Attention(), _sequences())
    fix = float(re.findall(r"Multiply the sampled loss by ([\d.]+),", str(caught.value))[0])
    curvature = _check(tmp_path, Tokens(fix), Attention(), _sequences()).curvature
    assert curvature.factor == pytest.approx(1, abs=0.02)


def test_a_tighter_tolerance_refuses_a_slightly_wrong_scale(tmp_path: Path) -> None:
    task = Tokens(0.5 * 1.2**0.5)
    assert _check(tmp_path, task, Attention(), _sequences()).curvature.factor == pytest.approx(1.2, rel=0.1)
    with pytest.raises(sf.TaskError, match="times the exact Gauss-Newton"):
        _check(tmp_path, task, Attention(), _sequences(), curvature_tolerance=1.01)


@pytest.mark.parametrize("tolerance", [0.0, 0.9, float("nan")])
def test_a_tolerance_below_one_is_refused(tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(sf.TaskError, match=f"curvature_tolerance={tolerance}: expected a number, at least 1"):
        _check(tmp_path, TaskOf(), curvature_tolerance=tolerance)


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
    report = _check(tmp_path_factory.mktemp("plain"), TaskOf(), Wrapped(OUTPUTS["tensor"][0]))
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

    report = _check(tmp_path, TaskOf(loss, lambda b, m: loss(b, m, True), loss), Wrapped(wrap), query=vectors(5))
    assert report.curvature.factor == pytest.approx(plain_factor, rel=1e-9)
    assert report.curvature.factor == pytest.approx(1, abs=3 * report.curvature.error)


def test_a_task_may_change_the_outputs_in_place(tmp_path: Path) -> None:
    def loss(batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(batch[0])
        logits.mul_(3.0)
        return sf.tasks.Classification().compute_train_loss((logits, batch[1]), nn.Identity(), sample)

    report = _check(tmp_path, TaskOf(loss, lambda b, m: loss(b, m, True), loss))
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

    report = _check(tmp_path, TaskOf(loss, lambda b, m: loss(b, m, True), loss), Wrapped(lambda h, z: (h, z)))
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


def _past_the_model(batch: Any, model: Any) -> Tensor:
    return functional.cross_entropy(model[2:](model[:2](batch[0])), batch[1], reduction="sum")


@pytest.mark.parametrize(
    ("task", "model", "note"),
    [
        (TaskOf(train=_linear_loss), None, "the loss has no curvature in any tensor that the model returned"),
        (TaskOf(_past_the_model), None, "the loss has no curvature in any tensor that the model returned"),
        (TaskOf(), Once(), "no second derivatives: "),
    ],
    ids=["linear", "parts of the model called alone", "not twice differentiable"],
)
def test_a_curvature_that_cannot_be_measured_is_said(
    tmp_path: Path, task: sf.Task, model: nn.Module | None, note: str
) -> None:
    report = _check(tmp_path, task, model)
    assert report.curvature.factor is None
    assert re.search(rf"curvature of sample=True: not measured \({note}", str(report))


# ---- the report, the trajectory, and the model afterwards ----


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x))) * self.scale


def test_the_report_says_what_share_is_attributed_and_why_the_rest_is_not(tmp_path: Path) -> None:
    report = _check(tmp_path, sf.tasks.Classification(), Mixed())
    assert (report.attributed, report.parameters) == (57, 72)
    lines = str(report).splitlines()
    assert lines[0] == "attributed: 57 of 72 parameters (79.2%)"
    assert lines[1:3] == [
        "not attributed: the model itself: Mixed is not supported",
        "not attributed: norm: LayerNorm is not supported",
    ]
    assert lines[3] == "seen in training: sampling: uniform, as is assumed"
    assert "every tracked layer is reached" in lines[4]
    assert re.fullmatch(r"curvature of sample=True: [\d.]+ \+- [\d.]+ times the exact Gauss-Newton curvature", lines[5])


def test_the_check_does_not_depend_on_the_random_state_and_leaves_it(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = _check(tmp_path, TaskOf()).curvature
    torch.manual_seed(2)
    state = torch.get_rng_state()
    model = mlp()
    torch.set_rng_state(state)
    assert _check(tmp_path, TaskOf(), model).curvature == first
    assert torch.get_rng_state().equal(state)


def test_a_trajectory_of_another_model_is_refused(tmp_path: Path) -> None:
    trajectory = trajectory_of(tmp_path / "run", [mlp().state_dict(), ConvNet().state_dict()], N)
    analyzer = analyzer_of(mlp(), trajectory, tmp_path / "store", TaskOf(), method=sf.TracIn())
    with pytest.raises(sf.TrajectoryError, match=r"checkpoint at step 20 \(state-1.*\) is of another model"):
        analyzer.check(vectors(N))


def test_a_training_set_of_another_length_is_refused(tmp_path: Path) -> None:
    trajectory = trajectory_of(tmp_path / "run", [mlp().state_dict()], N)
    analyzer = analyzer_of(mlp(), trajectory, tmp_path / "store", TaskOf(), method=sf.TracIn())
    with pytest.raises(sf.TrajectoryError, match=f"has {N - 1} examples, but .* dataset_size={N}"):
        analyzer.check(Subset(vectors(N), range(N - 1)))


@pytest.mark.parametrize(
    ("task", "error"),
    [
        (TaskOf(), None),
        (TaskOf(sample=_raising), KeyError),
        (TaskOf(train=_raising), KeyError),
        (TaskOf(train=_in_train_mode), sf.TaskError),
    ],
)
def test_check_leaves_the_model_untouched(tmp_path: Path, task: sf.Task, error: type[Exception] | None) -> None:
    model = Regularised(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.3)))
    trajectory = trajectory_of(tmp_path / "run", [Regularised(model.middle).state_dict()], N)
    model.train()
    model.first.eval()
    model.head.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    with torch.no_grad():
        model.first.weight.add_(1.0)

    def snapshot() -> tuple:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
        return (
            {name: value.clone() for name, value in model.state_dict().items()},
            [module.training for module in model.modules()],
            [(id(p), p.requires_grad, None if p.grad is None else p.grad.sum().item()) for p in model.parameters()],
            hooks,
        )

    before = snapshot()
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", task, method=sf.TracIn())
    if error is None:
        analyzer.check(vectors(N))
    else:
        with pytest.raises(error):
            analyzer.check(vectors(N))
    after = snapshot()
    assert before[1:] == after[1:]
    assert sum(after[3]) == 0
    assert all(before[0][name].equal(after[0][name]) for name in before[0])
