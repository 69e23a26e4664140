"""Whole methods against a naive dense implementation of the formulas, in float64 and float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import segflow as sf

from ..support import oracles
from ..support.helpers import (
    ConvNet,
    FixedLabels,
    analyzer_of,
    example_loss,
    images,
    mlp,
    perturbed_states,
    trajectory_of,
    vectors,
)

N, QUERIES = 20, 4
LR, MOMENTUM, WEIGHT_DECAY = 0.7, 0.5, 0.03


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def _reference(
    model: nn.Module, states: list[dict[str, Tensor]], train, query, groups: sf.Groups, combine: Callable
) -> Tensor:
    """Sum over layers and parts of what `combine` says of per-checkpoint oracle quantities, in float64."""
    model = model.double()
    train, query = (torch.utils.data.TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in (train, query))
    task, layers = FixedLabels(), _layers(model)
    cov, sampled, real, asked = [], [], [], []
    for state in states:
        model.load_state_dict({name: value.double() for name, value in state.items()})
        sample = example_loss(model, train, task, "sample")
        cov.append(oracles.naive_covariances(model, layers, sample, N))
        sampled.append(oracles.example_gradients(model, layers, sample, N))
        real.append(oracles.example_gradients(model, layers, example_loss(model, train, task), N))
        asked.append(oracles.example_gradients(model, layers, example_loss(model, query, task, "measurement"), QUERIES))
    total = 0
    for name in layers:
        fits = [(*c[name], s[name]) for c, s in zip(cov, sampled, strict=True)]
        for part in range(real[0][name].shape[1]):
            grouped = [torch.stack([r[name][list(m), part].flatten(1).sum(0) for m in groups.members]) for r in real]
            queries = [a[name][:, part].flatten(1) for a in asked]

            def curvature(pool, weights=None, fits=fits, part=part) -> Tensor:
                return oracles.dense_curvature(*oracles.pooled_ekfac([fits[i] for i in pool], weights))[part]

            total = total + combine(queries, grouped, curvature)
    return total


def _source(queries, grouped, curvature, weights=(0.75, 0.25)) -> Tensor:
    """A segment of 20 steps has checkpoints after 10 and 20: 15 steps are nearest to the first, 5 to the second."""
    segments = [
        {
            "curvature": curvature(pool, weights),
            "weights": weights,
            "lr_steps": 20 * LR / (1 - MOMENTUM),
            "weight_decay": WEIGHT_DECAY,
            "group_gradients": [grouped[i] for i in pool],
        }
        for pool in ((0, 1), (2, 3))
    ]
    return sum(oracles.source_scores(queries[-1], segments, N))


def _influence(queries, grouped, curvature) -> Tensor:
    return oracles.influence_scores(queries[-1], curvature((3,)), 0.01, grouped[-1], N)


def _tracin(queries, grouped, _curvature) -> Tensor:
    steps = zip((15, 10, 10, 5), queries, grouped, strict=True)
    return oracles.tracin_scores([(q, count * LR / (1 - MOMENTUM), g) for count, q, g in steps], N)


METHODS = {
    "source": (sf.Source(segments=2), _source),
    "source, equal weights": (
        sf.Source(segments=2, checkpoint_weights="equal"),
        partial(_source, weights=(0.5, 0.5)),
    ),
    "influence": (sf.InfluenceFunction(damping=0.01), _influence),
    "tracin": (sf.TracIn(), _tracin),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_scores_equal_the_dense_formulas(
    tmp_path: Path, method: str, net: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = (mlp if net == "mlp" else ConvNet)(dtype)
    make = vectors if net == "mlp" else images
    train, query = make(N, dtype), make(QUERIES, dtype, seed=5)
    states = perturbed_states(model, 4)
    trajectory = trajectory_of(tmp_path / "run", states, N, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    groups = sf.Groups.from_lists([[0, 3, 5], range(6, 20), [1], [2, 4]], N)
    plan, combine = METHODS[method]
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", method=plan)
    analyzer.fit(train, batch_size=7)
    scores = analyzer.score(groups, train, query, batch_size=6)
    expected = _reference(model, states, train, query, groups, combine)
    error = (scores.values.double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance, error.item()
