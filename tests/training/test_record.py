"""record(): the numbers of the recorded run, what it leaves behind, and what it leaves untouched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR

import segflow as sf
from segflow.training import recording_folder
from segflow.training.recording import Recording, RecordOptions
from segflow.training.recording_folder import RecordingFolder
from segflow.training.schedule import CheckpointSchedule

from ..support.helpers import mlp, vectors

STEPS, N, BATCH = 12, 24, 6
Step = Callable[[int], None]


class Noisy(nn.Module):
    """Dropout and batch norm: a stray random draw or a stray buffer update would show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.last = nn.Linear(6, 3)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


def two_groups(model: nn.Module, **options: Any) -> SGD:
    *rest, head = model.children()
    groups = [{"params": [p for m in rest for p in m.parameters()]}, {"params": head.parameters(), "lr": 0.03}]
    return SGD(groups, lr=0.1, **options)


def train(model: nn.Module, optimizer: Any, steps: int = STEPS, after_step: Step = lambda _step: None) -> list[float]:
    """The user's own loop; after_step sees the steps taken so far."""
    data = vectors(N)
    losses = []
    for step in range(1, steps + 1):
        chosen = torch.randint(0, N, (BATCH,))
        x, y = (column[chosen] for column in data.tensors)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after_step(step)
    return losses


def record(model: nn.Module, optimizer: Any, folder: Path, **options: Any) -> Any:
    return sf.record(model, optimizer, folder, **{"dataset_size": N, **options})


def recorded(folder: Path, steps: int = STEPS, optimizer: Any = None, model: Any = None, **options: Any) -> Any:
    model = model or mlp()
    optimizer = optimizer or SGD(model.parameters(), lr=0.1)
    with record(model, optimizer, folder, **options):
        train(model, optimizer, steps)
    return sf.Trajectory.load(folder)


RUNS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], Any] | None]] = {
    "plain SGD": (lambda m: SGD(m.parameters(), lr=0.1), None),
    "momentum, dampening": (lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.2), None),
    "nesterov, weight decay": (
        lambda m: SGD(m.parameters(), lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
        None,
    ),
    "parameter groups, scheduler": (two_groups, lambda o: CosineAnnealingLR(o, STEPS)),
    "OneCycleLR with momentum": (
        lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9),
        lambda o: OneCycleLR(o, 0.5, total_steps=STEPS + 1, cycle_momentum=True),
    ),
    "AdamW": (lambda m: AdamW(m.parameters(), lr=0.01), None),
    "Adam, amsgrad, foreach, maximize": (
        lambda m: Adam(m.parameters(), lr=0.01, amsgrad=True, foreach=True, maximize=True, weight_decay=0.1),
        None,
    ),
    "AdamW, fused, scheduler": (
        lambda m: AdamW(m.parameters(), lr=0.01, fused=True),
        lambda o: OneCycleLR(o, 0.5, total_steps=STEPS + 1, cycle_momentum=True),
    ),
    "Adam, learning rate a tensor": (lambda m: Adam(m.parameters(), lr=torch.tensor(0.01), foreach=False), None),
    "RMSprop, centered": (lambda m: RMSprop(m.parameters(), lr=0.01, centered=True, momentum=0.5), None),
    "Adagrad": (lambda m: Adagrad(m.parameters(), lr=0.01, lr_decay=0.1, initial_accumulator_value=0.2), None),
    "NAdam": (lambda m: NAdam(m.parameters(), lr=0.01), None),
    "SGD, fused": (lambda m: SGD(m.parameters(), lr=0.01, momentum=0.5, fused=True), None),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("total_steps", [STEPS, None])
def test_a_recorded_run_is_bit_identical_to_an_unrecorded_one(
    tmp_path: Path, name: str, total_steps: int | None
) -> None:
    make_optimizer, make_scheduler = RUNS[name]
    outcomes = []
    for recording in (False, True):
        model = Noisy()
        optimizer = make_optimizer(model)
        scheduler = make_scheduler(optimizer) if make_scheduler else None
        torch.manual_seed(3)
        block = record(model, optimizer, tmp_path, total_steps=total_steps, checkpoints=3) if recording else None
        with block or nullcontext():
            losses = train(model, optimizer, after_step=lambda _s, s=scheduler: s.step() if s else None)
        state = [*model.state_dict().values(), *[v for s in optimizer.state.values() for v in s.values()]]
        outcomes.append((losses, torch.get_rng_state(), [v for v in state if isinstance(v, torch.Tensor)]))
        assert model.training and all(p.requires_grad for p in model.parameters())
    (losses, random, state), (losses_recorded, random_recorded, state_recorded) = outcomes
    assert losses == losses_recorded
    assert torch.equal(random, random_recorded)
    assert len(state) == len(state_recorded) and all(map(torch.equal, state, state_recorded))


