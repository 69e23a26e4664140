"""How far scores agree with retraining, as the numbers of a row's JSON: of one run, and of all runs averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

import segflow as sf
from segflow.evaluation import (
    LinearDatamodelingDifference,
    LinearDatamodelingScore,
    empirical_influence,
    linear_datamodeling_difference,
    linear_datamodeling_score,
    noise_ceiling,
    slope_of_change,
)
from segflow.results import Slope

from .parts import BANKS, Part
from .training import ground_truth

CEILING = "intraclass correlation of the retrainings, pooled over the queries"  # what `noise_ceiling` is, in words
Estimate = LinearDatamodelingScore | LinearDatamodelingDifference | Slope


class Retrainings(Protocol):
    """Subsets [M, N] of the examples and what was measured after retraining on them [M, R, Q]."""

    @property
    def subsets(self) -> np.ndarray: ...

    @property
    def measured(self) -> np.ndarray: ...


def ceiling(measured: np.ndarray) -> dict[str, Any]:
    """The noise ceiling of measurements [M, R, Q], with what estimates it."""
    found = noise_ceiling(measured)
    return {
        "of": CEILING,
        "mean": found.ceiling,
        "low": found.low,
        "high": found.high,
        "reliability": found.reliability,
    }


def agreement(runs: Sequence[sf.Scores], subsets: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """The linear datamodeling scores of single runs and of their mean, given retrainings [M, N], [M, R, Q]."""
    single, whole = (_agreements(scores, subsets, measured.mean(1)) for scores in (runs, [mean_of(runs)]))
    return {"one": averaged(single) | {"runs": [score.mean for score in single]}, "all": averaged(whole)}


def _agreements(
    runs: Sequence[sf.Scores], subsets: np.ndarray, measured_MQ: np.ndarray
) -> list[LinearDatamodelingScore]:
    return [linear_datamodeling_score(scores, subsets, measured_MQ) for scores in runs]


def over_reference(part: Retrainings, runs: Sequence[sf.Scores], reference: Sequence[sf.Scores]) -> dict[str, Any]:
    """The paired difference from the reference: of single runs, run by run, and of all runs averaged."""
    measured_MQ = part.measured.mean(1)

    def differences(
        pairs: Sequence[tuple[sf.Scores, sf.Scores]],
    ) -> dict[str, float]:
        return averaged([linear_datamodeling_difference(*pair, part.subsets, measured_MQ) for pair in pairs])

    return {
        "over_one": differences(list(zip(runs, reference, strict=True))),
        "over_all": differences([(mean_of(runs), mean_of(reference))]),
    }


def slopes(part: Part, runs: Sequence[sf.Scores]) -> dict[str, Any]:
    """The slope of real on predicted change where halves, tenths and hundredths of the examples are left out."""
    return {what: slope(runs, *part.left_out(what)) for what in BANKS}


def slope(runs: Sequence[sf.Scores], subsets: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """The slope of real on predicted change for single runs and for their mean, given retrainings [M, N], [M, R, Q]."""
    kinds = {"one": runs, "all": [mean_of(runs)]}
    return {
        kind: averaged([slope_of_change(scores, subsets, measured) for scores in own]) for kind, own in kinds.items()
    }


def empirical(part: Part) -> dict[str, Any]:
    """The estimator fitted to other retrainings: to the second bank, or to the first half of the subsets."""
    if part.row.extra:
        fitted = empirical_influence(*ground_truth(part.row, "extra", part.measurement), centred=True)
        own = slice(None)
    else:
        half = len(part.subsets) // 2
        fitted = empirical_influence(part.subsets[:half], part.measured[:half], centred=True)
        own = slice(half, None)
    found = linear_datamodeling_score(fitted, part.subsets[own], part.measured[own].mean(1))
    return {
        "all": averaged([found]),
        "fitted_to": {key: fitted.provenance[key] for key in ("subsets", "repetitions")},
    }


def averaged(found: Sequence[Estimate]) -> dict[str, float]:
    """The mean of estimates, and that of the ends of their intervals."""
    values = [(e.value if isinstance(e, Slope) else e.mean, e.low, e.high) for e in found]
    return dict(zip(("mean", "low", "high"), map(float, np.mean(values, axis=0)), strict=True))


def mean_of(runs: Sequence[sf.Scores]) -> sf.Scores:
    """The scores averaged over runs."""
    return replace(runs[0], values=torch.stack([scores.values for scores in runs]).mean(0), by_term={}, by_layer={})
