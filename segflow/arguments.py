"""What users give as arguments, brought to plain Python, or refused at the door by the argument's name.

A number may be of any kind: Python's, NumPy's, a tensor or an array of no dimension, a float that is whole. Plain
numbers go on, so that neither what is computed nor what is written to disk depends on the kind. `error` is the kind of
error that the caller's room raises.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

_SHOWN = 80  # characters of a value that a message shows


def shown(value: object) -> str:
    """The value as a message shows it: on one line, cut where it is long."""
    line = " ".join(repr(value).split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


def plain(value: Any) -> Any:
    """The Python object in a NumPy scalar, or in an array or a tensor of no dimension; anything else as it is."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        try:
            return value.item()
        except (RuntimeError, NotImplementedError):  # a tensor without data, as on the device "meta"
            return value
    return value


def settle(frozen: object, **fields: object) -> None:
    """Put checked values into fields of a frozen dataclass, inside its `__post_init__`."""
    for name, value in fields.items():
        object.__setattr__(frozen, name, value)


def whole_number(
    name: str, value: object, error: type[Exception], least: int = 0, most: int | None = None, advice: str = ""
) -> int:
    """The value as an int; `error` unless it is a whole number (and no bool) from `least` to `most`.

    Args:
        name: of the argument; advice: a sentence that ends the message, on what to do.

    Example:
        >>> whole_number("batch_size", 12 / 2, ValueError)
        6
    """
    number = _number(value)
    if number is not None and number % 1 == 0 and least <= number and (most is None or number <= most):
        return int(number)
    bounds = f"at least {least}" if most is None else f"{least} to {most}"
    raise error(_refusal(name, value, f"a whole number, {bounds}", advice))


def real_number(
    name: str,
    value: object,
    error: type[Exception],
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    finite: bool = True,
    advice: str = "",
) -> float:
    """The value as a float; `error` unless it is a number (and no bool) within the bounds, and finite where it must be.

    Args:
        name: of the argument; advice: a sentence that ends the message, on what to do.
        least, most: bounds that it may be equal to; above, below: bounds that it may not.
        finite: refuse what is infinite; NaN is always refused.

    Example:
        >>> real_number("damping", 1, ValueError, least=0)
        1.0
    """
    found = _number(value)
    number = math.nan if found is None else _float(found)
    inside = (
        least <= number <= most and (above < number or above == -math.inf) and (number < below or below == math.inf)
    )
    if inside and (math.isfinite(number) or not finite):
        return number
    bounds = (("at least", least), ("above", above), ("at most", most), ("below", below))
    limits = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))
    expected = ("a finite number" if finite else "a number") + (f", {limits}" if limits else "")
    raise error(_refusal(name, value, expected, advice))


def truth(name: str, value: object, error: type[Exception], advice: str = "") -> bool:
    """The value as a bool; `error` for anything but True and False (of Python, of NumPy, or in a tensor).

    Example:
        >>> truth("cosine", True, ValueError)
        True
    """
    found = plain(value)
    if not isinstance(found, bool):
        raise error(_refusal(name, value, "True or False", advice))
    return found


def whole_numbers(
    name: str, values: object, error: type[Exception], least: int = 0, most: int | None = None, advice: str = ""
) -> tuple[int, ...]:
    """A sequence (a list, a range, an array, a tensor) of whole numbers as ints; `error` as for `whole_number`."""
    members = _members(name, values, error, "a sequence of whole numbers", advice)
    return tuple(whole_number(f"{name}[{i}]", member, error, least, most, advice) for i, member in enumerate(members))


def real_numbers(name: str, values: object, error: type[Exception], advice: str = "") -> tuple[float, ...]:
    """A sequence of finite numbers as floats; `error` as for `real_number`."""
    members = _members(name, values, error, "a sequence of finite numbers", advice)
    return tuple(real_number(f"{name}[{i}]", member, error, advice=advice) for i, member in enumerate(members))


def names(name: str, values: object, error: type[Exception]) -> tuple[str, ...]:
    """A sequence of names as text, where a plain string is one name and numbers count as text; `error` for others.

    Example:
        >>> names("keep", "layer", ValueError), names("labels", [1, 2], ValueError)
        (('layer',), ('1', '2'))
    """
    given = (values,) if isinstance(values, str) else _members(name, values, error, "a name or a sequence of names")
    return tuple(str(plain(member)) for member in given)


def _number(value: object) -> Any:
    """The Python number in a value; None where there is none, and for bools."""
    found = plain(value)
    return found if isinstance(found, Real) and not isinstance(found, bool) else None


def _float(number: Any) -> float:
    """The number in double precision; NaN where it is beyond the range."""
    try:
        return float(number)
    except OverflowError:
        return math.nan


def _members(name: str, values: object, error: type[Exception], expected: str, advice: str = "") -> tuple[Any, ...]:
    """What a sequence holds; `error` for text, mappings, and what has no members."""
    try:
        if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping):
            return tuple(values)
    except TypeError:  # an array or a tensor of no dimension, which says that it can be walked
        pass
    raise error(_refusal(name, values, expected, advice))


def _refusal(name: str, value: object, expected: str, advice: str = "") -> str:
    return f"{name}={shown(value)}: expected {expected}.{advice and f' {advice}'}"
