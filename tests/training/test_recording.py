"""What a recording writes: the log of steps, what was trained, in which precision; and several optimizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

import segflow as sf
from segflow.runtime.memory import bytes_in_words

from ..support.helpers import mlp, vectors

N, STEPS = 24, 8
X, Y = vectors(N).tensors


def step(model: nn.Module, *optimizers: Any) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), Y).backward()
    for optimizer in optimizers:
        optimizer.step()


def settings(**options: Any) -> dict[str, Any]:
    return {"dataset_size": N, "total_steps": STEPS, "checkpoints": 4, **options}


# The log


def test_every_step_is_on_disk_before_the_next_begins(tmp_path: Path) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    log = tmp_path / "steps.jsonl"
    with sf.record(model, optimizer, tmp_path, **settings()):
        for number in range(1, STEPS + 1):
            step(model, optimizer)
            rows = [json.loads(line) for line in log.read_text().splitlines()]
            assert [row["step"] for row in rows] == list(range(1, number + 1))
    assert [set(row) for row in rows[1:]] == [{"step", "codes"}] + [{"step"}] * (STEPS - 2)  # only what changed


def test_a_log_that_grew_by_histories_says_of_each_parameter_what_its_steps_were(tmp_path: Path) -> None:
    """Layers thawed one after the other, a parameter group that comes late, and one that never moves."""
    model = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(5)]).double()
    optimizer = SGD([p for layer in model[:4] for p in layer.parameters()], lr=0.1)
    thawed = {0: 1, 1: 3, 2: 6}  # layer: the step from which it is trained
    model.requires_grad_(False)
    with sf.record(model, optimizer, tmp_path, **settings()):
        for number in range(1, STEPS + 1):
            for layer, first in thawed.items():
                model[layer].requires_grad_(number >= first)
            if number == 5:
                optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.3})
                model[4].requires_grad_(True)
            optimizer.zero_grad()
            sum(
                (layer.weight.square().sum() for layer in model if layer.weight.requires_grad), torch.tensor(0.0)
            ).backward()
            optimizer.step()
    found = sf.Trajectory.load(tmp_path)
    first = {**thawed, 4: 5}
    for layer, begins in first.items():
        group = found.group_of(f"{layer}.weight")
        expected = [float(number >= begins) for number in range(1, STEPS + 1)]
        assert found.used.moved[:, group].tolist() == found.used.carried[:, group].tolist() == expected
        assert not found.used.left_out[:, group].any()
        assert found.learning_rates[-1, group] == (0.3 if layer == 4 else 0.1)
    assert found.group_of("3.weight") is None and found.why_untrained("3.weight") == "no step moved it"
    spans = found.observed["steps that moved parameters"]
    assert spans["1.weight"] == {"of": 8, "carried a gradient": 6, "frozen": 2, "frozen in steps": "1-2"}


@pytest.mark.parametrize(
    "damage", [lambda t: t.replace('"step": 3', '"step": 4'), lambda t: "x" + t, lambda t: t[:-40]]
)
def test_a_log_that_was_changed_is_refused(tmp_path: Path, damage: Any) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    with sf.record(model, optimizer, tmp_path, **settings()):
        for _ in range(STEPS):
            step(model, optimizer)
    log = tmp_path / "steps.jsonl"
    log.write_text(damage(log.read_text()))
    with pytest.raises(sf.TrajectoryError, match=r"steps.jsonl: damaged, its .* bytes have sha256"):
        sf.Trajectory.load(tmp_path)


# What is saved


class Adapted(nn.Module):
    """A frozen base with a small adapter, as LoRA has it, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.down, self.up = nn.Linear(5, 3), nn.Linear(5, 2, bias=False), nn.Linear(2, 3, bias=False)
        self.register_buffer("seen", torch.zeros(1))
        self.base.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.base(x) + self.up(self.down(x))


def adapted(folder: Path, **options: Any) -> tuple[Adapted, sf.Trajectory]:
    model = Adapted()
    optimizer = Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with sf.record(model, optimizer, folder, **settings(**options)):
        for _ in range(STEPS):
            step(model, optimizer)
    return model, sf.Trajectory.load(folder)


