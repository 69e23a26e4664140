"""Row: one number of a table, with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import ScoreError


class Estimate(NamedTuple):
    """A number and the ends of its interval; infinite ends where the data say nothing of the spread."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One number of a table.

    series: the method or baseline; x: the place on the x axis; mean, low, high: the number and its 95% interval
    (infinite ends: its spread is not known, as for a single value); values: what the mean is of, one for each seed or
    query as the table's settings say; label: a name for the row, where it has one (such as a group's).

    Raises:
        ScoreError: x, mean or a value is not finite, or low is above high.
    """

    series: str
    x: float
    mean: float
    low: float
    high: float
    values: tuple[float, ...] = ()
    label: str = ""

    def __post_init__(self) -> None:
        for name in ("x", "mean", "low", "high"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "values", tuple(map(float, self.values)))
        if not all(map(math.isfinite, (self.x, self.mean, *self.values))) or not self.low <= self.high:
            raise ScoreError(f"{self!r}: expected finite numbers, and low <= high. Look for a training that diverged.")

    def __str__(self) -> str:
        return shown(Estimate(self.mean, self.low, self.high))


def shown(estimate: Estimate) -> str:
    """An estimate as tables print it: the number and its interval."""
    return f"{estimate.mean:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]"