def test_checkpoints_hold_the_parameters_as_they_were_after_that_step(tmp_path: Path) -> None:
    model = Noisy()
    optimizer = SGD(model.parameters(), lr=0.1)
    seen: dict[int, dict[str, torch.Tensor]] = {}
    with record(model, optimizer, tmp_path, total_steps=STEPS, checkpoints=4):
        train(
            model,
            optimizer,
            after_step=lambda s: seen.update({s: {k: v.clone() for k, v in model.state_dict().items()}}),
        )
    trajectory = sf.Trajectory.load(tmp_path)
    assert trajectory.steps == (3, 6, 9, 12) and trajectory.dataset_size == N
    for index, step in enumerate(trajectory.steps):
        state = trajectory.state(index)
        assert state.keys() == seen[step].keys() and all(torch.equal(state[k], seen[step][k]) for k in state)
        trajectory.load_into(model, index)
        assert torch.equal(model.first.weight, seen[step]["first.weight"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"total_steps": 12, "checkpoints": 1}, (12,)),
        ({"total_steps": 12, "checkpoints": 3}, (4, 8, 12)),
        ({"total_steps": 12, "checkpoints": 5}, (2, 5, 7, 10, 12)),
        ({"total_steps": 12, "checkpoints": 12}, tuple(range(1, 13))),
        ({"total_steps": 12}, (2, 4, 6, 8, 10, 12)),  # six by default
        ({"checkpoints": [5, 2]}, (2, 5, 12)),  # explicit steps, and always the last
        ({"checkpoints": [12]}, (12,)),
    ],
)
def test_checkpoints_are_at_the_steps_asked_for(tmp_path: Path, options: dict, expected: tuple[int, ...]) -> None:
    assert recorded(tmp_path, **options).steps == expected
    files = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert files == [f"step-{step:08d}.safetensors" for step in expected]


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 6])
def test_thinning_on_the_way_keeps_the_count_nearly_even_and_the_last_step(tmp_path: Path, checkpoints: int) -> None:
    """Every length of run; nothing but which steps are saved matters, so saving is left out."""

    class Dry(Recording):
        def _save(self) -> None:
            self._saved[self.step] = {"file": "none"}
            assert len(self._saved) <= 2 * checkpoints + 2

        def _drop(self, step: int) -> None:
            del self._saved[step]

        def _describe(self, file: str) -> None:
            pass

    model = mlp()
    for total in range(1, 150):
        schedule = CheckpointSchedule(None, checkpoints)
        folder, optimizers = RecordingFolder(tmp_path, None), [SGD(model.parameters(), lr=0.1)]
        dry = Dry(model, optimizers, folder, schedule, RecordOptions(N))
        for _ in range(total):
            model[0].weight.grad = torch.zeros_like(model[0].weight)
            dry.before_step(0)
            dry.after_step(0)
        dry.finish()
        kept = sorted(dry._saved)
        count = min(checkpoints, total)
        assert len(kept) == count and kept[-1] == total, (total, kept)
        ideal = [total * place / count for place in range(1, count + 1)]
        furthest = max(abs(step - wish) for step, wish in zip(kept, ideal, strict=True))
        assert furthest <= total / count / 2 + 0.5, (total, kept)


def test_thinning_on_the_way_leaves_only_the_kept_files(tmp_path: Path) -> None:
    steps = recorded(tmp_path, 23, checkpoints=4).steps
    assert len(steps) == 4 and steps[-1] == 23
    files = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert files == [f"step-{step:08d}.safetensors" for step in steps]


def test_every_step_logs_the_learning_rate_it_used_for_each_parameter_group(tmp_path: Path) -> None:
    model = mlp()
    optimizer = two_groups(model, momentum=0.5, weight_decay=0.01, dampening=0.25)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    scheduler = ExponentialLR(optimizer, 0.9)
    with record(model, optimizer, tmp_path, total_steps=STEPS):
        train(model, optimizer, after_step=lambda _s: scheduler.step())
    found = sf.Trajectory.load(tmp_path)
    decay = torch.tensor([0.9**step for step in range(STEPS)], dtype=torch.float64)[:, None]
    expected = decay * torch.tensor([0.1, 0.03], dtype=torch.float64)
    torch.testing.assert_close(found.learning_rates, expected, rtol=1e-12, atol=0)
    assert (found.used.momentum == 0.5).all() and (found.used.dampening == 0.25).all()
    assert found.used.weight_decay.tolist() == [[0.01, 0.0]] * STEPS
    assert found.parameter_groups == {n: int(n.startswith("4.")) for n, _ in model.named_parameters()}


