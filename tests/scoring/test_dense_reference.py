"""Whole methods against a naive dense implementation of the formulas, in float64 and float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import segflow as sf

from ..support.dense import METHODS, QUERIES, TRAINED, N, Quantities, quantities, reference
from ..support.helpers import ConvNet, analyzer_of, images, mlp, perturbed_states, trajectory_of, vectors

GROUPS = sf.Groups.from_lists([[0, 3, 5], range(6, 20), [1], [2, 4]], N)


class Case(NamedTuple):
    """A network of one precision with its data, its trajectory, a store, and what the oracles say of it."""

    net: Any
    dtype: torch.dtype
    train: Any
    query: Any
    trajectory: sf.Trajectory
    store: Path
    exact: Quantities
    tolerance: float


@pytest.fixture(
    scope="module",
    params=[
        (net, *precision) for net in ("mlp", "conv") for precision in ((torch.float64, 1e-9), (torch.float32, 1e-4))
    ],
    ids=lambda case: f"{case[0]}-{case[1]}",
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, dtype, tolerance = request.param
    net, make = (mlp, vectors) if name == "mlp" else (ConvNet, images)
    train, query, folder = make(N, dtype), make(QUERIES, dtype, seed=5), tmp_path_factory.mktemp("dense")
    states = perturbed_states(net(dtype), 4)
    trajectory = trajectory_of(folder / "run", states, N, **TRAINED)
    exact = quantities(net(dtype), states, train, query)
    return Case(net, dtype, train, query, trajectory, folder / "store", exact, tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_scores_equal_the_dense_formulas(case: Case, method: str) -> None:
    plan, combine = METHODS[method]
    analyzer = analyzer_of(case.net(case.dtype), case.trajectory, case.store, method=plan)
    analyzer.fit(case.train, batch_size=7)
    scores = analyzer.score(GROUPS, case.train, case.query, batch_size=6)
    expected = reference(case.exact, GROUPS, combine)
    error = (scores.values.double() - expected).abs().max() / expected.abs().max()
    assert error < case.tolerance, error.item()
