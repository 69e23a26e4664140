"""What SOURCE takes from each optimizer: its second moments, how far one step goes, and what is known of its options.

Every claim is checked on a live loop under record(), against torch's own optimizer and an independent computation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

import segflow as sf
from segflow.store.files import TensorFile
from segflow.training.optimizers import second_moment

from ..support import oracles
from ..support.helpers import mlp, perturbed_states, trajectory_of

N = 24
Gradients = Callable[[int, nn.Module], Iterator[Tensor]]


def run(folder: Path, optimizer: Optimizer, model: nn.Module, gradients: Gradients, steps: int, **options: Any) -> Any:
    """Train on given gradients instead of losses, under record(); step counts from 1."""
    options = {"dataset_size": N, "total_steps": steps, "checkpoints": 2, **options}
    with sf.record(model, optimizer, folder, **options):
        for step in range(1, steps + 1):
            for parameter, gradient in zip(model.parameters(), gradients(step, model), strict=True):
                parameter.grad = gradient
            optimizer.step()
    return sf.Trajectory.load(folder)


def random_gradients(step: int, model: nn.Module) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        yield torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


# Second moments against a computation from the gradients alone


def moments_of_adam(gradients: list[Tensor], beta2: float, amsgrad: bool = False) -> Tensor:
    """v_hat by its definition: a weighted sum of squares; amsgrad: the largest such sum so far."""
    sums = [
        sum((1 - beta2) * beta2 ** (step - past) * gradients[past].square() for past in range(step + 1))
        for step in range(len(gradients))
    ]
    raw = torch.stack(sums).amax(0) if amsgrad else sums[-1]
    return raw / (1 - beta2 ** len(gradients))


def moments_of_rmsprop(gradients: list[Tensor], alpha: float, centered: bool = False) -> Tensor:
    count = len(gradients)
    weights = [(1 - alpha) * alpha ** (count - 1 - past) for past in range(count)]
    square = sum(w * g.square() for w, g in zip(weights, gradients, strict=True))
    mean = sum(w * g for w, g in zip(weights, gradients, strict=True))
    return square - mean.square() if centered else square


VARIANTS: dict[str, tuple[Callable[[Any], Optimizer], Callable[[list[Tensor]], Tensor], float]] = {
    "Adam": (lambda p: Adam(p, lr=0.01, betas=(0.8, 0.7)), lambda g: moments_of_adam(g, 0.7), 1e-8),
    "Adam, eps": (lambda p: Adam(p, lr=0.01, eps=0.3), lambda g: moments_of_adam(g, 0.999), 0.3),
    "Adam, amsgrad": (
        lambda p: Adam(p, lr=0.01, betas=(0.8, 0.3), amsgrad=True),
        lambda g: moments_of_adam(g, 0.3, amsgrad=True),
        1e-8,
    ),
    "Adam, foreach, maximize": (
        lambda p: Adam(p, lr=0.01, betas=(0.8, 0.7), foreach=True, maximize=True),
        lambda g: moments_of_adam(g, 0.7),
        1e-8,
    ),
    "Adam, tensors": (
        lambda p: Adam(p, lr=torch.tensor(0.01), betas=(0.8, 0.7), foreach=False),
        lambda g: moments_of_adam(g, 0.7),
        1e-8,
    ),
    "AdamW, decay": (
        lambda p: AdamW(p, lr=0.01, betas=(0.8, 0.7), weight_decay=0.3),
        lambda g: moments_of_adam(g, 0.7),
        1e-8,
    ),
    "AdamW, fused, amsgrad": (
        lambda p: AdamW(p, lr=0.01, betas=(0.8, 0.3), fused=True, amsgrad=True),
        lambda g: moments_of_adam(g, 0.3, amsgrad=True),
        1e-8,
    ),
    "RMSprop": (lambda p: RMSprop(p, lr=0.01, alpha=0.6), lambda g: moments_of_rmsprop(g, 0.6), 1e-8),
    "RMSprop, centered": (
        lambda p: RMSprop(p, lr=0.01, alpha=0.6, centered=True, momentum=0.5, eps=0.01),
        lambda g: moments_of_rmsprop(g, 0.6, centered=True),
        0.01,
    ),
    "Adagrad": (lambda p: Adagrad(p, lr=0.01), lambda g: torch.stack(g).square().sum(0), 1e-10),
    "Adagrad, accumulator": (
        lambda p: Adagrad(p, lr=0.01, lr_decay=0.1, initial_accumulator_value=0.4, eps=0.1),
        lambda g: 0.4 + torch.stack(g).square().sum(0),
        0.1,
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_second_moments_are_those_of_the_gradients_by_definition(tmp_path: Path, name: str) -> None:
    make, moments_of, eps = VARIANTS[name]
    model = mlp()
    found = run(tmp_path, make(model.parameters()), model, random_gradients, 9)
    assert found.preconditioned and found.steps == (4, 9) and found.eps == (eps,)
    for index, steps in enumerate(found.steps):
        past = [list(random_gradients(step, model)) for step in range(1, steps + 1)]
        moments = found.second_moments(index)
        assert moments.keys() == found.saved_moments(index) == dict(model.named_parameters()).keys()
        for place, (parameter, _) in enumerate(model.named_parameters()):
            expected = moments_of([gradients[place] for gradients in past])
            torch.testing.assert_close(moments[parameter], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("make", [SGD, NAdam])
def test_what_is_not_preconditioned_or_not_known_saves_no_second_moments(tmp_path: Path, make: Any) -> None:
    model = mlp()
    found = run(tmp_path, make(model.parameters(), lr=0.01), model, random_gradients, 4)
    assert not found.preconditioned and found.second_moments(1) is None and found.saved_moments(1) is None
    assert all(name.startswith("model.") for name in load_file(found.checkpoints[-1]))


def test_each_parameter_is_corrected_by_its_own_count_of_steps(tmp_path: Path) -> None:
    model = mlp()

    def gradients(step: int, model: nn.Module) -> Iterator[Any]:
        for place, parameter in enumerate(model.parameters()):
            yield None if (place == 0 and step < 4) or place == 1 else torch.ones_like(parameter)

    found = run(tmp_path, Adam(model.parameters(), lr=0.01), model, gradients, 6, checkpoints=[3])
    moments = found.second_moments(1)
    assert "0.weight" not in found.second_moments(0) and "0.bias" not in moments
    for name in ("0.weight", "2.weight"):  # three and six steps with gradients of 1
        torch.testing.assert_close(moments[name], torch.ones_like(moments[name]), rtol=1e-12, atol=0)


def test_a_parameter_without_a_gradient_so_far_has_no_second_moments_though_adagrad_starts_with_some(
    tmp_path: Path,
) -> None:
    def gradients(step: int, model: nn.Module) -> Iterator[Any]:
        yield from [None, *list(random_gradients(step, model))[1:]]

    model = mlp()
    optimizer = Adagrad(model.parameters(), initial_accumulator_value=0.5)
    moments = run(tmp_path, optimizer, model, gradients, 4).second_moments(1)
    assert moments.keys() == {name for name, _ in model.named_parameters()} - {"0.weight"}


def test_a_checkpoint_with_second_moments_is_still_the_models_and_names_no_optimizer_state(tmp_path: Path) -> None:
    model = mlp()
    found = run(tmp_path, Adam(model.parameters(), lr=0.01), model, random_gradients, 4)
    names = [name for name, _ in model.named_parameters()]
    expected = {f"model.{name}" for name in names} | {f"second_moment.{name}" for name in names}
    assert set(load_file(found.checkpoints[-1])) == expected
    other = mlp(seed=5)
    found.load_into(other, 1)
    assert all(map(torch.equal, other.parameters(), model.parameters()))


# A linear loss: once moments are at their fixed point, theta moves by -lr_steps * P * g


def slope(_: int, model: nn.Module) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        yield torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def alternating(step: int, model: nn.Module) -> Iterator[Tensor]:
    """The slope plus a swing that averages out, for centered RMSprop, whose P has no limit without one."""
    for gradient in slope(step, model):
        yield gradient + (-1) ** step * 2


LINEAR: dict[str, tuple[Callable[[Any], Optimizer], Gradients, float]] = {
    "SGD": (lambda p: SGD(p, lr=0.01), slope, 1e-9),
    "SGD, momentum, dampening": (lambda p: SGD(p, lr=0.01, momentum=0.5, dampening=0.3), slope, 1e-9),
    "SGD, nesterov, foreach": (lambda p: SGD(p, lr=0.01, momentum=0.5, nesterov=True, foreach=True), slope, 1e-9),
    "SGD, fused": (lambda p: SGD(p, lr=0.01, momentum=0.5, fused=True), slope, 1e-9),
    "Adam": (lambda p: Adam(p, lr=0.01, betas=(0.6, 0.9), eps=0.2), slope, 1e-9),
    "Adam, early": (lambda p: Adam(p, lr=0.01, betas=(0.6, 0.9999)), slope, 1e-9),  # the fixed point from step 1
    "AdamW, amsgrad": (lambda p: AdamW(p, lr=0.01, betas=(0.6, 0.9), amsgrad=True, weight_decay=0), slope, 1e-9),
    "RMSprop": (lambda p: RMSprop(p, lr=0.01, alpha=0.9, eps=0.2), slope, 1e-9),
    "RMSprop, momentum": (lambda p: RMSprop(p, lr=0.01, alpha=0.9, momentum=0.6), slope, 1e-9),
    "RMSprop, centered": (lambda p: RMSprop(p, lr=0.01, alpha=0.99, centered=True, eps=0.3), alternating, 2e-3),
    "Adagrad": (lambda p: Adagrad(p, lr=0.01, initial_accumulator_value=1e6, eps=0.5), slope, 1e-3),
    "Adagrad, lr_decay": (lambda p: Adagrad(p, lr=0.01, lr_decay=0.01, initial_accumulator_value=1e6), slope, 1e-3),
}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_under_a_linear_loss_late_steps_move_by_lr_steps_times_p_times_the_gradient(
    tmp_path: Path, name: str, maximize: bool
) -> None:
    """With maximize the loss that training made smaller is minus what was climbed, so its gradient is minus g."""
    make, gradients, tolerance = LINEAR[name]
    model = mlp()
    optimizer = make(model.parameters())
    if maximize:
        optimizer.param_groups[0]["maximize"] = True
    steps = 1200 if "centered" in name else 400  # of which the last 60 let momentum finish what a step began
    found = run(tmp_path, optimizer, model, gradients, steps + 60, checkpoints=[steps - 20, steps])
    before, after, moments = found.state(0), found.state(1), found.second_moments(1)
    lr_steps = found.lr_steps(steps - 20, steps)[0]
    assert found.optimizer.maximize is maximize
    for (parameter, _), gradient in zip(model.named_parameters(), slope(0, model), strict=True):
        p = 1 if moments is None else oracles.preconditioner([moments[parameter]], found.eps[0])
        expected = -lr_steps * p * gradient * (-1 if maximize else 1)
        torch.testing.assert_close(after[parameter] - before[parameter], expected, rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("make", [Adam, AdamW, RMSprop, Adagrad])
def test_lr_steps_and_weight_decay_follow_a_schedule(tmp_path: Path, make: Any) -> None:
    model = mlp()
    betas = {"betas": (0.0, 0.9)} if make in (Adam, AdamW) else {}  # without momentum a step is its own
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1, **betas)
    rates = [0.01 * (1 + step % 3) for step in range(1, 10)]

    def gradients(step: int, model: nn.Module) -> Iterator[Tensor]:
        optimizer.param_groups[0].update(lr=rates[step - 1], weight_decay=0.1 * step)
        return random_gradients(step, model)

    found = run(tmp_path, optimizer, model, gradients, 9)
    assert found.lr_steps(2, 7) == (pytest.approx(sum(rates[2:7]), rel=1e-12),)
    decay = sum(rate * 0.1 * step for step, rate in enumerate(rates, 1) if 2 < step <= 7)
    assert found.decay_steps(2, 7) == (pytest.approx(decay, rel=1e-12),)


@pytest.mark.parametrize(
    ("name", "momentum", "dampened"), [("SGD", 0.5, 0.4), ("RMSprop", 0.5, 1), ("Adam", 0, 1), ("Adagrad", 0, 1)]
)
def test_momentum_and_dampening_count_only_for_optimizers_that_have_them(
    tmp_path: Path, name: str, momentum: float, dampened: float
) -> None:
    """A step's gradient is taken by all later steps; the first one is never dampened."""
    found = trajectory_of(tmp_path, perturbed_states(mlp(), 1), N, name=name, momentum=0.5, dampening=0.6)
    taken = [sum(0.1 * momentum**later for later in range(left)) for left in range(10, 0, -1)]
    expected = taken[0] + dampened * sum(taken[1:])
    assert found.lr_steps(0, 10) == (pytest.approx(expected, rel=1e-12),)


