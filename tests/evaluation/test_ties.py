"""Ties within rounding, against exact fractions and against what must stay apart."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from segflow.evaluation.ties import merged, precision, rounding, summed


def test_sums_that_are_equal_as_fractions_tie_and_others_keep_their_order() -> None:
    generator = np.random.default_rng(0)
    tenths = generator.integers(-9, 10, (7, 400))
    exact = [sum((Fraction(int(t), 10) for t in column), Fraction(0)) for column in tenths.T]
    found = summed(tenths / 10, precision(np.float64(0)))
    assert len(np.unique((tenths / 10).sum(0))) > len(set(exact)), "plain sums are not tied"
    assert len(np.unique(found)) == len(set(exact))
    places = {value: place for place, value in enumerate(sorted(set(exact)))}
    assert np.unique(found, return_inverse=True)[1].tolist() == [places[value] for value in exact]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_of_groups_of_other_sizes_tie_in_the_precision_that_holds_them(dtype: torch.dtype) -> None:
    shares, sizes = torch.tensor([0.1, 0.7, -0.3]), torch.arange(1, 50)
    spread = ((shares[:, None] * sizes).to(dtype) / sizes).to(dtype)
    held = spread.double().numpy().reshape(1, -1)
    assert len(np.unique(held)) > 3
    found = summed(held, precision(spread)).reshape(3, -1)
    assert [len(np.unique(row)) for row in found] == [1, 1, 1]
    assert len(np.unique(summed(held, precision(np.float64(0))))) > 3, "not in float64"


def test_ties_do_not_chain() -> None:
    dense = np.arange(1000) * 1.0
    found = merged(dense, 0.5)
    assert len(np.unique(found)) == 500
    assert np.abs(found - dense).max() <= 1.0
    assert (np.diff(found) >= 0).all()


def test_each_column_has_ties_of_its_own_and_each_value_a_slack_of_its_own() -> None:
    values = np.array([[1.0, 1.0], [1.1, 5.0], [9.0, 1.1]])
    np.testing.assert_array_equal(merged(values, 0.06), [[1.0, 1.0], [1.0, 5.0], [9.0, 1.0]])
    large = np.array([1e9, 1e9 + 1, 1e-3, 2e-3])
    np.testing.assert_array_equal(merged(large, rounding(large[None], 1e-8)), [1e9, 1e9, 1e-3, 2e-3])


def test_precision_is_that_of_the_type_and_whole_numbers_are_exact() -> None:
    assert precision(torch.zeros(1)) == np.finfo(np.float32).eps == precision(np.zeros(1, np.float32))
    assert precision(np.zeros(1)) == precision([1.0]) == np.finfo(np.float64).eps
    assert precision(torch.arange(3)) == precision(np.arange(3)) == 0


def test_doubles_that_came_from_single_precision_are_as_precise_as_that() -> None:
    single = torch.tensor([0.1, 0.2])
    assert precision(single.double()) == precision(single) == 2.0**-23
    assert precision(torch.tensor([0.1, 0.2], dtype=torch.float64)) == 2.0**-52
    assert precision(torch.tensor([1e7 + 1, 1e7 + 2], dtype=torch.float64)) == 2.0**-52, "whole numbers are exact"
