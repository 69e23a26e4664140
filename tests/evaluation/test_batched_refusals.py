"""What cannot be trained together is refused by name, for one job as for several; alone it is trained and repeats."""

from __future__ import annotations

import random
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
from torch.optim.optimizer import register_optimizer_step_pre_hook

from segflow.errors import ScoreError
from segflow.evaluation import BatchedTraining

from ..support.plain_loop import jobs_of, losses_of, plain_loop, small_net, stage_of, training_of

Parameters = Iterable[Any]
sgd = partial(optim.SGD, lr=0.1, momentum=0.9)


class Changed(nn.Module):
    """A network whose inputs or outputs a function of (module, tensor) changes."""

    def __init__(self, before: Any = None, after: Any = None, **attributes: Any) -> None:
        super().__init__()
        self.net, self.before, self.after = small_net(), before, after
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.net(self.before(self, inputs) if self.before else inputs)
        return self.after(self, outputs) if self.after else outputs


class OwnSGD(optim.SGD):
    """A class of one's own may do anything in its step."""


def _then(change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    """Builds the small network and changes it."""

    def build() -> nn.Module:
        model = small_net()
        change(model)
        return model

    return build


def _clipped_activation(module: nn.Module, outputs: Tensor) -> Tensor:
    """Acts only where gradients are large, and only where hooks are possible."""
    if outputs.requires_grad:
        outputs.register_hook(lambda g: g * (100 / g.norm()).clamp(max=1))
    return outputs


def _where_positive(module: nn.Module, outputs: Tensor) -> Tensor:
    return outputs * 2 if outputs.mean() > 0 else outputs


def _counting(module: Any, outputs: Tensor) -> Tensor:
    module.calls += module.training
    return outputs * (1 + 0.01 * module.calls)


def _with_buffer(model: nn.Module) -> None:
    model.register_buffer("mask", torch.ones(3))


def _hook_steps(parameters: Parameters, register: str) -> optim.Optimizer:
    optimizer = sgd(parameters)
    getattr(optimizer, register)(lambda optimizer, args, kwargs: _clip(optimizer))
    return optimizer


def _clip(optimizer: optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)


def _replaced_step(parameters: Parameters) -> optim.Optimizer:
    optimizer = sgd(parameters)
    plain = optimizer.step
    optimizer.step = lambda: (_clip(optimizer), plain())[1]  # type: ignore[method-assign]
    return optimizer


def _scheduled_inside(parameters: Parameters) -> optim.Optimizer:
    optimizer = sgd(parameters)
    lr_scheduler.LinearLR(optimizer)
    return optimizer


def _clamp(parameter: Any) -> None:
    parameter.grad.clamp_(-0.01, 0.01)


def _hooked_parameters(parameters: Parameters) -> optim.Optimizer:
    parameters = list(parameters)
    parameters[0].register_post_accumulate_grad_hook(_clamp)
    return sgd(parameters)


def _drawn(parameters: Parameters) -> optim.Optimizer:
    return optim.SGD(parameters, lr=0.1 * float(torch.rand(())))


def _by_value(parameters: Parameters) -> optim.Optimizer:
    first, *rest = parameters
    return optim.SGD([{"params": [first], "lr": 0.1 * float(first.detach().norm())}, {"params": rest}], lr=0.1)


def _grouped_by_value(parameters: Parameters) -> optim.Optimizer:
    ordered = sorted(parameters, key=lambda p: float(p.detach().flatten()[0]))
    return optim.SGD([{"params": ordered[:2]}, {"params": ordered[2:], "lr": 0.2}], lr=0.1)


def _frozen_by_value(parameters: Parameters) -> optim.Optimizer:
    parameters = list(parameters)
    parameters[int(100 * parameters[0].detach().norm()) % 4].requires_grad_(False)
    return sgd(parameters)


def _more(parameters: Parameters) -> optim.Optimizer:
    return sgd([*parameters, nn.Parameter(torch.zeros(3))])


def _begun(parameters: Parameters) -> optim.Optimizer:
    optimizer = sgd(parameters)
    optimizer.state[optimizer.param_groups[0]["params"][0]]["something"] = 3
    return optimizer


def _drawn_schedule(optimizer: optim.Optimizer) -> Any:
    factor = random.random()
    return lr_scheduler.LambdaLR(optimizer, lambda step: factor**step)


def _of(build: Any = small_net, measure: Any = None, **changes: Any) -> BatchedTraining:
    return training_of(stage_of(**({"optimizer": sgd} | changes)), build=build, measure=measure)


def _or_skip(name: str) -> Any:
    return getattr(optim, name, None)


def _noisy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels) * (1 + random.random())