def test_adagrads_rates_go_on_decaying_where_a_resumed_optimizer_had_left_off(tmp_path: Path) -> None:
    model = mlp()
    optimizer = Adagrad(model.parameters(), lr=0.5, lr_decay=0.1)
    run(tmp_path / "first", optimizer, model, random_gradients, 5)
    with pytest.warns(UserWarning, match="the optimizer has taken 5 steps already that no stage in"):
        run(tmp_path / "second", optimizer, model, random_gradients, 3)
    found = sf.Trajectory.load(tmp_path / "second", partial=True)
    expected = [0.5 / (1 + past * 0.1) for past in (5, 6, 7)]
    assert found.learning_rates[:, 0].tolist() == pytest.approx(expected, rel=1e-12)


# Parameter groups


@pytest.mark.parametrize("make", [Adam, AdamW, RMSprop, Adagrad])
def test_learning_rate_eps_and_weight_decay_are_those_of_the_parameters_group(tmp_path: Path, make: Any) -> None:
    model = mlp()
    head = {"params": model[4].parameters(), "lr": 0.03, "eps": 0.7, "weight_decay": 0.4}
    optimizer = make([{"params": [*model[0].parameters(), *model[2].parameters()]}, head], lr=0.01, weight_decay=0.2)
    found = run(tmp_path, optimizer, model, random_gradients, 4)
    default = optimizer.defaults["eps"]
    assert found.eps == (default, 0.7) and found.lr_steps(0, 4) == pytest.approx((0.04, 0.12), rel=1e-12)
    assert found.used.weight_decay.tolist() == [[0.2, 0.4]] * 4
    assert {found.group_of(name) for name in found.second_moments(1) if name.startswith("4.")} == {1}


