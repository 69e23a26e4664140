"""Columns of labels, one label for each example: which combinations there are, and what they are called.

Axes: N examples, C columns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from ..errors import GroupError


def coded(columns: Sequence[Iterable[object]]) -> tuple[list[list[object]], np.ndarray]:
    """Each column's distinct labels in order, and the place of each example's label among them, [C, N].

    Raises:
        GroupError: there is no column, columns differ in length, or a label cannot name a group.
    """
    if not columns:
        raise GroupError("no column of labels was given. Expected one label for each example.")
    distinct, codes = [], []
    for column in columns:
        labels, ordered = _read(column)
        place = {label: index for index, label in enumerate(ordered)}
        distinct.append(ordered)
        codes.append(np.array([place[label] for label in labels], dtype=np.int64))
    lengths = [len(code) for code in codes]
    if len(set(lengths)) > 1:
        raise GroupError(f"the columns have {lengths} labels. Expected one label for each example in each of them.")
    return distinct, np.stack(codes)


def _read(column: Iterable[object]) -> tuple[list[object], list[object]]:
    """A column's labels as plain numbers and strings, and the distinct ones of them in order."""
    try:
        labels = [label.item() if hasattr(label, "item") else label for label in column]
        ordered = sorted(set(labels), key=lambda label: (str(type(label)), label))  # type: ignore[arg-type, return-value]
    except (TypeError, ValueError, RuntimeError) as problem:  # unhashable, unordered, or an array
        raise GroupError(f"a label cannot name a group ({problem}). Expected numbers or strings.") from problem
    if any(isinstance(label, float) and math.isnan(label) for label in ordered):
        raise GroupError("a label is NaN, which equals nothing. Give such examples a label of their own.")
    return labels, ordered


def combination_names(combinations: Sequence[Sequence[object]]) -> list[str]:
    """A text for each combination of labels; the labels of those that would be the same text are quoted."""
    names, quoted = [" / ".join(map(str, labels)) for labels in combinations], set[int]()
    while True:
        times = Counter(names)
        ambiguous = [place for place, name in enumerate(names) if times[name] > 1 and place not in quoted]
        if not ambiguous:
            return names
        quoted.update(ambiguous)
        for place in ambiguous:
            names[place] = " / ".join(map(repr, combinations[place]))
