"""Figures of tables: lines over x, bars, or a scatter of predicted and actual."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .plain_text import add_legend, as_written
from .row import Row

References = Mapping[str, tuple[float, float, float]]
Drawn = list[tuple[Any, str]]  # what was drawn, and its name in the legend


def table_figure(
    kind: str, rows: Sequence[Row], notes: Mapping[str, str], references: References, titles: tuple[str, str, str]
) -> Any:
    """A matplotlib Figure of a table's rows.

    kind: "lines", "bars" or "scatter"; notes: a line of text for each of some series, in the legend; references: drawn
    as dashed lines; titles: of the figure, the x axis and the y axis.
    """
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    if kind == "bars":
        drawn = _draw_bars(axes, rows)
    elif kind == "scatter":
        drawn = _draw_scatter(axes, rows, notes)
    else:
        drawn = _draw_lines(axes, rows, notes)
        _keep_means_apart(axes, [*(row.mean for row in rows), *(ends[0] for ends in references.values())])
    for number, (name, ends) in enumerate(references.items()):
        line = axes.axhline(ends[0], linestyle="--", color=str(0.35 + 0.2 * (number % 3)), linewidth=1)
        drawn.append((line, name))
    title, x, y = map(as_written, titles)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    add_legend(axes, drawn)
    return figure


def _by_series(rows: Sequence[Row], notes: Mapping[str, str]) -> Iterator[tuple[str, list[Row]]]:
    """Each series' legend, its name and below it its note, and its rows."""
    for series in dict.fromkeys(row.series for row in rows):
        legend = f"{series}\n{notes[series]}" if notes.get(series) else series
        yield legend, [row for row in rows if row.series == series]


def _columns(rows: Iterable[Row]) -> np.ndarray:
    """[4, rows]: x, mean, low, high, where an end that is infinite is not drawn."""
    columns = np.array([(row.x, row.mean, row.low, row.high) for row in rows]).T
    return np.where(np.isfinite(columns), columns, np.nan)


def _error_bars(columns: np.ndarray) -> np.ndarray:
    """[2, rows] distances from the mean; an end on the wrong side of it, as resampling may give, is at the mean."""
    _, mean, low, high = columns
    return np.maximum([mean - low, high - mean], 0.0)


def _draw_lines(axes: Any, rows: Sequence[Row], notes: Mapping[str, str]) -> Drawn:
    drawn = []
    for legend, of_series in _by_series(rows, notes):
        x, mean, low, high = _columns(sorted(of_series, key=lambda row: row.x))
        (line,) = axes.plot(x, mean, "o-", markersize=3)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        drawn.append((line, legend))
    return drawn


def _keep_means_apart(axes: Any, means: Sequence[float]) -> None:
    """Bound the y axis: an interval of two values may be so wide that the means could not be told apart."""
    span = max(means) - min(means)
    if span > 0:
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, min(means) - span), min(top, max(means) + span))


def _draw_bars(axes: Any, rows: Sequence[Row]) -> Drawn:
    """The bars, which the axis names: none is in the legend."""
    columns = _columns(rows)
    places = np.arange(len(rows))
    axes.bar(places, columns[1], yerr=_error_bars(columns), capsize=3, color="#4477aa")
    axes.set_xticks(places, [as_written(row.series) for row in rows], rotation=20, ha="right", fontsize=8)
    return []


def _draw_scatter(axes: Any, rows: Sequence[Row], notes: Mapping[str, str]) -> Drawn:
    drawn: Drawn = []
    for legend, of_series in _by_series(rows, notes):
        columns = _columns(of_series)
        points = axes.errorbar(*columns[:2], yerr=_error_bars(columns), fmt="o", markersize=4, capsize=2)
        drawn.append((points, legend))
    line = axes.axline((0.0, 0.0), slope=1.0, linestyle=":", color="0.5")
    return [*drawn, (line, "actual = predicted")]
