"""What moves a parameter has two sums, rate and decay: each parameter group is scored by its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import segflow as sf
from segflow.methods import spectra
from segflow.methods.plan import Curvature, Point, Preconditioner, Spectral

from ..support import oracles
from ..support.helpers import analyzer_of, apart, mlp, perturbed_states, trajectory_of, vectors
from ..support.histories import by_span, history, moment_files

N, QUERIES, EPS = 20, 4, 1e-3
GROUPS = sf.Groups.from_lists([[0, 3, 5], range(6, 20), [1], [2, 4]], N)
OWN_GROUP = {name: int(name.startswith("4")) for name in mlp().state_dict()}  # the last layer's is another one


@pytest.mark.parametrize("rate", [0.0, 0.3, 4.0])
@pytest.mark.parametrize("shift", [0.0, 0.2, 3.0])
def test_operators_are_the_limit_of_many_small_steps(rate: float, shift: float) -> None:
    """Each step takes in a gradient of 1 and forgets, by rate and decay over the number of steps."""
    sigma, steps = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64), 20_000
    kept, learnt = torch.ones_like(sigma), torch.zeros_like(sigma)
    per_step = 1 - (rate * sigma + shift) / steps
    for _ in range(steps):
        learnt = per_step * learnt + rate / steps
        kept = per_step * kept
    close: dict[str, Any] = {"rtol": 0, "atol": 2e-3}
    torch.testing.assert_close(spectra.decay(sigma, rate, shift), kept, **close)
    torch.testing.assert_close(spectra.response(sigma, rate, shift), learnt, **close)
    torch.testing.assert_close(spectra.response(sigma, rate, shift), oracles.response(rate, shift)(sigma))
    torch.testing.assert_close(spectra.decay(sigma, rate, shift), oracles.decay(rate, shift)(sigma))
    torch.testing.assert_close(spectra.saturation(sigma, rate, shift), 1 - kept if rate else learnt, **close)


def test_a_coupled_shift_needs_the_preconditioner_that_it_is_times() -> None:
    for given in ({"coupled": (0.1,)}, {"shifted_by": Preconditioner(0, ((0, 1.0),))}):
        with pytest.raises(sf.MethodError, match="expected both or neither"):
            Spectral(stage=0, kind="decay", curvature=None, amount=(1.0,), shift=(0.0,), **given)


def test_each_group_adds_its_own_shift_and_its_own_coupled_shift() -> None:
    P = torch.tensor([2.0, 5.0], dtype=torch.float64)
    sigma = torch.tensor([0.5, 0.0], dtype=torch.float64)
    curvature, of = Curvature(0, (Point.at(0, 0),), (1.0,)), Preconditioner(0, ((0, 1.0),))
    operator = Spectral(
        stage=0,
        kind="decay",
        curvature=curvature,
        amount=(1.0, 3.0),
        shift=(0.2, 0.0),
        coupled=(0.0, 0.1),
        shifted_by=of,
    )
    torch.testing.assert_close(operator.on(sigma, 0, P), torch.exp(-sigma - 0.2))
    torch.testing.assert_close(operator.on(sigma, 1, P), torch.exp(-3 * sigma - 0.1 * P))


def _by_layer(folder: Path, trajectory: sf.Trajectory, method: Any) -> dict[str, Tensor]:
    analyzer = analyzer_of(mlp(), trajectory, folder, method=method)
    analyzer.fit(vectors(N))
    return dict(analyzer.score(GROUPS, vectors(N), vectors(QUERIES, seed=5), keep=("layer",)).by_layer)


@pytest.mark.parametrize("preconditioner", ["kronecker", "diagonal"])
def test_coupled_and_decoupled_decay_stand_in_one_plan(tmp_path: Path, preconditioner: str) -> None:
    """Each layer is scored as if the whole model's decay had been as its own group's."""
    made = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 4), N)
    moments, method = moment_files(tmp_path, mlp(), 4), sf.Source(segments=2, preconditioner=preconditioner)
    optimizer, rates = sf.OptimizerConstants("Adam", eps=EPS), by_span((40, (0.004, 0.004)))
    by_layer = {}
    for label, coupled in {"both": (False, True), "first": (False, False), "second": (True, True)}.items():
        trajectory = history(
            made, OWN_GROUP, rates, optimizer=optimizer, moments=moments, decays=0.5 * rates, coupled=coupled
        )
        by_layer[label] = _by_layer(tmp_path / label, trajectory, method)
    for layer, expected in {"0": "first", "2": "first", "4": "second"}.items():
        torch.testing.assert_close(by_layer["both"][layer], by_layer[expected][layer], rtol=1e-9, atol=0)
    assert not torch.allclose(by_layer["first"]["4"], by_layer["second"]["4"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("preconditioner", ["none", "kronecker", "diagonal"])
def test_a_group_that_saw_no_data_in_a_segment_learns_nothing_there_and_decays(
    tmp_path: Path, preconditioner: str
) -> None:
    made = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 4), N)
    optimizer = sf.OptimizerConstants("AdamW" if preconditioner != "none" else "SGD", eps=EPS)
    moments = None if preconditioner == "none" else moment_files(tmp_path, mlp(), 4)
    method = apart(2, preconditioner=preconditioner)
    rates = by_span((20, (0.004, 0.004)), (20, (0.004, 0.0)))
    parts = {}
    for decay in (0.0, 0.01):
        decays = by_span((20, (0.0, 0.0)), (20, (0.0, decay)))
        trajectory = history(made, OWN_GROUP, rates, optimizer=optimizer, moments=moments, decays=decays)
        analyzer = analyzer_of(mlp(), trajectory, tmp_path / f"store-{decay}", method=method)
        analyzer.fit(vectors(N))
        query = vectors(QUERIES, seed=5)
        parts[decay] = analyzer.score(GROUPS, vectors(N), query, keep=("layer",)).by_layer["4"]
    alone = history(made, OWN_GROUP, by_span((20, (0.004, 0.004)), (20, (0.004, 1e-12))), optimizer=optimizer,
                    moments=moments)  # fmt: skip
    expected = _by_layer(tmp_path / "alone", alone, method)["4"]
    torch.testing.assert_close(parts[0.0], expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(parts[0.01], parts[0.0] * math.exp(-0.2), rtol=1e-9, atol=0)
