r"""Names in figures as they are written: matplotlib reads $...$ as mathematics, and hides labels that begin with "_".

Names of groups, queries and series are plain text, in which "$5 to $10", "$x_" and "_mine" mean themselves.
"""

from __future__ import annotations

from typing import Any


def as_written(text: str) -> str:
    r"""The text for matplotlib, with every $ escaped, so that none begins mathematics.

    Example:
        >>> print(as_written("$5 to $10"))
        \$5 to \$10
    """
    return text.replace("$", r"\$")


def add_legend(axes: Any, drawn: list[tuple[Any, str]]) -> None:
    """A legend of what was drawn, each with its name as it is written; none where nothing was.

    The names come in afterwards: before version 3.10 matplotlib leaves out those that begin with "_".
    """
    if drawn:
        handles, names = zip(*drawn, strict=True)
        legend = axes.legend(handles, [f"series {number}" for number in range(len(names))], fontsize=8)
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(as_written(name))
