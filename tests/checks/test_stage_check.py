"""check() reports what is attributed, and leaves the model untouched."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import segflow as sf
from segflow.data.batches import evenly_spaced

from ..support.check_tasks import (
    Branches,
    N,
    Regularised,
    TaskOf,
    check,
    in_train_mode,
    mean_loss,
    raising,
    summed,
)
from ..support.helpers import ConvNet, analyzer_of, mlp, perturbed_states, trajectory_of, vectors


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
    report = check(tmp_path, TaskOf(tracked=["first", "norm", "scale"]), Mixed())
    assert (report.attributed, report.parameters) == (51, 72)
    lines = str(report).splitlines()
    assert lines[0] == "attributed: 51 of 72 trained parameters (70.8%)"
    unnamed = "not among the tracked modules that the task names"
    assert lines[1] == f"not attributed: {unnamed}: 1 module, 21 parameters (head)"
    assert lines[2] == "slow: its module's calls repeated by torch.func, vmapped: 1 block (scale)"
    assert lines[3] == "seen in training: sampling: uniform, as is assumed"
    assert "every tracked layer is reached" in lines[4]
    assert re.fullmatch(r"curvature of sample=True: [\d.]+ \+- [\d.]+ times the exact Gauss-Newton curvature", lines[5])


def test_the_exact_curvature_is_compared_with_that_of_all_kinds_of_blocks(tmp_path: Path) -> None:
    report = check(tmp_path, TaskOf(), Mixed())
    assert str(report).splitlines()[0] == "attributed: 72 of 72 trained parameters (100.0%)"
    assert report.curvature.factor == pytest.approx(1, abs=3 * report.curvature.error)


def test_the_check_does_not_depend_on_the_random_state_and_leaves_it(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = check(tmp_path, TaskOf()).curvature
    torch.manual_seed(2)
    state = torch.get_rng_state()
    model = mlp()
    torch.set_rng_state(state)
    assert check(tmp_path, TaskOf(), model).curvature == first
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
        (TaskOf(sample=raising), sf.TaskError),
        (TaskOf(train=raising), sf.TaskError),
        (TaskOf(train=in_train_mode), sf.TaskError),
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


# ---- what is done once ----


class Counting(TaskOf):
    """Notes which losses were asked for, of how many examples."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        self.seen.append(("sample" if sample else "train", len(batch[0])))
        return super().compute_train_loss(batch, model, sample)

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        self.seen.append(("measurement", len(batch[0])))
        return super().compute_measurement(batch, model)

    def taken(self, kind: str) -> int:
        """The examples a kind of loss was taken of since this was asked last."""
        count = sum(size for of_kind, size in self.seen if of_kind == kind)
        self.seen = [entry for entry in self.seen if entry[0] != kind]
        return count


def _counted(folder: Path, checked: bool) -> tuple[int, int, int]:
    """How many training losses and pseudo-labels a fit takes, and how many measurements a score, after a check."""
    task, model, train, query = Counting(), mlp(), vectors(N), vectors(5, seed=3)
    trajectory = trajectory_of(folder / "run", [model.state_dict()], N)
    analyzer = analyzer_of(model, trajectory, folder / "store", task, method=sf.InfluenceFunction(damping=0.1))
    if checked:
        analyzer.check(train, query)
    task.seen.clear()
    analyzer.fit(train)
    fitted = task.taken("train"), task.taken("sample")
    analyzer.score(sf.Groups.random(N, 6), train, query)
    return *fitted, task.taken("measurement")


def test_what_check_has_probed_is_not_probed_again(tmp_path: Path) -> None:
    train, sample, measurement = _counted(tmp_path / "plain", False)
    train_after, sample_after, measurement_after = _counted(tmp_path / "checked", True)
    assert train - train_after >= 24, "8 examples together twice, and each alone"
    assert sample - sample_after == 24, "8 examples in two draws, and each alone"
    assert measurement - measurement_after >= 15, "5 examples together twice, and each alone"


def test_check_itself_probes_whatever_was_probed_before(tmp_path: Path) -> None:
    task, model, train = TaskOf(), mlp(), vectors(N)
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], N)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", task, method=sf.TracIn())
    analyzer.check(train)
    task.train = mean_loss
    with pytest.raises(sf.TaskError, match="is a mean over the batch"):
        analyzer.check(train)


