"""Layers whose optimizer has no known rates, as Muon's, are refused by name by methods that need rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import segflow as sf
from segflow.methods import TraceShares

from ..support.helpers import FixedLabels, analyzer_of, mlp, perturbed_states, trajectory_of, vectors
from ..support.histories import by_span, history

N = 20
GROUPS = sf.Groups.random(N, 5)
NAN = float("nan")


class Tracking(FixedLabels):
    def __init__(self, *names: str):
        super().__init__()
        self.names = names

    def get_influence_tracked_modules(self) -> list[str]:
        return list(self.names)


def _beside_muon(folder: Path, **given: Any) -> sf.Trajectory:
    """The middle layer was Muon's."""
    made = trajectory_of(folder / "run", perturbed_states(mlp(), 2), N)
    groups = {name: int(name.startswith("2")) for name in mlp().state_dict()}
    rates = by_span((15, (0.3, NAN)), (5, (0.1, NAN)))
    return history(made, groups, rates, kinds=("SGD", "Muon"), decays=0.01 * rates, **given)


@pytest.mark.parametrize("method", [sf.Source(), sf.Source(segments="auto"), sf.TracIn(), sf.Hydra()])
def test_methods_that_need_rates_name_the_layers_when_the_analyzer_is_made(tmp_path: Path, method: Any) -> None:
    message = (
        r"parameters \['2.weight', '2.bias'\] were trained by Muon, whose rates are not known.*Leave their layers out"
    )
    with pytest.raises(sf.TrajectoryError, match=message):
        analyzer_of(mlp(), _beside_muon(tmp_path), tmp_path / "store", method=method)


class Shared(sf.InfluenceFunction):
    """An influence function of coupled layers: only the layers' shares take rates."""

    def plan(self, trajectory: sf.Trajectory, stage: int = -1) -> Any:
        [term], rates = super().plan(trajectory, stage), trajectory.lr_steps(0, 20)
        [operator] = term.operators
        shares = TraceShares(stage=0, curvature=operator.curvature, rates=rates)
        return (replace(term, operators=(replace(operator, trace_shares=shares),)),)


def test_unknown_rates_of_layers_shares_are_refused(tmp_path: Path) -> None:
    with pytest.raises(sf.TrajectoryError, match=r"\['2.weight', '2.bias'\] were trained by Muon, whose rates are not"):
        analyzer_of(mlp(), _beside_muon(tmp_path), tmp_path / "store", method=Shared())


@pytest.mark.parametrize("method", [sf.InfluenceFunction(), sf.GradientDot()])
def test_methods_without_rates_take_them(tmp_path: Path, method: Any) -> None:
    analyzer = analyzer_of(mlp(), _beside_muon(tmp_path), tmp_path / "store", method=method)
    analyzer.fit(vectors(N))
    assert torch.isfinite(analyzer.score(GROUPS, vectors(N), vectors(3, seed=5)).values).all()


@pytest.mark.parametrize("method", [sf.Source(), sf.Source(segments="auto", penalty=1e-6), sf.TracIn()])
def test_the_other_layers_are_scored_as_if_there_were_no_other_optimizer(tmp_path: Path, method: Any) -> None:
    task, values = Tracking("0", "4"), []
    made = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 2), N)
    known = by_span((15, (0.3,)), (5, (0.1,)))
    alone = history(made, dict.fromkeys(mlp().state_dict(), 0), known, decays=0.01 * known)
    for label, trajectory in {"beside": _beside_muon(tmp_path), "alone": alone}.items():
        analyzer = analyzer_of(mlp(), trajectory, tmp_path / label, task=task, method=method)
        analyzer.fit(vectors(N))
        values.append(analyzer.score(GROUPS, vectors(N), vectors(3, seed=5)).values)
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-12)


def test_a_bias_of_another_optimizer_than_its_weights_is_a_block_by_itself(tmp_path: Path) -> None:
    made = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 2), N)
    groups = {name: int(name == "2.bias") for name in mlp().state_dict()}
    constants = sf.OptimizerConstants(name=["Muon", "SGD"])
    kinds = {"kinds": ("Muon", "SGD"), "has_moments": (False, False)}
    trajectory = history(made, groups, by_span((20, (0.3, 0.3))), optimizer=constants, **kinds)
    analyzer = analyzer_of(mlp(), trajectory, tmp_path / "store", method=sf.GradientDot())
    assert list(analyzer.context.layers.tracked) == ["0", "2", "2.bias", "4"]
    assert analyzer.context.parameter_groups == {"0": 0, "2": 0, "2.bias": 1, "4": 0}
