"""Trajectory: what it accepts, what it refuses and how it says so; and how segments cut it."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import segflow as sf
from segflow.training.segments import cut

from ..support.helpers import mlp, perturbed_states, trajectory_of

STEPS = (10, 20, 30, 40)


def trajectory(folder: Path, **changes: Any) -> sf.Trajectory:
    """Four checkpoints, ten steps apart, with one argument of Trajectory changed."""
    base = trajectory_of(folder, perturbed_states(mlp(), 4), 24)
    known = {"checkpoints": base.checkpoints, "steps": STEPS, "learning_rates": 0.1, "dataset_size": 24}
    return sf.Trajectory(**{**known, **changes})


def constants(**values: Any) -> dict[str, Any]:
    return {"optimizer": sf.OptimizerConstants(**values)}


def recorded(folder: Path) -> sf.Trajectory:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sf.record(model, optimizer, folder, dataset_size=4, total_steps=6, checkpoints=2):
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.ones(4, 2)).square().mean().backward()
            optimizer.step()
    return sf.Trajectory.load(folder)


# What a plain trajectory may be given


def test_every_form_of_learning_rates_is_read_as_steps_by_groups(tmp_path: Path) -> None:
    values = np.linspace(0.1, 1, 40)
    for given_as in (
        values,
        values.tolist(),
        torch.from_numpy(values),
        dict(enumerate(values, start=1)),
        values[:, None],
    ):
        found = trajectory(tmp_path, learning_rates=given_as)
        assert found.learning_rates.shape == (40, 1) and found.learning_rates.dtype == torch.float64
        assert found.lr_steps(5, 17) == (pytest.approx(values[5:17].sum(), rel=1e-13),)
    pairs = np.stack([values, 2 * values], 1)
    for given_as in (pairs, pairs.tolist(), dict(enumerate(pairs.tolist(), start=1))):
        found = trajectory(tmp_path, learning_rates=given_as, parameter_groups={})
        assert found.lr_steps(0, 40) == pytest.approx((values.sum(), 2 * values.sum()), rel=1e-13)
    assert trajectory(tmp_path, learning_rates=0.5).lr_steps(3, 5) == (1.0,)


def taken_of_each_gradient(lr: np.ndarray, m: np.ndarray, d: np.ndarray) -> np.ndarray:
    """What all steps take of each step's gradient, by SGD's definition; the first gradient is not dampened."""
    rates = np.zeros_like(lr)
    for step in range(len(lr)):
        velocity = 1 - (d[step] if step else 0.0)
        for later in range(step, len(lr)):
            velocity = velocity if later == step else velocity * m[later]
            rates[step] += lr[later] * velocity
    return rates


def test_lr_steps_are_what_all_later_steps_take_of_the_gradients(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lr, m, d, w = generator.uniform(0.1, 0.9, (4, 40, 2))
    found = trajectory(
        tmp_path, learning_rates=lr, parameter_groups={}, **constants(momentum=m, dampening=d, weight_decay=w)
    )
    rates = taken_of_each_gradient(lr, m, d)
    assert found.lr_steps(7, 29) == pytest.approx(tuple(rates[7:29].sum(0)), rel=1e-12)
    assert found.decay_steps(7, 29) == pytest.approx(tuple((rates * w)[7:29].sum(0)), rel=1e-12)


def test_dampening_without_momentum_changes_nothing_as_in_torch(tmp_path: Path) -> None:
    plain, dampened = (trajectory(tmp_path, **constants(dampening=d)) for d in (0.0, 0.5))
    assert plain.lr_steps(0, 40) == dampened.lr_steps(0, 40)


def test_constants_may_be_given_once_per_step_or_per_step_and_group(tmp_path: Path) -> None:
    rates = np.full((40, 2), 0.1)
    for m in (0.5, [0.5] * 40, torch.full((40, 2), 0.5), np.full((40, 1), 0.5)):
        found = trajectory(tmp_path, learning_rates=rates, parameter_groups={}, **constants(momentum=m))
        expected = sum(0.1 * (1 - 0.5**left) / 0.5 for left in range(1, 41))
        assert found.lr_steps(0, 40) == pytest.approx((expected, expected), rel=1e-13)


def test_steps_that_do_not_learn_do_not_decay(tmp_path: Path) -> None:
    found = trajectory(tmp_path, learning_rates=[0.0] * 20 + [0.1] * 20, **constants(weight_decay=0.03))
    assert found.lr_steps(0, 20) == found.decay_steps(0, 20) == (0.0,)
    assert found.decay_steps(0, 40) == (pytest.approx(0.06),)


def test_several_learning_rates_need_to_know_whose_they_are(tmp_path: Path) -> None:
    with pytest.raises(
        sf.TrajectoryError, match="learning_rates cover 2 parameter groups, and parameter_groups does not"
    ):
        trajectory(tmp_path, learning_rates=np.full((40, 2), 0.1))


def test_parameter_groups_say_which_learning_rates_a_parameter_had(tmp_path: Path) -> None:
    rates = np.full((40, 2), 0.1)
    found = trajectory(tmp_path, learning_rates=rates, parameter_groups={"0.weight": 1, "0.bias": 0})
    assert (found.group_of("0.weight"), found.group_of("0.bias"), found.group_of("2.weight")) == (1, 0, None)
    assert trajectory(tmp_path).group_of("anything") == 0


def test_repr_and_length_tell_the_run(tmp_path: Path) -> None:
    found = trajectory(tmp_path)
    assert len(found) == 4
    assert repr(found) == "Trajectory(SGD, 40 steps, checkpoints at [10, 20, 30, 40], 24 examples)"


# What it refuses

MIXED = {step: 0.1 for step in range(1, 41) if step not in (3, 4, 5, 17, 39, 40)}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "missing file": ({"checkpoints": ["a.safetensors"] * 4}, "a.safetensors: no such checkpoint file"),
    "a folder without a state": ({"checkpoints": [Path()] * 4}, "a folder without any of model.safetensors"),
    "no checkpoint": ({"checkpoints": [], "steps": []}, "0 checkpoint files for 0 steps"),
    "one step too few": ({"steps": STEPS[1:]}, "4 checkpoint files for 3 steps: expected one step for each file"),
    "steps out of order": ({"steps": (10, 30, 20, 40)}, r"steps=\[10, 30, 20, 40\]: expected steps that ascend"),
    "a step twice": ({"steps": (10, 20, 20, 40)}, r"steps=\[10, 20, 20, 40\]: expected steps that ascend"),
    "step zero": ({"steps": (0, 20, 30, 40)}, r"steps\[0\]=0: expected a whole number, at least 1"),
    "half a step": ({"steps": (10, 20, 30.5, 40)}, r"steps\[2\]=30.5: expected a whole number"),
    "no examples": ({"dataset_size": 0}, "dataset_size=0: expected a whole number, at least 1"),
    "half an example": ({"dataset_size": 2.5}, "dataset_size=2.5: expected a whole number, at least 1"),
    "gap in a mapping": (
        {"learning_rates": MIXED},
        r"steps 3\.\.5, 17, 39\.\.40: no learning rate was recorded "
        r"\(the log covers 1\.\.2, 6\.\.16, 18\.\.38\)\. Pass learning_rates=",
    ),
    "empty mapping": (
        {"learning_rates": {}},
        r"steps 1\.\.40: no learning rate was recorded \(the log covers nothing\)",
    ),
    "not a number in the log": ({"learning_rates": [0.1] * 39 + [float("nan")]}, "steps 40: no learning rate"),
    "one rate missing of one group": (
        {"learning_rates": [[0.1, 0.1]] * 20 + [[0.1, float("nan")]] + [[0.1, 0.1]] * 19},
        "steps 21: no learning rate",
    ),
    "too few": ({"learning_rates": [0.1] * 25}, r"steps 26\.\.40: no learning rate .*the log covers 1\.\.25\)"),
    "none": ({"learning_rates": []}, r"steps 1\.\.40: no learning rate"),
    "too many": (
        {"learning_rates": [0.1] * 41},
        "learning rates for 41 steps, but the last checkpoint stands at step 40. Training's end must be a checkpoint",
    ),
    "mapping beyond the end": ({"learning_rates": {**MIXED, 41: 0.1}}, "the step=41: expected a whole number, 1 to 40"),
    "mapping from zero": (
        {"learning_rates": dict.fromkeys(range(40), 0.1)},
        "the step=0: expected a whole number, 1 to 40",
    ),
    "mapping of half steps": ({"learning_rates": {1.5: 0.1}}, "the step=1.5: expected a whole number, 1 to 40"),
    "mapping of texts": ({"learning_rates": {"1": 0.1}}, "the step='1': expected a whole number, 1 to 40"),
    "mapping of two widths": ({"learning_rates": {1: [0.1], 2: [0.1, 0.2]}}, "learning_rates: expected numbers"),
    "negative": ({"learning_rates": [0.1] * 39 + [-0.25]}, "must not be negative, found -0.25"),
    "texts": ({"learning_rates": ["a"] * 40}, "learning_rates: expected numbers"),
    "rates of three axes": ({"learning_rates": np.ones((40, 2, 2))}, r"learning_rates has shape \(40, 2, 2\)"),
    "rates of no group": ({"learning_rates": np.ones((40, 0))}, r"learning_rates has shape \(40, 0\)"),
    "momentum of other steps": (constants(momentum=[0.5] * 39), r"momentum has shape \(39, 1\): .*\[40, 1\]"),
    "momentum of one step": (constants(momentum=[0.5]), r"momentum has shape \(1, 1\)"),
    "momentum of other groups": (constants(momentum=np.ones((40, 2))), r"momentum has shape \(40, 2\)"),
    "dampening of three axes": (constants(dampening=np.ones((40, 1, 1))), r"dampening has shape \(40, 1, 1\)"),
    "momentum one": (constants(momentum=1.0), "momentum=1: expected finite numbers >= 0 and < 1"),
    "momentum not a number": (constants(momentum=float("nan")), "momentum=nan: expected finite"),
    "negative weight decay": (constants(weight_decay=-0.1), "weight_decay=-0.1: expected finite numbers >= 0"),
    "group out of range": (
        {"parameter_groups": {"0.weight": 0, "0.bias": 1}},
        r"parameter_groups\['0.bias'\]=1: expected a whole number, 0 to 0. learning_rates cover 1 group\(s\)",
    ),
    "negative group": ({"parameter_groups": {"0.weight": -1}}, r"parameter_groups\['0.weight'\]=-1: expected"),
    "group by name": ({"parameter_groups": {"0.weight": "head"}}, r"parameter_groups\['0.weight'\]='head': expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_incomplete_or_inconsistent_is_refused_by_name(tmp_path: Path, name: str) -> None:
    changes, text = REFUSED[name]
    with pytest.raises(sf.TrajectoryError, match=text):
        trajectory(tmp_path, **changes)


def test_a_trajectory_without_its_optimizer_refuses_source(tmp_path: Path) -> None:
    found = trajectory(tmp_path, **constants(name="NAdam", weight_decay=0.25))
    known = "SGD, Adam, AdamW, RMSprop and Adagrad only"
    with pytest.raises(sf.TrajectoryError, match=rf"trained with NAdam: effective learning rates are known .* {known}"):
        found.lr_steps(0, 10)
    with pytest.raises(sf.TrajectoryError, match="Use InfluenceFunction, which needs none"):
        sf.Source().plan(found)


# Files that hold the checkpoints


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_torch_files_are_read_like_safetensors(tmp_path: Path, wrap: Callable[[dict], Any]) -> None:
    state = mlp(seed=4).state_dict()
    torch.save(wrap(state), tmp_path / "state.pt")
    found = sf.Trajectory([tmp_path / "state.pt"], [5], 0.1, 24)
    model = mlp(seed=9)
    found.load_into(model, 0)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Bomb:
    """Unpickling it calls a function of its choice."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["state.pt", "state.bin", "state.pkl"])