def test_only_checkpoints_at_which_something_is_tried_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loaded = mlp(), []
    load = sf.Trajectory.load_into
    monkeypatch.setattr(
        sf.Trajectory, "load_into", lambda own, model, index: (loaded.append(index), load(own, model, index))
    )
    states = [model.state_dict(), *perturbed_states(model, 2), mlp(torch.float32).state_dict(), model.state_dict()]
    trajectory = trajectory_of(tmp_path / "run", states, N)
    assert [trajectory.fits(model, index) for index in range(5)] == [True, True, True, False, True]
    analyzer_of(model, trajectory, tmp_path / "store", TaskOf(), method=sf.TracIn()).check(vectors(N))
    assert set(loaded) == {0, 3, 4}, "the first, the last, and one that may fit only once it is converted"


def test_a_whole_number_in_place_of_a_weight_is_refused_wherever_it_is(tmp_path: Path) -> None:
    model = mlp()
    wrong = {name: value.long() if name == "2.bias" else value for name, value in model.state_dict().items()}
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict(), wrong, model.state_dict()], N)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", TaskOf(), method=sf.TracIn())
    with pytest.raises(sf.TrajectoryError, match=r"checkpoint at step 20 .* holds '2.bias' as torch.int64"):
        analyzer.check(vectors(N))


class Rare(nn.Module):
    """Two side layers, one of which examples with a large first number reach, the other those with a small one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.main, self.high, self.low = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.main(x)
        for side, reached in ((self.high(x), x[:, :1] > 5), (self.low(x), x[:, :1] < -5)):
            outputs = torch.where(reached, outputs + side, outputs) if reached.any() else outputs + 0 * side.detach()
        return outputs


PROBED = evenly_spaced(80, 8)[-1]


@pytest.mark.parametrize(
    ("high", "low", "unreached"), [(17, 18, []), (17, PROBED, []), (70, PROBED, ["high"]), (70, 70, ["high", "low"])]
)
def test_a_layer_that_no_probe_reaches_is_looked_for_in_64_examples(
    tmp_path: Path, high: int, low: int, unreached: list[str]
) -> None:
    inputs, labels = vectors(80).tensors
    inputs = inputs.clamp(-4, 4)
    inputs[low, 0], inputs[high, 0] = -9.0, 9.0
    if unreached == ["high", "low"]:
        inputs[low, 0] = 0.0
    assert PROBED >= 64
    if not unreached:
        assert check(tmp_path, TaskOf(), Rare(), TensorDataset(inputs, labels)).attributed == 54
        return
    with pytest.raises(sf.LayerError, match=rf"was never reached.*exclude={re.escape(str(unreached))}"):
        check(tmp_path, TaskOf(), Rare(), TensorDataset(inputs, labels))


def test_a_measurement_may_call_a_layer_that_it_does_not_depend_on(tmp_path: Path) -> None:
    def of_main(batch: Any, model: Any) -> Tensor:
        return (model.main(batch[0]) + model.side(batch[0]).detach()).square().sum()

    def of_both(batch: Any, model: Any) -> Tensor:
        return summed((model.main(batch[0]) + model.side(batch[0]), batch[1]), nn.Identity())

    task = TaskOf(of_both, of_both, of_main)
    task.draws_labels = False
    assert check(tmp_path, task, Branches("detached"), query=vectors(4)).attributed == 36


def test_the_output_function_is_tried_where_the_method_needs_it(tmp_path: Path) -> None:
    class Outputs(sf.tasks.Classification):
        def compute_output(self, batch: Any, model: nn.Module) -> Tensor:
            return super().compute_output(batch, model).mean() / len(batch[0])

    model, train = mlp(), vectors(N)
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], N)
    for method, wrong in ((sf.TracIn(), False), (sf.TRAK(), True)):
        analyzer = analyzer_of(model, trajectory, tmp_path / type(method).__name__, Outputs(), method=method)
        with pytest.raises(sf.TaskError, match="output loss") if wrong else nullcontext():
            analyzer.check(train)