def test_betas_and_amsgrad_are_those_of_the_parameters_group(tmp_path: Path) -> None:
    model = mlp()
    head = {"params": model[4].parameters(), "betas": (0.9, 0.3), "amsgrad": True}
    optimizer = Adam([{"params": [*model[0].parameters(), *model[2].parameters()], "betas": (0.9, 0.7)}, head], lr=0.01)
    moments = run(tmp_path, optimizer, model, random_gradients, 5).second_moments(1)
    past = [list(random_gradients(step, model)) for step in range(1, 6)]
    for place, (name, _) in enumerate(model.named_parameters()):
        own = [gradients[place] for gradients in past]
        is_head = name.startswith("4.")
        expected = moments_of_adam(own, 0.3, True) if is_head else moments_of_adam(own, 0.7)
        torch.testing.assert_close(moments[name], expected, rtol=1e-12, atol=0)


# What is recorded of the optimizer


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (lambda p: Adam(p, amsgrad=True), "amsgrad", True),
        (lambda p: Adam(p, betas=(torch.tensor(0.5), torch.tensor(0.75)), foreach=False), "betas", [0.5, 0.75]),
        (lambda p: RMSprop(p, centered=True), "centered", True),
        (lambda p: RMSprop(p, alpha=0.5), "alpha", 0.5),
        (lambda p: Adagrad(p, lr_decay=0.25), "lr_decay", 0.25),
        (lambda p: Adam(p, lr=torch.tensor(0.5), foreach=False), "lr", 0.5),
    ],
)
def test_an_option_changes_the_recorded_constants(tmp_path: Path, make: Any, key: str, value: Any) -> None:
    model = mlp()
    optimizer = make(model.parameters())
    run(tmp_path, optimizer, model, random_gradients, 4)
    constants = json.loads((tmp_path / "trajectory.json").read_text())["constants"][0]
    assert constants[key] == value
    assert type(optimizer)(model.parameters()).defaults[key] != optimizer.defaults[key]


