"""Subsets: masks and lists of indices mean the same everywhere, and what might be either is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from segflow.errors import ScoreError
from segflow.evaluation.subsets import as_subsets

KEPT = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0]], dtype=bool)
LISTS = [[0, 1, 2], [3, 4, 5], [0, 2, 4]]
FORMS: dict[str, Any] = {
    "booleans": KEPT,
    "lists of booleans": KEPT.tolist(),
    "0 and 1": KEPT.astype(int),
    "0.0 and 1.0": KEPT.astype(float),
    "a tensor of booleans": torch.from_numpy(KEPT),
    "lists of indices": LISTS,
    "an array of indices": np.array(LISTS),
    "a tensor of indices": torch.tensor(LISTS),
    "a list of arrays": [np.array(row, dtype=np.int32) for row in LISTS],
    "indices in another order": [row[::-1] for row in LISTS],
}


@pytest.mark.parametrize("form", FORMS)
def test_masks_and_lists_of_indices_are_the_same_subsets(form: str) -> None:
    assert np.array_equal(as_subsets(FORMS[form], 6), KEPT)
    assert np.array_equal(as_subsets(FORMS[form]), KEPT)


def test_rows_that_might_be_both_follow_from_the_others_or_from_the_length() -> None:
    assert np.array_equal(as_subsets([[0, 1], [2]], 3), [[1, 1, 0], [0, 0, 1]])
    assert np.array_equal(as_subsets([[0, 1], [1]], 3), [[1, 1, 0], [0, 1, 0]])
    assert np.array_equal(as_subsets([[0, 1], [1, 1]]), [[0, 1], [1, 1]])
    assert np.array_equal(as_subsets([[], [2]], 3), [[0, 0, 0], [0, 0, 1]])


def test_lists_without_a_length_are_refused_where_nobody_guesses_it() -> None:
    with pytest.raises(ScoreError, match="lists of indices, of an unknown number"):
        as_subsets(LISTS, guess=False)
    assert np.array_equal(as_subsets(KEPT, guess=False), KEPT)


FAULTS: dict[str, tuple[Any, int | None, str]] = {
    "none": ([], None, "there are none"),
    "one row": (KEPT[0], None, r"a row is bool of shape \(\)"),
    "no rows of numbers": ([["a"]], None, "a row is <U1"),
    "three axes": (KEPT[None], None, r"a row is bool of shape \(3, 6\)"),
    "weights": ([[0.3, 0, 1.0]], None, "other numbers than 0 and 1"),
    "not a number": ([[0.0, np.nan, 1.0]], None, "a row is float64"),
    "negative": ([[0, -1, 2]], None, "has -1"),
    "twice": ([[0, 2, 2]], None, "one of them twice"),
    "out of range": ([[0, 6, 2]], 6, "has 6, expected less than 6"),
    "mixed": ([[True, False, True], [0, 2]], 3, "some rows are masks, others lists of indices"),
    "either": ([[0, 1], [1, 0]], None, "may be masks or lists of indices"),
    "either, of the length": ([[0, 1], [1, 0]], 2, "may be masks or lists of indices"),
    "another length": (KEPT, 5, r"masks of \[6\], expected 5 columns"),
    "ragged masks": ([[1, 1, 0], [1, 1, 0, 0]], None, r"masks of \[3, 4\], expected one length"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_neither_is_refused(fault: str) -> None:
    given, length, text = FAULTS[fault]
    with pytest.raises(ScoreError, match=text):
        as_subsets(given, length)
