"""The questions of a row: the influence of one stage's examples each, with the retrainings that answer it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .rows import REMOVED, STAGE_NAMES, Row
from .training import ground_truth

HALVES = "halves"
BANKS = {HALVES: "bank", **{kind: kind for kind in REMOVED}}  # what is left out, and the kind of bank that does so


@dataclass(frozen=True)
class Part:
    """One question of a row: the influence of one stage's examples.

    stage: the stage's name ("" where there is one stage); measurement: what is explained; subsets [M, N], measured
    [M, R, Q]: the retrainings on halves.
    """

    row: Row
    stage: str
    measurement: str
    subsets: np.ndarray
    measured: np.ndarray

    def left_out(self, what: str) -> tuple[np.ndarray, np.ndarray]:
        """The retrainings that leave out halves, a "tenth" or a "hundredth", as `subsets` and `measured`."""
        if what == HALVES:
            return self.subsets, self.measured
        return truth_of(self.row, BANKS[what], self.stage, self.measurement)


def parts_of(row: Row, measurement: str) -> Iterator[Part]:
    """The row's questions, each with its ground truth."""
    for stage in ("",) if len(row.recipes) == 1 else STAGE_NAMES:
        yield Part(row, stage, measurement, *truth_of(row, BANKS[HALVES], stage, measurement))


def truth_of(row: Row, kind: str, stage: str, measurement: str) -> tuple[np.ndarray, np.ndarray]:
    """A finished bank of one kind: which of the stage's examples are kept [M, N], and the measurements [M, R, Q]."""
    subsets, measured = ground_truth(row, f"{kind}-{stage}" if stage else kind, measurement)
    sizes = [len(inputs) for inputs, _ in row.load().stages]
    number = STAGE_NAMES.index(stage) if stage else 0
    start = sum(sizes[:number])
    return subsets[:, start : start + sizes[number]], measured