def test_a_frozen_base_is_stored_once_and_each_checkpoint_is_whole_with_it(tmp_path: Path) -> None:
    model, found = adapted(tmp_path)
    assert set(load_file(tmp_path / "frozen.safetensors")) == {"model.base.weight", "model.base.bias"}
    for path in found.checkpoints:
        moments = {"second_moment.down.weight", "second_moment.up.weight"}
        assert set(load_file(path)) == {"model.down.weight", "model.up.weight", "model.seen"} | moments
    state = found.state(3)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    other = Adapted()
    nn.init.zeros_(other.base.weight)
    found.load_into(other, 0)
    assert torch.equal(other.base.weight, model.base.weight)
    (tmp_path / "frozen.safetensors").write_bytes(b"something else")
    with pytest.raises(sf.TrajectoryError, match=r"frozen.safetensors: damaged"):
        sf.Trajectory.load(tmp_path).state(0)


def test_what_is_thawed_or_changed_by_others_is_saved_from_then_on(tmp_path: Path) -> None:
    model = nn.ModuleDict({name: nn.Linear(5, 3) for name in ("head", "late", "teacher", "still")}).double()
    for name in ("late", "teacher", "still"):
        model[name].requires_grad_(False)
    optimizer = SGD([*model["head"].parameters(), *model["late"].parameters()], lr=0.1)
    states = {}
    with sf.record(model, optimizer, tmp_path, **settings()):
        for number in range(1, STEPS + 1):
            model["late"].requires_grad_(number > 5)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model["head"](X) + model["late"](X), Y).backward()
            optimizer.step()
            if number == 3:
                model["teacher"].weight.data.mul_(0.5)  # as a momentum encoder is
            states[number] = {name: value.clone() for name, value in model.state_dict().items()}
    found = sf.Trajectory.load(tmp_path)
    for index, number in enumerate(found.steps):
        assert all(torch.equal(found.state(index)[name], value) for name, value in states[number].items())
    saved = [{name.split(".")[1] for name in load_file(path)} for path in found.checkpoints]
    assert saved == [{"head"}, {"head", "teacher"}, {"head", "teacher", "late"}, {"head", "teacher", "late"}]
    changed = "no recorded optimizer holds it, and it changed during training"
    assert found.why_untrained("teacher.weight") == changed
    assert found.why_untrained("still.weight") == "no recorded optimizer holds it"


@pytest.mark.parametrize(
    ("dtype", "of_moments"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)]
)
def test_checkpoints_are_written_in_the_precision_asked_for(
    tmp_path: Path, dtype: torch.dtype, of_moments: torch.dtype
) -> None:
    model, found = adapted(tmp_path, dtype=dtype)
    for name, value in load_file(found.checkpoints[-1]).items():
        assert value.dtype == (of_moments if name.startswith("second_moment.") else dtype), name
    assert load_file(tmp_path / "frozen.safetensors")["model.base.weight"].dtype == dtype
    other = Adapted()
    found.load_into(other, 3)
    assert torch.equal(other.up.weight, model.up.weight.to(dtype).double())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float8_e4m3fn, 16])