def _matrices(parameters: Parameters, kind: Any) -> optim.Optimizer:
    return kind([p for p in parameters if p.ndim == 2], lr=0.02)


def _dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4)).double()


def _hidden() -> nn.Module:
    return Changed(lambda m, x: x @ m.mixing, mixing=torch.randn(3, 3, dtype=torch.float64))


def _unregistered() -> nn.Module:
    model = Changed(after=lambda m, x: x * m.weights[0].sum())
    model.weights = [model.net[0].weight]
    return model


def _by_seed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 4), nn.ReLU() if torch.initial_seed() % 2 else nn.Tanh(), nn.Linear(4, 4)
    ).double()


def _wide_by_seed() -> nn.Module:
    width = 3 + torch.initial_seed() % 2
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 4)).double()


def _frozen_by_seed() -> nn.Module:
    model = small_net()
    model[0].requires_grad_(bool(torch.initial_seed() % 2))
    return model


def _places(module: Any, inputs: Tensor) -> Tensor:
    return (inputs * 2).long().clamp(0, 3)


def _rows(**options: Any) -> nn.Module:
    model = Changed(_places)
    model.net = nn.Sequential(nn.Embedding(4, 4, **options), nn.Flatten(), nn.Linear(12, 4)).double()
    return model


def _bags() -> nn.Module:
    model = Changed(_places)
    model.net = nn.Sequential(nn.EmbeddingBag(4, 4, padding_idx=0), nn.Linear(4, 4)).double()
    return model


def _called_rows(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Changed(lambda m, x: call(_places(m, x), m.table)[:, 0])
        model.table = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        return model

    return build


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 4)).double()


def _limited() -> nn.Module:
    return Changed(lambda m, x: x.clamp(max=100 * m.limits["high"]), limits={"high": float(1.2 + torch.rand(()))})


def _smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    weights = torch.arange(1.0, 5.0, dtype=logits.dtype)
    return functional.cross_entropy(logits, labels, weight=weights, label_smoothing=0.1)


class ByDimensions(lr_scheduler.LRScheduler):
    """A rate that follows from a parameter's shape."""

    def get_lr(self) -> list[float]:
        return [0.1 / group["params"][0].ndim for group in self.optimizer.param_groups]


def _by_dimensions(optimizer: optim.Optimizer) -> Any:
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1 / optimizer.param_groups[0]["params"][0].ndim)


def _by_first_values(optimizer: optim.Optimizer) -> Any:
    values = optimizer.param_groups[0]["params"][0].detach()
    return lr_scheduler.LambdaLR(optimizer, lambda step: float(values.norm()) if step else 1.0)


def _projecting(optimizer: optim.Optimizer) -> Any:
    def project(step: int) -> float:
        with torch.no_grad():
            for parameter in optimizer.param_groups[0]["params"] if step else ():
                parameter.clamp_(-0.5, 0.5)
        return 1.0

    return lr_scheduler.LambdaLR(optimizer, project)


def _own_in_sequence(optimizer: optim.Optimizer) -> Any:
    parts: list[Any] = [lr_scheduler.ConstantLR(optimizer), ByDimensions(optimizer)]
    return lr_scheduler.SequentialLR(optimizer, parts, [2])


def _replaced_schedule(optimizer: optim.Optimizer) -> Any:
    schedule = lr_scheduler.ConstantLR(optimizer)
    schedule.step = lambda *args: _clip(optimizer)  # type: ignore[method-assign]
    return schedule


def _recurrent() -> nn.Module:
    model = Changed(lambda m, x: m.cells(x[:, :, None])[0][:, -1])
    model.cells = nn.LSTM(1, 3).double()
    return model


