"""Templates of prose: numbers in them are places in the result files, `{{file | ... | figure}}`, and cannot drift."""

from __future__ import annotations

import re
from collections.abc import Callable

_PLACE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)


def filled(template: str, figure: Callable[..., str]) -> str:
    """The text with `figure(*words)` for each place; KeyError, with the place, where the results have no such figure."""

    def put(place: re.Match[str]) -> str:
        words = [" ".join(word.split()) for word in place[1].split("|")]
        try:
            return figure(*words)
        except (KeyError, TypeError) as problem:
            raise KeyError(f"{place[0]}: the results have no such figure ({problem})") from problem

    return _PLACE.sub(put, template)


def without_places(template: str) -> str:
    """The text as it is written by hand alone."""
    return _PLACE.sub("", template)
