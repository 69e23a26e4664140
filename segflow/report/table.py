"""Table: a small labelled result that can be read, drawn, saved, and compared."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.fingerprints import digest
from ..errors import ScoreError, check_choice
from ..store.files import read_json, write_json
from ..store.json_form import fitting
from .row import Estimate, Row, shown
from .table_figure import table_figure

FORMAT = 1
KINDS = ("lines", "bars", "scatter")
_ENDS = {"mean": float, "low": (float, None), "high": (float, None)}
_FORM = {
    **dict.fromkeys(("title", "x", "y", "kind"), str),
    "rows": [_ENDS | {"series": str, "x": float, "values": [float], "label": str}],
    "references": [_ENDS | {"name": str}],
    "settings": {str: object},
}  # of a file


@dataclass(frozen=True)
class Table:
    """The result of a task, over series (methods and baselines) and an x axis.

    Args:
        title: what the table shows.
        x, y: names of the axes, with units.
        rows: the numbers.
        references: named numbers that hold for every x, as (mean, low, high): drawn as horizontal lines.
        settings: how the numbers were made, as JSON; "interval" says in words what the intervals are, and "notes" has
            a line of text for each of some series, shown below the table and in the figure's legend.
        kind: how it is drawn: "lines" over x, "bars" (one for each series), or "scatter" with the line x = y.

    Raises:
        ScoreError: there are no rows, two are at one place, a number is not finite, or the settings are not JSON.

    Example:
        >>> rows = (Row("Source", 0.1, 2.0, 1.5, 2.5), Row("random", 0.1, 1.0, 0.5, 1.5))
        >>> table = Table("Retraining", "share removed", "loss", rows, {"nothing removed": (0.9, 0.8, 1.0)})
        >>> print(table)
        **Retraining** (loss)
        <BLANKLINE>
        | share removed | Source | random |
        |---|---|---|
        | 0.1 | 2 [1.5, 2.5] | 1 [0.5, 1.5] |
        <BLANKLINE>
        nothing removed: 0.9 [0.8, 1]
        >>> table.value("Source", 0.1).mean
        2.0
    """

    title: str
    x: str
    y: str
    rows: tuple[Row, ...]
    references: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "lines"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS, ScoreError)
        object.__setattr__(self, "rows", tuple(self.rows))
        references = {name: _checked_reference(name, ends) for name, ends in self.references.items()}
        object.__setattr__(self, "references", references)
        if not self.rows:
            raise ScoreError(f"table {self.title!r}: no rows. Expected at least one.")
        places = [(row.series, row.x, row.label)[: 2 if self.kind == "lines" else 3] for row in self.rows]
        if len(set(places)) < len(places):
            twice = next(place for place in places if places.count(place) > 1)
            raise ScoreError(
                f"table {self.title!r}: two rows are at {twice}. Give each place once: (series, x) of lines, "
                "(series, x, label) of others."
            )
        try:
            object.__setattr__(self, "settings", json.loads(json.dumps(dict(self.settings), allow_nan=False)))
        except (TypeError, ValueError) as problem:
            raise ScoreError(f"table {self.title!r}: expected settings that JSON can hold ({problem}).") from problem

    @property
    def notes(self) -> dict[str, str]:
        """The lines of text about series, from the settings."""
        notes = self.settings.get("notes")
        return {str(series): str(text) for series, text in notes.items()} if isinstance(notes, dict) else {}

    @property
    def series(self) -> tuple[str, ...]:
        """The names of the series, in order."""
        return tuple(dict.fromkeys(row.series for row in self.rows))

    def of(self, series: str) -> tuple[Row, ...]:
        """The rows of one series; ScoreError if there is no such series."""
        rows = tuple(row for row in self.rows if row.series == series)
        if not rows:
            raise ScoreError(f"table {self.title!r}: no series {series!r}; there are {list(self.series)}.")
        return rows

    def value(self, series: str, x: float | str | None = None) -> Row:
        """One row: by its series and its x or its label; x may be left out where the series has one row.

        Raises:
            ScoreError: no row or several rows are there.
        """
        places = [row.label if isinstance(x, str) else row.x for row in self.of(series)]
        rows = [row for row, place in zip(self.of(series), places, strict=True) if x is None or x == place]
        if len(rows) != 1:
            raise ScoreError(
                f"table {self.title!r}: {len(rows)} rows of {series!r} at {x!r}; its rows are at {places[:20]}. Give "
                "one of them."
            )
        return rows[0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one JSON file, atomically. Infinite ends of intervals are written as null."""
        content = {name: getattr(self, name) for name in ("title", "x", "y", "kind", "settings")} | {
            "format": FORMAT,
            "rows": [asdict(row) | _to_json(Estimate(row.mean, row.low, row.high)) for row in self.rows],
            "references": [{"name": name} | _to_json(Estimate(*ends)) for name, ends in self.references.items()],
        }
        seal = {"segflow": "table", "sha256": digest(json.dumps(content, sort_keys=True))}
        write_json(Path(path), seal | content, ScoreError)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Table:
        """Read what `save` wrote; ScoreError if the file is damaged or not a table's."""
        content = read_json(Path(path), ScoreError)
        if not isinstance(content, dict) or content.pop("segflow", None) != "table":
            raise ScoreError(f"{path}: not a table. Expected what Table.save wrote.")
        if content.pop("sha256", None) != digest(json.dumps(content, sort_keys=True)):
            raise ScoreError(f"{path}: damaged, its content has another checksum. Restore it or make it anew.")
        if content.get("format") != FORMAT:
            raise ScoreError(f"{path}: table format {content.get('format')!r}, this segflow reads format {FORMAT}.")
        try:
            return cls._from_content(fitting(content, _FORM))
        except (TypeError, ValueError, ScoreError) as problem:
            raise ScoreError(f"{path}: makes no sense as a table ({problem}). Make it anew.") from problem

    @classmethod
    def _from_content(cls, content: Mapping[str, Any]) -> Table:
        rows = [row | _from_json(row)._asdict() | {"values": tuple(row["values"])} for row in content["rows"]]
        references = {entry["name"]: _from_json(entry) for entry in content["references"]}
        if len(references) < len(content["references"]):
            raise ScoreError("two references have one name")
        others = {name: content[name] for name in ("title", "x", "y", "settings", "kind")}
        return cls(rows=tuple(Row(**row) for row in rows), references=references, **others)

    def __str__(self) -> str:
        """A GitHub markdown table, with the references and what the intervals are below it."""
        cells = {"lines": _by_x, "bars": _by_series, "scatter": _by_label}[self.kind](self)
        lines = [f"**{self.title}** ({self.y})", "", *map(_line, cells[:1]), "|" + "---|" * len(cells[0])]
        lines += map(_line, cells[1:])
        notes = [f"{name}: {shown(Estimate(*ends))}" for name, ends in self.references.items()]
        notes += [f"{series}: {text}" for series, text in self.notes.items()]
        notes += [str(self.settings["interval"])] if "interval" in self.settings else []
        return "\n".join(lines + [line for note in notes for line in ("", note)])

    def to_pandas(self) -> Any:
        """A pandas DataFrame: one row for each row, with columns series, label, x, mean, low, high, values."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows])[
            ["series", "label", "x", "mean", "low", "high", "values"]
        ]

    def plot(self) -> Any:
        """A matplotlib Figure: means with their intervals, the references dashed; save it with `savefig`."""
        titles = (self.title, "" if self.kind == "bars" else self.x, self.y)
        return table_figure(self.kind, self.rows, self.notes, self.references, titles)


def _checked_reference(name: str, ends: Iterable[float]) -> Estimate:
    estimate = Estimate(*map(float, ends))
    if not math.isfinite(estimate.mean) or not estimate.low <= estimate.high:
        raise ScoreError(f"reference {name!r}: {tuple(estimate)}, expected a finite mean, and low <= high.")
    return estimate


def _to_json(estimate: Estimate) -> dict[str, float | None]:
    """JSON has no infinity: an infinite end is null."""
    return {name: end if math.isfinite(end) else None for name, end in estimate._asdict().items()}


def _from_json(entry: Mapping[str, Any]) -> Estimate:
    low, high = entry["low"], entry["high"]
    return Estimate(entry["mean"], -math.inf if low is None else low, math.inf if high is None else high)


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _by_x(table: Table) -> list[list[object]]:
    """A line for each x, a column for each series."""
    rows = {(row.series, row.x): row for row in table.rows}
    xs = sorted({row.x for row in table.rows})
    lines: list[list[object]] = [[f"{x:g}", *(rows.get((series, x), "") for series in table.series)] for x in xs]
    return [[table.x, *table.series], *lines]


def _by_series(table: Table) -> list[list[object]]:
    lines: list[list[object]] = [[row.series, row] for row in table.rows]
    return [["series", table.y], *lines]


def _by_label(table: Table) -> list[list[object]]:
    lines: list[list[object]] = [[row.series, row.label, f"{row.x:.4g}", row] for row in table.rows]
    return [["series", "label", table.x, table.y], *lines]
