"""What the rows' JSON files say, block by block: a block is a row, or one stage's data of a row of two stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..result_files import read_result
from .methods import REFERENCE
from .rows import ROWS
from .scoring import EMPIRICAL, RESULTS

KINDS = ("one", "all")  # of figures: of one run, and of all runs averaged


@dataclass(frozen=True)
class Block:
    """row: the row's whole JSON; part: of its parts the block's."""

    title: str
    row: Mapping[str, Any]
    part: Mapping[str, Any]

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """The methods that did not refuse; a family by its best member, for one run and for all."""
        return {name: figures for name, figures in shown_methods(self.part).items() if "refused" not in figures}

    def method(self, name: str) -> Mapping[str, Any]:
        """A method's figures; those of "SOURCE" are those of its default when the row was made."""
        return self.methods[self.part["reference"] if name == REFERENCE else name]


def results() -> list[dict[str, Any]]:
    """The results that are there, in the order of the rows."""
    return [found for name in ROWS if (found := read_result(RESULTS / f"{name}.json"))]


def blocks() -> list[Block]:
    """The blocks of the results that are there."""
    return [
        Block(f"{row['row']}, {stage} data" if stage else row["row"], row, part)
        for row in results()
        for stage, part in row["parts"].items()
    ]


def shown_methods(part: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The methods of the table: a family by its best member, chosen for one run and for all runs separately."""
    shown: dict[str, dict[str, Any]] = {}
    for name, figures in part["methods"].items():
        family = figures.get("best_of", "")
        if not family:
            shown[name] = figures
            continue
        best = shown.setdefault(family, {})
        for kind in KINDS:
            if kind in figures and (kind not in best or figures[kind]["mean"] > best[kind]["mean"]):
                best[kind] = figures[kind] | {"chosen": name.rsplit(" ", 1)[-1]}
                best[f"over_{kind}"] = figures.get(f"over_{kind}")
    return shown


def free(name: str) -> bool:
    """Whether a user can choose the method: neither chosen on this evaluation, nor fitted to retrainings."""
    return name != EMPIRICAL and "upper bound" not in name
