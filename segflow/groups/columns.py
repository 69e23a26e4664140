"""Columns of labels, one label for each example: which combinations there are, and what they are called.

Axes: N examples, C columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data.labels import Label, distinct_labels
from ..errors import GroupError


def coded(columns: Sequence[Any]) -> tuple[list[list[Label]], np.ndarray]:
    """Each column's distinct labels in order, and the place of each example's label among them, [C, N].

    columns: each has a label for each example; a data frame, or a mapping of lists, counts as its columns.

    Raises:
        GroupError: there is no column, columns differ in length, or a label is missing or cannot name a group.
    """
    flat = [column for given in columns for column in columns_of(given)]
    if not flat:
        raise GroupError("no column of labels was given. Expected one label for each example.")
    names = ["labels"] if len(flat) == 1 else [f"labels of column {number}" for number in range(len(flat))]
    read = [distinct_labels(name, column, GroupError) for name, column in zip(names, flat, strict=True)]
    distinct, codes = [labels for labels, _ in read], [code for _, code in read]
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


def combination_names(combinations: Sequence[Sequence[Label]]) -> list[str]:
    """A text for each combination of labels; the labels of those that would be the same text are quoted."""
    names = [" / ".join(label.text for label in labels) for labels in combinations]
    quoted = set[int]()
    while True:
        times = Counter(names)
        ambiguous = [place for place, name in enumerate(names) if times[name] > 1 and place not in quoted]
        if not ambiguous:
            return names
        quoted.update(ambiguous)
        for place in ambiguous:
            names[place] = " / ".join(label.quoted for label in combinations[place])
