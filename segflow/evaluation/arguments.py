"""What users give to the evaluation, as arrays of the expected kind, or a ScoreError that says what is wrong."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import real_number
from ..errors import ScoreError


def as_array(given: Any) -> np.ndarray:
    """An array of what may be a tensor, also one with a gradient, on another device, or of a type NumPy lacks."""
    if not isinstance(given, Tensor):
        return np.asarray(given)
    known = given.dtype in (torch.float64, torch.float32, torch.float16) or not given.is_floating_point()
    return (given if known else given.float()).detach().cpu().numpy()


def as_numbers(name: str, given: Any) -> np.ndarray:
    """An array of real numbers in float64; ScoreError for anything else, such as text or lists of unequal lengths."""
    array = _array(name, given)
    if array.dtype.kind == "O":
        array = _of_objects(array)
    if array.dtype.kind not in "biuf":
        raise ScoreError(f"{name}: expected real numbers, found {array.dtype}. Give an array of numbers.")
    return array.astype(float)


def _array(name: str, given: Any) -> np.ndarray:
    try:
        return as_array(given)
    except (TypeError, ValueError) as problem:
        raise ScoreError(f"{name}: {problem}. Give an array of numbers.") from problem


def _of_objects(array: np.ndarray) -> np.ndarray:
    """In float64 if all members are real numbers, as Python's large integers and fractions are; otherwise as it is."""
    return array.astype(float) if all(isinstance(member, Real) for member in array.flat) else array


def as_booleans(name: str, given: np.ndarray | Tensor, shape: str, meaning: str = "") -> np.ndarray:
    """An array of booleans, which may be given as 0 and 1; ScoreError for other numbers, which might be indices."""
    array = _array(name, given)
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise ScoreError(f"{name}: expected {shape} booleans{meaning}, found other numbers. Are they indices?")
    return array.astype(bool)


def as_confidence(given: float) -> float:
    """The confidence of an interval, between 0 and 1; ScoreError for another number."""
    return real_number("confidence", given, ScoreError, above=0, below=1)


def as_measurements(given: np.ndarray | Tensor) -> np.ndarray:
    """Measurements of retrainings in float64; ScoreError if one is no number, or not finite."""
    measured = as_numbers("measurements", given)
    if not np.isfinite(measured).all():
        raise ScoreError("measurements are not finite. Look for a retraining that diverged.")
    return measured