REFUSED: dict[str, tuple[BatchedTraining, str]] = {
    "dropout": (_of(_dropped), "the model or the loss draws at random .*torch"),
    "noise of NumPy": (_of(lambda: Changed(lambda m, x: x + np.random.rand())), "draws at random .*NumPy"),  # noqa: NPY002
    "noise of Python in the loss": (_of(loss=_noisy), "draws at random .*Python"),
    "noise when evaluated": (
        _of(lambda: Changed(after=lambda m, x: x if m.training else x + torch.rand(()))), "in evaluation mode draws",
    ),
    "noise of the measure": (_of(measure=lambda out, y: losses_of(out, y) + torch.rand(())), "`measure` draws"),
    "noise of the recipe": (_of(optimizer=_drawn), "`optimizer` or `schedule` draws"),
    "noise of the schedule": (_of(schedule=_drawn_schedule), "`optimizer` or `schedule` draws"),
    "batch normalisation": (_of(lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)).double()), "buffers"),
    "a buffer": (_of(_then(_with_buffer)), r"buffers \(mask\)"),
    "Muon": (_of(optimizer=partial(_matrices, kind=_or_skip("Muon"))), "optimizer Muon.*each number by itself"),
    "Adafactor": (_of(optimizer=partial(_matrices, kind=_or_skip("Adafactor"))), "optimizer Adafactor"),
    "an optimizer of one's own": (_of(optimizer=partial(OwnSGD, lr=0.1)), "optimizer OwnSGD"),
    "a hook before steps": (_of(optimizer=partial(_hook_steps, register="register_step_pre_hook")), "on its steps"),
    "a hook after steps": (_of(optimizer=partial(_hook_steps, register="register_step_post_hook")), "on its steps"),
    "another step": (_of(optimizer=_replaced_step), "`step` was replaced"),
    "a schedule inside": (_of(optimizer=_scheduled_inside), r"`step` was replaced.*Stage\(schedule=\.\.\.\)"),
    "a hook on a parameter": (
        _of(_then(lambda m: m[0].weight.register_hook(lambda g: g / g.norm()))), "parameter 0.weight has a hook",
    ),
    "a hook after a gradient": (_of(optimizer=_hooked_parameters), "parameter 0.weight has a hook"),
    "a backward hook": (
        _of(_then(lambda m: m[2].register_full_backward_hook(lambda m, i, o: (i[0] * 0.5,)))), "'2' has a backward",
    ),
    "a hook on an activation": (_of(lambda: Changed(after=_clipped_activation)), "a hook on a tensor"),
    "rates by value": (_of(optimizer=_by_value), "differ in option lr of group 0"),
    "groups by value": (_of(optimizer=_grouped_by_value), "differ in the parameters of group"),
    "frozen by value": (_of(optimizer=_frozen_by_value), "differ in parameter .*trained.*frozen|frozen.*trained"),
    "more parameters": (_of(optimizer=_more), "not of the model"),
    "a state that was begun": (_of(optimizer=_begun), "state 'something' of parameter 0.weight"),
    "layers by seed": (_of(_by_seed), "differ in module '1': (ReLU and Tanh|Tanh and ReLU)"),
    "widths by seed": (_of(_wide_by_seed), "differ in parameter 0.weight"),
    "frozen by seed": (_of(_frozen_by_seed), "differ in parameter 0.weight.*(trained.*frozen|frozen.*trained)"),
    "a tensor by seed": (_of(_hidden), "differ in attribute mixing of module ''"),
    "parameters in a list": (_of(_unregistered), "more than its registered parameters"),
    "control flow": (_of(lambda: Changed(after=_where_positive)), "torch cannot stack.*control flow"),
    "sparse gradients": (
        _of(partial(_rows, sparse=True), optimizer=partial(optim.SGD, lr=0.1)), "embedding with sparse=True",
    ),
    "padding": (_of(partial(_rows, padding_idx=0)), "embedding with padding_idx=0"),
    "rows of a largest norm": (_of(partial(_rows, max_norm=1.0)), "embedding with max_norm=1.0"),
    "rows by frequency": (_of(partial(_rows, scale_grad_by_freq=True)), "embedding with scale_grad_by_freq=True"),
    "padding of bags": (_of(_bags), "embedding_bag with padding_idx=0"),
    "a call with padding": (
        _of(_called_rows(lambda i, w: functional.embedding(i, w, padding_idx=0))),
        "embedding with padding_idx=0",
    ),
    "torch's call with padding": (_of(_called_rows(lambda i, w: torch.embedding(w, i, 0))), "with padding_idx=0"),
    "a schedule of one's own": (_of(schedule=ByDimensions), "schedule ByDimensions"),
    "a schedule of one's own in another": (_of(schedule=_own_in_sequence), "schedule ByDimensions"),
    "a schedule by shapes": (_of(schedule=_by_dimensions), "the schedule reads or changes a parameter"),
    "a schedule by first values": (_of(schedule=_by_first_values), "the schedule reads or changes a parameter"),
    "a schedule that projects": (_of(schedule=_projecting), "the schedule reads or changes a parameter"),
    "another step of the schedule": (_of(schedule=_replaced_schedule), "ConstantLR: its `step` was replaced"),
    "a number by seed": (_of(_limited), r"differ in attribute limits of module ''\['high'\]"),
    "lazy": (_of(_lazy), "parameter 0.weight has no shape"),
    "weighted label smoothing": (_of(loss=_smoothed), "torch cannot stack|another gradient"),
    "recurrent": (_of(_recurrent), "torch cannot stack"),
    "a count of calls, when evaluated": (_of(lambda: Changed(after=_counting, calls=0)), "a count of its calls"),
}  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_together_is_refused_whatever_the_number_of_jobs(name: str, count: int) -> None:
    training, message = REFUSED[name]
    _skip_unless_torch_has(name)
    jobs = [(kept, seed) for (kept, _), seed in zip(jobs_of(training), (10, 12), strict=False)][:count]
    with pytest.raises(ScoreError, match=rf"many models at a time: .*{message}.*together=1"):
        training.run(jobs)


