"""JSON that was written by nobody knows whom: read strictly, and compared with the form that is expected of it.

A form is one of: a type (`int` and `float` take no bools, and `float` takes whole numbers); None, for null; a range,
for whole numbers in it; a compiled pattern, for text that it matches whole; a tuple of forms, one of which fits;
[form], a list of such; {str: form}, an object of such; {"key": form, ...}, an object with at least these keys, where a
key that ends in "?" may be absent; `object`, for anything.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, TypeAlias

from ..arguments import shown

Form: TypeAlias = Any
COUNT = range(2**53)  # whole numbers from 0, as far as double precision tells them apart
SHA256 = re.compile(r"[0-9a-f]{64}")
LINE = re.compile(r"[^\x00-\x1f\x7f-\x9f]{0,999}")  # text that is shown on a terminal as it is
_DEEPEST = 64  # levels of nesting
_NUMBERS = range(-(2**63), 2**64)


def parse_json(content: bytes | str, form: Form = object) -> Any:
    """JSON as its standard defines it, of a given form; ValueError says what else was found.

    Refused are numbers that are not finite or beyond 64 bits, keys that come twice, and more than 64 levels of nesting.

    Example:
        >>> parse_json(b'{"bytes": 3}', {"bytes": COUNT})
        {'bytes': 3}
    """
    try:
        found = _DECODER.decode(content if isinstance(content, str) else content.decode())
        _check_depth(content, found)
    except RecursionError as problem:
        raise ValueError(f"nested too deep: {problem}") from problem
    return fitting(found, form)


def fitting(content: Any, form: Form, where: str = "") -> Any:
    """The content, if it has the form; ValueError naming the first place that has not."""
    if isinstance(form, dict) and str in form:
        _of_kind(content, dict, where)
        for key, value in content.items():
            fitting(value, form[str], _below(where, key))
    elif isinstance(form, dict):
        _of_kind(content, dict, where)
        for key, expected in form.items():
            name = key.removesuffix("?")
            if name in content:
                fitting(content[name], expected, _below(where, name))
            elif name == key:
                raise ValueError(f"no {_below(where, key)}")
    elif isinstance(form, list):
        for place, value in enumerate(_of_kind(content, list, where)):
            fitting(value, form[0], _below(where, place))
    elif not _fits(content, form):
        raise ValueError(f"{where or 'content'}: found {shown(content)}, expected {_words(form)}")
    return content


def _fits(content: Any, form: Form) -> bool:
    """Whether content has a form that is not made of others, or one of several."""
    if isinstance(form, tuple):
        return any(_fits_any(content, one) for one in form)
    if form is None or isinstance(form, range):
        return content is None if form is None else type(content) is int and content in form
    if isinstance(form, re.Pattern):
        return isinstance(content, str) and form.fullmatch(content) is not None
    if form in (int, float):
        return type(content) in (int, form)
    return isinstance(content, form)


def _fits_any(content: Any, form: Form) -> bool:
    try:
        fitting(content, form)
    except ValueError:
        return False
    return True


def _of_kind(content: Any, kind: type, where: str) -> Any:
    if not isinstance(content, kind):
        raise ValueError(f"{where or 'content'}: found {shown(content)}, expected {_words(kind)}")
    return content


def _below(where: str, key: object) -> str:
    return f"{where}.{shown(key)}" if where else shown(key)


def _words(form: Form) -> str:
    if isinstance(form, tuple):
        return " or ".join(map(_words, form))
    if isinstance(form, range):
        return f"a whole number, {form.start} to {form.stop - 1}"
    if isinstance(form, re.Pattern):
        return f"text of the form {form.pattern}"
    if isinstance(form, dict | list):
        return _words(type(form))
    names = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number", None: "null"}
    return names.get(form, str(form))


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond double precision")
    return number


def _whole(text: str) -> int:
    number = int(text) if len(text) <= 20 else _NUMBERS.stop
    if number not in _NUMBERS:
        raise ValueError(f"a number of {len(text)} digits")
    return number


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} comes twice")
    return found


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_finite, parse_int=_whole, parse_constant=_refused, strict=True
)


def _check_depth(content: bytes | str, found: Any) -> None:
    """Raise ValueError for more levels of nesting than anything here needs, which would end in a RecursionError."""
    text = content if isinstance(content, bytes) else content.encode(errors="replace")
    if text.count(b"[") + text.count(b"{") <= _DEEPEST:
        return
    level, depth = [found], 0
    while level := [inner for outer in level for inner in _members(outer)]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} levels of nesting")


def _members(content: Any) -> Iterable[Any]:
    if isinstance(content, dict):
        return content.values()
    return content if isinstance(content, list) else ()