@pytest.mark.parametrize(
    ("make", "decoupled"),
    [
        (lambda p: Adam(p, weight_decay=0.1), False),
        (lambda p: Adam(p, weight_decay=0.1, decoupled_weight_decay=True), True),
        (AdamW, True),
        (lambda p: RMSprop(p, weight_decay=0.1), False),
        (lambda p: SGD(p, lr=0.1, weight_decay=0.1), False),
    ],
)
def test_decoupled_weight_decay_is_known_from_the_optimizer(tmp_path: Path, make: Any, decoupled: bool) -> None:
    model = mlp()
    assert run(tmp_path, make(model.parameters()), model, random_gradients, 4).decoupled == (decoupled,)


def test_decoupled_is_by_name_unless_said(tmp_path: Path) -> None:
    def made(**constants: Any) -> sf.Trajectory:
        return trajectory_of(tmp_path, perturbed_states(mlp(), 2), N, **constants)

    assert made(name="AdamW").decoupled == (True,) and made(name="Adam").decoupled == (False,)
    assert made(name="Adam", decoupled=True).decoupled == (True,)
    assert made(name="AdamW", decoupled=False).decoupled == (False,)


def test_the_batch_size_is_recorded_where_it_is_given(tmp_path: Path) -> None:
    model = mlp()
    for given in (None, 6):
        folder = tmp_path / str(given)
        found = run(folder, SGD(model.parameters(), lr=0.1), model, random_gradients, 4, batch_size=given)
        assert found.optimizer.batch_size == given


