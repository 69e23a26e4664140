"""Tables: exact round trips, refusals, text and figures."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from segflow.errors import ScoreError
from segflow.report import Row, Table

INF = float("inf")
ROWS = (
    Row("Straße", 0.2, 0.1 + 0.2, 1 / 3, 2 / 3, (0.1, 0.7)),
    Row("Straße", 0.1, -1e-300, -INF, INF, (-1e-300,)),
    Row("random", 0.1, 5e300, 4.0, 6e300),
)
TABLE = Table(
    "A | title",
    "share",
    "loss (nats)",
    ROWS,
    {"nothing removed": (1.0, 0.5, 1.5), "alone": (2.0, -INF, INF)},
    {"interval": "what it is", "counts": (1, 2), "nested": {"seed": None}},
)
BARS = replace(TABLE, kind="bars", rows=(Row("a", 0, 0.5, 0.4, 0.6), Row("b", 1, 0.7, -INF, INF)))
SCATTER = replace(
    TABLE, kind="scatter", rows=tuple(Row(s, x, 2 * x, x, 3 * x, (2 * x,), f"g{x}") for s in "ab" for x in (1, 2))
)


# ---- reading ----


def test_rows_are_found_by_series_and_place_or_label() -> None:
    assert TABLE.series == ("Straße", "random")
    assert TABLE.of("Straße") == ROWS[:2]
    assert TABLE.value("Straße", 0.1) is ROWS[1]
    assert TABLE.value("random") is ROWS[2]
    assert SCATTER.value("b", "g2") is SCATTER.rows[3]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (("none", 0.1), r"no series 'none'; there are \['Straße', 'random'\]"),
        (("Straße", 0.3), r"0 rows of 'Straße' at 0.3; its rows are at \[0.2, 0.1\]"),
        (("Straße",), "2 rows of 'Straße' at None"),
        (("Straße", "label"), "0 rows of 'Straße' at 'label'"),
    ],
)
def test_a_row_that_is_not_there_is_an_error_that_says_which_are(ask: Any, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        TABLE.value(*ask)


def test_numbers_of_numpy_become_plain_ones() -> None:
    row = Row("a", np.float32(0.5), np.float64(1), np.int64(0), 2, tuple(np.arange(3)))
    assert row == Row("a", 0.5, 1.0, 0.0, 2.0, (0.0, 1.0, 2.0))
    assert {type(number) for number in (row.x, row.mean, row.low, row.high, *row.values)} == {float}


@pytest.mark.parametrize(
    "numbers", [(np.nan, 0, 0, 1), (0, np.nan, 0, 1), (0, INF, 0, 1), (0, 0, 1, 0), (0, 0, np.nan, 1)]
)
def test_a_row_of_numbers_that_are_none_is_refused(numbers: tuple[float, ...]) -> None:
    with pytest.raises(ScoreError, match="expected finite numbers"):
        Row("a", *numbers)
    with pytest.raises(ScoreError, match="expected finite numbers"):
        Row("a", 0, 0, 0, 1, (1.0, np.nan))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": ()}, "no rows"),
        ({"rows": (ROWS[0], ROWS[0])}, r"two rows are at \('Straße', 0.2\)"),
        ({"rows": (ROWS[0], replace(ROWS[0], label="other"))}, r"two rows are at \('Straße', 0.2\)"),
        ({"kind": "scatter", "rows": (ROWS[0], ROWS[0])}, r"two rows are at \('Straße', 0.2, ''\)"),
        ({"kind": "pie"}, "kind='pie' is not known.*'bars', 'lines', 'scatter'"),
        ({"settings": {"a": {1, 2}}}, "settings that JSON can hold"),
        ({"settings": {"a": np.nan}}, "settings that JSON can hold"),
        ({"references": {"none": (np.nan, 0, 1)}}, "reference 'none'"),
        ({"references": {"none": (0, 1, 0)}}, "reference 'none'"),
    ],
)
def test_what_is_no_table_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        replace(TABLE, **change)


# ---- files ----


@pytest.mark.parametrize("table", [TABLE, BARS, SCATTER], ids=lambda table: table.kind)
def test_a_file_gives_back_an_equal_table(table: Table, tmp_path: Path) -> None:
    table.save(tmp_path / "new" / "table.json")
    loaded = Table.load(str(tmp_path / "new" / "table.json"))
    assert loaded == table
    assert list(loaded.references) == list(table.references)
    assert str(loaded) == str(table)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "new" / "table.json").read_bytes()
    json.loads((tmp_path / "again.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("field", ["title", "x", "y", "rows", "references", "settings", "kind"])
def test_tables_that_differ_in_one_field_are_not_equal(field: str) -> None:
    other = {"rows": ROWS[:1], "references": {}, "settings": {}, "kind": "scatter"}.get(field, "other")
    assert replace(TABLE, **{field: other}) != TABLE


def _other_format(path: Path) -> None:
    from segflow.data.fingerprints import digest

    content = json.loads(path.read_text()) | {"format": 2}
    del content["sha256"], content["segflow"]
    path.write_text(json.dumps({"segflow": "table", "sha256": digest(json.dumps(content, sort_keys=True))} | content))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not readable as JSON"),
        (lambda path: path.write_text("[1, 2]"), "not a table. Expected what Table.save wrote"),
        (lambda path: path.write_text('{"segflow": "bank"}'), "not a table"),
        (lambda path: path.write_text(path.read_text().replace("0.7", "0.8")), "damaged, its content has another"),
        (lambda path: path.write_text(path.read_text().replace('"seed": null', '"seed": 1')), "damaged"),
        (_other_format, "table format 2, this segflow reads format 1"),
    ],
)
def test_a_harmed_or_foreign_file_is_refused_by_name(tmp_path: Path, harm: Any, message: str) -> None:
    path = tmp_path / "table.json"
    TABLE.save(path)
    harm(path)
    with pytest.raises(ScoreError, match=rf"table\.json: .*{message}"):
        Table.load(path)


# ---- text and frames ----


def test_text_of_lines_has_a_column_for_each_series_and_says_what_the_intervals_are() -> None:
    assert str(TABLE).splitlines() == [
        "**A | title** (loss (nats))",
        "",
        "| share | Straße | random |",
        "|---|---|---|",
        "| 0.1 | -1e-300 [-inf, inf] | 5e+300 [4, 6e+300] |",
        "| 0.2 | 0.3 [0.3333, 0.6667] |  |",
        "",
        "nothing removed: 1 [0.5, 1.5]",
        "",
        "alone: 2 [-inf, inf]",
        "",
        "what it is",
    ]


def test_text_of_bars_and_of_points_has_a_line_for_each_row() -> None:
    assert str(BARS).splitlines()[2:6] == [
        "| series | loss (nats) |",
        "|---|---|",
        "| a | 0.5 [0.4, 0.6] |",
        "| b | 0.7 [-inf, inf] |",
    ]
    assert "| b | g2 | 2 | 4 [2, 6] |" in str(SCATTER)
    assert "a\\|b" in str(replace(BARS, rows=(Row("a|b", 0, 1, 0, 2),)))


def test_notes_are_lines_of_text_and_of_the_legend() -> None:
    for table in (TABLE, SCATTER):
        name = table.series[0]
        noted = replace(table, settings={"notes": {name: "a line", "absent": "another"}, "interval": "what it is"})
        assert str(noted).splitlines()[-5:] == [f"{name}: a line", "", "absent: another", "", "what it is"]
        assert {f"{name}\na line", table.series[1]} <= set(_legend(noted.plot()))


def test_a_frame_has_a_line_for_each_row() -> None:
    frame = SCATTER.to_pandas()
    assert list(frame.columns) == ["series", "label", "x", "mean", "low", "high", "values"]
    assert [Row(**line) for line in frame.to_dict("records")] == list(SCATTER.rows)


# ---- figures ----


def _legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_lines_are_drawn_for_each_series_with_its_interval_and_dashed_for_the_references(tmp_path: Path) -> None:
    figure = TABLE.plot()
    (axes,) = figure.axes
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("A | title", "share", "loss (nats)")
    assert _legend(figure) == ["Straße", "random", "nothing removed", "alone"]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--", "--"]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0.1, -1e-300], [0.2, 0.1 + 0.2]])
    assert len(axes.collections) == 2
    top = axes.collections[0].get_paths()[0].vertices
    assert {1 / 3, 2 / 3} <= set(top[:, 1])
    figure.savefig(tmp_path / "figure.png")


def test_a_wide_interval_runs_off_the_figure_instead_of_flattening_the_means() -> None:
    rows = (Row("a", 0, 1, -100, 100), Row("a", 1, 3, 2.5, 3.5))
    assert replace(TABLE, rows=rows, references={}).plot().axes[0].get_ylim() == (-1, 5)
    assert replace(TABLE, rows=rows, references={"line": (4, 4, 4)}).plot().axes[0].get_ylim() == (-2, 7)
    bottom, top = replace(TABLE, rows=rows[1:], references={}).plot().axes[0].get_ylim()
    assert 2 < bottom < 2.5
    assert 3.5 < top < 4


def test_bars_are_drawn_for_each_series(tmp_path: Path) -> None:
    figure = BARS.plot()
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0.7]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    figure.savefig(tmp_path / "figure.png")


def test_points_are_drawn_with_error_bars_and_the_line_of_agreement(tmp_path: Path) -> None:
    figure = SCATTER.plot()
    (axes,) = figure.axes
    assert set(_legend(figure)) == {"a", "b", "actual = predicted", "nothing removed", "alone"}
    assert len(axes.containers) == 2
    np.testing.assert_array_equal(axes.containers[0].lines[0].get_xydata(), [[1, 2], [2, 4]])
    segments = axes.containers[0].lines[2][0].get_segments()
    np.testing.assert_array_equal(segments[1], [[2, 2], [2, 6]])
    figure.savefig(tmp_path / "figure.png")


NAMES = (
    "costs $5",
    "$5 to $10",
    "$x_$",
    r"a_b^c \alpha $\frac{$",
    r"\$ and $",
    "_mine",
    "100 % of {braces} & #1",
)


def _texts_of_svg(figure: Any) -> set[str]:
    """What is drawn, as text: mathematics would be drawn as paths or other letters."""
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file := io.StringIO(), format="svg")
    tree = ElementTree.fromstring(file.getvalue())
    return {"".join(node.itertext()).strip() for node in tree.iter("{http://www.w3.org/2000/svg}text")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["lines", "bars", "scatter"])
def test_names_are_drawn_as_they_are_written(kind: str, name: str) -> None:
    rows = (Row(name, 0.5, 1.0, 0.5, 1.5, label=name), Row("other", 0.5, 1.0, 0.5, 1.5))
    title, x, y, note, line = (f"{what} {name}" for what in ("title", "x", "y", "note", "line"))
    table = Table(title, x, y, rows, {line: (1, 1, 1)}, {"notes": {name: note}}, kind)
    drawn = _texts_of_svg(table.plot())
    expected = {title, y, line, name} | ({x} if kind != "bars" else set()) | ({note} if kind != "bars" else set())
    assert expected <= drawn


def test_a_reference_whose_name_begins_with_an_underscore_is_in_the_legend() -> None:
    assert "_line" in _legend(replace(TABLE, references={"_line": (1, 1, 1)}).plot())