def test_a_cycled_momentum_is_logged_as_each_step_used_it(tmp_path: Path) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = OneCycleLR(optimizer, 0.5, total_steps=STEPS + 1, cycle_momentum=True)
    used: list[tuple[float, float]] = []

    def spy(o: Any, *_: Any) -> None:
        used.append((o.param_groups[0]["lr"], o.param_groups[0]["momentum"]))

    optimizer.register_step_pre_hook(spy)
    with record(model, optimizer, tmp_path, total_steps=STEPS):
        train(model, optimizer, after_step=lambda _s: scheduler.step())
    found = sf.Trajectory.load(tmp_path)
    assert len({momentum for _, momentum in used}) > 5
    assert [*zip(found.learning_rates[:, 0].tolist(), found.used.momentum[:, 0].tolist(), strict=True)] == used
    velocity = sum(
        lr * torch.tensor([m for _, m in used[step + 1 : later + 1]]).double().prod().item()
        for step in range(STEPS)
        for later, (lr, _) in enumerate(used)
        if later >= step
    )
    assert found.lr_steps(0, STEPS)[0] == pytest.approx(velocity, rel=1e-6)


def test_a_parameter_group_added_midway_counts_from_then_on(tmp_path: Path) -> None:
    model = mlp()
    head = {id(p) for p in model[4].parameters()}
    optimizer = SGD([p for p in model.parameters() if id(p) not in head], lr=0.1, momentum=0.5)

    def unfreeze(step: int) -> None:
        if step == 5:
            optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.2})

    with pytest.warns(UserWarning, match=r"no recorded optimizer holds 4\.weight"):
        block = record(model, optimizer, tmp_path, total_steps=STEPS, checkpoints=2)
        with block:
            train(model, optimizer, after_step=unfreeze)
    found = sf.Trajectory.load(tmp_path)
    assert found.learning_rates.tolist() == [[0.1, 0.0]] * 5 + [[0.1, 0.2]] * 7
    expected = [
        rate * sum((1 - 0.5**left) / 0.5 for left in range(1, count + 1)) for rate, count in ((0.1, 12), (0.2, 7))
    ]
    assert found.lr_steps(0, STEPS) == pytest.approx(expected, rel=1e-12)
    assert {found.group_of("0.weight"), found.group_of("4.bias")} == {0, 1}


def test_a_parameter_frozen_before_the_end_is_still_part_of_the_run(tmp_path: Path) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    with record(model, optimizer, tmp_path, total_steps=STEPS):
        train(model, optimizer)
        model.requires_grad_(False)
    assert set(sf.Trajectory.load(tmp_path).parameter_groups) == {name for name, _ in model.named_parameters()}


def test_parameters_that_the_optimizer_does_not_hold_are_in_no_group(tmp_path: Path) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"no recorded optimizer holds 4\.weight, 4\.bias\. If another"):
        found = recorded(tmp_path, model=model, optimizer=SGD(model[2].parameters(), lr=0.1))
    assert set(found.parameter_groups) == {"2.weight", "2.bias"}
    assert found.group_of("0.weight") is None and found.group_of("4.weight") is None


def test_an_accelerate_wrapper_is_recorded_through_its_own_optimizer(tmp_path: Path) -> None:
    class Wrapped:
        def __init__(self, optimizer: SGD):
            self.optimizer, self.calls = optimizer, 0

        def zero_grad(self) -> None:
            self.optimizer.zero_grad()

        def step(self) -> None:  # gradient accumulation: every other call is a real step
            self.calls += 1
            if self.calls % 2 == 0:
                self.optimizer.step()

    model = mlp()
    found = recorded(tmp_path, model=model, optimizer=Wrapped(SGD(model.parameters(), lr=0.1)), checkpoints=2)
    assert found.total_steps == STEPS // 2 and found.optimizer.name == "SGD"


