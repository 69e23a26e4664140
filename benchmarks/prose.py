"""Templates of prose: numbers in them are places in the result files, `{{file | ... | figure}}`, and cannot drift."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable

WIDTH = 125
_PLACE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_VERBATIM = ("#", "|", "!")  # how lines begin that are no prose


def filled(template: str, figure: Callable[..., str]) -> str:
    """The text with `figure(*words)` for each place, its lines broken anew.

    Raises:
        KeyError: with the place, where the results have no such figure.
    """

    def put(place: re.Match[str]) -> str:
        words = [" ".join(word.split()) for word in place[1].split("|")]
        try:
            return figure(*words)
        except (KeyError, TypeError, ValueError) as problem:
            raise KeyError(f"{place[0]}: the results have no such figure ({problem})") from problem

    return "\n\n".join(map(_wrapped, _PLACE.sub(put, template).strip().split("\n\n"))) + "\n"


def without_places(template: str) -> str:
    """What of the text is written by hand."""
    return _PLACE.sub("", template)


def _wrapped(block: str) -> str:
    """A paragraph or a list with lines of even length; headings and tables as they are."""
    if block.startswith(_VERBATIM):
        return block
    items = re.split(r"\n(?=- )", block)
    return "\n".join(
        textwrap.fill(
            " ".join(item.split()),
            WIDTH,
            subsequent_indent="  " if item.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for item in items
    )
