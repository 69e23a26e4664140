"""Subsets, which users give as masks or as lists of indices, brought to masks: here and nowhere else.

Axis letters: M subsets, K examples or groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..arguments import shown
from ..errors import ScoreError
from .arguments import as_array

Subsets = np.ndarray | Tensor | Sequence[Sequence[int] | np.ndarray]
_ADVICE = "Expected [M, K] booleans (kept or not), or for each subset a list of the indices that it keeps."


def as_subsets(given: Subsets, length: int | None = None, guess: bool = True) -> np.ndarray:
    """[M, K] booleans: which examples or groups each retraining keeps.

    Args:
        given: booleans [M, K] (or 0 and 1), or for each subset a list of the indices that it keeps.
        length: K, where it is known.
        guess: without the length, take lists of indices to be about as many as the largest of them says; or refuse.

    Raises:
        ScoreError: there are no subsets, or rows are neither of these, of both kinds, of another length, or might be
            both ([0, 1] is a mask of two and the first two indices); an index comes twice or is out of range.

    Example:
        >>> as_subsets([[0, 2], [1]], 3).astype(int)
        array([[1, 0, 1],
               [0, 1, 0]])
    """
    rows = _rows(given)
    kinds = {_kind(row) for row in rows}
    if {"mask", "indices"} <= kinds:
        raise ScoreError(f"subsets: some rows are masks, others lists of indices: {shown(given)}. {_ADVICE}")
    if kinds == {"either"}:
        if length is None or any(len(row) == length for row in rows):
            raise ScoreError(f"subsets={shown(given)}: these may be masks or lists of indices. Give masks as booleans.")
        kinds = {"indices"}
    if "indices" in kinds and length is None and not guess:
        raise ScoreError(
            f"subsets={shown(given)}: lists of indices, of an unknown number. Give booleans (kept or not)."
        )
    return _from_indices(rows, length) if "indices" in kinds else _from_masks(rows, length)


def _rows(given: Subsets) -> list[np.ndarray]:
    try:
        rows = [as_array(row) for row in (as_array(given) if isinstance(given, Tensor) else given)]
    except (TypeError, ValueError) as problem:
        raise ScoreError(f"subsets={shown(given)}: {problem}. {_ADVICE}") from problem
    rows = [row.astype(np.int64) if row.size == 0 else row for row in rows]
    if not rows:
        raise ScoreError(f"subsets: there are none. {_ADVICE}")
    for row in rows:
        if row.ndim != 1 or row.dtype.kind not in "buif" or not np.isfinite(row).all():
            raise ScoreError(f"subsets: a row is {row.dtype} of shape {row.shape}: {shown(row)}. {_ADVICE}")
    return rows


def _kind(row: np.ndarray) -> str:
    """Whether a row is a mask, a list of indices, or might be either: 0 and 1, none of them twice."""
    if row.dtype == bool:
        return "mask"
    distinct = len(np.unique(row)) == len(row)
    if np.isin(row, (0, 1)).all():
        return "either" if distinct and row.dtype.kind in "ui" else "mask"
    if row.dtype.kind == "f":
        raise ScoreError(f"subsets: a row has other numbers than 0 and 1: {shown(row)}. {_ADVICE}")
    if row.min() < 0:
        raise ScoreError(f"subsets: a list of indices has {row.min()}, expected 0 or more. {_ADVICE}")
    if not distinct:
        raise ScoreError(f"subsets: a list of indices has one of them twice: {shown(row)}. {_ADVICE}")
    return "indices"


def _from_masks(rows: list[np.ndarray], length: int | None) -> np.ndarray:
    lengths = sorted({len(row) for row in rows} | ({length} if length is not None else set()))
    if len(lengths) > 1:
        expected = "one length" if length is None else f"{length} columns, one for each example or group"
        raise ScoreError(f"subsets: masks of {sorted({len(row) for row in rows})}, expected {expected}. {_ADVICE}")
    masks: np.ndarray = np.stack(rows).astype(bool)
    return masks


def _from_indices(rows: list[np.ndarray], length: int | None) -> np.ndarray:
    largest = max((int(row.max()) for row in rows if row.size), default=-1)
    columns = largest + 1 if length is None else length
    if largest >= columns:
        raise ScoreError(f"subsets: a list of indices has {largest}, expected less than {columns}. {_ADVICE}")
    kept = np.zeros((len(rows), columns), dtype=bool)
    for subset, row in enumerate(rows):
        kept[subset, row] = True
    return kept