def test_accelerates_own_wrapper_is_recorded(tmp_path: Path) -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    wrapped = object.__new__(AcceleratedOptimizer)  # its own __init__ starts process state, which is global
    wrapped.optimizer = optimizer
    with record(model, wrapped, tmp_path, total_steps=STEPS):
        train(model, optimizer)
    assert sf.Trajectory.load(tmp_path).optimizer.name == "SGD"


def test_a_recording_is_replaced_only_when_asked(tmp_path: Path) -> None:
    before = recorded(tmp_path, checkpoints=[1, 5])
    digests = [before.digest(index) for index in range(3)]
    with pytest.raises(sf.TrajectoryError, match=r"holds a recorded run already \(trajectory.json\)"):
        recorded(tmp_path)
    assert [sf.Trajectory.load(tmp_path).digest(index) for index in range(3)] == digests
    after = recorded(tmp_path, 6, overwrite=True, checkpoints=[3])
    assert after.steps == (3, 6) and after.learning_rates.shape == (6, 1)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_refused_recording_leaves_the_folder_and_the_optimizer_alone(tmp_path: Path) -> None:
    recorded(tmp_path, total_steps=STEPS)
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(sf.TrajectoryError, match="checkpoints=0: expected a whole number, at least 1"):
        record(model, optimizer, tmp_path, checkpoints=0, overwrite=True).__enter__()
    assert sf.Trajectory.load(tmp_path).total_steps == STEPS
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"checkpoints": 0}, "checkpoints=0: expected a whole number, at least 1. Give how many, or their steps"),
        ({"checkpoints": []}, "checkpoints: no steps were given"),
        ({"checkpoints": [0, 4]}, r"checkpoints\[0\]=0: expected a whole number, at least 1"),
        ({"checkpoints": [2.5]}, r"checkpoints\[0\]=2.5: expected a whole number"),
        ({"checkpoints": [4, 30], "total_steps": 12}, r"checkpoints\[1\]=30: expected a whole number, 1 to 12"),
        ({"checkpoints": 6, "total_steps": 5}, "total_steps=5: too few for 6 checkpoints"),
        ({"dataset_size": 0}, "dataset_size=0: expected a whole number, at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_training(tmp_path: Path, options: dict, text: str) -> None:
    model = mlp()
    with pytest.raises(sf.TrajectoryError, match=text):
        record(model, SGD(model.parameters(), lr=0.1), tmp_path / "run", **options).__enter__()
    assert not (tmp_path / "run").exists()


def test_another_models_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sf.TrajectoryError, match="the optimizer holds none of this model's parameters"):
        record(mlp(), SGD(mlp().parameters(), lr=0.1), tmp_path).__enter__()


def test_what_is_no_torch_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sf.TrajectoryError, match="the optimizer is a dict, which has no step hooks"):
        record(mlp(), {}, tmp_path).__enter__()


def test_a_model_whose_state_is_no_tensor_is_refused_before_training(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict:
            return {"version": 1}

    model = Extra(2, 2)
    with pytest.raises(sf.TrajectoryError, match="the model's state '_extra_state' is no tensor"):
        record(model, SGD(model.parameters(), lr=0.1), tmp_path).__enter__()


def test_a_run_shorter_or_longer_than_announced_is_recorded_and_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"ended at step 5, checkpoints at \[8, 12\] were never reached.*\[4, 5\]"):
        assert recorded(tmp_path / "short", 5, total_steps=12, checkpoints=3).steps == (4, 5)
    with pytest.warns(UserWarning, match=r"ended at step 15, not at total_steps=12.*\[4, 8, 12, 15\]"):
        assert recorded(tmp_path / "long", 15, total_steps=12, checkpoints=3).steps == (4, 8, 12, 15)


def test_a_warning_turned_into_an_error_does_not_cost_the_recording(tmp_path: Path) -> None:
    with pytest.raises(UserWarning, match="never reached"):
        recorded(tmp_path, 5, total_steps=12, checkpoints=3)
    assert sf.Trajectory.load(tmp_path).steps == (4, 5)


def test_a_block_without_a_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(sf.TrajectoryError, match="the optimizer took no step inside the block"):
        recorded(tmp_path, 0)


