"""docs/GROUPS.md from the JSON results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..prose import filled
from ..result_files import observed, read_result, shown_estimate, shown_made
from .data import NOISE
from .detect import RESULTS
from .settings import GROUPINGS, SETTINGS, TITLES, Setting

DOCUMENT = Path(__file__).parents[2] / "docs" / "GROUPS.md"
NOTES = Path(__file__).parent / "notes.md"
RANDOM = "random"  # the series of removal in random order

_HEAD = f"""# What groups cost, and what they are good for

Written by `python -m benchmarks.groups table` from the results of `python -m benchmarks.groups all`; do not edit.
After GGDA ([Ley et al. 2024](https://arxiv.org/abs/2410.09940)): training examples are grouped, groups are scored, and
every example gets its group's score divided by the group's size.

- **Groupings**: random; k-means on raw features (inputs; for text the mean hidden state), on representations (inputs of
  the last layer), on gradients with respect to them (Grad-K-Means), and on gradients of the last layer's own weights
  (64 random projections of them); the last three whitened. Size: examples in a group on average; size 1 is attribution
  of single examples, the same for every grouping.
- **Scores** are for the mean loss over all queries, on test examples that are held out. A group's score is the sum of
  its members', which are computed once; times are of real scoring of groups.
- **Runs**: three training runs (two of the ResNet and of the encoder) with their own initialisation, order, grouping
  and clustering. Intervals: 95%, Student's t over the runs' means (so few runs make them wide; none of a single run).
- **Made**: what says "read back" was made before results were kept as files, by an earlier way of counting learning
  rates (`CHANGELOG.md`); its figures are those of the table of that day, to its digits. SOURCE has
  layers apart and the final query on this page, as its default of those days had.
- **Noisy**: {NOISE:.0%} of the training labels moved to another class at random (of two classes: flipped).
"""


def write_table() -> Path:
    """Write docs/GROUPS.md from the results that are there."""
    assert any(RESULTS.glob("*.json")), f"no results in {RESULTS}. Run `python -m benchmarks.groups all` first."
    lines = [_HEAD, filled(NOTES.read_text(), figure), ""]
    for title, part in (
        ("Wrong labels found", _detection),
        ("Removing the most important examples", _removal),
        ("Pruning the least important examples", _pruning),
        ("What it takes", _times),
    ):
        blocks = [line for setting in SETTINGS.values() for line in _block(setting, part(setting))]
        lines += [f"## {title}", "", *blocks] if blocks else []
    lines += _million()
    DOCUMENT.write_text("\n".join(lines).rstrip() + "\n")
    return DOCUMENT


def _block(setting: Setting, lines: Iterator[str]) -> Iterator[str]:
    """A setting's lines under its name; nothing if it has none."""
    found = list(lines)
    if found:
        yield from (f"### {setting.name}: {setting.model}", "", *found, "")


def _read(setting: Setting, step: str) -> Any | None:
    return read_result(RESULTS / f"{setting.name}-{step}.json")


def figure(*words: str) -> str:
    """What stands at a place of the notes.

    {{FILE | ... | ...}}: the figure there, such as {{mnist-detect | TracIn | gradient | 64}} or {{credit-lr-removal |
    SOURCE, single examples | 20%}}, and of times the epochs. {{FILE | batching error | METHOD}}: from the lowest to the
    highest. {{observed | NAME}}.
    """
    if words[0] == "observed":
        return observed(words[1])
    found = read_result(RESULTS / f"{words[0]}.json")
    if words[1] == "batching error":
        errors = found["batching_error"][words[2]]
        return f"{min(errors):.0%} to {max(errors):.0%}"
    place = found["figures"]
    for word in words[1:]:
        place = place[word]
    return f"{place['mean']:.3f}" if "mean" in place else f"{place['epochs']:.2f}"


def _detection(setting: Setting) -> Iterator[str]:
    found = _read(setting, "detect")
    if found is None:
        return
    right = " / ".join(f"{value:.3f}" for value in found["accuracy"])
    yield (
        f"{found['examples']:,} examples, {found['wrong']} of them with a wrong label; {found['queries']} queries; "
        f"accuracy of the runs {right}. Area under the curve of wrong labels found against examples inspected, most "
        f"harmful first: 0.5 is random, {found['perfect']:.3f} perfect. {shown_made(found)}"
    )
    if setting.few is not None:
        yield f"Curvature is fitted to {setting.few:,} of the examples (`curvature_examples`)."
    yield ""
    whole = {name: by for name, by in found["figures"].items() if "refused" not in by}
    sizes = list(next(iter(whole.values()))["random"])
    yield from _header(["method", "grouping", *[f"size {size}" for size in sizes]])
    for name, by in whole.items():
        for grouping in GROUPINGS:
            cells = [_plus_minus(by[grouping][size]) for size in sizes]
            yield f"| {name} | {TITLES.get(grouping, grouping)} | {' | '.join(cells)} |"
    for name, errors in found.get("batching_error", {}).items():
        from_rank = ", ".join(f"{error:.0%}" for error in errors)
        yield from ("", f"{name}: batches of 64; relative error of the projected Fisher in the runs: {from_rank}.")
    for name, by in found["figures"].items():
        if "refused" in by:
            yield from ("", f"{name}: {by['refused']}")


def _removal(setting: Setting) -> Iterator[str]:
    intro = "Mean loss of the queries after retraining without the examples; higher is better."
    yield from _curve(setting, "removal", intro)


def _pruning(setting: Setting) -> Iterator[str]:
    intro = "Noisy labels. Mean loss of the queries after retraining on what is left; lower is better."
    yield from _curve(setting, "pruning", intro)
    lines = list(_curve(setting, "pruning-accuracy", "The same retrainings: accuracy on the queries."))
    yield from (["", *lines] if lines else [])


def _curve(setting: Setting, step: str, intro: str) -> Iterator[str]:
    found = _read(setting, step)
    if found is None:
        return
    references = "; ".join(f"{name}: {shown_estimate(ends)}" for name, ends in found["references"].items())
    yield from (f"{intro} {references}. {shown_made(found)}", "")
    figures: dict[str, dict[str, Any]] = found["figures"]
    series = {name.partition(", ")[::2]: cells for name, cells in figures.items() if name != RANDOM}
    shares = list(figures[RANDOM])
    yield from _header(["method", "groups", *[f"{share} removed" for share in shares]])
    for (method, title), cells in [*series.items(), ((RANDOM, ""), figures[RANDOM])]:
        yield f"| {method} | {title} | {' | '.join(shown_estimate(cells[share]) for share in shares)} |"


def _times(setting: Setting) -> Iterator[str]:
    found = _read(setting, "time")
    if found is None:
        return
    times = found["figures"]
    yield (
        f"One thread. Seconds, and in brackets plain epochs (forward and backward in batches of {found['batch']}, "
        f"{found['epoch seconds']:.2f} s in the median). Scoring: every example against {found['queries']} queries "
        f"at six checkpoints, query gradients included. {shown_made(found)}"
    )
    yield ""
    sizes = sorted({int(key.rsplit(", ", 1)[-1]) for key in times if key.rsplit(", ", 1)[-1].isdigit()})
    yield from _header(["stage", *[f"size {size}" for size in sizes]])
    rows = dict.fromkeys(key.rsplit(", ", 1)[0] if key.rsplit(", ", 1)[-1].isdigit() else key for key in times)
    for row in rows:
        whole = times.get(row)
        cells = [_seconds(whole or times.get(f"{row}, {size}")) for size in sizes]
        yield f"| {row} | {' | '.join([cells[0] + ', once', *[''] * (len(sizes) - 1)] if whole else cells)} |"


def _million() -> Iterator[str]:
    found = read_result(RESULTS / "million.json")
    if found is None:
        return
    yield from (
        "## A million examples",
        "",
        "![Seconds and peak memory against the number of examples](million.png)",
        "",
    )
    yield (
        f"{found['features']} features, {found['groups']:,} groups, {found['queries']} queries, logistic regression, "
        f"TracIn at one checkpoint, one thread; each figure is of a process of its own. {shown_made(found)}"
    )
    yield ""
    yield from _header(["examples", "step", "seconds", "peak memory, GiB"])
    for row in found["found"]:
        yield f"| {row['examples']:,} | {row['step']} | {row['seconds']:.1f} | {row['GiB']:.2f} |"


def _header(cells: list[str]) -> Iterator[str]:
    yield f"| {' | '.join(cells)} |"
    yield "|---" * len(cells) + "|"


def _plus_minus(figures: dict[str, Any]) -> str:
    if figures["low"] is None or figures["high"] is None:
        return f"{figures['mean']:.3f}"
    return f"{figures['mean']:.3f} ± {(figures['high'] - figures['low']) / 2:.3f}"


def _seconds(figures: dict[str, float] | None) -> str:
    return f"{figures['seconds']:.2f} ({figures['epochs']:.2f})" if figures else ""
