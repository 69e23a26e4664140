"""How the size of scores compares with real changes: one number, by which they can be calibrated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ..arguments import real_number, settle, shown, whole_number
from ..errors import ScoreError

CALIBRATION = "calibration"  # in the provenance: the slope that the scores were multiplied by
# What the provenance may tell otherwise of the scores that a slope was fitted to: other groups, another run.
_MAY_DIFFER = {
    *("group_digest", "shared_out_from", "rolled_up_from"),
    *("seed", "terms", "training", "segmentation", "batching_error", "trace_shares", "coupled_curvature", "queries_at"),
}


@dataclass(frozen=True)
class Slope:
    """The real change of the measurement for each unit of predicted change; 1 where predictions have the right size.

    Args:
        value: the slope.
        low, high: its interval of 95%.
        subsets, repetitions, queries: how many retrained subsets, retrainings of each, and queries it was fitted to.
        left_out: the mean share of the examples that a subset leaves out; None where it is not known.
        of: the provenance of the scores that it was fitted to; empty where it is not known.

    Raises:
        ScoreError: a count is no whole number, or the slope no number within its interval.
    """

    value: float
    low: float
    high: float
    subsets: int
    repetitions: int
    queries: int
    left_out: float | None = None
    of: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        low = real_number("low", self.low, ScoreError, finite=False)
        high = real_number("high", self.high, ScoreError, low, finite=False)
        settle(self, low=low, high=high, value=real_number("value", self.value, ScoreError, low, high))
        for name in ("subsets", "repetitions", "queries"):
            settle(self, **{name: whole_number(name, getattr(self, name), ScoreError, 1)})
        if self.left_out is not None:
            settle(self, left_out=real_number("left_out", self.left_out, ScoreError, 0, 1))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def described(self) -> dict[str, Any]:
        """What the provenance of calibrated scores says: the slope, its interval, and what it was fitted to."""
        names = ("value", "low", "high", "subsets", "repetitions", "queries", "left_out")
        return {name: getattr(self, name) for name in names}


@runtime_checkable
class HasSlope(Protocol):
    """What can tell the slope of scores, such as a `segflow.evaluation.Bank` of retrained models."""

    def slope(self, scores: Any) -> Slope:
        """The slope of real changes on those that the segflow.Scores predict."""


def slope_for(scores: Any, provenance: Mapping[str, Any], by: Slope | HasSlope) -> Slope:
    """The slope to calibrate scores by; ScoreError for one that is not theirs, or not known to be positive.

    scores, provenance: segflow.Scores, and theirs.
    """
    if CALIBRATION in provenance:
        raise ScoreError(
            f"calibrated: these scores were multiplied by a slope already ({shown(provenance[CALIBRATION])}). "
            "Calibrate the scores as they came."
        )
    slope = by.slope(scores) if isinstance(by, HasSlope) else by
    if not isinstance(slope, Slope):
        raise ScoreError(
            f"calibrated: by={shown(by)}: expected a Slope, or what tells one, such as a segflow.evaluation.Bank."
        )
    _check_theirs(slope, provenance)
    if not 0 < slope.low <= slope.high < float("inf"):
        raise ScoreError(
            f"calibrated: the slope is {slope}, of {slope.subsets} subsets and {slope.queries} queries. Expected an "
            "interval above 0: these scores do not predict the changes well enough to take their size from. Retrain "
            "on more subsets, or use the ranks alone."
        )
    return slope


def _check_theirs(slope: Slope, provenance: Mapping[str, Any]) -> None:
    """ScoreError if the slope was fitted to scores of another method, of other options, or of another measurement."""
    if not slope.of:
        return
    keys = sorted((set(slope.of) | set(provenance)) - _MAY_DIFFER)
    differing = [key for key in keys if slope.of.get(key) != provenance.get(key)]
    if differing:
        key = differing[0]
        raise ScoreError(
            f"calibrated: the slope was fitted to scores of {key}={shown(slope.of.get(key))}, these are of "
            f"{shown(provenance.get(key))}. Fit one to these scores: scores.calibrated(bank)."
        )


def check_calibrated_alike(name: str, provenances: Iterable[Mapping[str, Any]]) -> None:
    """ScoreError if of the runs of a series, whose scores are averaged, some are calibrated and others are not."""
    if len({CALIBRATION in provenance for provenance in provenances}) > 1:
        raise ScoreError(
            f"scores of {name!r}: some runs are calibrated, others are not, so their sizes have no common mean. "
            "Calibrate all of them or none."
        )
