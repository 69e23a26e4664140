"""Segments of training, and how a trajectory is cut into them (Bae et al. 2024, arXiv 2405.12186, Eqs. 13 to 22).

Automatic cuts are optimal change points: dynamic programming over squared distances of checkpoints' statistics, with a
penalty for each segment (Killick et al. 2012, arXiv 1101.1438, in its exact quadratic form).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MethodError, check_choice
from .sampling import nearest_bounds
from .trajectory import Trajectory

WEIGHTINGS = ("nearest", "equal")
Weight = float | tuple[float, ...]  # a checkpoint's: one number for all parameter groups, or one for each of them
_ROUNDING = 1e-9  # weights of two parameter groups that differ by less are the same


@dataclass(frozen=True)
class Segment:
    """Steps (start, end] of training, with the checkpoints in them.

    Args:
        weights: each checkpoint's share of the segment, by the rates of each parameter group; they sum to 1.
        overall: the same by the summed rates of all groups, for what is taken at one point for all parameters.
        lr_steps: what multiplies the data's gradient in the steps, summed; decay_steps: what multiplies the parameter
            itself (weight decay), summed; both one number for each parameter group.
    """

    start: int
    end: int
    checkpoints: tuple[int, ...]
    weights: tuple[Weight, ...]
    overall: tuple[float, ...]
    lr_steps: tuple[float, ...]
    decay_steps: tuple[float, ...]


def cut(trajectory: Trajectory, segments: int | Sequence[int], weighting: str = "nearest") -> tuple[Segment, ...]:
    """Cut a trajectory into segments.

    Args:
        segments: how many (checkpoints are shared out evenly, in order, and a segment ends at its last checkpoint), or
            the steps at which one segment ends and the next begins.
        weighting: "nearest": a checkpoint stands for the steps of its segment that are nearest to it, by their
            rates, for each parameter group by its own; "equal": all of a segment weigh the same.

    Raises:
        MethodError: the segments make no sense, or one would hold no checkpoint.
    """
    check_choice("checkpoint_weights", weighting, WEIGHTINGS, MethodError)
    steps, total = trajectory.steps, trajectory.total_steps
    if not isinstance(segments, Iterable):
        if segments != int(segments):
            raise MethodError(f"segments={segments}: expected a whole number, or the steps at which to cut.")
        if not 1 <= segments <= len(steps):
            raise MethodError(
                f"segments={segments}: expected 1 to {len(steps)}, the number of checkpoints. "
                "Record more checkpoints, or ask for fewer segments."
            )
        ends = [steps[part[-1]] for part in np.array_split(np.arange(len(steps)), int(segments))]
    else:
        points = [int(point) for point in segments]
        ascending = points == sorted(set(points)) == list(segments)
        if not ascending or any(not 0 < point < total for point in points):
            raise MethodError(f"segments={list(segments)}: expected ascending whole steps between 1 and {total - 1}.")
        ends = [*points, total]
    return tuple(_segment(trajectory, start, end, weighting) for start, end in zip([0, *ends], ends, strict=False))


def _segment(trajectory: Trajectory, start: int, end: int, weighting: str) -> Segment:
    inside = tuple(index for index, step in enumerate(trajectory.steps) if start < step <= end)
    if not inside:
        raise MethodError(
            f"no checkpoint lies in steps {start + 1}..{end} (checkpoints: {list(trajectory.steps)}). "
            "Move the cut, or record a checkpoint there."
        )
    overall = (1 / len(inside),) * len(inside)
    weights: tuple[Weight, ...] = overall
    if weighting == "nearest":
        amounts = covered(trajectory, inside, start, end)
        overall = _overall(amounts)
        weights = _by_group(amounts, overall)
    rates, decay = trajectory.lr_steps(start, end), trajectory.decay_steps(start, end)
    return Segment(start, end, inside, weights, overall, rates, decay)


def covered(trajectory: Trajectory, checkpoints: Sequence[int], start: int, end: int) -> tuple[tuple[float, ...], ...]:
    """For each checkpoint the lr_steps of the steps in (start, end] nearest to it, for each parameter group."""
    bounds = nearest_bounds([trajectory.steps[index] for index in checkpoints], start, end)
    return tuple(trajectory.lr_steps(low, high) for low, high in pairwise(bounds))


def shares(amounts: Sequence[float]) -> tuple[float, ...]:
    """Amounts brought to a sum of 1; all the same where they are all zero.

    Example:
        >>> shares([1.0, 3.0])
        (0.25, 0.75)
    """
    total = sum(amounts)
    return tuple(amount / total if total else 1 / len(amounts) for amount in amounts)


def for_group(weights: Sequence[Weight], parameter_group: int) -> tuple[float, ...]:
    """The weights that hold for one parameter group.

    Example:
        >>> for_group((0.25, (0.75, 0.5)), 1)
        (0.25, 0.5)
    """
    return tuple(weight[parameter_group] if isinstance(weight, tuple) else weight for weight in weights)


def _overall(amounts: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Each checkpoint's share of all parameter groups' rates; a group whose rates are not known does not count."""
    return shares([sum(amount for amount in by_group if not math.isnan(amount)) for by_group in amounts])


