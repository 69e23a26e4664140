"""What scores predict of retrainings that are there, and whether the two fit.

Axis letters: M subsets, K groups, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..errors import ScoreError
from ..results.same_groups import check_same_groups
from ..results.scores import Scores
from .arguments import as_measurements
from .series import values_of
from .subsets import Subsets, as_subsets
from .ties import merged, precision

FEWEST_SUBSETS = 3  # two agree or disagree, and nothing between


@dataclass(frozen=True)
class Retrained:
    """Retrainings that are there, checked to fit the scores: kept_MK and measured_MQ, whose ties are merged."""

    kept_MK: np.ndarray
    measured_MQ: np.ndarray

    @classmethod
    def of(cls, subsets: Subsets, measurements: np.ndarray | Tensor, *compared: Scores) -> Retrained:
        """As given: subsets in any form, measurements [M, Q]; ScoreError where they do not fit one of the scores."""
        kept_MK, measured_MQ = as_subsets(subsets, len(compared[0].group_labels)), as_measurements(measurements)
        for scores in compared:
            _check_shapes(kept_MK, measured_MQ, scores)
        check_same_groups(zip(("first", "second"), compared, strict=False))
        return cls(kept_MK, _measured(measured_MQ))


def _measured(measured_MQ: np.ndarray) -> np.ndarray:
    """The measurements, where those that differ by rounding alone (of a mean over repetitions) are equal."""
    return merged(measured_MQ, 5e-15 * np.abs(measured_MQ))


def predicted_changes(scores: Scores, kept_MK: np.ndarray) -> np.ndarray:
    """[M, Q]: the predicted change from leaving groups out; those that differ by rounding alone are equal."""
    values_QK = values_of(scores)
    if not np.isfinite(values_QK).all():
        raise ScoreError("scores: a number is not finite. Score again, or leave the method out.")
    predicted_MQ = (~kept_MK).astype(float) @ values_QK.T
    steps = values_QK.shape[1] * np.finfo(float).eps * np.abs(values_QK).sum(1)  # of the sums
    held, summed_MQ = precision(scores.values), merged(predicted_MQ, steps)
    columns = (_as_held(*pair, kept_MK, held) for pair in zip(summed_MQ.T, values_QK, strict=True))
    return np.stack(list(columns), axis=1)


def _as_held(predicted_M: np.ndarray, values_K: np.ndarray, kept_MK: np.ndarray, held: float) -> np.ndarray:
    """The predictions, where those that differ by how their terms are held alone are equal.

    held: the precision of the terms. Terms that two subsets share are rounded alike, and do not count.
    """
    size_K, lowest, equal_M = held * np.abs(values_K), int(predicted_M.argmin()), predicted_M.copy()
    most = size_K.sum()
    for subset in np.argsort(predicted_M, kind="stable"):
        gap = predicted_M[subset] - predicted_M[lowest]
        if gap > most or gap > size_K[kept_MK[subset] != kept_MK[lowest]].sum():
            lowest = subset
        equal_M[subset] = predicted_M[lowest]
    return equal_M


def varies(values_MQ: np.ndarray) -> np.ndarray:
    """[Q] booleans: whether a query's values are not the same in every subset."""
    moving: np.ndarray = np.ptp(values_MQ, axis=0) > 0
    return moving


def used_queries(predictions: Sequence[np.ndarray], measured_MQ: np.ndarray | None, scores: Scores) -> np.ndarray:
    """[Q] booleans: the queries whose predictions and measurement vary; ScoreError if there are none."""
    predicted_Q = np.all([varies(predicted_MQ) for predicted_MQ in predictions], axis=0)
    used = predicted_Q if measured_MQ is None else predicted_Q & varies(measured_MQ)
    if not used.any():
        label, what = scores.query_labels[0], "measurement" if predicted_Q[0] else "predicted change"
        raise ScoreError(
            f"query {label!r}: the {what} is the same for every subset, so nothing can be compared, and the "
            f"other queries ({len(used) - 1}) do not vary either. Vary the subsets, or leave the method out."
        )
    return used


def left_out(used: np.ndarray, scores: Scores) -> tuple[str, ...]:
    """The labels of the queries that are not used."""
    return tuple(label for label, is_used in zip(scores.query_labels, used, strict=True) if not is_used)


def _check_shapes(kept_MK: np.ndarray, measured_MQ: np.ndarray, scores: Scores) -> None:
    Q, K = scores.values.shape
    if kept_MK.ndim != 2 or kept_MK.shape[1] != K or measured_MQ.shape != (len(kept_MK), Q):
        raise ScoreError(
            f"subsets {kept_MK.shape} and measurements {measured_MQ.shape}: expected [M, {K}] and [M, {Q}] for these "
            "scores."
        )
    if len(kept_MK) < FEWEST_SUBSETS:
        raise ScoreError(f"{len(kept_MK)} subsets: expected at least {FEWEST_SUBSETS} to compare.")