@pytest.mark.parametrize("given", [0, -1, 2.5, "6", True])
def test_a_batch_size_that_is_no_count_is_refused(tmp_path: Path, given: Any) -> None:
    model = mlp()
    with pytest.raises(sf.TrajectoryError, match=r"batch_size=.*expected a whole number, at least 1"):
        run(tmp_path, SGD(model.parameters(), lr=0.1), model, random_gradients, 4, batch_size=given)
    with pytest.raises(sf.TrajectoryError, match=r"batch_size=.*expected a whole number, at least 1"):
        trajectory_of(tmp_path, perturbed_states(model, 1), N, batch_size=given)


# Refusals


class OwnAdam(Adam):
    """Might do anything in its step."""


@pytest.mark.parametrize("make", [NAdam, RAdam, torch.optim.Adadelta, torch.optim.Adamax, OwnAdam])
def test_an_optimizer_that_is_not_known_is_recorded_and_refused_only_when_asked(tmp_path: Path, make: Any) -> None:
    model = mlp()
    found = run(tmp_path, make(model.parameters(), lr=0.01), model, random_gradients, 4)
    with pytest.raises(
        sf.TrajectoryError, match=rf"{make.__name__}: effective .*SGD, Adam, AdamW, RMSprop and Adagrad"
    ):
        found.lr_steps(0, 4)
    with pytest.raises(sf.TrajectoryError, match="Use InfluenceFunction, which needs none"):
        found.lr_steps(0, 4)
    assert not found.preconditioned


def test_a_namesake_of_another_library_is_not_taken_for_torchs(tmp_path: Path) -> None:
    namesake = type("AdamW", (Adam,), {"__module__": "elsewhere.optim"})
    model = mlp()
    found = run(tmp_path, namesake(model.parameters()), model, random_gradients, 4)
    with pytest.raises(sf.TrajectoryError, match=r"trained with elsewhere.optim.AdamW: effective"):
        found.lr_steps(0, 4)
    assert all(name.startswith("model.") for name in load_file(found.checkpoints[-1]))  # its state may be another


@pytest.mark.parametrize(
    ("make", "head", "text"),
    [
        (SGD, {"maximize": True}, r"SGD \(maximize=True in some parameter groups only\)"),
        (Adam, {"maximize": True}, r"Adam \(maximize=True in some parameter groups only\)"),
    ],
)
def test_parameter_groups_that_differ_in_what_one_formula_must_hold_for_are_refused(
    tmp_path: Path, make: Any, head: dict[str, Any], text: str
) -> None:
    model = mlp()
    groups = [{"params": [*model[0].parameters(), *model[2].parameters()]}, {"params": model[4].parameters(), **head}]
    found = run(tmp_path, make(groups, lr=0.1, weight_decay=0.1), model, random_gradients, 4)
    with pytest.raises(sf.TrajectoryError, match=rf"trained with {text}"):
        found.lr_steps(0, 4)


