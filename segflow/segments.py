"""Segments of training, and how a trajectory is cut into them (Bae et al. 2024, arXiv 2405.12186, Eqs. 13 to 22)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import MethodError
from .trajectory import Trajectory


@dataclass(frozen=True)
class Segment:
    """Steps (start, end] of training, with the checkpoints in them.

    lr_steps: summed effective learning rates; weight_decay: its mean; both one number for each parameter group.
    """

    start: int
    end: int
    checkpoints: tuple[int, ...]
    lr_steps: tuple[float, ...]
    weight_decay: tuple[float, ...]


def cut(trajectory: Trajectory, segments: int | Sequence[int]) -> tuple[Segment, ...]:
    """Cut a trajectory into segments.

    segments: how many (checkpoints are shared out evenly, in order; a segment ends at its last checkpoint), or the
    steps at which one segment ends and the next begins.

    Raises MethodError if a segment would hold no checkpoint.
    """
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
    return tuple(_segment(trajectory, start, end) for start, end in zip([0, *ends], ends, strict=False))


def _segment(trajectory: Trajectory, start: int, end: int) -> Segment:
    inside = tuple(index for index, step in enumerate(trajectory.steps) if start < step <= end)
    if not inside:
        raise MethodError(
            f"no checkpoint lies in steps {start + 1}..{end} (checkpoints: {list(trajectory.steps)}). "
            "Move the cut, or record a checkpoint there."
        )
    return Segment(start, end, inside, trajectory.lr_steps(start, end), trajectory.mean_weight_decay(start, end))
