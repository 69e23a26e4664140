"""Second moments that some parameters have not yet, or never will: whose P they leave as it is, and where P is 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import segflow as sf

from ..support.helpers import analyzer_of, apart, mlp, perturbed_states, trajectory_of, vectors
from ..support.histories import by_span, history, moment_files

N, QUERIES, EPS = 20, 4, 1e-3
GROUPS = sf.Groups.from_lists([[0, 3, 5], range(6, 20), [1], [2, 4]], N)
OWN_GROUP = {name: int(name.startswith("4")) for name in mlp().state_dict()}  # the last layer's is another one
METHODS = {kind: sf.Source(segments=2, preconditioner=kind) for kind in ("kronecker", "diagonal")}
APART = {kind: apart(2, preconditioner=kind) for kind in METHODS}  # for what other layers leave as it is
STEADY = by_span((40, (0.004, 0.004)))
FROZEN_FIRST = by_span((20, (0.004, 0.0)), (20, (0.004, 0.004)))


def _changed(folder: Path, files: list[Path], change: dict[int, dict[str, Tensor]]) -> list[Path]:
    """Copies of the files with other second moments in some."""
    folder.mkdir()
    for index, path in enumerate(files):
        save_file(load_file(path) | change.get(index, {}), folder / path.name)
    return [folder / path.name for path in files]


def _trajectory(folder: Path, files: Any, rates: Tensor = STEADY, **options: Any) -> sf.Trajectory:
    made = trajectory_of(folder / "run", perturbed_states(mlp(), 4), N)
    optimizer = sf.OptimizerConstants("Adam", **{"eps": EPS, **options.pop("constants", {})})
    return history(
        made, OWN_GROUP, rates, **{"decays": 0.5 * rates, "optimizer": optimizer, "moments": files, **options}
    )


def _scores(store: Path, trajectory: sf.Trajectory, method: Any) -> sf.Scores:
    analyzer = analyzer_of(mlp(), trajectory, store, method=method)
    analyzer.fit(vectors(N))
    return analyzer.score(GROUPS, vectors(N), vectors(QUERIES, seed=5), keep=("layer",))


def _last_layer(of: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in of.items() if name.startswith("4")}


@pytest.mark.parametrize("kind", METHODS)
def test_the_weight_of_a_checkpoint_without_a_layers_moments_goes_to_the_others(tmp_path: Path, kind: str) -> None:
    """As if the checkpoint had had the moments of the one that takes its weight; other layers keep theirs."""
    whole = moment_files(tmp_path / "whole", mlp(), 4)
    partly = moment_files(tmp_path / "partly", mlp(), 4, missing={0: "4"})
    same = _changed(tmp_path / "same", whole, {0: _last_layer(load_file(whole[1]))})
    found, expected, before = (
        _scores(tmp_path / name, _trajectory(tmp_path, files), APART[kind])
        for name, files in (("a", partly), ("b", same), ("c", whole))
    )
    torch.testing.assert_close(found.values, expected.values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.by_layer["0"], before.by_layer["0"], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found.by_layer["4"], before.by_layer["4"], rtol=1e-3, atol=0)
    assert found.provenance["second_moments"] == "recorded"


@pytest.mark.parametrize("kind", METHODS)
def test_a_layer_that_did_not_move_in_a_segment_needs_no_moments_there(tmp_path: Path, kind: str) -> None:
    whole = moment_files(tmp_path / "whole", mlp(), 4)
    partly = moment_files(tmp_path / "partly", mlp(), 4, missing={0: "4", 1: "4"})
    found, expected = (
        _scores(tmp_path / name, _trajectory(tmp_path, files, FROZEN_FIRST), METHODS[kind]).values
        for name, files in (("a", partly), ("b", whole))
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("call", ["check", "fit"])
def test_a_layer_that_moved_and_has_no_moments_in_its_segment_says_where_to_record(tmp_path: Path, call: str) -> None:
    files = moment_files(tmp_path / "partly", mlp(), 4, missing={0: "4", 1: "4"})
    analyzer = analyzer_of(mlp(), _trajectory(tmp_path, files), tmp_path / "store", method=METHODS["kronecker"])
    message = (
        r"no second moments of \['4.bias', '4.weight'\] at the checkpoints of steps \[10, 20\].*Record a checkpoint"
    )
    with pytest.raises(sf.TrajectoryError, match=message):
        getattr(analyzer, call)(vectors(N))
    assert not list((tmp_path / "store").glob("units/**/*.safetensors"))


@pytest.mark.parametrize("kind", METHODS)
def test_layers_of_an_optimizer_without_second_moments_have_a_p_of_one(tmp_path: Path, kind: str) -> None:
    """SGD beside Adam, against second moments of (1 - eps)^2, whose P is 1."""
    whole = moment_files(tmp_path / "whole", mlp(), 4)
    ones = {n: torch.full_like(v, (1 - EPS) ** 2) for n, v in _last_layer(load_file(whole[0])).items()}
    unit = _changed(tmp_path / "unit", whole, dict.fromkeys(range(4), ones))
    bare = moment_files(tmp_path / "bare", mlp(), 4, missing=dict.fromkeys(range(4), "4"))
    mixed = {"has_moments": (True, False), "kinds": ("Adam", "SGD"), "coupled": (True, False)}
    for method in (METHODS[kind], APART[kind]):
        found = _scores(tmp_path / "a", _trajectory(tmp_path, bare, **mixed), method)
        expected = _scores(tmp_path / "b", _trajectory(tmp_path, unit, coupled=(True, False)), method)
        torch.testing.assert_close(found.values, expected.values, rtol=1e-7, atol=1e-12)
    estimated = _trajectory(tmp_path, None, constants={"batch_size": 5}, **mixed)
    with pytest.warns(UserWarning, match="second moments were not saved at 4 checkpoints"):
        by_layer = _scores(tmp_path / "c", estimated, APART[kind]).by_layer
    torch.testing.assert_close(by_layer["4"], expected.by_layer["4"], rtol=1e-7, atol=1e-12)
    assert not torch.allclose(by_layer["0"], expected.by_layer["0"], rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:.*second moments were not saved")
@pytest.mark.parametrize("kind", ["Adam", "Adagrad"])
def test_estimated_moments_are_of_clipped_gradients(tmp_path: Path, kind: str) -> None:
    """A factor of 1/2 on every gradient is a P of twice the rate, and half the eps."""
    plan, squares = sf.Source(segments=2), ((0.25, 1.0),) * 4
    clipped, plain, twice = (
        _trajectory(
            tmp_path,
            None,
            rates,
            kinds=(kind,) * 2,
            clip_squares=clip,
            constants={"eps": [first_eps, EPS], "batch_size": 5},
            decays=0.5 * STEADY,
        )
        for rates, clip, first_eps in (
            (STEADY, squares, EPS),
            (STEADY, ((1.0, 1.0),) * 4, EPS),
            (STEADY * torch.tensor([2.0, 1.0]), ((1.0, 1.0),) * 4, 2 * EPS),
        )
    )
    found = _scores(tmp_path / "a", clipped, plan)
    expected = _scores(tmp_path / "b", twice, plan)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-8, atol=1e-12)
    assert not torch.allclose(found.values, _scores(tmp_path / "c", plain, plan).values, rtol=1e-3, atol=0)
    with pytest.raises(sf.StoreError, match="clip_squares"):
        _scores(tmp_path / "a", plain, plan)
