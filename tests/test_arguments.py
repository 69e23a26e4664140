"""Arguments: every kind of number is brought to plain Python, and what is no number is refused by name."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from segflow.arguments import names, real_number, real_numbers, shown, truth, whole_number, whole_numbers

WHOLE = [
    6,
    12 / 2,
    np.int64(6),
    np.uint8(6),
    np.float32(6),
    np.float64(6),
    np.array(6),
    np.array(6.0),
    np.ones(6, dtype=bool).sum(),
    torch.tensor(6),
    torch.tensor(6.0, dtype=torch.bfloat16),
    torch.tensor(6.0, requires_grad=True),
    torch.ones(6, dtype=torch.bool).sum(),
    Fraction(12, 2),
]
NOT_WHOLE: list[Any] = [
    True,
    np.bool_(True),
    torch.tensor(True),
    2.5,
    np.float64(2.5),
    math.nan,
    math.inf,
    "6",
    None,
    [6],
    np.array([6]),
    torch.tensor([6]),
    6j,
    np.complex64(6),
    torch.tensor(6, device="meta"),
    -1,
]


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_a_whole_number_of_any_kind_is_an_int(value: Any) -> None:
    number = whole_number("n", value, ValueError, least=6, most=6)
    assert number == 6 and type(number) is int and json.dumps(number) == "6"


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_whole_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^n=.*: expected a whole number, at least 0\. Give one\.$"):
        whole_number("n", value, ValueError, advice="Give one.")


def test_a_whole_number_keeps_within_its_bounds() -> None:
    assert whole_number("n", 2e9, ValueError) == 2_000_000_000
    assert whole_number("n", 2**70 + 1, ValueError) == 2**70 + 1
    with pytest.raises(ValueError, match="n=4: expected a whole number, 1 to 3"):
        whole_number("n", 4, ValueError, least=1, most=3)
    with pytest.raises(ValueError, match=r"n=np.int64\(0\): expected a whole number, at least 1"):
        whole_number("n", np.int64(0), ValueError, least=1)


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_a_real_number_of_any_kind_is_a_float(value: Any) -> None:
    number = real_number("x", value, ValueError, least=6, most=6)
    assert number == 6.0 and type(number) is float and json.dumps(number) == "6.0"


@pytest.mark.parametrize("value", [v for v in NOT_WHOLE if not isinstance(v, float) or not math.isfinite(v)], ids=repr)
def test_what_is_no_finite_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^x=.*: expected a finite number, at least 0\. Give one\.$"):
        real_number("x", value, ValueError, least=0, advice="Give one.")


def test_a_real_number_keeps_within_its_bounds() -> None:
    assert real_number("x", np.float32(0.1), ValueError, above=0, below=1) == float(np.float32(0.1))
    assert real_number("x", math.inf, ValueError, finite=False) == math.inf
    for bounds, words in [
        ({"above": 1}, "above 1"),
        ({"below": 1}, "below 1"),
        ({"least": 1.5}, "at least 1.5"),
        ({"most": 0.5}, "at most 0.5"),
        ({"above": 0, "below": 1}, "above 0 and below 1"),
    ]:
        with pytest.raises(ValueError, match=f"x=1: expected a finite number, {words}"):
            real_number("x", 1, ValueError, **bounds)
    with pytest.raises(ValueError, match=r"x=nan: expected a number\."):
        real_number("x", math.nan, ValueError, finite=False)
    with pytest.raises(ValueError, match=r"expected a finite number"):
        real_number("x", 10**400, ValueError)


@pytest.mark.parametrize("value", [True, np.bool_(True), np.array(True), torch.tensor(True)], ids=repr)
def test_a_truth_of_any_kind_is_a_bool(value: Any) -> None:
    assert truth("flag", value, ValueError) is True


@pytest.mark.parametrize("value", [1, 0.0, "True", None, torch.tensor([True]), np.int64(1)], ids=repr)
def test_what_is_neither_true_nor_false_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^flag=.*: expected True or False"):
        truth("flag", value, ValueError)


@pytest.mark.parametrize(
    "values",
    [[3, 6], (3.0, 6), np.array([3, 6]), torch.tensor([3, 6]), range(3, 7, 3), (3, np.int8(6))],
    ids=repr,
)
def test_sequences_of_any_kind_become_tuples_of_plain_numbers(values: Any) -> None:
    numbers = whole_numbers("steps", values, ValueError)
    assert numbers == (3, 6) and all(type(number) is int for number in numbers)
    assert real_numbers("x", numbers, ValueError) == (3.0, 6.0)


@pytest.mark.parametrize("values", [3, "36", {3: 6}, np.array(3), torch.tensor(3), None], ids=repr)
def test_what_is_no_sequence_is_refused_by_name(values: Any) -> None:
    with pytest.raises(ValueError, match=r"^steps=.*: expected a sequence of whole numbers\. Give a list\.$"):
        whole_numbers("steps", values, ValueError, advice="Give a list.")
    with pytest.raises(ValueError, match=r"^steps=.*: expected a sequence of finite numbers"):
        real_numbers("steps", values, ValueError)


def test_a_wrong_member_of_a_sequence_is_named_by_its_place() -> None:
    with pytest.raises(ValueError, match=r"steps\[1\]=True: expected a whole number, 1 to 9"):
        whole_numbers("steps", [3, True], ValueError, 1, 9)
    with pytest.raises(ValueError, match=r"x\[0\]=inf: expected a finite number"):
        real_numbers("x", [math.inf], ValueError)


def test_a_plain_string_is_one_name() -> None:
    assert names("keep", "layer", ValueError) == names("keep", {"layer"}, ValueError) == ("layer",)
    assert names("keep", np.array(["layer", "run"]), ValueError) == ("layer", "run")
    assert type(names("keep", np.str_("layer"), ValueError)[0]) is str
    assert names("labels", torch.tensor([1, 2]), ValueError) == ("1", "2")
    for wrong in (3, {"layer": 1}, None, np.array("layer")):
        with pytest.raises(ValueError, match=r"^keep=.*: expected a name or a sequence of names"):
            names("keep", wrong, ValueError)


def test_a_long_value_is_shown_on_one_short_line() -> None:
    assert shown(np.int64(3)) == "np.int64(3)"
    assert len(shown(torch.zeros(50, 50))) < 90 and "\n" not in shown(torch.zeros(50, 50))
