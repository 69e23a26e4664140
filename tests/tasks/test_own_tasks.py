"""What is asked of a user's own task: an output function for TRAK only, and losses that take one example."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import segflow as sf

from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

N = 12


class Poisson(sf.tasks.Classification):
    """Another loss than that of the task it derives from, whose output function does not take these outputs."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, counts = batch
        rates = model(inputs)[:, 0].exp()
        if sample:
            counts = torch.poisson(rates.detach())
        return functional.poisson_nll_loss(rates, counts, log_input=False, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return model(batch[0]).sum()


class Traced(Poisson):
    def compute_output(self, batch: Any, model: nn.Module) -> Tensor:
        return model(batch[0]).sum()


class Vouched(Poisson):
    compute_output = sf.tasks.Classification.compute_output


class Measured(sf.tasks.Classification):
    """The loss is the parent's, and so is the output."""

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return model(batch[0]).sum()


def scored(folder: Path, task: sf.Task, method: Any, classes: int = 1) -> Tensor:
    torch.manual_seed(0)
    model, train = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, classes)).double(), vectors(N)
    if classes == 1:
        train = TensorDataset(train.tensors[0], train.tensors[1].double())
    trajectory = trajectory_of(folder / "run", perturbed_states(model, 1), N)
    analyzer = analyzer_of(model, trajectory, folder / type(task).__name__, task, method=method)
    analyzer.check(train, train, curvature=False)
    analyzer.fit(train, batch_size=5)
    return analyzer.score(sf.Groups.singletons(N), train, train).values


def test_a_task_with_losses_of_its_own_is_not_asked_for_an_inherited_output(tmp_path: Path) -> None:
    assert torch.isfinite(scored(tmp_path, Poisson(), sf.Source(1))).all()


def test_trak_refuses_an_output_that_is_inherited_with_other_losses(tmp_path: Path) -> None:
    words = r"Poisson inherits compute_output\(\) from Classification.*compute_output = Classification\.compute_output"
    with pytest.raises(sf.TaskError, match=words):
        scored(tmp_path, Poisson(), sf.TRAK(None, 0.1))
    assert torch.isfinite(scored(tmp_path, Traced(), sf.TRAK(None, 0.1))).all()


@pytest.mark.parametrize("task", [Measured(), sf.tasks.Classification()], ids=["measurement", "none"])
def test_trak_takes_an_output_whose_training_loss_is_inherited_too(task: sf.Task, tmp_path: Path) -> None:
    assert torch.isfinite(scored(tmp_path, task, sf.TRAK(None, 0.1), classes=3)).all()


def test_a_class_may_vouch_for_an_output_that_it_inherits(tmp_path: Path) -> None:
    with pytest.raises(sf.TaskError, match="the model has one output"):  # it was called
        scored(tmp_path, Vouched(), sf.TRAK(None, 0.1))


# ---- one example ----


class Squeezed(sf.Task):
    """A loss of outputs without the dimensions of size one: all of them, or the last."""

    def __init__(self, loss: Callable[..., Tensor], squeeze: Callable[[Tensor], Tensor]):
        self.loss, self.squeeze = loss, squeeze

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        outputs, targets = self.squeeze(model(batch[0])), batch[1]
        if sample and outputs.ndim < 2:
            targets = torch.bernoulli(outputs.detach().sigmoid())
        elif sample:
            targets = torch.multinomial(outputs.detach().softmax(-1), 1)[:, 0]
        return self.loss(outputs, targets, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


@pytest.mark.parametrize("act", ["check", "fit", "score"])
@pytest.mark.parametrize("loss", [functional.binary_cross_entropy_with_logits, functional.cross_entropy])
def test_a_task_that_squeezes_the_one_example_of_a_batch_is_told_how_to_squeeze(
    loss: Any, act: str, tmp_path: Path
) -> None:
    """Cross-entropy of [C] and [1] fails in its backward pass only."""
    torch.manual_seed(0)
    data, classes = vectors(N), 3 if loss is functional.cross_entropy else 1
    train = TensorDataset(data.tensors[0], data.tensors[1] if classes == 3 else (data.tensors[1] > 0).double())
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, classes)).double()
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], N)

    method = sf.Source(1) if act == "fit" else sf.TracIn()

    def run(squeeze: Callable[[Tensor], Tensor], store: str) -> None:
        analyzer = analyzer_of(model, trajectory, tmp_path / store, Squeezed(loss, squeeze), method=method)
        if act == "check":
            analyzer.check(train, train)
        elif act == "fit":
            analyzer.fit(train, batch_size=11)
        else:
            analyzer.score(sf.Groups.singletons(N), train, train, batch_size=11)

    with pytest.raises(sf.TaskError, match=r"of example \d+ raised .*\.squeeze\(\) drops its .* \.squeeze\(-1\) keeps"):
        run(Tensor.squeeze, "all")
    run(lambda outputs: outputs.squeeze(-1), "last")


def test_a_batch_of_several_is_not_told_how_to_squeeze(tmp_path: Path) -> None:
    def several_fail(outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
        if len(targets) > 1:
            raise ValueError("the user's own")
        return functional.cross_entropy(outputs, targets, reduction=reduction)

    model = mlp()
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], N)
    analyzer = analyzer_of(model, trajectory, tmp_path / "s", Squeezed(several_fail, lambda outputs: outputs))
    with pytest.raises(sf.TaskError, match="the user's own") as raised:
        analyzer.check(vectors(N))
    assert "squeeze" not in str(raised.value)