def test_a_precision_that_holds_no_parameters_is_refused(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(sf.TrajectoryError, match=r"expected a floating-point torch.dtype"):
        adapted(tmp_path, dtype=dtype)


def test_the_recording_says_what_it_will_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Adapted()
    optimizer = Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with sf.record(model, optimizer, tmp_path, **settings(progress=True)) as recording:
        for _ in range(STEPS):
            step(model, optimizer)
        each, once = 8 * (2 * 16 + 1), 8 * 18  # adapters with their moments, and a buffer; the base
        words = f"4 checkpoints of {each} B each, and {once} B of frozen parameters once"
        assert str(recording) == words
        assert recording.expected() == (4, each, once)
    assert capsys.readouterr().err == f"recording into {tmp_path}: {words}\n"
    optimizer.state.clear()
    held = [
        sum(value.nbytes for value in load_file(path).values()) for path in sf.Trajectory.load(tmp_path).checkpoints
    ]
    assert held == [each] * 4
    with sf.record(
        model, optimizer, tmp_path, **settings(progress=None, dtype=torch.float16, overwrite=True)
    ) as recording:
        for _ in range(STEPS):
            step(model, optimizer)
        assert recording.expected() == (4, 2 * 17 + 4 * 16, 2 * 18)


def test_sizes_are_said_in_words() -> None:
    assert [bytes_in_words(n) for n in (0, 999, 1000, 2_500_000, 13_200_000_000)] == [
        "0 B",
        "999 B",
        "1 kB",
        "2.5 MB",
        "13.2 GB",
    ]


# Several optimizers


def test_constants_and_second_moments_are_those_of_each_parameters_optimizer(tmp_path: Path) -> None:
    model = mlp()
    first = SGD(model[0].parameters(), lr=0.1, momentum=0.5)
    second = AdamW(
        [{"params": model[2].parameters()}, {"params": model[4].parameters(), "eps": 0.5}], lr=0.01, weight_decay=0.3
    )
    with sf.record(model, [first, second], tmp_path, **settings()):
        for _ in range(STEPS):
            step(model, first, second)
    found = sf.Trajectory.load(tmp_path)
    groups = [found.group_of(f"{layer}.weight") for layer in (0, 2, 4)]
    assert [found.kinds[group] for group in groups] == ["SGD", "AdamW", "AdamW"]
    assert [found.eps[group] for group in groups] == [1e-8, 1e-8, 0.5]
    assert [found.decoupled[group] for group in groups] == [False, True, True]
    assert [found.has_moments[group] for group in groups] == [False, True, True]
    assert found.preconditioned and found.saved_moments(0) == {f"{n}.{p}" for n in (2, 4) for p in ("weight", "bias")}
    velocity = sum((1 - 0.5**left) / 0.5 * 0.1 for left in range(1, STEPS + 1))
    assert found.lr_steps(0, STEPS)[groups[0]] == pytest.approx(velocity)
    assert found.lr_steps(0, STEPS)[groups[1]] == pytest.approx(0.01 * STEPS)
    assert found.decay_steps(0, STEPS)[groups[2]] == pytest.approx(0.01 * STEPS * 0.3)


def test_a_step_is_one_round_of_all_optimizers(tmp_path: Path) -> None:
    """One steps each time, one every third time: what has not stepped when a round ends was not moved by it."""
    model = mlp()
    often, seldom = SGD(model[0].parameters(), lr=0.1), SGD([*model[2].parameters(), *model[4].parameters()], lr=0.1)
    states = []
    with sf.record(model, [often, seldom], tmp_path, **settings(total_steps=9, checkpoints=[4, 6])):
        for number in range(1, 10):
            step(model, *([often, seldom] if number % 3 == 0 else [often]))
            seldom.zero_grad()
            states.append({name: value.clone() for name, value in model.state_dict().items()})
    found = sf.Trajectory.load(tmp_path)
    assert found.steps == (4, 6, 9)
    moved = {name: found.used.moved[:, found.group_of(name)].tolist() for name in ("0.weight", "2.weight")}
    assert moved == {"0.weight": [1.0] * 9, "2.weight": [float(number % 3 == 0) for number in range(1, 10)]}
    for index, number in enumerate(found.steps):
        assert all(torch.equal(found.state(index)[name], value) for name, value in states[number - 1].items())


def test_what_optimizers_cannot_be_recorded_together_is_said(tmp_path: Path) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    for given, text in (
        ([optimizer, Adam(model[0].parameters())], r"parameter '0.weight' is held by 2 of the optimizers"),
        ([optimizer, optimizer], "expected one optimizer, or several different ones, found 2"),
        ([], "expected one optimizer, or several different ones, found 0"),
        ([optimizer, "adam"], "the optimizer is a str, which has no step hooks"),
    ):
        with pytest.raises(sf.TrajectoryError, match=text), sf.record(model, given, tmp_path, **settings()):
            pass
    averaged = torch.optim.swa_utils.AveragedModel(model)
    recording = sf.record(averaged, optimizer, tmp_path, **settings())
    with pytest.raises(sf.TrajectoryError, match="it is an average of another model's weights, which"), recording:
        pass
    assert not list(tmp_path.iterdir())


def test_a_parameter_group_that_is_added_does_not_shift_another_optimizers(tmp_path: Path) -> None:
    model = mlp()
    first, second = SGD(model[0].parameters(), lr=0.1), SGD(model[4].parameters(), lr=0.005)
    model[2].requires_grad_(False)
    with sf.record(model, [first, second], tmp_path, **settings()):
        for number in range(STEPS):
            if number == 4:
                first.add_param_group({"params": list(model[2].requires_grad_(True).parameters()), "lr": 0.2})
            step(model, first, second)
    found = sf.Trajectory.load(tmp_path)
    rates = {name: found.learning_rates[:, found.group_of(f"{name}.weight")].tolist() for name in ("0", "2", "4")}
    assert rates == {"0": [0.1] * 8, "2": [0.0] * 4 + [0.2] * 4, "4": [0.005] * 8}


def test_parameters_that_change_groups_leave_or_are_replaced_are_followed(tmp_path: Path) -> None:
    model = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(4)]).double()
    moving, leaving, replaced, swapped = (layer.weight for layer in model)
    optimizer = SGD([{"params": [moving, leaving, replaced]}, {"params": [swapped], "lr": 0.1}], lr=0.01)
    with sf.record(model, optimizer, tmp_path, **settings(total_steps=4, checkpoints=2)):
        for number in range(4):
            groups = optimizer.param_groups
            if number == 2:
                model[2].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
                groups[0]["params"], groups[1]["params"] = [swapped, model[2].weight], [moving]
            optimizer.zero_grad()
            sum(layer.weight.sum() for layer in model).backward()
            optimizer.step()
    found = sf.Trajectory.load(tmp_path)
    rates = [[found.lr_steps(n, n + 1)[found.group_of(f"{layer}.weight")] for n in range(4)] for layer in range(4)]
    assert rates == [[0.01, 0.01, 0.1, 0.1], [0.01, 0.01, 0, 0], [0.01] * 4, [0.1, 0.1, 0.01, 0.01]]