def test_a_file_with_code_in_it_is_refused_and_the_code_never_runs(tmp_path: Path, name: str) -> None:
    fuse = tmp_path / "it-ran"
    content = {**mlp().state_dict(), "extra": Bomb(fuse)}
    if name.endswith("pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    found = sf.Trajectory([tmp_path / name], [5], 0.1, 24)
    with pytest.raises(sf.TrajectoryError, match=rf"{name}: not readable as a plain state_dict"):
        found.state(0)
    assert not fuse.exists()
    pickle.loads(pickle.dumps(Bomb(fuse)))  # noqa: S301  the bomb is real
    assert fuse.exists()


@pytest.mark.parametrize("content", [[1, 2], {"model": mlp().state_dict()}, mlp().state_dict()["0.weight"]])
def test_a_torch_file_that_holds_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(sf.TrajectoryError, match=r"state.pt: expected a state_dict of tensors"):
        sf.Trajectory([tmp_path / "state.pt"], [5], 0.1, 24).state(0)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_of_noise_or_cut_short_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"state.{suffix}"
    save_file(mlp().state_dict(), path) if suffix == "safetensors" else torch.save(mlp().state_dict(), path)
    whole = path.read_bytes()
    for content in (b"", b"noise", whole[: len(whole) // 2], whole[:-1] if suffix == "safetensors" else whole[:64]):
        path.write_bytes(content)
        with pytest.raises(sf.TrajectoryError, match=re.escape(str(path))):
            sf.Trajectory([path], [5], 0.1, 24).state(0)


def test_a_checkpoint_that_vanished_is_named(tmp_path: Path) -> None:
    found = trajectory(tmp_path)
    found.checkpoints[2].unlink()
    with pytest.raises(sf.TrajectoryError, match=r"state-2.safetensors: no such file"):
        found.state(2)
    with pytest.raises(sf.TrajectoryError, match=r"state-2.safetensors: no such file. Restore it"):
        found.digest(2)


WIDER = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 3))
OTHERS: dict[str, tuple[nn.Module, str]] = {
    "other widths": (WIDER, "size mismatch for 0.weight"),
    "a layer more": (nn.Sequential(*mlp(), nn.Linear(3, 3)), r"Missing key\(s\)"),
    "a layer less": (mlp()[:3], r"Unexpected key\(s\)"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_models_checkpoint_is_refused_by_step_and_parameter(tmp_path: Path, name: str) -> None:
    model, text = OTHERS[name]
    with pytest.raises(sf.TrajectoryError, match=rf"(?s)checkpoint at step 20 \(state-1.safetensors\) .*{text}"):
        trajectory(tmp_path).load_into(model.double(), 1)


def test_the_digest_follows_the_file_within_one_trajectory(tmp_path: Path) -> None:
    found = trajectory(tmp_path)
    first = found.digest(0)
    assert found.digest(0) == first != found.digest(1)
    found.checkpoints[0].write_bytes(found.checkpoints[1].read_bytes())
    assert found.digest(0) == found.digest(1)


# Means of checkpoints


class Counting(nn.Module):
    """Single and double precision, a counter and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.single, self.double_ = nn.Linear(3, 2), nn.Linear(2, 2).double()
        self.register_buffer("mask", torch.tensor([True, False]))
        self.norm = nn.BatchNorm1d(2)


def counting_states() -> list[dict[str, torch.Tensor]]:
    states = perturbed_states(Counting(), 4, scale=1.0)
    for index, state in enumerate(states):
        state["norm.num_batches_tracked"] = torch.tensor(10 * index + 1)
        state["mask"] = torch.tensor([index % 2 == 0, index > 1])
    return states


@pytest.mark.parametrize(
    "weights", [{0: 1, 1: 1, 2: 1, 3: 1}, {3: 0.1, 1: 0.25}, {0: 3.0, 2: 0.0, 1: 1e-3}, {2: 7}, {1: 1, 3: 0}]
)
def test_a_mean_of_checkpoints_is_the_weighted_mean_of_their_floating_point_tensors(
    tmp_path: Path, weights: dict[int, float]
) -> None:
    states = counting_states()
    found, model = trajectory_of(tmp_path, states, 24), Counting()
    found.load_into(model, weights)
    total = sum(weights.values())
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            parts = [weight / total * states[index][name].double().numpy() for index, weight in weights.items()]
            expected = np.sum(parts, axis=0).astype(np.float32 if value.dtype == torch.float32 else np.float64)
            np.testing.assert_allclose(value.numpy(), expected, rtol=1e-7 if value.dtype == torch.float32 else 1e-13)
        else:
            assert torch.equal(value, states[max(weights)][name]), name


def test_the_mean_is_taken_in_double_precision(tmp_path: Path) -> None:
    """Added up in single precision, each quarter would be lost beside 2^22."""
    states = [{"weight": torch.tensor([[value]])} for value in (2.0**24, 1.0, 1.0, 1.0)]
    model = nn.Linear(1, 1, bias=False)
    trajectory_of(tmp_path, states, 24).load_into(model, dict.fromkeys(range(4), 1))
    assert model.weight.item() == float(np.float32(2.0**22 + 0.75)) != 2.0**22


def test_a_checkpoint_of_no_weight_does_not_count_even_if_it_is_not_finite(tmp_path: Path) -> None:
    states = [{"weight": torch.tensor([[value]])} for value in (1.0, float("nan"), 3.0)]
    model = nn.Linear(1, 1, bias=False)
    trajectory_of(tmp_path, states, 24).load_into(model, {0: 1, 1: 0, 2: 1})
    assert model.weight.item() == 2.0


@pytest.mark.parametrize(
    "weights",
    [{}, {0: 0.0}, {0: 1, 1: -0.5}, {0: float("nan")}, {0: float("inf"), 1: 1}, {4: 1}, {-1: 1}, {"a": 1}, {0.5: 1}],
)
def test_weights_that_make_no_mean_are_refused(tmp_path: Path, weights: dict[Any, float]) -> None:
    with pytest.raises(
        sf.TrajectoryError, match=r"mean of checkpoints: got .* expected checkpoints 0 to 3 with finite"
    ):
        trajectory(tmp_path).load_into(mlp(), weights)


def test_a_mean_over_different_models_is_refused(tmp_path: Path) -> None:
    found = trajectory_of(tmp_path, [WIDER.state_dict(), mlp().state_dict(), mlp()[:3].state_dict()], 24)
    for weights in ({0: 1, 1: 1}, {1: 1, 2: 1}):
        with pytest.raises(sf.TrajectoryError, match=r"state-\d.safetensors: its tensors are not those of the last"):
            found.load_into(mlp(), weights)
    with pytest.raises(sf.TrajectoryError, match=r"mean of the checkpoints \[0\] is of another model"):
        found.load_into(mlp(), {0: 1})


# Stages


def test_stages_put_in_order_are_known_to_the_last_and_leave_it_as_it_was(tmp_path: Path) -> None:
    first, second, third = (trajectory(tmp_path, stage=name, dataset_size=n) for n, name in enumerate("abc", start=1))
    chain = third.after(second.after(first))
    assert [(stage.stage, stage.dataset_size) for stage in chain.stages] == [("a", 1), ("b", 2), ("c", 3)]
    assert chain.earlier is not None and chain.earlier.earlier is first and first.earlier is None
    assert third.earlier is None and third.stages == (third,) and second.stages == (second,)
    assert (chain.steps, chain.total_steps, chain.lr_steps(0, 40)) == (third.steps, 40, third.lr_steps(0, 40))
    assert repr(chain).endswith("3 examples; last of the stages a, b, c)")
    assert trajectory(tmp_path).stage == "train"


def test_stages_of_one_name_or_put_in_order_twice_are_refused(tmp_path: Path) -> None:
    first, second = (trajectory(tmp_path, stage=name) for name in "ab")
    with pytest.raises(sf.TrajectoryError, match=r"stages \['train', 'train'\]: expected names that differ"):
        trajectory(tmp_path).after(trajectory(tmp_path))
    chain = second.after(first)
    with pytest.raises(sf.TrajectoryError, match=r"stages \['a', 'b', 'a'\]"):
        first.after(chain)
    with pytest.raises(sf.TrajectoryError, match=r"stages \['c', 'a', 'b'\]: .* put in order one by one"):
        chain.after(trajectory(tmp_path, stage="c"))


# Recorded runs


def test_a_damaged_checkpoint_of_a_recorded_run_is_refused_wherever_it_is_damaged(tmp_path: Path) -> None:
    found = recorded(tmp_path)
    path = found.checkpoints[0]
    whole = path.read_bytes()
    found.state(0)
    flipped = [
        whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :] for at in range(len(whole)) for bit in (at % 8,)
    ]
    shortened = [whole[:length] for length in range(0, len(whole), 7)]
    for content in (*flipped, *shortened, whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(sf.TrajectoryError, match=r"step-00000003.safetensors: damaged, its \d+ bytes have sha256"):
            found.state(0)
    path.write_bytes(whole)
    found.state(0)


def test_a_damaged_log_of_learning_rates_is_refused(tmp_path: Path) -> None:
    recorded(tmp_path)
    log = tmp_path / "steps.jsonl"
    log.write_bytes(log.read_bytes()[:-3])
    with pytest.raises(sf.TrajectoryError, match=r"steps.jsonl: damaged"):
        sf.Trajectory.load(tmp_path)


def test_a_deleted_checkpoint_of_a_recorded_run_is_named(tmp_path: Path) -> None:
    recorded(tmp_path).checkpoints[0].unlink()
    with pytest.raises(sf.TrajectoryError, match=r"step-00000003.safetensors: no such checkpoint file"):
        sf.Trajectory.load(tmp_path)


def test_a_folder_without_a_recording_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(sf.TrajectoryError, match=rf"{folder}: no recorded run here \(no trajectory.json\)"):
            sf.Trajectory.load(folder)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda c: c | {"format": 4}, "trajectory format 4, this segflow reads 3"),
        (lambda c: c | {"format": 2}, "trajectory format 2, this segflow reads 3. Record it again"),
        (lambda c: [c], "content: found"),
        (lambda c: {k: v for k, v in c.items() if k != "log"}, r"trajectory.json: damaged \(no 'log'\)"),
        (
            lambda c: c | {"checkpoints": ["step-3"]},
            r"trajectory.json: damaged \('checkpoints'.0: found 'step-3', expected an object",
        ),
        (lambda c: c | {"moved": ["other"]}, r"trajectory.json: damaged \(KeyError: 'other'\)"),
        (lambda c: c | {"checkpoints": c["checkpoints"][:1]}, "the log has 6 steps, but the last checkpoint"),
    ],
)
def test_a_trajectory_json_that_makes_no_sense_is_refused(tmp_path: Path, edit: Callable, text: str) -> None:
    recorded(tmp_path)
    path = tmp_path / "trajectory.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(sf.TrajectoryError, match=text):
        sf.Trajectory.load(tmp_path)


def test_a_trajectory_json_cut_short_is_refused(tmp_path: Path) -> None:
    recorded(tmp_path)
    path = tmp_path / "trajectory.json"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 13):
        path.write_bytes(whole[:length])
        with pytest.raises(sf.TrajectoryError, match=r"trajectory.json: not readable as JSON"):
            sf.Trajectory.load(tmp_path)


def test_a_recorded_run_can_be_moved_to_another_folder(tmp_path: Path) -> None:
    before = recorded(tmp_path / "here").state(0)
    (tmp_path / "here").rename(tmp_path / "there")
    after = sf.Trajectory.load(tmp_path / "there").state(0)
    assert all(torch.equal(before[name], after[name]) for name in before)


# Segments


def spans(found: sf.Trajectory, segments: Any) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(part.start, part.end, part.checkpoints) for part in cut(found, segments)]


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        (1, [(0, 40, (0, 1, 2, 3))]),
        (2, [(0, 20, (0, 1)), (20, 40, (2, 3))]),
        (3, [(0, 20, (0, 1)), (20, 30, (2,)), (30, 40, (3,))]),
        (4, [(0, 10, (0,)), (10, 20, (1,)), (20, 30, (2,)), (30, 40, (3,))]),
        (np.int64(2), [(0, 20, (0, 1)), (20, 40, (2, 3))]),
        ([], [(0, 40, (0, 1, 2, 3))]),
        ([10], [(0, 10, (0,)), (10, 40, (1, 2, 3))]),
        ([15, 39], [(0, 15, (0,)), (15, 39, (1, 2)), (39, 40, (3,))]),
        (np.array([15, 39]), [(0, 15, (0,)), (15, 39, (1, 2)), (39, 40, (3,))]),
    ],
)
def test_segments_are_cut_where_asked(tmp_path: Path, segments: Any, expected: list) -> None:
    assert spans(trajectory(tmp_path), segments) == expected


@pytest.mark.parametrize(
    ("segments", "text"),
    [
        (0, "segments=0: expected 1 to 4, the number of checkpoints"),
        (-1, "segments=-1: expected 1 to 4"),
        (5, r"segments=5: expected 1 to 4, .* Record more checkpoints, or ask for fewer segments"),
        (2.5, "segments=2.5: expected a whole number"),
        ([5.5], r"segments=\[5.5\]: expected ascending whole steps between 1 and 39"),
        ([20, 10], r"segments=\[20, 10\]: expected ascending"),
        ([20, 20], r"segments=\[20, 20\]: expected ascending"),
        ([0, 20], r"segments=\[0, 20\]: expected ascending"),
        ([20, 40], r"segments=\[20, 40\]: expected ascending whole steps between 1 and 39"),
        ([12, 18], r"no checkpoint lies in steps 13\.\.18 \(checkpoints: \[10, 20, 30, 40\]\)\. Move the cut"),
        ([9], r"no checkpoint lies in steps 1\.\.9"),
    ],
)
def test_segments_that_fit_no_trajectory_are_refused(tmp_path: Path, segments: Any, text: str) -> None:
    with pytest.raises(sf.MethodError, match=text):
        cut(trajectory(tmp_path), segments)


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_segments_partition_the_steps_and_their_lr_steps_and_decay_add_up(tmp_path: Path, data: st.DataObject) -> None:
    numbers = st.floats(0.01, 0.9)
    lr, m, w = (data.draw(st.lists(numbers, min_size=40, max_size=40)) for _ in range(3))
    found = trajectory(tmp_path, learning_rates=lr, **constants(momentum=m, weight_decay=w))
    parts = cut(found, data.draw(st.integers(1, 4)))
    assert [part.start for part in parts] == [0, *[part.end for part in parts[:-1]]] and parts[-1].end == 40
    assert sorted(index for part in parts for index in part.checkpoints) == [0, 1, 2, 3]
    effective = taken_of_each_gradient(*map(np.array, (lr, m, [0.0] * 40)))
    assert sum(part.lr_steps[0] for part in parts) == pytest.approx(effective.sum(), rel=1e-12)
    shrunk = sum(part.decay_steps[0] for part in parts)
    assert shrunk == pytest.approx((effective * w).sum(), rel=1e-12)


def test_a_recordings_checkpoint_fits_with_its_frozen_parameters(tmp_path: Path) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with sf.record(model, optimizer, tmp_path / "run", dataset_size=4, checkpoints=1, total_steps=1):
        model(torch.ones(4, 5, dtype=torch.float64)).sum().backward()
        optimizer.step()
    trajectory = sf.Trajectory.load(tmp_path / "run")
    assert trajectory.fits(model, len(trajectory) - 1)
    assert not trajectory.fits(mlp(torch.float32), len(trajectory) - 1)
