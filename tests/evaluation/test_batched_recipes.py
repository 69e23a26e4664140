"""Models that are trained together are those of an ordinary loop, for a table of recipes and models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional
from torch.optim import lr_scheduler

from segflow.evaluation import BatchedTraining

from ..support.plain_loop import jobs_of, plain_loop, small_net, stage_of, training_of

# ---- models ----


class Branches(nn.Module):
    """A number of its own (no axes), a layer that nothing uses, and a count of its calls that changes what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))
        self.inner, self.outer, self.unused = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(5, 4)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += self.training
        return self.outer(torch.tanh(self.inner(inputs))) * (
            self.scale + (0.5 if self.calls > 3 and self.training else 0)
        )


class Spare(nn.Module):
    """A layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = small_net(), nn.Linear(3, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs)


class Tied(nn.Module):
    """An embedding whose weight is that of the last layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.last = nn.Embedding(4, 5), nn.Linear(5, 5), nn.Linear(5, 4, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, inputs: Tensor) -> Tensor:
        places = (inputs * 2).long().clamp(0, 3)
        return self.last(torch.tanh(self.inner(self.embedding(places)).mean(1)))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 4))


def convolutions() -> nn.Module:
    layers = [nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2), nn.ReLU(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(*layers)


def transformer() -> nn.Module:
    block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Linear(1, 4), block, nn.Flatten(), nn.Linear(12, 4))


def parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 4))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4))
    model[2].requires_grad_(False)
    return model


def attributed() -> nn.Module:
    """A model whose parameters say themselves how fast they are trained and whether they decay."""
    model = normed()
    for number, parameter in enumerate(model.parameters()):
        parameter.lr_scale, parameter.no_decay = 1 / (1 + number), parameter.ndim < 2  # type: ignore[attr-defined]
    return model


def hooked() -> nn.Module:
    model = small_net()
    model[0].register_forward_hook(lambda module, inputs, outputs: outputs * 1.5)
    return model


# ---- recipes: the parameters of one model -> its optimizer ----


def decay_matrices(parameters: Iterable[Tensor], kind: Any = optim.AdamW, **options: Any) -> optim.Optimizer:
    """The commonest there is: only what has two axes or more decays."""
    parameters = list(parameters)
    matrices, others = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    return kind(groups, **({"lr": 0.05} | options))


def large_decay(parameters: Iterable[Tensor]) -> optim.Optimizer:
    """By the number of a parameter's numbers, which decides about its rate as well."""
    groups = [{"params": [p], "lr": 0.3 / p.numel(), "weight_decay": 0.1 * (p.numel() > 5)} for p in parameters]
    return optim.SGD(groups, lr=0.1, momentum=0.9)


def by_attribute(parameters: Iterable[Any]) -> optim.Optimizer:
    groups = [{"params": [p], "lr": 0.05 * p.lr_scale, "weight_decay": 0.0 if p.no_decay else 0.3} for p in parameters]
    return optim.AdamW(groups)


def two_rates(parameters: Iterable[Tensor]) -> optim.Optimizer:
    first, second, *rest = parameters
    return optim.SGD([{"params": [first, second]}, {"params": rest, "lr": 0.4, "momentum": 0.5}], lr=0.05)


def last_only(parameters: Iterable[Tensor]) -> optim.Optimizer:
    return optim.Adam(list(parameters)[-2:], lr=0.05, weight_decay=0.1)


def freeze_first(parameters: Iterable[Tensor]) -> optim.Optimizer:
    first, *rest = parameters
    first.requires_grad_(False)
    return optim.SGD([first, *rest], lr=0.2, weight_decay=0.1)


def thaw_all(parameters: Iterable[Tensor]) -> optim.Optimizer:
    return optim.SGD([p.requires_grad_() for p in parameters], lr=0.2, momentum=0.9)


def trained_only(parameters: Iterable[Tensor]) -> optim.Optimizer:
    return optim.SGD([p for p in parameters if p.requires_grad], lr=0.2, weight_decay=0.1)


def reached_only(parameters: Iterable[Tensor]) -> optim.Optimizer:
    """What had a gradient before; nothing had one in the first stage."""
    parameters = list(parameters)
    reached = [p for p in parameters if p.grad is not None]
    return optim.SGD(reached or parameters, lr=0.2 if reached else 0.05, weight_decay=0.1)


