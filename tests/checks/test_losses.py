"""A loss that is no sum over examples that stay apart, or is not repeatable or finite, is named by check()."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import segflow as sf

from ..support.check_tasks import (
    Branches,
    N,
    Regularised,
    TaskOf,
    check,
    detached,
    functional_dropout,
    in_train_mode,
    mean_loss,
    noisy,
    not_a_number,
    raising,
    squared_sum,
)
from ..support.helpers import mlp, vectors

LOSS_FAULTS = {
    "mean": (
        mean_loss,
        r"TaskOf: the {kind} loss is a mean over the batch: a batch of 8 has 0\.125 times .*reduction='sum'",
    ),
    "noise": (noisy, r"the {kind} loss of one batch was [\d.]+, then [\d.]+\. Something is random: dropout left on"),
    "dropout": (functional_dropout, "Something is random: dropout left on"),
    "batch": (squared_sum, r"the {kind} loss of a batch is .* examples' losses add up to .*no batch statistics"),
    "nan": (
        not_a_number,
        "probe of the {kind} loss, checkpoint at step 10: the loss of the batch of 8 .* what the model makes of them",
    ),
    "detached": (detached, "the loss does not depend on any tracked layer's output: the task detaches it"),
}


@pytest.mark.parametrize("fault", LOSS_FAULTS)
@pytest.mark.parametrize("kind", ["train", "measurement"])
def test_a_faulty_loss_is_caught_and_named(tmp_path: Path, fault: str, kind: str) -> None:
    loss, text = LOSS_FAULTS[fault]
    task = TaskOf(**{kind: loss})
    with pytest.raises(sf.TaskError, match=text.format(kind=kind)):
        check(tmp_path, task, query=vectors(9, seed=3))


def test_the_measurement_is_evaluated_only_with_queries(tmp_path: Path) -> None:
    with pytest.raises(sf.TaskError, match=r"the measurement loss of .* raised KeyError: 'user code'"):
        check(tmp_path, TaskOf(measurement=raising), query=vectors(9, seed=3))
    assert check(tmp_path, TaskOf(measurement=raising)).attributed > 0


@pytest.mark.parametrize("n", [2, 3, 5, 15, 16, 48])
def test_a_mean_is_never_passed_whatever_the_length(tmp_path: Path, n: int) -> None:
    with pytest.raises(sf.TaskError, match=r"mean over the batch|examples' losses add up"):
        check(tmp_path, TaskOf(train=mean_loss), train=vectors(n))


def test_a_sum_whose_terms_cancel_is_not_mistaken_for_an_interaction(tmp_path: Path) -> None:
    def signed(batch: Any, model: nn.Module) -> Tensor:
        outputs = model(batch[0])[:, 0]
        return (outputs - outputs.detach() + batch[1]).sum()

    half = 1000 * torch.rand(8, generator=torch.Generator().manual_seed(0))
    values = torch.cat([half, 1e-3 - half.flip(0)])  # halves of opposite sign, which float32 rounds
    assert not values.sum().equal(values[:8].sum() + values[8:].sum())
    model, query = mlp(torch.float32), TensorDataset(vectors(16, torch.float32).tensors[0], values)
    report = check(tmp_path, TaskOf(measurement=signed), model, vectors(N, torch.float32), query)
    assert report.attributed > 0


def test_dropout_left_on_by_the_task_is_caught(tmp_path: Path) -> None:
    with pytest.raises(sf.TaskError, match="Something is random: dropout left on, or noise in the task"):
        check(tmp_path, TaskOf(train=in_train_mode), Regularised(nn.Dropout(0.5)))


def test_batch_norm_in_train_mode_inside_the_task_is_caught(tmp_path: Path) -> None:
    with pytest.raises(sf.TaskError, match=r"changes the buffer 'middle\.running_mean' although .* eval mode"):
        check(tmp_path, TaskOf(train=in_train_mode), Regularised(nn.BatchNorm1d(6)))
    with pytest.raises(
        sf.TaskError, match=r"the train loss of example \d+ raised ValueError: Expected more than 1 value per channel"
    ):
        check(tmp_path, TaskOf(train=in_train_mode), Regularised(nn.BatchNorm1d(6, track_running_stats=False)))


@pytest.mark.parametrize("middle", [nn.Dropout(0.5), nn.BatchNorm1d(6)])
def test_dropout_and_batch_norm_in_eval_mode_are_in_order(tmp_path: Path, middle: nn.Module) -> None:
    report = check(tmp_path, TaskOf(), Regularised(middle).train())
    assert report.curvature.factor == pytest.approx(1, abs=3 * report.curvature.error)


@pytest.mark.parametrize(
    ("used", "text"),
    [
        ("no", r"layer 'side': never reached by the train loss\. .* Analyzer\(\.\.\., exclude=\['side'\]\)"),
        (
            "detached",
            r"check, train loss, checkpoint at step 10: layer 'side' was never reached: no batch's loss.* "
            r"Analyzer\(\.\.\., exclude=\['side'\]\)",
        ),
    ],
)
def test_a_layer_that_is_never_reached_is_named_and_may_be_left_out(tmp_path: Path, used: str, text: str) -> None:
    with pytest.raises(sf.LayerError, match=text):
        check(tmp_path, TaskOf(), Branches(used))
    report = check(tmp_path, TaskOf(tracked=["main"]), Branches(used))
    assert "not attributed: not among the tracked modules that the task names: 1 module, 18 parameters (side)" in str(
        report
    )


def test_a_measurement_may_leave_layers_out(tmp_path: Path) -> None:
    def of_main_alone(batch: Any, model: Any) -> Tensor:
        return functional.cross_entropy(model.main(batch[0]), batch[1], reduction="sum")

    def of_both(batch: Any, model: Any) -> Tensor:
        return functional.cross_entropy(model.main(batch[0]) + model.side(batch[0]), batch[1], reduction="sum")

    task = TaskOf(of_both, of_both, of_main_alone)
    task.draws_labels = False
    assert check(tmp_path, task, Branches("no")).attributed == 36
    assert check(tmp_path, task, Branches("no"), query=vectors(4)).attributed == 36


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (
            torch.nan,
            sf.TaskError,
            r"loss of the batch of 8 examples .* is not finite: example 40 holds NaN or infinity in \[0\]",
        ),
        (
            torch.inf,
            sf.LayerError,
            r"gradient or input of layer '0' .* not finite: example 40 holds NaN or infinity in \[0\]",
        ),  # tanh hides it
    ],
)
def test_an_input_that_is_not_finite_is_named(tmp_path: Path, value: float, error: type[Exception], text: str) -> None:
    inputs, labels = vectors(N).tensors
    inputs = inputs.clone()
    inputs[40, 2] = value
    with pytest.raises(error, match=f"probe of the train loss, checkpoint at step 10: the {text}"):
        check(tmp_path, TaskOf(), train=TensorDataset(inputs, labels))
