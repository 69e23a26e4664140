"""What scores must fulfil: labels, places, shapes, and parts that add up. Axes: Q queries, K groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import shown, whole_number
from ..errors import ScoreError

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLURALS = {"query": "queries", "group": "groups"}


def place(what: str, given: int | str, labels: tuple[str, ...]) -> int:
    """The place of a query or a group, which is given by its place or its label."""
    if isinstance(given, str):
        if given not in labels:
            raise ScoreError(f"no {what} {given!r}; they are {list(labels[:8])}...")
        return labels.index(given)
    count = len(labels)
    return whole_number(what, given, ScoreError, -count, count - 1, f"There are {count} {_PLURALS[what]}.")


def distinct_labels(name: str, given: Any) -> tuple[str, ...]:
    """The labels, if they are text and no two are alike."""
    labels = tuple(given) if isinstance(given, list | tuple) else (None,)
    if not all(isinstance(label, str) for label in labels):
        raise ScoreError(f"{name}={shown(given)}: expected a tuple of text.")
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ScoreError(f"{name}: {shown(twice)} comes twice. Give each a label of its own.")
    return labels


def check_part(name: str, part: Any, expected: tuple[int, int]) -> None:
    """Raise ScoreError unless a part is a tensor of this shape, of finite floating-point numbers."""
    if not isinstance(part, Tensor) or part.dtype not in _DTYPES:
        found = part.dtype if isinstance(part, Tensor) else type(part).__name__
        raise ScoreError(f"{name}: {found}, expected a tensor of floating-point numbers.")
    if tuple(part.shape) != expected:
        raise ScoreError(f"{name}: shape {tuple(part.shape)}, expected {expected} from the labels.")
    if not torch.isfinite(part).all():
        raise ScoreError(f"{name}: holds numbers that are not finite.")


def check_sum(kind: str, parts: list[Tensor], values: Tensor) -> None:
    """ScoreError unless the parts add up to the values, or the runs' mean is theirs, to rounding."""
    if not parts:
        return
    count = len(parts) if kind == "by_run" else 1
    stacked = torch.stack([part.double() for part in parts]) / count
    scale = stacked.abs().sum(0) + values.double().abs()
    rounding = torch.finfo(values.dtype).eps ** 0.5
    off = ((stacked.sum(0) - values.double()).abs() > rounding * scale).nonzero()
    if len(off):
        query, group = off[0].tolist()
        what = "the mean of the runs" if kind == "by_run" else "the sum of the parts"
        raise ScoreError(
            f"{kind}: {what} is {stacked.sum(0)[query, group].item():g} for query {query} and group {group}, but the "
            f"value is {values[query, group].item():g}. Change the parts together with the values, or leave them out."
        )
