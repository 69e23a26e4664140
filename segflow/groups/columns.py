"""Columns of labels, one label for each example: which combinations there are, and what they are called.

Axes: N examples, C columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..arguments import shown
from ..errors import GroupError


def coded(columns: Sequence[Any]) -> tuple[list[list[object]], np.ndarray]:
    """Each column's distinct labels in order, and the place of each example's label among them, [C, N].

    columns: each has a label for each example; a data frame, or a mapping of lists, counts as its columns.

    Raises:
        GroupError: there is no column, columns differ in length, or a label cannot name a group.
    """
    flat = [column for given in columns for column in columns_of(given)]
    if not flat:
        raise GroupError("no column of labels was given. Expected one label for each example.")
    distinct, codes = [], []
    for column in flat:
        labels, ordered = _read(column)
        place = {label: index for index, label in enumerate(ordered)}
        distinct.append(ordered)
        codes.append(np.array([place[label] for label in labels], dtype=np.int64))
    lengths = [len(code) for code in codes]
    if len(set(lengths)) > 1:
        raise GroupError(f"the columns have {lengths} labels. Expected one label for each example in each of them.")
    return distinct, np.stack(codes)


def columns_of(given: Any) -> list[Any]:
    """The columns of a data frame or a mapping; of anything else, which is a column, itself."""
    columns = getattr(given, "column_names", getattr(given, "columns", None))  # pandas, polars, pyarrow, datasets
    if columns is None:
        return list(given.values()) if isinstance(given, Mapping) else [given]
    return [given[name] for name in columns]


def _read(column: Iterable[object]) -> tuple[list[object], list[object]]:
    """A column's labels as plain numbers and strings, and the distinct ones of them in order."""
    if isinstance(column, str | bytes):
        raise GroupError(f"labels={shown(column)}: expected a list, with one label for each example.")
    try:
        labels = [label.item() if hasattr(label, "item") else label for label in column]
        ordered = sorted(set(labels), key=lambda label: (str(type(label)), label))  # type: ignore[arg-type, return-value]
    except (TypeError, ValueError, RuntimeError) as problem:  # unhashable, unordered, or an array
        raise GroupError(f"a label cannot name a group ({problem}). Expected numbers or strings.") from problem
    if any(map(_is_missing, ordered)):
        example = next(place for place, label in enumerate(labels) if _is_missing(label))
        raise GroupError(
            f"example {example}'s label is {labels[example]}, which stands for none. Give such examples a label "
            "of their own, as pandas' fillna does."
        )
    return labels, ordered


def _is_missing(label: object) -> bool:
    """Whether the label stands for none: NaN, and what else does not equal itself (NaT, pandas' NA)."""
    try:
        return bool(label != label)  # noqa: PLR0124
    except (TypeError, ValueError):
        return True


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
