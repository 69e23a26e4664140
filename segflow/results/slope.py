"""How the size of scores compares with real changes: one number, by which scores can be calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from .scores import Scores


@dataclass(frozen=True)
class Slope:
    """The real change of the measurement for each unit of predicted change; 1 where predictions have the right size.

    value: the slope; low, high: its interval of 95%, infinite where there is none; subsets, repetitions, queries: how
    many retrained subsets, retrainings of each and queries it was fitted to; left_out: the mean share of the scored
    examples that a subset leaves out; of: the provenance of the scores it was fitted to.
    """

    value: float
    low: float
    high: float
    subsets: int
    repetitions: int
    queries: int
    left_out: float | None = None
    of: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@runtime_checkable
class HasSlope(Protocol):
    """What can tell the slope of scores, such as a `segflow.evaluation.Bank` of retrained models."""

    def slope(self, scores: Scores) -> Slope:
        """Of real changes on those that the scores predict."""
        ...
