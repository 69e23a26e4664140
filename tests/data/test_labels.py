"""Labels of examples: the same in every form that a column has, or refused by the example's index."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from decimal import Decimal
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import segflow as sf

NAN = float("nan")


class _Colour(Enum):
    RED = 1
    BLUE = 2


def _found(column: Any) -> dict[str, list[int]]:
    groups = sf.Groups.by(column)
    return {label: member.tolist() for label, member in zip(groups.labels, groups.members, strict=True)}


def _pandas() -> Any:
    return pytest.importorskip("pandas")


MISSING: dict[str, Callable[[], Any]] = {
    "None": lambda: ["a", None, "b"],
    "None among numbers": lambda: [1, None, 2],
    "an array of objects": lambda: np.array(["a", None, "b"], dtype=object),
    "NaN": lambda: [1.0, NAN, 2.0],
    "half precision": lambda: np.array([1, NAN, 2], dtype=np.float16),
    "tensor": lambda: torch.tensor([1, NAN, 2]),
    "complex": lambda: np.array([1, complex(NAN, 0), 2]),
    "decimal": lambda: [Decimal(1), Decimal("NaN"), Decimal(2)],
    "signalling decimal": lambda: [Decimal(1), Decimal("sNaN"), Decimal(2)],
    "NaT by days": lambda: np.array(["2020-01-01", "NaT", "2020-01-02"], dtype="datetime64[D]"),
    "NaT by nanoseconds": lambda: np.array(["2020-01-01", "NaT", "2020-01-02"], dtype="datetime64[ns]"),
    "NaT of durations": lambda: np.array([1, "NaT", 2], dtype="timedelta64[s]"),
    "masked": lambda: np.ma.array([1, 2, 3], mask=[False, True, False]),
    "masked field": lambda: np.ma.array([(1, 2), (3, 4)], dtype=[("x", int), ("y", int)], mask=[(0, 0), (1, 0)]),
    "in a tuple": lambda: [("a", 1.0), ("a", NAN), ("b", None)],
    "in a structured array": lambda: np.array([(1.0, 1), (NAN, 1)], dtype=[("x", float), ("y", int)]),
    "pandas' NaT": lambda: _pandas().Series(_pandas().to_datetime(["2020-01-01", None])),
    "NaT among dates": lambda: [datetime.date(2020, 1, 1), _pandas().NaT],
    "nullable integers": lambda: _pandas().Series([1, None, 2], dtype="Int64"),
    "nullable booleans": lambda: _pandas().array([True, None], dtype="boolean"),
    "nullable text": lambda: _pandas().Series(["a", None], dtype="string"),
    "NA among text": lambda: ["a", _pandas().NA],
    "categorical": lambda: _pandas().Series(_pandas().Categorical(["b", NAN])),
    "outside of all intervals": lambda: _pandas().cut(_pandas().Series([1, 99]), [0, 3, 6]),
    "period": lambda: _pandas().PeriodIndex(["2020-01", None], freq="M"),
}


@pytest.mark.parametrize("guise", MISSING)
def test_a_missing_label_is_named_in_every_guise_by_groups_and_by_properties(guise: str) -> None:
    column = MISSING[guise]()
    with pytest.raises(sf.GroupError, match=r"labels: example 1's label is .*, which stands for none\. Give such"):
        sf.Groups.by(column)
    data = TensorDataset(torch.zeros(len(column), 2), torch.zeros(len(column), dtype=torch.long))
    with pytest.raises(sf.TaskError, match=r"attribute: example 1's label is .*, which stands for none\. Give such"):
        sf.properties.DemographicParityGap(data, column)


def test_text_that_says_none_is_a_label() -> None:
    assert _found(np.array(["nan", "None", "nan"])) == {"None": [1], "nan": [0, 2]}


DAYS = ["2020-01-02", "2020-01-01", "2020-01-02"]
DATES: dict[str, Callable[[], Any]] = {
    **{
        f"[{unit}]": lambda unit=unit: np.array(DAYS, dtype=f"datetime64[{unit}]")
        for unit in ("D", "h", "s", "us", "ns")
    },
    "datetime.date": lambda: [datetime.date.fromisoformat(day) for day in DAYS],
    "datetime.datetime": lambda: [datetime.datetime.fromisoformat(day) for day in DAYS],
    "date and datetime": lambda: [datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 1), datetime.date(2020, 1, 2)],
    "series": lambda: _pandas().Series(_pandas().to_datetime(DAYS)),
    "index": lambda: _pandas().to_datetime(DAYS),
    "series of objects": lambda: _pandas().Series([datetime.date.fromisoformat(day) for day in DAYS]),
    "categorical": lambda: _pandas().Series(_pandas().to_datetime(DAYS)).astype("category"),
    "days as text": lambda: DAYS,
}


@pytest.mark.parametrize("form", DATES)
def test_dates_keep_their_text_in_every_form(form: str) -> None:
    assert _found(DATES[form]()) == {"2020-01-01": [1], "2020-01-02": [0, 2]}


TIMES = ["2020-01-02 12:30:00.500", "2020-01-01 00:00:00.000"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.array(TIMES, dtype="datetime64[ms]"),
        lambda: np.array(TIMES, dtype="datetime64[ns]"),
        lambda: [datetime.datetime.fromisoformat(time) for time in TIMES],
        lambda: _pandas().Series(_pandas().to_datetime(TIMES)),
    ],
    ids=["ms", "ns", "datetime", "series"],
)
def test_a_time_of_day_is_kept_where_one_label_has_it(make: Callable[[], Any]) -> None:
    assert _found(make()) == {"2020-01-01 00:00:00": [1], "2020-01-02 12:30:00.500000": [0]}


def test_months_years_nanoseconds_and_time_zones_keep_their_text() -> None:
    assert list(_found(np.array(["2020-02", "2020-01"], dtype="datetime64[M]"))) == ["2020-01", "2020-02"]
    assert list(_found(np.array(["2020"], dtype="datetime64[Y]"))) == ["2020"]
    fine = np.array(["2020-01-01T00:00:00.000000001"], dtype="datetime64[ns]")
    assert list(_found(fine)) == ["2020-01-01 00:00:00.000000001"]
    zone = datetime.timezone.utc
    assert list(_found([datetime.datetime(2020, 1, 1, tzinfo=zone)])) == ["2020-01-01 00:00:00+00:00"]


def test_a_date_and_its_text_are_two_labels_told_apart() -> None:
    assert _found([datetime.date(2020, 1, 1), "2020-01-01"]) == {"date 2020-01-01": [0], "'2020-01-01'": [1]}


def test_durations_are_one_label_in_every_unit() -> None:
    hours = [np.timedelta64(1, "h"), datetime.timedelta(minutes=60), np.timedelta64(3600 * 10**9, "ns")]
    assert _found(hours) == {"1:00:00": [0, 1, 2]}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 1.0, Decimal(1), np.int8(1), torch.tensor(1.0)], {"1": [0, 1, 2, 3, 4]}),
        ([1.0, 1, 2], {"1": [0, 1], "2": [2]}),
        ([10, 9.5, 2], {"2": [2], "9.5": [1], "10": [0]}),
        ([True, False, 2], {"False": [1], "True": [0], "2": [2]}),
        (np.array([0.1, 0.2], dtype=np.float32), {"0.1": [0], "0.2": [1]}),
        (torch.tensor([0.1, 0.2]), {"0.1": [0], "0.2": [1]}),
        ([np.float32(0.5), 0.5], {"0.5": [0, 1]}),
        (
            np.array([(1, "a"), (1, "b"), (1, "a")], dtype=[("x", int), ("y", "U1")]),
            {"(1, 'a')": [0, 2], "(1, 'b')": [1]},
        ),
        ([(1, "a"), (True, "a")], {"(True, 'a')": [1], "(1, 'a')": [0]}),
        (["a", "a ", "A"], {"A": [2], "a": [0], "a ": [1]}),
    ],
    ids=str,
)
def test_labels_are_one_where_they_are_of_one_kind_and_equal(labels: Any, expected: dict[str, list[int]]) -> None:
    assert _found(labels) == expected


def test_only_categories_that_occur_make_groups() -> None:
    pandas = _pandas()
    assert _found(pandas.Categorical(["b", "a", "b"], categories=["a", "b", "c"])) == {"a": [1], "b": [0, 2]}
    assert list(_found(pandas.cut(pandas.Series([9, 1, 5]), [0, 3, 6, 10]))) == ["(0, 3]", "(3, 6]", "(6, 10]"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([True, 1, False], "True and 1 among the labels, which are alike and of two kinds"),
        ([0, 2, np.False_], "False and 0 among the labels"),
        ([np.float32(0.1), 0.1], "two numbers that are both 0.1"),
        ([0.1, Decimal("0.1")], "two numbers that are both 0.1"),
        ([1j, 2j], "labels cannot be ordered"),
        (list(_Colour), "labels cannot be ordered"),
        ([frozenset("a"), frozenset("b")], "example 0's label cannot be used .a frozenset has no order"),
        ([1, np.array([2])], "example 1's label cannot be used"),
        (np.array([1], dtype="timedelta64[Y]"), "no whole number of microseconds"),
        ({"a"}, "expected a list, with one label for each example"),
        ("abab", "expected a list, with one label for each example"),
        (torch.tensor(1), r"has the shape \(\), expected one dimension"),
        (3, "expected a list"),
    ],
    ids=str,
)
def test_labels_that_cannot_be_told_apart_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(sf.GroupError, match=message):
        sf.Groups.by(labels)
    with pytest.raises(sf.GroupError, match=message):
        sf.GroupTree.by(labels)


def test_an_attribute_is_the_same_property_in_every_form() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    data, model = TensorDataset(x, torch.tensor([0, 1, 1])), nn.Linear(4, 2)
    gaps = [
        sf.properties.DemographicParityGap(data, DATES[form]()).evaluate(model) for form in ("[D]", "[ns]", "series")
    ]
    assert gaps[0] == gaps[1] == gaps[2] > 0
