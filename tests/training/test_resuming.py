"""A recording that goes on after a stop: joined without a gap, or refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import segflow as sf

from ..support.helpers import mlp, vectors

N, STEPS, STOP = 24, 20, 9
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "Adam": lambda p: Adam(p, lr=0.01),
    "AdamW, amsgrad": lambda p: AdamW(p, lr=0.01, amsgrad=True),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5),
    "SGD, momentum": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "SGD": lambda p: SGD(p, lr=0.05),
}


def steps(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    data = vectors(N)
    x, y = data.tensors
    for step in range(first, last + 1):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + step % 4)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def stopped(folder: Path, make: Callable[[Any], Optimizer], at: int, saved: int, **options: Any) -> tuple[Any, Any]:
    """A run that is stopped after step `at`; what its trainer had saved after step `saved`."""
    model = mlp()
    optimizer = make(model.parameters())
    state: tuple[Any, Any] = ({}, {})
    with pytest.raises(KeyboardInterrupt), sf.record(model, optimizer, folder, **settings(options)):
        steps(model, optimizer, 1, saved)
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        steps(model, optimizer, saved + 1, at)
        raise KeyboardInterrupt
    return state


def settings(options: dict[str, Any]) -> dict[str, Any]:
    return {"dataset_size": N, "total_steps": STEPS, "checkpoints": 5, **options}


def resumed(
    folder: Path,
    make: Callable[[Any], Optimizer],
    state: tuple[Any, Any],
    first: int,
    last: int = STEPS,
    **options: Any,
) -> sf.Trajectory:
    model = mlp(seed=7)
    optimizer = make(model.parameters())
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    with sf.record(model, optimizer, folder, resume=True, **settings(options)):
        steps(model, optimizer, first, last)
    return sf.Trajectory.load(folder)


def assert_equal(found: sf.Trajectory, whole: sf.Trajectory) -> None:
    assert found.steps == whole.steps and found.parameter_groups == whole.parameter_groups
    for start, end in ((0, STEPS), (3, STOP + 2), (STOP, STEPS)):
        assert found.lr_steps(start, end) == whole.lr_steps(start, end)
        assert found.decay_steps(start, end) == whole.decay_steps(start, end)
    for index in range(len(whole)):
        state, moments = found.state(index), found.second_moments(index)
        assert all(torch.equal(value, state[name]) for name, value in whole.state(index).items())
        of_whole = whole.second_moments(index)
        assert (moments is None) is (of_whole is None)
        assert all(torch.equal(value, (moments or {})[name]) for name, value in (of_whole or {}).items())


@pytest.mark.parametrize("total", [STEPS, None])
@pytest.mark.parametrize(("at", "saved"), [(STOP, STOP), (STOP + 6, STOP), (STOP, 3), (2, 2)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_went_on_twice_is_recorded_as_if_it_had_never_stopped(
    tmp_path: Path, name: str, at: int, saved: int, total: int | None
) -> None:
    make = OPTIMIZERS[name]
    model = mlp()
    optimizer = make(model.parameters())
    with sf.record(model, optimizer, tmp_path / "whole", **settings({"total_steps": total})):
        steps(model, optimizer, 1, STEPS)
    whole = sf.Trajectory.load(tmp_path / "whole")
    counted = not name.startswith("SGD")
    options = {"total_steps": total, **({} if counted else {"step": saved})}
    state = stopped(tmp_path / "run", make, at, saved, total_steps=total)
    found = resumed(tmp_path / "run", make, state, saved + 1, **options)
    assert_equal(found, whole) if total else None
    assert found.lr_steps(0, STEPS) == whole.lr_steps(0, STEPS)
    assert found.observed["resumed after steps"] == [saved]
    assert (tmp_path / "run" / "steps.jsonl").read_text().count("\n") == STEPS
    files = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert files == {path.name for path in found.checkpoints}


def test_a_finished_recording_may_go_on_too(tmp_path: Path) -> None:
    make = OPTIMIZERS["Adam"]
    model = mlp()
    optimizer = make(model.parameters())
    with sf.record(model, optimizer, tmp_path, **settings({"checkpoints": [5]})):
        steps(model, optimizer, 1, STEPS)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    found = resumed(tmp_path, make, state, STEPS + 1, STEPS + 5, total_steps=None, checkpoints=[5, 23])
    assert found.steps == (5, 20, 23, 25) and found.observed["resumed after steps"] == [STEPS]


def test_where_there_is_nothing_to_go_on_with_a_recording_begins(tmp_path: Path) -> None:
    make = OPTIMIZERS["Adam"]
    model = mlp()
    with sf.record(model, make(model.parameters()), tmp_path, resume=True, **settings({})) as recording:
        steps(model, recording.optimizers[0], 1, STEPS)
    assert "resumed after steps" not in sf.Trajectory.load(tmp_path).observed
    with pytest.raises(sf.TrajectoryError, match="no recording to go on with, so steps 1 to 4 are missing"):
        resumed(tmp_path / "none", make, stopped(tmp_path / "other", make, 4, 4), 5, step=4)


def test_a_gap_is_refused_and_what_was_recorded_stays(tmp_path: Path) -> None:
    make = OPTIMIZERS["Adam"]
    state = stopped(tmp_path / "run", make, STOP, STOP)
    text = (tmp_path / "run" / "steps.jsonl").read_text()
    (tmp_path / "run" / "steps.jsonl").write_text(
        "".join(line + "\n" for line in text.split("\n")[:6]) + '{"step": 7, "l'
    )
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        sf.TrajectoryError, match=r"the optimizer has taken 9 steps with '0.weight', but the log holds 6: "
    ):
        resumed(tmp_path / "run", make, state, STOP + 1)
    with pytest.raises(sf.TrajectoryError, match=r"step=9, but the log ends at step 6: steps 7 to 9 are missing"):
        resumed(tmp_path / "run", make, state, STOP + 1, step=9)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("SGD", {}, "the log holds 9 steps, and the optimizer does not tell how many it has taken. Pass step="),
        ("Adam", {"step": 5}, r"taken 9 steps with '0.weight', which fits steps 9 to 9\. Pass step=, .*, not 5"),
        ("SGD", {"step": -1}, "step=-1: expected a whole number"),
        ("SGD", {"step": 9, "overwrite": True}, "expected one of overwrite and resume"),
    ],
)
def test_where_training_goes_on_must_be_known(tmp_path: Path, name: str, options: dict[str, Any], text: str) -> None:
    state = stopped(tmp_path, OPTIMIZERS[name], STOP, STOP)
    with pytest.raises(sf.TrajectoryError, match=text):
        resumed(tmp_path, OPTIMIZERS[name], state, STOP + 1, **options)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dataset_size": N + 1}, r"dataset_size was 24, and is 25 where the recording would go on"),
        ({"make": lambda p: AdamW(p, lr=0.01)}, r"optimizers was \['Adam'\], and is \['AdamW'\]"),
        ({"make": lambda p: Adam(p, lr=0.01, eps=0.1)}, r"the optimizer's eps was \[1e-08\], and is \[0.1\]"),
        ({"example_weights": [1.0] * N}, "sampling was uniform, as is assumed, and is example weights"),
    ],
)
def test_a_recording_goes_on_with_what_it_began_with(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    state = stopped(tmp_path, OPTIMIZERS["Adam"], STOP, STOP)
    make = change.pop("make", OPTIMIZERS["Adam"])
    model = mlp()
    optimizer = make(model.parameters())
    options = {k: v for k, v in optimizer.state_dict()["param_groups"][0].items() if k != "params"}
    optimizer.load_state_dict(state[1])
    optimizer.param_groups[0].update(options)
    recording = sf.record(model, optimizer, tmp_path, resume=True, **settings(change))
    with pytest.raises(sf.TrajectoryError, match=text), recording:
        pass


def test_draws_before_and_after_a_stop_are_added(tmp_path: Path) -> None:
    for first, last, resume in ((0, 4, False), (4, 12, True)):
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1)
        sampler = sf.CountedSampler(range(N) if resume else range(N // 2))
        options = {"total_steps": None, "checkpoints": [4, 8, 12] if resume else [4], "sampler": sampler}
        extra = {"resume": True, "step": 4} if resume else {}
        with sf.record(model, optimizer, tmp_path, **settings(options), **extra):
            for _ in range(first, last):
                list(sampler)
                steps(model, optimizer, 1, 1)
    counts = [load_file(path)["example_counts"] for path in sf.Trajectory.load(tmp_path).checkpoints]
    assert [(row[0].item(), row[-1].item()) for row in counts] == [(4, 0), (8, 4), (12, 8)]


def test_a_frozen_part_that_was_changed_before_the_resume_is_saved_from_then_on(tmp_path: Path) -> None:
    model = nn.ModuleDict({"head": nn.Linear(5, 3), "base": nn.Linear(5, 3).requires_grad_(False)}).double()
    optimizer = SGD(model["head"].parameters(), lr=0.1)
    x, y = vectors(N).tensors
    for first, resume in ((1, {}), (5, {"resume": True, "step": 4})):
        with sf.record(
            model, optimizer, tmp_path, **settings({"total_steps": None, "checkpoints": [4, first + 3]}), **resume
        ):
            for _ in range(first, first + 4):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model["head"](x), y).backward()
                optimizer.step()
        last = {name: value.clone() for name, value in model.state_dict().items()}
        model["base"].weight.data.neg_()
    found = sf.Trajectory.load(tmp_path)
    assert all(torch.equal(value, found.state(1)[name]) for name, value in last.items())
    assert not torch.equal(found.state(0)["base.weight"], last["base.weight"])


def test_step_is_for_resuming_only(tmp_path: Path) -> None:
    model = mlp()
    recording = sf.record(model, SGD(model.parameters(), lr=0.1), tmp_path, step=3, **settings({}))
    with pytest.raises(sf.TrajectoryError, match="step= with resume=True only"), recording:
        pass


def test_a_velocity_that_was_lost_at_the_stop_moves_nothing_afterwards(tmp_path: Path) -> None:
    """SGD's momentum buffers were not loaded: gradients before the stop count for the steps before it only."""
    make = OPTIMIZERS["SGD, momentum"]
    model_state, _ = stopped(tmp_path, make, STOP, STOP)
    fresh = make(mlp().parameters()).state_dict()
    found = resumed(tmp_path, make, (model_state, fresh), STOP + 1, step=STOP)
    rate, momentum = [0.01 * (1 + step % 4) for step in range(1, STEPS + 1)], 0.9
    for first, last in ((1, STOP), (STOP + 1, STEPS)):
        expected = sum(rate[j - 1] * momentum ** (j - k) for k in range(first, last + 1) for j in range(k, last + 1))
        assert found.lr_steps(first - 1, last)[0] == pytest.approx(expected, rel=1e-12)