def test_weight_decay_may_be_coupled_in_one_parameter_group_and_not_in_another(tmp_path: Path) -> None:
    model = mlp()
    head = {"params": model[4].parameters(), "decoupled_weight_decay": True}
    optimizer = Adam([{"params": [*model[0].parameters(), *model[2].parameters()]}, head], lr=0.1, weight_decay=0.1)
    found = run(tmp_path, optimizer, model, random_gradients, 4)
    assert found.decoupled == (False, True) and found.coupled == (True, False)
    assert found.group_of("4.weight") == 1 and found.decay_steps(0, 4) == pytest.approx((0.04, 0.04), rel=1e-6)


def test_lr_decay_counts_each_parameters_own_steps(tmp_path: Path) -> None:
    def gradients(step: int, model: nn.Module) -> Iterator[Any]:
        for place, gradient in enumerate(random_gradients(step, model)):
            yield None if place == 0 and step < 3 else gradient

    model = mlp()
    found = run(tmp_path / "decay", Adagrad(model.parameters(), lr_decay=0.1), model, gradients, 4)
    late, early = found.group_of("0.weight"), found.group_of("0.bias")
    assert found.lr_steps(0, 4)[late] == pytest.approx(sum(0.01 / (1 + 0.1 * past) for past in (0, 1)), rel=1e-12)
    assert found.lr_steps(0, 4)[early] == pytest.approx(sum(0.01 / (1 + 0.1 * past) for past in range(4)), rel=1e-12)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1e-3])
def test_second_moments_that_are_not_finite_or_negative_name_the_parameter(tmp_path: Path, wrong: float) -> None:
    model = mlp()
    optimizer = Adam(model.parameters(), lr=0.01)

    def gradients(step: int, model: nn.Module) -> Iterator[Tensor]:
        if step == 4:
            optimizer.state[model[2].bias]["exp_avg_sq"][1] = wrong
        return (torch.zeros_like(p) for p in model.parameters())

    found = run(tmp_path, optimizer, model, gradients, 4)
    assert found.second_moments(0)
    with pytest.raises(sf.TrajectoryError, match=r"step-00000004.*1 of 4 second moments of '2.bias' are not finite"):
        found.second_moments(1)


def test_rounding_below_zero_in_centered_moments_counts_as_zero() -> None:
    mean = torch.tensor([0.1, 0.1], dtype=torch.float64)
    square = mean.square() * torch.tensor([1 - 4e-16, 0.9], dtype=torch.float64)
    state = {"step": torch.tensor(3.0), "square_avg": square, "grad_avg": mean}
    found = second_moment("RMSprop", state, {"centered": True})
    assert (square - mean.square())[0] < 0 and found[0] == 0
    assert found[1] < -1e-4  # what is truly wrong stays to be seen


# Second moments from elsewhere


def foreign(folder: Path, files: Any, **options: Any) -> sf.Trajectory:
    made = trajectory_of(folder, perturbed_states(mlp(), 2), N)
    constants = sf.OptimizerConstants(**{"name": "AdamW", "eps": 0.5, **options})
    return sf.Trajectory(made.checkpoints, made.steps, 0.1, N, constants, second_moments=files)


def moment_files(folder: Path, moments: dict[str, Tensor], suffix: str = "safetensors") -> list[Path]:
    paths = [folder / f"v-{index}.{suffix}" for index in range(2)]
    for index, path in enumerate(paths):
        content = {name: (index + 1) * values for name, values in moments.items()}
        save_file(content, path) if suffix == "safetensors" else torch.save(content, path)
    return paths


def test_the_names_of_saved_moments_are_read_without_the_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    recorded = run(tmp_path / "run", Adam(model.parameters(), lr=0.01), model, random_gradients, 4)
    moments = {name: p.detach().square() for name, p in mlp().named_parameters()}
    given = foreign(tmp_path, moment_files(tmp_path, moments))
    monkeypatch.setattr(TensorFile, "tensor", None)
    for trajectory in (recorded, given):
        assert trajectory.saved_moments(1) == moments.keys()
        with pytest.raises(TypeError):
            trajectory.second_moments(1)