def test_no_hook_outlives_the_block_or_an_exception_in_it(tmp_path: Path) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    with record(model, optimizer, tmp_path / "whole", total_steps=STEPS) as recording:
        train(model, optimizer)
    train(model, optimizer, 3)
    assert recording.step == STEPS and sf.Trajectory.load(tmp_path / "whole").total_steps == STEPS
    with pytest.raises(KeyError, match="user"), record(model, optimizer, tmp_path / "broken", total_steps=STEPS):
        train(model, optimizer, 4)
        raise KeyError("user")
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_run_stopped_by_an_exception_reads_as_unfinished_until_recorded_again(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(failure), record(model, optimizer, tmp_path, total_steps=STEPS):
        train(model, optimizer, 7)
        raise failure
    with pytest.raises(sf.TrajectoryError, match=r"the recorded run did not finish.*overwrite=True"):
        sf.Trajectory.load(tmp_path)
    with pytest.raises(sf.TrajectoryError, match=r"holds a recorded run already \(recording.json\)"):
        recorded(tmp_path)
    assert recorded(tmp_path, overwrite=True).total_steps == STEPS


def test_overwriting_a_finished_run_and_failing_reads_as_unfinished_not_as_the_old_run(tmp_path: Path) -> None:
    recorded(tmp_path)
    model = mlp()
    with pytest.raises(RuntimeError), record(model, SGD(model.parameters(), lr=0.1), tmp_path, overwrite=True):
        raise RuntimeError
    with pytest.raises(sf.TrajectoryError, match="the recorded run did not finish"):
        sf.Trajectory.load(tmp_path)


KILLED = """
    import os, signal, sys, torch, segflow as sf

    def train(folder, die_at, stage):
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with sf.record(model, optimizer, folder, dataset_size=4, total_steps=10, checkpoints=5, stage=stage):
            for step in range(10):
                if step == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                optimizer.zero_grad()
                model(torch.ones(4, 2)).square().mean().backward()
                optimizer.step()

    for folder, die_at, stage in zip(*[iter(sys.argv[1:])] * 3):
        child = os.fork()  # so that libraries are imported once
        if not child:
            train(folder, int(die_at), stage or None)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Folders of runs whose process was killed by SIGKILL, by the stage ("" for none) and the steps taken."""
    folders = {case: tmp_path_factory.mktemp("killed") for case in (("", 7), ("finetune", 7), ("finetune", 0))}
    for (stage, _), folder in folders.items():
        if stage:
            staged(folder, "pretrain", nn.Sequential(nn.Linear(5, 3)).double())
    arguments = [str(word) for (stage, die_at), folder in folders.items() for word in (folder, die_at, stage)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), *arguments], env=environment, check=True)
    return lambda stage, die_at: folders[stage, die_at]


def test_a_process_killed_inside_the_block_leaves_a_run_that_reads_as_unfinished(killed: Any) -> None:
    folder = killed("", 7)
    assert len(list((folder / "checkpoints").iterdir())) == 3
    with pytest.raises(sf.TrajectoryError, match="the recorded run did not finish, its process was stopped"):
        sf.Trajectory.load(folder)


