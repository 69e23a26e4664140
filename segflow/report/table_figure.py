"""Figures of tables: lines over x, bars, or a scatter of predicted and actual."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .table import Row, Table


def table_figure(table: Table) -> Any:
    """A matplotlib Figure of a table: see `Table.plot`."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    {"lines": _draw_lines, "bars": _draw_bars, "scatter": _draw_scatter}[table.kind](axes, table)
    for number, (name, ends) in enumerate(table.references.items()):
        axes.axhline(ends[0], linestyle="--", color=str(0.35 + 0.2 * (number % 3)), label=name, linewidth=1)
    axes.set_title(table.title, fontsize=11)
    axes.set_ylabel(table.y)
    if table.kind != "bars":
        axes.set_xlabel(table.x)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return figure


def _columns(rows: Iterable[Row]) -> np.ndarray:
    """[4, rows]: x, mean, low, high, where an end that is infinite is not drawn."""
    columns = np.array([(row.x, row.mean, row.low, row.high) for row in rows]).T
    return np.where(np.isfinite(columns), columns, np.nan)


def _error_bars(columns: np.ndarray) -> np.ndarray:
    """[2, rows] distances from the mean; an end on the wrong side of it, as resampling may give, is at the mean."""
    _, mean, low, high = columns
    return np.maximum([mean - low, high - mean], 0.0)


def _legend(table: Table, series: str) -> str:
    """The series' name, and below it its note."""
    note = table.notes.get(series)
    return f"{series}\n{note}" if note else series


def _draw_lines(axes: Any, table: Table) -> None:
    for series in table.series:
        x, mean, low, high = _columns(sorted(table.of(series), key=lambda row: row.x))
        (line,) = axes.plot(x, mean, "o-", markersize=3, label=_legend(table, series))
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    means = [*(row.mean for row in table.rows), *(ends[0] for ends in table.references.values())]
    span = max(means) - min(means)
    if span > 0:  # an interval of two values may be so wide that the means could not be told apart
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, min(means) - span), min(top, max(means) + span))


def _draw_bars(axes: Any, table: Table) -> None:
    columns = _columns(table.rows)
    places = np.arange(len(table.rows))
    axes.bar(places, columns[1], yerr=_error_bars(columns), capsize=3, color="#4477aa")
    axes.set_xticks(places, [row.series for row in table.rows], rotation=20, ha="right", fontsize=8)


def _draw_scatter(axes: Any, table: Table) -> None:
    for series in table.series:
        columns = _columns(table.of(series))
        label = _legend(table, series)
        axes.errorbar(*columns[:2], yerr=_error_bars(columns), fmt="o", markersize=4, capsize=2, label=label)
    axes.axline((0.0, 0.0), slope=1.0, linestyle=":", color="0.5", label="actual = predicted")