def test_a_parameter_group_may_be_removed(tmp_path: Path) -> None:
    model = mlp()
    optimizer = Adam([{"params": layer.parameters()} for layer in (model[0], model[2], model[4])], lr=0.01)
    with sf.record(model, optimizer, tmp_path, **settings()):
        for number in range(STEPS):
            if number == 3:
                del optimizer.param_groups[1]
            step(model, optimizer)
    found = sf.Trajectory.load(tmp_path)
    moved = [found.used.moved[:, found.group_of(f"{layer}.weight")].sum() for layer in (0, 2, 4)]
    assert moved == [8, 3, 8]


# Skipped steps


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_no_steps(tmp_path: Path, fused: bool) -> None:
    model = nn.Linear(5, 3)
    optimizer = AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    taken = []
    with sf.record(model, optimizer, tmp_path, **settings(total_steps=None)):
        for number in range(12):
            before = model.weight.detach().clone()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X.float()), Y) * (float("inf") if number in (3, 4, 7) else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            taken.append(not torch.equal(before, model.weight))
    found = sf.Trajectory.load(tmp_path)
    assert found.total_steps == sum(taken) == 9
    assert found.used.clip_factors[:, 0].max() < 1 and len(found.second_moments(len(found) - 1)) == 2
    assert found.observed.get("skipped steps") == (3 if fused else None)
    assert "gradients, not followed" not in found.observed


# Regimes


def test_closures_are_followed_where_a_step_calls_them_once(tmp_path: Path) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss

    with sf.record(model, optimizer, tmp_path / "closure", **settings()):
        for _ in range(STEPS):
            optimizer.step(closure)
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with sf.record(model, optimizer, tmp_path / "plain", **settings()):
        for _ in range(STEPS):
            closure()
            optimizer.step()
    closed, plain = (sf.Trajectory.load(tmp_path / name) for name in ("closure", "plain"))
    assert closed.lr_steps(0, STEPS) == plain.lr_steps(0, STEPS) and closed.used.clip_factors.max() < 1
    assert closed.observed == plain.observed


class Namesake(SGD):
    """As schedule-free and 8-bit optimizers are: torch's in form, other in what a step does."""


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: torch.optim.LBFGS(p, max_iter=3), "LBFGS"),
        (lambda p: Namesake(p, lr=0.1), "tests.training.test_recording.Namesake"),
        (
            lambda p: type("AdamW", (Namesake,), {"__module__": "bitsandbytes.optim"})(p, lr=0.1),
            "bitsandbytes.optim.AdamW",
        ),
    ],
)
def test_optimizers_whose_steps_are_not_known_are_refused_by_name(tmp_path: Path, make: Any, name: str) -> None:
    model = mlp()
    optimizer = make(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    with sf.record(model, optimizer, tmp_path, **settings()):
        for _ in range(STEPS):
            optimizer.step(closure)
    found = sf.Trajectory.load(tmp_path)
    for method in (sf.Source(), sf.TracIn(), sf.Hydra()):
        with pytest.raises(sf.TrajectoryError, match=rf"trained with {name}: effective learning rates are known"):
            method.plan(found)
    assert sf.InfluenceFunction().plan(found) and sf.GradientDot().plan(found)