def test_a_step_that_raises_is_not_logged_and_a_checkpoint_left_behind_can_be_used(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure(fail: bool) -> float:
        if fail:
            raise MemoryError
        return 0.0

    def train(steps: tuple[bool, ...]) -> None:
        for fail in steps:
            with suppress(MemoryError):
                optimizer.step(partial(closure, fail))

    recording = sf.record(model, optimizer, tmp_path, dataset_size=4, total_steps=6, checkpoints=3)
    with pytest.raises(KeyboardInterrupt), recording:
        train((False, True, False, False, False))
        raise KeyboardInterrupt
    left = sorted((tmp_path / "checkpoints").glob("*.safetensors"))
    salvaged = sf.Trajectory(left, [2, 4], 0.1, 4)
    salvaged.load_into(model, 1)
    with sf.record(model, optimizer, tmp_path, dataset_size=4, total_steps=2, checkpoints=1, overwrite=True):
        train((False, True, False))
    assert sf.Trajectory.load(tmp_path).total_steps == 2


@pytest.mark.parametrize("size", [128.5, "128", 0])
def test_a_dataset_size_that_is_no_count_is_refused_before_training(tmp_path: Path, size: object) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recording = sf.record(model, optimizer, tmp_path, dataset_size=size)  # type: ignore[arg-type]
    with pytest.raises(sf.TrajectoryError, match="expected a whole number, at least 1"), recording:
        pass


def test_a_run_that_was_stopped_is_read_up_to_its_last_checkpoint_when_asked(tmp_path: Path) -> None:
    def trained(folder: str, stop: int) -> None:
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1)
        x, y = vectors(N).tensors
        with sf.record(model, optimizer, tmp_path / folder, dataset_size=N, total_steps=12, checkpoints=4):
            for step in range(12):
                if step == stop:
                    raise KeyboardInterrupt
                optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()

    trained("whole", 99)
    whole = sf.Trajectory.load(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained("stopped", 8)
    with pytest.raises(sf.TrajectoryError, match="pass unfinished=True"):
        sf.Trajectory.load(tmp_path / "stopped")
    found = sf.Trajectory.load(tmp_path / "stopped", unfinished=True)
    assert found.steps == (3, 6) and found.learning_rates.equal(whole.learning_rates[:6])
    for index in range(2):
        state = found.state(index)
        assert all(value.equal(state[name]) for name, value in whole.state(index).items())
    with pytest.raises(KeyboardInterrupt):
        trained("at once", 0)
    with pytest.raises(sf.TrajectoryError, match="stopped before its first checkpoint"):
        sf.Trajectory.load(tmp_path / "at once", unfinished=True)


@pytest.mark.parametrize("file", ["/etc/passwd", "../outside.safetensors", "checkpoints/../../x", 7, None])
def test_a_recording_cannot_name_files_outside_its_folder(tmp_path: Path, file: object) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    with sf.record(model, optimizer, tmp_path / "run", dataset_size=N, total_steps=1, checkpoints=1):
        optimizer.step()
    path = tmp_path / "run" / "trajectory.json"
    content = json.loads(path.read_text())
    content["checkpoints"][0]["file"] = file
    path.write_text(json.dumps(content))
    with pytest.raises(sf.TrajectoryError):
        sf.Trajectory.load(tmp_path / "run")


# Several stages


def staged(folder: Path, name: str, model: Any = None, lr: float = 0.1, make: Any = SGD, **options: Any) -> Any:
    """Six steps of a stage called `name`, with two checkpoints."""
    model = model or mlp()
    optimizer = make(model.parameters(), lr=lr)
    with record(model, optimizer, folder, stage=name, total_steps=6, checkpoints=2, **options):
        train(model, optimizer, 6)
    return sf.Trajectory.load(folder)


def listed(folder: Path) -> list[str]:
    return json.loads((folder / "stages.json").read_text())["stages"]


def test_pretraining_and_finetuning_are_loaded_back_as_two_stages_in_order(tmp_path: Path) -> None:
    model = mlp()
    first = staged(tmp_path, "pretrain", model, lr=0.2)
    between = {name: value.clone() for name, value in model.state_dict().items()}
    found = staged(tmp_path, "finetune", model, lr=0.01, make=AdamW, dataset_size=7, batch_size=BATCH)
    assert first.stages == (first,) and first.earlier is None and first.stage == "pretrain"
    assert [stage.stage for stage in found.stages] == listed(tmp_path) == ["pretrain", "finetune"]
    pretrain, finetune = found.stages
    assert finetune is found and found.earlier is pretrain
    assert (pretrain.dataset_size, finetune.dataset_size) == (N, 7)
    assert (pretrain.optimizer.name, finetune.optimizer.name) == ("SGD", "AdamW")
    assert (pretrain.preconditioned, finetune.preconditioned) == (False, True)
    assert pretrain.steps == finetune.steps == (3, 6) and finetune.total_steps == 6
    assert pretrain.lr_steps(0, 6) == (pytest.approx(1.2),) and finetune.lr_steps(0, 6) == (pytest.approx(0.06),)
    assert finetune.optimizer.batch_size == BATCH and finetune.second_moments(1) and not pretrain.second_moments(1)
    for stage, expected in ((pretrain, between), (finetune, model.state_dict())):
        assert all(torch.equal(value, expected[name]) for name, value in stage.state(1).items())
    assert repr(found).endswith("7 examples; last of the stages pretrain, finetune)") and "stages" not in repr(pretrain)
    alone = sf.Trajectory.load(tmp_path / "finetune")
    assert alone.stage == "finetune" and alone.earlier is None


def test_a_staged_run_is_bit_identical_to_an_unrecorded_one(tmp_path: Path) -> None:
    outcomes = []
    for recording in (False, True):
        model = Noisy()
        torch.manual_seed(3)
        for name, make in (("first", SGD), ("second", Adagrad)):
            optimizer = make(model.parameters(), lr=0.05)
            block = record(model, optimizer, tmp_path, stage=name, total_steps=6) if recording else nullcontext()
            with block:
                train(model, optimizer, 6)
        outcomes.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(map(torch.equal, *outcomes))


def test_overwriting_a_stage_drops_those_recorded_after_it_and_keeps_those_before(tmp_path: Path) -> None:
    for name in ("one", "two", "three", "four"):
        staged(tmp_path, name)
    (tmp_path / "four" / "notes.txt").write_text("the user's own")
    kept = sf.Trajectory.load(tmp_path / "one").digest(1)
    found = staged(tmp_path, "two", lr=0.3, overwrite=True)
    assert listed(tmp_path) == [stage.stage for stage in found.stages] == ["one", "two"]
    assert found.earlier.digest(1) == kept and found.lr_steps(0, 6) == (pytest.approx(1.8),)
    assert not (tmp_path / "three").exists()
    assert [path.name for path in (tmp_path / "four").iterdir()] == ["notes.txt"]
    assert listed(tmp_path) == ["one", "two"] and staged(tmp_path, "four", overwrite=True).earlier.stage == "two"


def test_a_stage_is_replaced_only_when_asked(tmp_path: Path) -> None:
    staged(tmp_path, "one")
    before = [stage.digest(1) for stage in staged(tmp_path, "two").stages]
    for name in ("one", "two"):
        with pytest.raises(sf.TrajectoryError, match=rf"holds stage '{name}' already.*overwrite=True"):
            staged(tmp_path, name, lr=0.3)
    with pytest.raises(sf.TrajectoryError, match=r"holds stage 'two' already.*stage='two' and overwrite=True"):
        staged(tmp_path, "TWO", overwrite=True)  # one folder, where file names do not tell case
    assert [stage.digest(1) for stage in sf.Trajectory.load(tmp_path).stages] == before


def test_stages_and_a_run_without_them_do_not_share_a_folder(tmp_path: Path) -> None:
    recorded(tmp_path / "plain")
    staged(tmp_path / "staged", "one")
    for overwrite in (False, True):
        with pytest.raises(sf.TrajectoryError, match=r"holds a recorded run without stages \(trajectory.json\)"):
            staged(tmp_path / "plain", "one", overwrite=overwrite)
        with pytest.raises(sf.TrajectoryError, match=r"holds the stages one\. Give record"):
            recorded(tmp_path / "staged", overwrite=overwrite)
    assert sf.Trajectory.load(tmp_path / "plain").stage == "train"
    assert not (tmp_path / "plain" / "one").exists() and not (tmp_path / "staged" / "trajectory.json").exists()


def test_another_recording_in_a_stages_folder_is_not_overwritten_unasked(tmp_path: Path) -> None:
    recorded(tmp_path / "one")
    with pytest.raises(sf.TrajectoryError, match=r"one: holds a recorded run already"):
        staged(tmp_path, "one")
    assert not (tmp_path / "stages.json").exists() and sf.Trajectory.load(tmp_path / "one").total_steps == STEPS
    assert staged(tmp_path, "one", overwrite=True).total_steps == 6


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "../a", "a b", "ä", "a\n", "x" * 101, "checkpoints", "Stages.json", 3, "a\0"],
)
def test_a_stage_name_that_is_no_plain_word_is_refused_before_anything_is_written(tmp_path: Path, name: Any) -> None:
    with pytest.raises(sf.TrajectoryError, match=r"stage=.*: expected up to 100 letters, digits"):
        staged(tmp_path / "run", name)
    assert not (tmp_path / "run").exists()
    files = recorded(tmp_path / "plain").checkpoints
    with pytest.raises(sf.TrajectoryError, match=r"stage=.*: expected up to 100 letters, digits"):
        sf.Trajectory(files[-1:], [STEPS], 0.1, N, stage=name)


