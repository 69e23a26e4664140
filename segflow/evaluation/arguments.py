"""What users give to the evaluation, as arrays of the expected kind, or a ScoreError that says what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..errors import ScoreError


def as_array(given: Any) -> np.ndarray:
    """An array of what may be a tensor, also one with a gradient or on another device."""
    return given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)


def as_booleans(name: str, given: np.ndarray | Tensor, shape: str, meaning: str = "") -> np.ndarray:
    """An array of booleans, which may be given as 0 and 1; ScoreError for other numbers, which might be indices."""
    array = as_array(given)
    if not np.isin(array, (0, 1)).all():
        raise ScoreError(f"{name}: expected {shape} booleans{meaning}, found other numbers. Are they indices?")
    return array.astype(bool)


def as_measurements(given: np.ndarray | Tensor) -> np.ndarray:
    """Measurements of retrainings in float64; ScoreError if one is not finite."""
    measured = as_array(given).astype(float)
    if not np.isfinite(measured).all():
        raise ScoreError("measurements are not finite. Look for a retraining that diverged.")
    return measured
