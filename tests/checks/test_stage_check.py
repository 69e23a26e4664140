"""check() reports what is attributed, and leaves the model untouched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

import segflow as sf

from ..support.check_tasks import (
    N,
    Regularised,
    TaskOf,
    check,
    in_train_mode,
    raising,
)
from ..support.helpers import ConvNet, analyzer_of, mlp, trajectory_of, vectors


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
    report = check(tmp_path, TaskOf(), Mixed())
    assert (report.attributed, report.parameters) == (57, 72)
    lines = str(report).splitlines()
    assert lines[0] == "attributed: 57 of 72 trained parameters (79.2%)"
    assert lines[1:3] == [
        "not attributed: LayerNorm is not supported: 1 module, 12 parameters (norm)",
        "not attributed: Mixed is not supported: 1 module, 3 parameters (the model itself)",
    ]
    assert lines[3] == "seen in training: sampling: uniform, as is assumed"
    assert "every tracked layer is reached" in lines[4]
    assert re.fullmatch(r"curvature of sample=True: [\d.]+ \+- [\d.]+ times the exact Gauss-Newton curvature", lines[5])


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