def test_the_later_part_alone_is_never_taken_for_the_run(tmp_path: Path) -> None:
    make = OPTIMIZERS["Adam"]
    state = stopped(tmp_path / "first", make, STOP, STOP)
    model = mlp()
    optimizer = make(model.parameters())
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    recording = sf.record(model, optimizer, tmp_path / "rest", **settings({"total_steps": 5, "checkpoints": 1}))
    with pytest.warns(UserWarning, match="the optimizer has taken 9 steps already that no stage in"), recording:
        steps(model, optimizer, STOP + 1, STOP + 5)
    found = sf.Trajectory.load(tmp_path / "rest")
    assert found.observed["steps before the recording"] == "9 steps"
    for method in (sf.Source(), sf.TracIn(), sf.Hydra()):
        with pytest.raises(sf.TrajectoryError, match="9 steps before the recording are missing"):
            method.plan(found)
    sf.InfluenceFunction().plan(found)  # which needs the end of training only
    partial = sf.Trajectory.load(tmp_path / "rest", partial=True)
    assert sf.Source().plan(partial) and partial.observed["steps before the recording"] == "9 steps"
    # Adam's bias correction counts the steps before
    rates = [0.01 * (1 + step % 4) for step in range(STOP + 1, STOP + 6)]
    expected = [
        sum(lr * 0.1 * 0.9 ** (j - k) / (1 - 0.9 ** (STOP + 1 + j)) for j, lr in enumerate(rates) if j >= k)
        for k in range(5)
    ]
    assert partial.lr_steps(0, 5)[0] == pytest.approx(sum(expected), rel=1e-12)


