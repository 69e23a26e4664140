"""Labels of examples, in whatever column they come: brought to plain values, or refused by the example's index.

Two labels are one if they are of one kind and equal: True is not 1, and the text "1" is not the number. A missing label
(None, NaN, NaT, pandas' NA, a masked value) is none, in every guise. A date is the same label from pandas, NumPy and
Python, whatever its resolution.
Axes: N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from datetime import date, datetime, timedelta
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..arguments import shown

_PLAIN = {str, int, bool, float, np.str_, np.bool_, np.int64, np.float64, np.float32, np.datetime64}  # seen many times
_MIDNIGHT = " 00:00:00"
_ADVICE = "Give one label for each example: numbers, text or dates."


class Label(NamedTuple):
    """A label: equal labels have the same kind and value, and `text` shows them; `quoted` where texts are ambiguous."""

    kind: str
    value: Any
    text: str
    quoted: str

    @property
    def key(self) -> tuple[str, Any]:
        """What tells it from others, and orders it."""
        return self.kind, self.value


def distinct_labels(name: str, column: Any, error: type[Exception]) -> tuple[list[Label], np.ndarray]:
    """A column's distinct labels in order, and the place of each example's label among them, [N].

    Args:
        name: of the column, in messages.
        column: one label for each example: a list, an array, a tensor, a pandas series, an Arrow array.

    Raises:
        error: it is no column, a label is missing or cannot be told from others, or labels are alike though they are of
            different kinds (True and 1).

    Example:
        >>> labels, place_N = distinct_labels("source", ["web", "book", "web"], ValueError)
        >>> [label.text for label in labels], place_N.tolist()
        (['book', 'web'], [1, 0, 1])
    """
    labels = _with_short_dates(_labels(name, column, error))
    found: dict[tuple[str, Any], Label] = {}
    for label in labels:  # of equal labels, as 1 and 1.0, the shortest text
        known = found.setdefault(label.key, label)
        if (len(label.text), label.text) < (len(known.text), known.text):
            found[label.key] = label
    try:
        ordered = sorted(found.values(), key=lambda label: label.key)
    except (TypeError, ValueError) as problem:
        raise error(f"{name}: labels cannot be ordered ({problem}). {_ADVICE}") from problem
    _check_told_apart(name, ordered, error)
    place = {label.key: index for index, label in enumerate(ordered)}
    return ordered, np.array([place[label.key] for label in labels], dtype=np.int64)


def check_none_missing(name: str, labels: Iterable[Any], error: type[Exception]) -> None:
    """Raise `error`, with its place, for a label of a group that stands for none (None, NaN, NaT)."""
    for place, member in enumerate(labels):
        if _is_missing(raw := _scalar(member)):
            raise error(f"{name}: group {place}'s label is {raw}, which stands for none. Give it a label of its own.")


def _labels(name: str, column: Any, error: type[Exception]) -> list[Label]:
    """Each example's label; `error` by its index for one that is missing or cannot be used."""
    labels, seen = [], dict[tuple[type, Any], Label]()
    for place, member in enumerate(_members(name, column, error)):
        raw = _scalar(member)
        plain = type(raw) in _PLAIN
        label = seen.get((type(raw), raw)) if plain else None
        if label is None:
            if _is_missing(raw):
                raise error(
                    f"{name}: example {place}'s label is {raw}, which stands for none. Give such examples a label of "
                    "their own, as pandas' fillna does."
                )
            try:
                label = _label(raw)
            except (TypeError, ValueError, RuntimeError) as problem:  # unhashable, or an array
                raise error(f"{name}: example {place}'s label cannot be used ({problem}). {_ADVICE}") from problem
            if plain:
                seen[type(raw), raw] = label
        labels.append(label)
    return labels


def _members(name: str, column: Any, error: type[Exception]) -> list[Any]:
    """The labels in a column, one for each example."""
    if isinstance(column, str | bytes | Mapping | Set) or not isinstance(column, Iterable):
        raise error(f"{name}={shown(column)}: expected a list, with one label for each example.")
    if to_pylist := getattr(column, "to_pylist", None):  # of Arrow
        return list(to_pylist())
    if isinstance(column, Tensor):
        column = column.detach().cpu()
        column = (column if column.dtype.itemsize > 2 or not column.is_floating_point() else column.float()).numpy()
    elif isinstance(getattr(column, "dtype", None), np.dtype) and not isinstance(column, np.ma.MaskedArray):
        column = np.asarray(column)  # pandas' and xarray's would give other kinds of numbers
    if getattr(column, "ndim", 1) != 1:
        raise error(f"{name}: the column has the shape {column.shape}, expected one dimension. {_ADVICE}")
    return list(column)


def _scalar(label: Any) -> Any:
    """A label out of the tensor, the array or the Arrow scalar of no dimension that it may be in."""
    if isinstance(label, Tensor):
        return label.detach().cpu().numpy()[()]
    if as_py := getattr(label, "as_py", None):
        return as_py()
    if isinstance(label, np.ma.MaskedArray):
        return tuple(label) if label.dtype.names else label[()]
    boxed = getattr(label, "ndim", None) == 0 and not isinstance(label, np.generic)
    return np.asarray(label)[()] if boxed else label


