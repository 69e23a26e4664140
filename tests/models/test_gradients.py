"""Products of gradients over all that training changed, of the models that people train, against autograd's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import segflow as sf

from ..support.model_tasks import Example
from ..support.models import CASES, N, Trained, trained
from ..support.naive import assert_near


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(CASES[request.param], tmp_path_factory.mktemp("run") / "recorded")


def analyzer_of(run: Trained, store: Path, **options: Any) -> sf.Analyzer:
    trajectory = sf.Trajectory.load(run.folder)
    options = {"method": sf.GradientDot(), "collate_fn": run.case.collate, "progress": False, **options}
    return sf.Analyzer(run.model, run.case.task, trajectory, store=store, **options)


def example_gradients(run: Trained, examples: Sequence[Example], kind: str) -> Tensor:
    """[n, D]: the gradient of each example alone in all parameters that training changed."""
    compute = run.case.task.compute_train_loss if kind == "train" else run.case.task.compute_measurement
    rows = []
    for example in examples:
        loss = compute(run.case.collate([example]), run.model)
        slopes = torch.autograd.grad(loss, list(run.changed.values()), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([slope.flatten() for slope in slopes]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "batch_size", [3, pytest.param(N, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)]
)
def test_gradient_products_are_those_of_autograd_over_all_trained_parameters(
    run: Trained, batch_size: int, tmp_path: Path
) -> None:
    train, query = run.case.data()
    expected = example_gradients(run, query, "measurement") @ example_gradients(run, train, "train").mT / N
    scores = analyzer_of(run, tmp_path).score(sf.Groups.singletons(N), train, query, batch_size=batch_size)
    assert_near(torch.as_tensor(scores.values, dtype=torch.float64), expected)


def test_every_trained_parameter_is_attributed(run: Trained, tmp_path: Path) -> None:
    train, query = run.case.data()
    report = analyzer_of(run, tmp_path).check(train, query, curvature_tolerance=float("inf"))
    assert report.attributed == sum(p.numel() for p in run.changed.values())
    dead = sum(p.numel() for p in run.model.parameters() if not p.requires_grad)
    assert report.attributed in (report.parameters, report.parameters - dead)
