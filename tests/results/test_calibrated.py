"""Calibrated scores are the same scores at another size, say by which slope, and are not calibrated twice."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf
from segflow.evaluation import FunctionTraining, leave_one_group_out
from segflow.evaluation.series import named_runs
from segflow.results import Slope

GROUPS = sf.Groups.from_lists([[0, 2], [1], [3, 4]], length=5)
SLOPE = Slope(0.25, 0.125, 0.5, subsets=20, repetitions=3, queries=50, left_out=0.1)


@pytest.fixture
def scores() -> sf.Scores:
    parts = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return sf.Scores(
        parts.mean(0),
        ("a", "b"),
        GROUPS.labels,
        (2, 1, 2),
        {"method": "Source", "layers": "coupled", "measurement": "loss", "group_digest": GROUPS.digest},
        by_term={"segment 1": parts[0] / 2, "segment 2": parts[1] / 2},
        by_layer={"fc": parts[0], "head": parts.mean(0) - parts[0]},
        by_run={"run 1": parts[0], "run 2": parts[1]},
        spread=parts.std(0),
    )


def _times(scores: sf.Scores, factor: float) -> dict[str, torch.Tensor]:
    return {name: part * factor for name, part in scores._parts().items()}


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.allclose(first[name], second[name]) for name in first)


# ---- what is multiplied, and what is said ----


def test_values_parts_and_spread_are_all_multiplied(scores: sf.Scores) -> None:
    calibrated = scores.calibrated(SLOPE)
    assert len(scores._parts()) == 8
    assert _same(calibrated._parts(), _times(scores, 0.25))


def test_the_provenance_says_by_what_and_survives_a_file(scores: sf.Scores, tmp_path: Path) -> None:
    calibrated = scores.calibrated(SLOPE)
    names = ("value", "low", "high", "subsets", "repetitions", "queries", "left_out")
    assert calibrated.provenance["calibration"] == {name: getattr(SLOPE, name) for name in names}
    calibrated.save(tmp_path / "scores")
    loaded = sf.Scores.load(tmp_path / "scores")
    assert loaded.provenance == calibrated.provenance
    with pytest.raises(sf.ScoreError, match="were multiplied by a slope already"):
        loaded.calibrated(SLOPE)


@pytest.mark.parametrize("step", ["total", "by_example", "rolled_up"])
def test_calibrated_scores_are_summed_and_shared_out_as_others_are(scores: sf.Scores, step: str) -> None:
    coarse = sf.Groups.from_lists([[0, 1, 2], [3, 4]], length=5)
    given: dict[str, Any] = {"total": (), "by_example": (GROUPS,), "rolled_up": (GROUPS, coarse)}
    before, after = (getattr(of, step)(*given[step]) for of in (scores, scores.calibrated(SLOPE)))
    assert _same(after._parts(), _times(before, 0.25))
    assert _same(before.calibrated(SLOPE)._parts(), after._parts())
    with pytest.raises(sf.ScoreError, match="were multiplied by a slope already"):
        after.calibrated(SLOPE)


def test_a_tree_of_calibrated_scores_adds_up(scores: sf.Scores) -> None:
    tree = sf.GroupTree((sf.Groups.from_lists([[0, 1, 2], [3, 4]], length=5), GROUPS))
    coarse, fine = tree.scores(scores.calibrated(SLOPE))
    torch.testing.assert_close(coarse.values.sum(1), fine.values.sum(1))
    assert coarse.provenance["calibration"]["value"] == 0.25


def test_low_precision_parts_still_add_up(scores: sf.Scores) -> None:
    single = replace(scores, values=scores.values.bfloat16(), by_term={}, by_layer={}, by_run={}, spread=None)
    assert single.calibrated(replace(SLOPE, value=0.3)).values.dtype == torch.bfloat16


# ---- what is refused ----


@pytest.mark.parametrize(
    ("value", "low", "high"), [(0.2, -0.1, 0.5), (0.2, 0.0, 0.4), (-0.3, -0.5, -0.1), (0.2, 0.1, np.inf)]
)
def test_a_slope_that_is_not_known_to_be_positive_is_refused(
    scores: sf.Scores, value: float, low: float, high: float
) -> None:
    with pytest.raises(sf.ScoreError, match=r"the slope is .*, of 20 subsets and 50 queries.*an interval above 0"):
        scores.calibrated(replace(SLOPE, value=value, low=low, high=high))


def test_scores_that_do_not_add_up_are_refused(scores: sf.Scores) -> None:
    with pytest.raises(sf.ScoreError, match="calibrated: scores of Source do not add up"):
        replace(scores, provenance={"method": "Source", "additive": False}).calibrated(SLOPE)


@pytest.mark.parametrize("by", [0.5, None, np.ones(3), "bank"])
def test_what_is_no_slope_and_tells_none_is_refused(scores: sf.Scores, by: Any) -> None:
    with pytest.raises(sf.ScoreError, match="expected a Slope, or what tells one"):
        scores.calibrated(by)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "apart"}, "of layers='apart', these are of 'coupled'"),
        ({"measurement": "margin"}, "of measurement='margin'"),
        ({"runs": 5}, "of runs=5, these are of None"),
        ({"calibration": {}}, "of calibration={}"),
    ],
)
def test_a_slope_of_other_scores_is_refused(scores: sf.Scores, change: dict[str, Any], message: str) -> None:
    with pytest.raises(sf.ScoreError, match=message):
        scores.calibrated(replace(SLOPE, of={**scores.provenance, **change}))


@pytest.mark.parametrize("change", [{"group_digest": "x"}, {"seed": 3}, {"terms": {"segment 1": [3]}}])
def test_a_slope_of_the_same_method_on_other_groups_or_another_run_is_taken(
    scores: sf.Scores, change: dict[str, Any]
) -> None:
    slope = replace(SLOPE, of={**scores.provenance, **change})
    assert torch.equal(scores.calibrated(slope).values, scores.values * 0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": 0.6}, "value=0.6: expected"),
        ({"value": np.nan}, "value=nan"),
        ({"low": 0.6}, "high=0.5: expected"),
        ({"subsets": 0}, "subsets=0"),
        ({"left_out": 2}, "left_out=2"),
    ],
)
def test_a_slope_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(sf.ScoreError, match=message):
        replace(SLOPE, **change)


def test_numbers_of_numpy_are_saved_as_plain_ones(scores: sf.Scores) -> None:
    slope = Slope(np.float32(0.25), np.float64(0.125), torch.tensor(0.5), np.int64(20), 3, 50, np.float32(0.5))  # type: ignore[arg-type]
    assert json.dumps(scores.calibrated(slope).provenance["calibration"])


# ---- who tells a slope ----


@dataclass
class _Told:
    """What tells a slope as a bank does."""

    told: Any
    asked: sf.Scores | None = None

    def slope(self, scores: sf.Scores) -> Any:
        self.asked = scores
        return self.told


def test_anything_that_tells_a_slope_of_scores_is_asked_for_theirs(scores: sf.Scores) -> None:
    told = _Told(SLOPE)
    assert scores.calibrated(told).provenance == scores.calibrated(SLOPE).provenance
    assert told.asked is scores
    with pytest.raises(sf.ScoreError, match="expected a Slope"):
        scores.calibrated(_Told(0.5))


# ---- beside scores that are not calibrated ----


def test_runs_that_are_averaged_are_calibrated_alike(scores: sf.Scores) -> None:
    calibrated = scores.calibrated(SLOPE)
    assert named_runs({"mine": [calibrated, calibrated], "theirs": scores})
    with pytest.raises(sf.ScoreError, match="scores of 'mine': some runs are calibrated, others are not"):
        named_runs({"mine": [calibrated, scores]})


def test_a_table_of_predicted_changes_says_that_they_are_calibrated(scores: sf.Scores, tmp_path: Path) -> None:
    training = FunctionTraining(lambda kept, seed: [float(kept.sum()), 1.0], {"sum": "of indices"}, processes=1)
    series = {"calibrated": scores.calibrated(SLOPE), "as it came": scores}
    notes = leave_one_group_out(series, GROUPS, training, tmp_path, repetitions=2, progress=False).settings["notes"]
    assert notes["calibrated"].endswith("; predictions calibrated on retrainings")
    assert "calibrated" not in notes["as it came"]