def _is_missing(label: Any) -> bool:
    """Whether the label stands for none: None, a masked value, pandas' NA, or what does not equal itself (NaN, NaT)."""
    if isinstance(label, tuple | np.void):
        return any(_is_missing(part) for part in label)  # type: ignore[union-attr]
    if label is None or label is np.ma.masked or type(label).__name__ == "NAType":
        return True
    try:
        return bool(label != label)  # noqa: PLR0124
    except ArithmeticError:  # a signalling NaN of decimal
        return True
    except (TypeError, ValueError, RuntimeError):
        return False


def _label(label: Any) -> Label:
    """What a label is known by; ValueError or TypeError where it cannot be."""
    return next(make for kinds, make in _MAKERS if isinstance(label, kinds))(label)


def _number(label: Any) -> Label:
    return Label("number", label.item() if isinstance(label, np.number) else label, str(label), str(label))


def _tuple(label: Any) -> Label:
    """A tuple, or an element of a structured array: known by what its parts are known by."""
    parts = [_label(_scalar(part)) for part in label]
    text = f"({', '.join(part.quoted for part in parts)})"
    return Label("tuple", tuple(part.key for part in parts), text, text)


def _other(label: Any) -> Label:
    """Anything else that can be hashed and has an order, as pandas' intervals and periods."""
    if isinstance(label, Set):
        raise TypeError(f"a {type(label).__name__} has no order")
    hash(label)
    return Label(type(label).__name__, label, str(label), repr(label))


def _date(label: Any) -> Label:
    """A date or a point in time, known by its ISO text; with a time zone, by its moment."""
    if isinstance(label, datetime) and label.tzinfo is not None:
        return Label("moment", label, str(label), f"moment {label}")
    if isinstance(label, datetime):
        text = _clock(str(label))
    elif isinstance(label, np.datetime64) and np.datetime_data(label)[0] in ("h", "m"):
        text = _clock(np.datetime_as_string(label, unit="s").replace("T", " "))
    else:
        text = _clock(str(label).replace("T", " "))
    return Label("date", text, text, f"date {text}")


def _clock(text: str) -> str:
    """An ISO text with a time of day, and no more digits of a second than are needed: none, six or more.

    A year or a month alone stays as it is.
    """
    if " " not in text:
        return text + _MIDNIGHT if text.lstrip("-").count("-") == 2 else text
    whole, _, fraction = text.partition(".")
    fraction = fraction.rstrip("0")
    return f"{whole}.{fraction.ljust(6 if len(fraction) <= 6 else 9, '0')}" if fraction else whole


def _with_short_dates(labels: list[Label]) -> list[Label]:
    """Dates without a time of day, where that of all of them is midnight."""
    times = [label.text for label in labels if label.kind == "date"]
    if not all(text.endswith(_MIDNIGHT) or " " not in text for text in times):
        return labels
    return [
        label._replace(text=text, quoted=f"date {text}")
        if label.kind == "date" and (text := label.text.removesuffix(_MIDNIGHT))
        else label
        for label in labels
    ]


def _duration(label: Any) -> Label:
    """A duration, known by its microseconds."""
    given = np.timedelta64(label) if isinstance(label, timedelta) and not hasattr(label, "to_timedelta64") else label
    given = given.to_timedelta64() if hasattr(given, "to_timedelta64") else given
    exact = given.astype("timedelta64[us]")
    if np.datetime_data(given)[0] in ("Y", "M", "generic") or exact != given:
        raise ValueError(f"{given} is no whole number of microseconds")
    return Label("duration", exact.item(), str(exact.item()), f"duration {exact.item()}")


_MAKERS: tuple[tuple[Any, Callable[[Any], Label]], ...] = (
    ((bool, np.bool_), lambda label: Label("bool", bool(label), str(label), str(label))),
    (str, lambda label: Label("text", str(label), str(label), repr(str(label)))),
    ((np.timedelta64, timedelta), _duration),  # before numbers, of which NumPy takes a duration for one
    ((np.datetime64, date), _date),
    ((Number, np.number), _number),
    ((tuple, np.void), _tuple),
    (object, _other),
)


def _check_told_apart(name: str, ordered: list[Label], error: type[Exception]) -> None:
    """Raise unless numbers that are not the same label differ to the eye, and True and False from 1 and 0."""
    numbers = {label.text: label.value for label in ordered if label.kind == "number"}
    seen: set[str] = set()
    for label in ordered:
        alike = label.kind == "bool" and label.value in numbers.values()
        twice = label.kind == "number" and label.text in seen
        if alike or twice:
            what = f"{label.text} and {int(label.value)}" if alike else f"two numbers that are both {label.text}"
            raise error(
                f"{name}: there are {what} among the labels, which are alike and of two kinds. Give labels of one kind."
            )
        if label.kind == "number":
            seen.add(label.text)