def test_the_names_in_a_torch_file_of_the_old_format_are_read_too(tmp_path: Path) -> None:
    moments = {name: p.detach().square() for name, p in mlp().named_parameters()}
    paths = [tmp_path / "v-0.pt", tmp_path / "v-1.pt"]
    for path in paths:
        torch.save(moments, path, _use_new_zipfile_serialization=False)
    assert foreign(tmp_path, paths).saved_moments(1) == moments.keys()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_second_moments_of_other_trainers_are_read_from_files(tmp_path: Path, suffix: str) -> None:
    moments = {name: p.detach().square() for name, p in mlp().named_parameters()}
    found = foreign(tmp_path, moment_files(tmp_path, moments, suffix))
    for index in range(2):
        values = found.second_moments(index)
        assert values.keys() == found.saved_moments(index) == moments.keys()
        assert all(torch.equal(values[name], (index + 1) * expected) for name, expected in moments.items())
    assert foreign(tmp_path, None).second_moments(0) is None and foreign(tmp_path, None).saved_moments(0) is None


def test_the_digest_follows_the_file_of_second_moments(tmp_path: Path) -> None:
    moments = {name: p.detach().square() for name, p in mlp().named_parameters()}
    found = foreign(tmp_path, moment_files(tmp_path, moments))
    before = [found.digest(index) for index in range(2)]
    assert before[0].startswith(foreign(tmp_path, None).digest(0)) and before[0] != before[1]
    save_file({name: 3 * values for name, values in moments.items()}, tmp_path / "v-1.safetensors")
    assert found.digest(0) == before[0] and found.digest(1) != before[1]


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda m: m | {"0.weight": -m["0.weight"]}, r"v-1.*30 of 30 second moments of '0.weight' are not finite num"),
        (lambda m: m | {"0.bias": torch.zeros(6).long()}, r"v-1.*second moments of '0.bias' are torch.int64"),
        (lambda m: m | {"0.bias": torch.ones(5)}, r"'0.bias' have shape \(5,\), but .* it is of shape \(6,\)"),
        (lambda m: m | {"other": torch.ones(5)}, r"'other' have shape \(5,\), but in the checkpoint it is no such"),
    ],
)
def test_foreign_second_moments_that_do_not_fit_are_refused(tmp_path: Path, edit: Callable, text: str) -> None:
    moments = {name: p.detach().square() + 1 for name, p in mlp().named_parameters()}
    found = foreign(tmp_path, moment_files(tmp_path, edit(moments)))
    with pytest.raises(sf.TrajectoryError, match=text):
        found.second_moments(1)


def test_files_of_second_moments_that_make_no_sense_are_refused_at_once(tmp_path: Path) -> None:
    paths = moment_files(tmp_path, {"0.bias": torch.ones(6)})
    with pytest.raises(sf.TrajectoryError, match="1 files of second moments for 2 checkpoints of AdamW"):
        foreign(tmp_path, paths[:1])
    with pytest.raises(sf.TrajectoryError, match=r"2 files of second moments for 2 checkpoints of SGD: .*Adam, AdamW"):
        foreign(tmp_path, paths, name="SGD")
    with pytest.raises(sf.TrajectoryError, match=r"v-9.safetensors: no such file of second moments"):
        foreign(tmp_path, [paths[0], tmp_path / "v-9.safetensors"])


def test_second_moments_of_a_parameter_in_no_group_are_refused(tmp_path: Path) -> None:
    made = trajectory_of(tmp_path, perturbed_states(mlp(), 2), N)
    paths = moment_files(tmp_path, {"0.bias": torch.ones(6)})
    adam = sf.OptimizerConstants("Adam")
    found = sf.Trajectory(made.checkpoints, made.steps, 0.1, N, adam, {"0.weight": 0}, second_moments=paths)
    with pytest.raises(sf.TrajectoryError, match=r"second moments of '0.bias', which is in no parameter group"):
        found.second_moments(0)


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        ([0.1, 0.2], r"eps has 2 numbers, but learning rates cover 1 parameter group\(s\)"),
        (-1e-8, "eps=-1e-08: expected finite numbers >= 0"),
        (float("inf"), "eps=inf: expected finite numbers >= 0"),
        (float("nan"), "eps=nan: expected finite"),
        ("small", "eps: expected numbers"),
    ],
)
def test_an_eps_that_makes_no_sense_is_refused(tmp_path: Path, eps: Any, text: str) -> None:
    with pytest.raises(sf.TrajectoryError, match=text):
        trajectory_of(tmp_path, perturbed_states(mlp(), 1), N, name="Adam", eps=eps)
