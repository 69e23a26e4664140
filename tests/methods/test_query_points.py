"""Queries along the run: the mean of the measurement's gradients at the last stage's checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import segflow as sf
from segflow.errors import MethodError
from segflow.methods import Point, Term

from ..support.helpers import ConvNet, analyzer_of, images, mlp, perturbed_states, trajectory_of, vectors

N, GROUPS = 20, sf.Groups.random(20, size=4)
SCHEDULE = [0.5] * 20 + [0.1] * 10  # of 3 checkpoints, ten steps apart
WEIGHTS = (15 * 0.5, 5 * 0.5 + 5 * 0.1, 5 * 0.1)  # the rates of the steps nearest to each


@dataclass(frozen=True)
class At:
    """SOURCE with the query at one point: a checkpoint, or (place None) the weighted mean of all."""

    place: int | None
    segments: int = 1

    def plan(self, trajectory: sf.Trajectory, stage: int = -1) -> Any:
        terms = sf.Source(self.segments).plan(trajectory, stage)
        weights = tuple(weight / sum(WEIGHTS) for weight in WEIGHTS)
        point = Point(0, tuple(enumerate(weights))) if self.place is None else Point.at(0, self.place)
        return tuple(replace(term, query=point, query_weights=()) for term in terms)


def _scores(folder: Path, method: Any, net: str = "mlp", query: Any = None) -> Tensor:
    model, data = (ConvNet(), images) if net == "conv" else (mlp(), vectors)
    trajectory = trajectory_of(folder / "run", perturbed_states(model, 3, 0.3), N, lr=SCHEDULE)
    analyzer = analyzer_of(model, trajectory, folder / "store", method=method)
    analyzer.fit(data(N))
    return analyzer.score(GROUPS, data(N), data(4, seed=5) if query is None else query).values


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("net", ["mlp", "conv", "property"])
def test_scores_are_the_weighted_mean_of_those_at_each_checkpoint(tmp_path: Path, net: str, segments: int) -> None:
    """Of examples of one token, of many, and of a property; a checkpoint weighs by the steps nearest to it."""
    query = sf.properties.MeanMeasurement(vectors(6, seed=5), sf.tasks.Classification()) if net == "property" else None
    found = _scores(tmp_path, sf.Source(segments), net, query)
    at_each = [_scores(tmp_path, At(place, segments), net, query) for place in range(3)]
    expected = sum(weight * values for weight, values in zip(WEIGHTS, at_each, strict=True)) / sum(WEIGHTS)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    final = _scores(tmp_path, sf.Source(segments, query_points="final"), net, query)
    torch.testing.assert_close(final, at_each[-1], rtol=1e-9, atol=1e-14)
    assert not torch.allclose(found, final, rtol=1e-2, atol=0)
    assert not torch.allclose(found, _scores(tmp_path, At(None, segments), net, query), rtol=1e-3, atol=0)


def test_the_query_is_at_the_last_stages_checkpoints_whatever_stage_is_scored(tmp_path: Path) -> None:
    first, second = (
        trajectory_of(tmp_path / name, perturbed_states(mlp(), 2), N, lr=rate)
        for name, rate in (("a", 0.4), ("b", 0.2))
    )
    for name, trajectory in (("first", first), ("second", second)):
        trajectory.stage = name
    run = second.after(first)
    for stage in (0, 1):
        for term in sf.Source().plan(run, stage):
            assert term.query_points == (Point.at(1, 0), Point.at(1, 1))


def test_a_checkpoint_that_stands_for_no_rate_is_not_differentiated(tmp_path: Path) -> None:
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 3), N, lr=[0.5] * 24 + [0.0] * 6)
    [term] = sf.Source().plan(trajectory)
    assert term.query_points == (Point.at(0, 0), Point.at(0, 1))
    [equal] = sf.Source(checkpoint_weights="equal").plan(trajectory)
    assert equal.query_points == tuple(Point.at(0, place) for place in range(3))
    assert equal.query_weights == (1 / 3,) * 3


def test_query_weights_of_parameter_groups_and_of_representations_are_refused() -> None:
    points = (Point.at(0, 0), Point.at(0, 1))
    term: dict[str, Any] = {"label": "t", "stage": 0, "operators": (), "train": points[:1], "weights": (1.0,)}
    assert Term(query=points, **term).query_weights == (0.5, 0.5)
    assert Term(query=points[:1], **term) == Term(query=points[0], **term)
    for weights in (((1.0, 0.5), (0.0, 0.5)), (0.5,), (0.7, 0.7)):
        with pytest.raises(MethodError, match="weights"):
            Term(query=points, query_weights=weights, **term)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="2 query points"):
        Term(query=points, side="representation", **term)
