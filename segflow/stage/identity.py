"""What every unit of a stage is made of, as the store compares it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.fingerprints import digest

_NAMED = 6  # steps that a unit's name spells out
PROBES = 16  # training examples whose losses tell one task from another


def rounded(weights: Sequence[Any]) -> str:
    """A word for weights in a unit's name, the same where they differ by rounding only."""
    return digest([f"{number:.9g}" for weight in weights for number in np.atleast_1d(weight)])[:8]


def short(steps: Sequence[str]) -> str:
    """Steps joined for a unit's name: all of a few, else the first and the last with a digest of all."""
    if len(steps) <= _NAMED:
        return "-".join(steps)
    return f"{steps[0]}-to-{steps[-1]}-{digest(list(steps))[:12]}"
