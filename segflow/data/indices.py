"""Some examples of a dataset, given by their indices or by a mask: told apart here and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

_EXPECTED = "expected a list of example indices, or a mask with a boolean for each example"


def as_indices(name: str, given: Any, length: int, error: type[Exception]) -> np.ndarray:
    """The indices of the examples that are meant, [n], as they are given; of a mask, in the dataset's order.

    Args:
        name: of what names them, in messages.
        given: whole numbers, or a boolean for each of `length` examples; a list, an array or a tensor.

    Raises:
        error: it is neither, a mask is of another length, or an index is out of range.

    Example:
        >>> as_indices("slice_of", [False, True, True], 3, ValueError), as_indices("slice_of", [2, 1], 3, ValueError)
        (array([1, 2]), array([2, 1]))
    """
    try:
        array = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    except ValueError as problem:
        raise error(f"{name}: {_EXPECTED} ({problem}).") from problem
    if array.ndim == 1 and array.size == 0:
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "bui":
        raise error(f"{name}: {_EXPECTED}, found {array.dtype} of shape {array.shape}.")
    if array.dtype == bool:
        if len(array) != length:
            raise error(f"{name} is a mask of {len(array)}, but the data has {length} examples: expected one for each.")
        return np.flatnonzero(array)
    if isinstance(given, list | tuple) and any(isinstance(member, bool | np.bool_) for member in given):
        raise error(f"{name}: {_EXPECTED}, found both booleans and numbers.")
    if array.min() < 0 or array.max() >= length:
        wrong = array[(array < 0) | (array >= length)]
        raise error(f"{name} names example {wrong[0]}, but the data has 0..{length - 1}.")
    return array.astype(np.int64)


def as_distinct_indices(name: str, given: Any, length: int, error: type[Exception]) -> np.ndarray:
    """The same; `error` also where there are none, or one comes twice."""
    indices = as_indices(name, given, length, error)
    if not len(indices):
        raise error(f"{name} names no example: {_EXPECTED}, of at least one.")
    times = np.bincount(indices)
    if times.max() > 1:
        raise error(
            f"{name} names example {int(np.argmax(times > 1))} more than once. Name each once; if it is a mask, give "
            "booleans."
        )
    return indices
