"""Ties: numbers that differ by rounding alone are one number, in every order, rank and correlation.

Axis letters: N numbers, T terms of each sum, C columns.
"""

from __future__ import annotations

import numpy as np
import torch

from .arguments import as_array

_EPSILON = float(np.finfo(np.float64).eps)  # of sums, which are all in float64


def precision(given: object) -> float:
    """The gap between 1 and the next number in the type that the numbers are held in; 0 where they are whole.

    Numbers in double precision that are all of single precision, and not all whole, came from there.
    """
    dtype = getattr(given, "dtype", np.dtype(np.float64))
    if dtype in (torch.float64, np.float64) and _are_single(as_array(given)):
        dtype = torch.float32
    if isinstance(dtype, torch.dtype):
        return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return float(np.finfo(dtype).eps) if dtype.kind == "f" else 0.0


def _are_single(values: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        single = bool((values.astype(np.float32) == values).all())
    return single and not bool((values == np.round(values)).all())


def rounding(terms: np.ndarray, held: float = _EPSILON) -> np.ndarray:
    """[N]: how far the sum of each column's terms [T, N] may lie from the sum that was meant.

    A term is rounded where it is stored, and once more where a group's score was shared out over its members: by
    `held` of its size at most, `precision` of the type that holds it, and independently of the others, so that squares
    add up. The sum, in float64, rounds at each of its steps.
    """
    steps = _EPSILON * (len(terms) - 1) * np.abs(terms).sum(0)
    slack: np.ndarray = held * np.sqrt((terms**2).sum(0)) + steps
    return slack


def merged(values: np.ndarray, slack: np.ndarray | float) -> np.ndarray:
    """The values [N] or [N, C], each replaced by the lowest of those in its column that it ties with.

    Two values tie if they differ by no more than their slacks together. Ties do not chain: going up, each value is
    compared with the lowest of its tie, so that numbers which are dense do not all become one.

    Example:
        >>> merged(np.array([0.1 + 0.2, 1.0, 0.3]), 1e-15)
        array([0.3, 1. , 0.3])
    """
    slack = np.broadcast_to(slack, values.shape)
    if values.ndim == 2:
        return np.stack([merged(*column) for column in zip(values.T, slack.T, strict=True)], axis=1)
    order = np.argsort(values, kind="stable")
    rising, near = values[order], slack[order]
    first = np.concatenate([[True], np.diff(rising) > near[1:] + near[:-1]])  # a gap that no tie spans
    starts = np.flatnonzero(first)
    lasts = np.append(starts[1:], len(values)) - 1
    wide = rising[lasts] - rising[starts] > near[lasts] + near[starts]
    for start, last in zip(starts[wide], lasts[wide], strict=True):
        first[start : last + 1] = _parted(rising[start : last + 1], near[start : last + 1])
    unordered = np.empty_like(values)
    unordered[order] = rising[np.flatnonzero(first)[np.cumsum(first) - 1]]
    return unordered


def _parted(rising: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Where a tie begins among values whose neighbours all tie, but whose ends do not."""
    first, lowest = np.zeros(len(rising), dtype=bool), 0
    for place in range(len(rising)):
        if place == 0 or rising[place] - rising[lowest] > near[place] + near[lowest]:
            first[place], lowest = True, place
    return first


def summed(values: np.ndarray, held: float) -> np.ndarray:
    """[N]: the sums of the columns of [T, N], ties merged; held: the `precision` of the terms.

    Example:
        >>> sums = summed(np.array([[0.1, 0.3], [0.2, 0.2], [0.3, 0.1]]), 2.0**-52)
        >>> bool(sums[0] == sums[1])
        True
    """
    return merged(values.sum(0), rounding(values, held))