@pytest.mark.parametrize("name", REFUSED)
def test_alone_it_is_what_an_ordinary_loop_makes_of_it_and_repeats_itself(name: str) -> None:
    training = replace(REFUSED[name][0], together=1)
    _skip_unless_torch_has(name)
    jobs = jobs_of(training, 2)
    found = training.run(jobs)
    assert np.array_equal(found, [plain_loop(training, *job) for job in jobs])
    assert np.array_equal(found[::-1], training.run(jobs[::-1]))


def _skip_unless_torch_has(name: str) -> None:
    if name in ("Muon", "Adafactor") and not hasattr(optim, name):
        pytest.skip(f"this torch has no {name}")


STAGES: dict[str, tuple[dict[str, Any], str]] = {
    "LBFGS": ({"optimizer": optim.LBFGS}, "LBFGS.*FunctionTraining"),
    "several optimizers": ({"optimizer": lambda p: [sgd(p), sgd(p)]}, "gave a list, expected one"),
    "a schedule by measurements": ({"schedule": lr_scheduler.ReduceLROnPlateau}, "ReduceLROnPlateau"),
    "no schedule": ({"schedule": lambda optimizer: 0.1}, "gave a float, expected a scheduler"),
    "a loss that cannot be copied": ({"loss": partial(losses_of, torch)}, "cannot be copied"),
}  # fmt: skip


@pytest.mark.parametrize("together", [1, 64])
@pytest.mark.parametrize("name", STAGES)
def test_what_no_such_loop_can_train_is_refused(name: str, together: int) -> None:
    changes, message = STAGES[name]
    training = replace(_of(**changes), together=together)
    with pytest.raises(ScoreError, match=message):
        training.run(jobs_of(training, 1))


def test_a_hook_on_the_steps_of_all_optimizers_is_refused() -> None:
    handle = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: None)
    try:
        with pytest.raises(ScoreError, match="hook on its steps"):
            _of().run(jobs_of(_of(), 1))
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"optimizer": partial(OwnSGD, lr=0.1)}, "OwnSGD"),
        ({"optimizer": _hooked_parameters}, "parameter 0.weight has a hook"),
        ({"loss": _noisy}, "draws at random"),
    ],
)
def test_a_later_stage_is_looked_at_as_the_first_is(second: dict[str, Any], message: str) -> None:
    training = training_of(stage_of(), stage_of(**({"optimizer": sgd} | second)))
    with pytest.raises(ScoreError, match=message):
        training.run(jobs_of(training, 2))
    alone = replace(training, together=1)
    assert np.array_equal(alone.run(jobs_of(training, 2)), [plain_loop(training, *job) for job in jobs_of(training, 2)])


def test_a_count_of_calls_that_goes_on_in_a_second_stage_is_refused() -> None:
    def in_training(module: Any, outputs: Tensor) -> Tensor:
        module.calls += module.training
        return outputs * (1 + 0.1 * module.calls * module.training)

    training = training_of(stage_of(), stage_of(), build=lambda: Changed(after=in_training, calls=0))
    with pytest.raises(ScoreError, match="more than its registered parameters"):
        training.run(jobs_of(training, 2))