def test_stages_account_for_the_steps_of_an_optimizer_that_serves_them_all(tmp_path: Path) -> None:
    model = mlp()
    optimizer = Adam(model.parameters(), lr=0.01)
    for name in ("first", "second", "third"):
        with sf.record(model, optimizer, tmp_path, stage=name, **settings({"total_steps": 6, "checkpoints": 1})):
            steps(model, optimizer, 1, 6)
    found = sf.Trajectory.load(tmp_path)
    assert sf.Source().plan(found) and "steps before the recording" not in found.observed
    assert found.used.taken_before.tolist() == [12.0]


def test_a_stage_goes_on_unless_a_later_one_follows(tmp_path: Path) -> None:
    make = OPTIMIZERS["Adam"]
    state = stopped(tmp_path, make, STOP, STOP, stage="first")
    assert resumed(tmp_path, make, state, STOP + 1, stage="first").total_steps == STEPS
    model = mlp()
    optimizer = make(model.parameters())
    with sf.record(model, optimizer, tmp_path, stage="second", **settings({})):
        steps(model, optimizer, 1, STEPS)
    with pytest.raises(sf.TrajectoryError, match="stage 'first' cannot go on, for 'second' was recorded after it"):
        resumed(tmp_path, make, state, STOP + 1, stage="first")


def test_what_is_not_a_recording_of_this_format_is_not_gone_on_with(tmp_path: Path) -> None:
    make = OPTIMIZERS["Adam"]
    state = stopped(tmp_path, make, STOP, STOP)
    path = tmp_path / "recording.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(sf.TrajectoryError, match="trajectory format 2, this segflow reads 3"):
        resumed(tmp_path, make, state, STOP + 1)