@pytest.mark.parametrize(("die_at", "steps"), [(7, (2, 4, 6)), (0, None)])
def test_a_kill_in_the_second_stage_leaves_the_first_and_what_the_second_had(
    killed: Any, die_at: int, steps: tuple[int, ...] | None
) -> None:
    folder = killed("finetune", die_at)
    assert listed(folder) == ["pretrain", "finetune"]
    with pytest.raises(sf.TrajectoryError, match=r"finetune: the recorded run did not finish.*overwrite=True"):
        sf.Trajectory.load(folder)
    with pytest.raises(sf.TrajectoryError, match="stage 'finetune', before 'third', did not finish"):
        staged(folder, "third")
    if steps is None:
        with pytest.raises(sf.TrajectoryError, match=r"finetune: .* stopped before its first .*loaded from its own"):
            sf.Trajectory.load(folder, unfinished=True)
    else:
        found = sf.Trajectory.load(folder, unfinished=True)
        assert found.steps == steps and [stage.stage for stage in found.stages] == ["pretrain", "finetune"]
    assert sf.Trajectory.load(folder / "pretrain").total_steps == 6
    assert [stage.stage for stage in staged(folder, "finetune", overwrite=True).stages] == ["pretrain", "finetune"]


def test_an_earlier_stage_that_did_not_finish_is_refused_even_if_unfinished_is_asked_for(tmp_path: Path) -> None:
    staged(tmp_path, "one")
    staged(tmp_path, "two")
    (tmp_path / "one" / "trajectory.json").rename(tmp_path / "one" / "recording.json")
    for unfinished in (False, True):
        with pytest.raises(sf.TrajectoryError, match="one: the recorded run did not finish"):
            sf.Trajectory.load(tmp_path, unfinished=unfinished)