def _by_group(amounts: Sequence[Sequence[float]], overall: tuple[float, ...]) -> tuple[Weight, ...]:
    """Each checkpoint's share of each group's rates; where all groups agree it is the overall one, a plain number.

    A group whose rates are not known, or all 0, takes the overall shares.
    """
    by_group = list(zip(*amounts, strict=True))
    groups = [shares(rates) if math.isfinite(sum(rates)) and any(rates) else overall for rates in by_group]
    agree = all(abs(own - of_all) < _ROUNDING for group in groups for own, of_all in zip(group, overall, strict=True))
    return overall if agree else tuple(zip(*groups, strict=True))


@dataclass(frozen=True)
class Segmentation:
    """Where a stage is cut, and why: the cut minimises scatter + penalty * segments.

    Args:
        cuts: the steps at which one segment ends and the next begins.
        steps: the checkpoints'.
        distances: [C, C], squared distances between the checkpoints' statistics.
        costs: the least scatter within segments with 1, 2, ... of them.
        penalty: for each segment.
    """

    cuts: tuple[int, ...]
    steps: tuple[int, ...]
    distances: tuple[tuple[float, ...], ...]
    costs: tuple[float, ...]
    penalty: float

    def explained(self) -> dict[str, Any]:
        """What `Scores.provenance` says."""
        return {
            "cuts": list(self.cuts),
            "checkpoints": list(self.steps),
            "distances": [list(row) for row in self.distances],
            "scatter_of_1_2_3_segments": list(self.costs),
            "penalty": self.penalty,
        }


def segmentation(trajectory: Trajectory, statistics_CF: Tensor, penalty: float) -> Segmentation:
    """Cut a trajectory where its checkpoints' statistics [C, F] change, by optimal partitioning.

    The scatter of a segment is the weighted sum of squared distances of its checkpoints' statistics from their mean,
    weights being the checkpoints' shares of the whole run.
    """
    count = len(trajectory)
    squared_CC = torch.cdist(statistics_CF.double(), statistics_CF.double()).square()
    amounts = covered(trajectory, range(count), 0, trajectory.total_steps)
    weights = torch.tensor(_overall(amounts), dtype=torch.float64)
    scatter = {
        (first, last): _scatter(squared_CC[first:last, first:last], weights[first:last])
        for first in range(count)
        for last in range(first + 1, count + 1)
    }
    # best[k][last]: (least scatter of the first `last` checkpoints in k segments, where the last of them begins)
    best = [{last: (scatter[0, last], 0) for last in range(1, count + 1)}]
    for segments in range(2, count + 1):
        before = best[-1]
        best.append(
            {
                last: min((before[first][0] + scatter[first, last], first) for first in range(segments - 1, last))
                for last in range(segments, count + 1)
            }
        )
    costs = [table[count][0] for table in best]
    chosen = min(range(count), key=lambda k: (costs[k] + penalty * (k + 1), k))
    starts, last = [], count
    for table in reversed(best[: chosen + 1]):
        last = table[last][1]
        starts.append(last)
    cuts = tuple(trajectory.steps[start - 1] for start in reversed(starts) if start)
    rows = tuple(tuple(row) for row in squared_CC.tolist())
    return Segmentation(cuts, trajectory.steps, rows, tuple(costs), penalty)


def _scatter(squared_CC: Tensor, weights_C: Tensor) -> float:
    """Sum of weight * squared distance from the weighted mean, from pairwise squared distances."""
    total = weights_C.sum()
    return float(weights_C @ squared_CC @ weights_C / (2 * total)) if total > 0 else 0.0