def shrunk_first(parameters: Iterable[Tensor]) -> optim.Optimizer:
    """Changes what it is given, by its values."""
    parameters = list(parameters)
    with torch.no_grad():
        for p in parameters:
            p.div_(p.norm() + 0.1)
    return optim.SGD(parameters, lr=0.2)


sgd = partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.02)


def of(optimizer: Any = sgd, build: Callable[[], nn.Module] = small_net, **changes: Any) -> BatchedTraining:
    return training_of(stage_of(optimizer=optimizer, **changes), build=lambda: build().double())


def in_two(first: Any, second: Any, build: Callable[[], nn.Module] = small_net, **changes: Any) -> BatchedTraining:
    stages = stage_of(8, optimizer=first), stage_of(10, 1, optimizer=second, epochs=2, batch_size=3, **changes)
    return training_of(*stages, build=lambda: build().double())


def penalised(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, label_smoothing=0.1) + 0.1 * logits.square().mean()


class Growing:
    """A loss that counts its calls: one of its own for each training."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return functional.cross_entropy(logits, labels) * self.calls**0.5


OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(optim.SGD, lr=0.1),
    "SGD with momentum": sgd,
    "SGD with Nesterov's momentum": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD upwards": partial(optim.SGD, lr=0.01, maximize=True),
    "SGD fused": partial(sgd, dampening=0, fused=True),
    "SGD by tensors of all parameters": partial(sgd, foreach=True),
    "Adam": partial(optim.Adam, lr=0.02, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1, amsgrad=True),
    "Adam with a rate in a tensor": lambda p: optim.Adam(p, lr=torch.tensor(0.02, dtype=torch.float64), foreach=False),
    "AdamW": partial(optim.AdamW, lr=0.02, betas=(0.8, 0.9), weight_decay=0.5, amsgrad=True),
    "AdamW fused": partial(optim.AdamW, lr=0.02, weight_decay=0.5, fused=True),
    "RMSprop": partial(optim.RMSprop, lr=0.02, alpha=0.8, momentum=0.5, centered=True, weight_decay=0.1),
    "Adagrad": partial(optim.Adagrad, lr=0.1, lr_decay=0.01, weight_decay=0.1, initial_accumulator_value=0.2),
    "Adadelta": partial(optim.Adadelta, lr=3.0, rho=0.8, eps=1e-4, weight_decay=0.1),
    "NAdam": partial(optim.NAdam, lr=0.02, weight_decay=0.1, momentum_decay=0.01, decoupled_weight_decay=True),
    "RAdam": partial(optim.RAdam, lr=0.05, betas=(0.5, 0.7), weight_decay=0.1, decoupled_weight_decay=True),
    "Adamax": partial(optim.Adamax, lr=0.05, betas=(0.8, 0.9), weight_decay=0.1),
    "ASGD": partial(optim.ASGD, lr=0.1, lambd=0.01, alpha=0.6, t0=3, weight_decay=0.1),
    "Rprop": partial(optim.Rprop, lr=0.02, etas=(0.4, 1.3), step_sizes=(1e-4, 0.1)),
}
SCHEDULES: dict[str, Any] = {
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=4),
    "warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 4)),
    "by group": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 0.9**step, lambda step: 1.2**step]),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.3, total_steps=10),
    "one after the other": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.8)], milestones=[2]
    ),
}
RECIPES: dict[str, BatchedTraining] = {
    **{name: of(make) for name, make in OPTIMIZERS.items()},
    **{f"{name}, matrices decay": of(partial(decay_matrices, kind=kind), Branches) for name, kind in (
        ("AdamW", optim.AdamW), ("Adagrad", optim.Adagrad), ("ASGD", optim.ASGD), ("NAdam", optim.NAdam),
        ("RAdam", optim.RAdam), ("SGD", partial(optim.SGD, momentum=0.9)),
    )},
    "matrices decay, LayerNorm": of(decay_matrices, normed),
    "matrices decay, convolutions": of(decay_matrices, convolutions),
    "matrices decay, tied": of(decay_matrices, Tied),
    "matrices decay, transformer": of(decay_matrices, transformer),
    "matrices decay, weight norm": of(decay_matrices, parametrized),
    "by the number of numbers": of(large_decay, normed),
    "by attributes": of(by_attribute, attributed),
    "two rates": of(two_rates, normed),
    "a group left out": of(last_only),
    "frozen by build": of(sgd, frozen),
    "frozen by build, matrices decay": of(decay_matrices, frozen),
    "frozen by build, and left out": of(trained_only, frozen),
    "frozen by build, thawed by the recipe": of(thaw_all, frozen),
    "frozen by the recipe": of(freeze_first),
    "changed by the recipe": of(shrunk_first),
    "tied": of(sgd, Tied),
    "forward hook": of(sgd, hooked),
    "clamped in place": of(sgd, lambda: nn.Sequential(nn.Linear(3, 4), nn.Hardtanh(-0.5, 0.5, inplace=True))),
    "a penalty in the loss": of(sgd, loss=penalised),
    "weights of classes": of(sgd, loss=nn.CrossEntropyLoss(weight=torch.arange(1.0, 5.0, dtype=torch.float64))),
    "a loss that counts": of(sgd, loss=Growing()),
    "batches of one": of(decay_matrices, normed, batch_size=1),
    "two stages": in_two(decay_matrices, sgd, normed),
    "two stages, the second of some layers": in_two(sgd, last_only),
    "two stages, the first of some layers": in_two(last_only, sgd),
    "two stages, frozen in the second": in_two(thaw_all, freeze_first),
    "two stages, frozen in the first": in_two(freeze_first, thaw_all),
    "two stages, frozen in the first, left out of the second": in_two(freeze_first, trained_only),
    "two stages, the second of what the first reached": in_two(reached_only, reached_only, Spare),
    "two stages, the second shrinks": in_two(sgd, shrunk_first),
    "two stages, a schedule in the second": in_two(sgd, sgd, schedule=SCHEDULES["cosine"]),
    **{f"schedule: {name}": of(partial(decay_matrices, kind=kind), normed, schedule=schedule)
        for name, schedule in SCHEDULES.items() for kind in (partial(optim.SGD, momentum=0.9),)},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention and weight norm, one model at a time
@pytest.mark.parametrize("name", RECIPES)
def test_models_trained_together_are_those_of_an_ordinary_loop(name: str) -> None:
    training = RECIPES[name]
    jobs = jobs_of(training)
    expected = np.stack([plain_loop(training, *job) for job in jobs])
    np.testing.assert_allclose(training.run(jobs), expected, rtol=1e-9, atol=1e-11)
    assert np.array_equal(replace(training, together=1).run(jobs), expected), "an ordinary loop, to the last bit"
    untrained = replace(
        training,
        stages=[replace(stage, optimizer=partial(optim.SGD, lr=0.0), schedule=None) for stage in training.stages],
    )
    assert np.abs(expected - plain_loop(untrained, *jobs[0])).min(1).max() > 1e-4


def test_a_schedule_that_is_left_out_shows() -> None:
    training = RECIPES["schedule: cosine"]
    without = replace(training, stages=[replace(training.stages[0], schedule=None)])
    for together in (1, 64):
        one, other = (replace(t, together=together).run(jobs_of(training)) for t in (training, without))
        assert np.abs(one - other).min() > 1e-5


def test_a_recipe_by_shape_in_single_precision_decays_what_it_does_alone() -> None:
    stage = replace(stage_of(50, optimizer=decay_matrices, epochs=10, batch_size=8), inputs=stage_of(50).inputs.float())
    training = replace(training_of(stage, build=lambda: small_net().float()), query_inputs=stage_of(6).inputs.float())
    everything = replace(stage, optimizer=partial(optim.AdamW, lr=0.05, weight_decay=0.5))
    jobs = jobs_of(training)
    expected = np.stack([plain_loop(training, *job) for job in jobs])
    np.testing.assert_allclose(training.run(jobs), expected, atol=1e-5)
    assert np.abs(expected - replace(training, stages=[everything]).run(jobs)).max() > 0.05


def test_outputs_may_be_of_another_precision_than_the_parameters() -> None:
    class Wide(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs.float()).double()

    training = training_of(build=lambda: Wide(3, 4))
    jobs = jobs_of(training)
    np.testing.assert_allclose(training.run(jobs), [plain_loop(training, *job) for job in jobs], atol=1e-5)


def test_layers_that_build_froze_stay_as_they_were() -> None:
    training = RECIPES["frozen by build"]
    thawed = replace(training, build=lambda: frozen().double().requires_grad_())
    assert np.abs(training.run(jobs_of(training)) - thawed.run(jobs_of(training))).max() > 0.01