def test_a_stop_while_a_stage_begins_costs_no_earlier_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever file was about to be written: what can be loaded is the old stages, or an error that says what to do."""
    write = recording_folder.write_json
    for stop in (1, 2):
        folder = tmp_path / str(stop)
        before = [stage.digest(1) for stage in (staged(folder, "one"), staged(folder, "two"))]
        calls = []

        def dying(path: Path, content: Any, calls: list = calls, stop: int = stop) -> None:
            calls.append(path)
            if len(calls) == stop:
                raise KeyboardInterrupt
            write(path, content)

        monkeypatch.setattr(recording_folder, "write_json", dying)
        with pytest.raises(KeyboardInterrupt):
            staged(folder, "three")
        monkeypatch.setattr(recording_folder, "write_json", write)
        if stop == 1:
            assert [stage.digest(1) for stage in sf.Trajectory.load(folder).stages] == before
        else:
            with pytest.raises(sf.TrajectoryError, match=r"three: no recorded run here"):
                sf.Trajectory.load(folder, unfinished=True)
        assert [s.digest(1) for s in staged(folder, "three", overwrite=stop == 2).stages[:2]] == before


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("[]", r"stages.json: damaged \(content: found \[\], expected an object\)"),
        ('{"format": 2, "stages": ["one", "two"]}', "'format': found 2, expected a whole number, 1 to 1"),
        ('{"format": 1}', "damaged \\(no 'stages'\\)"),
        ('{"format": 1, "stages": []}', r'expected \{"format": 1'),
        ('{"format": 1, "stages": "one"}', "'stages': found 'one', expected a list"),
        ('{"format": 1, "stages": ["one", "One"]}', r'expected \{"format": 1'),
        ('{"format": 1, "stages": ["one", 2]}', "'stages'.1: found 2, expected text"),
        ('{"format": 1, "stages": ["one", ["two"]]}', r"'stages'.1: found \['two'\], expected text"),
        ('{"format": 1, "stages": ["../one"]}', r"stage='../one': expected up to 100 letters"),
        ('{"format": 1, "stages": ["one", "/etc"]}', "stage='/etc': expected up to 100 letters"),
        ('{"format": 1, "stages": ["one", "gone"]}', "gone: no recorded run here"),
        ('{"format": 1, "stages": ["one", "copy"]}', "copy: holds stage 'two', but stages.json says 'copy'"),
        ('{"format": 1, "stages": ["one", "link"]}', "link: leads out of"),
    ],
)
def test_a_hostile_list_of_stages_is_refused(tmp_path: Path, content: str, text: str) -> None:
    for name in ("one", "two"):
        staged(tmp_path / "run", name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / "two").rename(tmp_path / "run" / "copy")
    (tmp_path / "run" / "stages.json").write_text(content)
    with pytest.raises(sf.TrajectoryError, match=text):
        sf.Trajectory.load(tmp_path / "run")


def test_stages_are_never_written_or_removed_through_a_link(tmp_path: Path) -> None:
    precious = recorded(tmp_path / "elsewhere").checkpoints[0]
    staged(tmp_path / "run", "one")
    for name in ("two", "three"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(sf.TrajectoryError, match="leads out of"):
            staged(tmp_path / "run", name, overwrite=True)
    (tmp_path / "run" / "stages.json").write_text('{"format": 1, "stages": ["one", "two"]}')
    with pytest.raises(sf.TrajectoryError, match="leads out of"):
        staged(tmp_path / "run", "one", overwrite=True)
    assert precious.exists() and listed(tmp_path / "run") == ["one", "two"]
