"""What in training was unlike a textbook's, in words and numbers. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .motion import Steps

_NAMED = 4  # parameters and spans that are spelled out


def seen(steps: Steps, group_of: Mapping[str, int] | None) -> dict[str, Any]:
    """What the steps show: parameters that not every step moved, and clipping.

    group_of: each parameter's group; None where all are in the one.
    """
    members: dict[int, list[str]] = {}
    for name, group in (group_of or {"all parameters": 0}).items():
        members.setdefault(group, []).append(name)
    partly = {_shortened(names): _counts(steps, group) for group, names in members.items()}
    found = {"steps that moved parameters": {names: counts for names, counts in partly.items() if counts}}
    found["clipping"] = _clipping(steps, members)
    scaled = (
        {"gradients": f"{steps.gradient_scale:g} times those of the mean loss"} if steps.gradient_scale != 1 else {}
    )
    return scaled | {name: value for name, value in found.items() if value}


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _counts(steps: Steps, group: int) -> dict[str, Any]:
    """How many steps carried a gradient, left the parameters out, or found them frozen; nothing if all carried."""
    carried, left_out = (values[:, group] > 0 for values in (steps.carried, steps.left_out))
    if carried.all():
        return {}
    frozen = ~carried & ~left_out
    counts = {
        "of": len(carried),
        "carried a gradient": carried.sum(),
        "left out": left_out.sum(),
        "frozen": frozen.sum(),
    }
    return {name: int(count) for name, count in counts.items() if count} | (
        {"frozen in steps": _spans(frozen)} if frozen.any() else {}
    )


def _spans(where: np.ndarray) -> str:
    """Steps, counted from 1, as spans; of many the first few."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], where.astype(int), [0]])))
    spans = [f"{first + 1}-{last}" for first, last in zip(edges[::2], edges[1::2], strict=True)]
    return ", ".join(spans[:_NAMED]) + (f" and {len(spans) - _NAMED} more spans" if len(spans) > _NAMED else "")


def _clipping(steps: Steps, members: Mapping[int, list[str]]) -> dict[str, Any]:
    """The clip factors of steps that carried a gradient, over all parameter groups; nothing where all are 1."""
    groups = list(members)
    factors = steps.clip_factors[:, groups][steps.carried[:, groups] > 0]
    if not len(factors) or (factors == 1).all():
        return {}
    return {
        "mean factor": float(factors.mean()),
        "smallest": float(factors.min()),
        "share of steps clipped": float((factors < 1).mean()),
        "not followed": "how the norm itself depends on the data",
    }
