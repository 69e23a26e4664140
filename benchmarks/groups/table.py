"""docs/GROUPS.md from the JSON results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segflow.evaluation import Table

from .data import NOISE
from .detect import RESULTS
from .retrain import METHODS, places, series_title
from .settings import GROUPINGS, SETTINGS, TITLES, Setting

DOCUMENT = Path(__file__).parents[2] / "docs" / "GROUPS.md"

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
  and clustering. Intervals: 95%, Student's t over the runs' means (so few runs make them wide).
- **Noisy**: {NOISE:.0%} of the training labels moved to another class at random (of two classes: flipped).
"""


def write_table() -> Path:
    """Write docs/GROUPS.md from the results that are there."""
    assert any(RESULTS.glob("*.json")), f"no results in {RESULTS}. Run `python -m benchmarks.groups all` first."
    lines = [_HEAD, (Path(__file__).parent / "notes.md").read_text(), ""]
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
    path = RESULTS / f"{setting.name}-{step}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _detection(setting: Setting) -> Iterator[str]:
    found = _read(setting, "detect")
    if found is None:
        return
    right = " / ".join(f"{value:.3f}" for value in found["accuracy"])
    yield (
        f"{found['examples']:,} examples, {found['wrong']} of them with a wrong label; {found['queries']} queries; "
        f"accuracy of the runs {right}. Area under the curve of wrong labels found against examples inspected, most "
        f"harmful first: 0.5 is random, {found['perfect']:.3f} perfect."
    )
    if setting.few is not None:
        yield f"Curvature is fitted to {setting.few:,} of the examples (`curvature_examples`)."
    yield ""
    whole = {name: by for name, by in found["methods"].items() if "refused" not in by}
    sizes = list(next(iter(whole.values()))["random"])
    yield from _header(["method", "grouping", *[f"size {size}" for size in sizes]])
    for name, by in whole.items():
        for grouping in GROUPINGS:
            cells = [_plus_minus(by[grouping][size]) for size in sizes]
            yield f"| {name} | {TITLES.get(grouping, grouping)} | {' | '.join(cells)} |"
    for name, errors in found.get("batching_error", {}).items():
        from_rank = ", ".join(f"{error:.0%}" for error in errors)
        yield from ("", f"{name}: batches of 64; relative error of the projected Fisher in the runs: {from_rank}.")
    for name, by in found["methods"].items():
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
    path = RESULTS / f"{setting.name}-{step}.json"
    if not path.exists():
        return
    table = Table.load(path)
    shares = list(dict.fromkeys(row.x for row in table.rows))
    references = "; ".join(
        f"{name}: {mean:.3f} [{low:.3f}, {high:.3f}]" for name, (mean, low, high) in table.references.items()
    )
    yield from (f"{intro} {references}.", "")
    yield from _header(["method", "groups", *[f"{share:.0%} removed" for share in shares]])
    series = [(method, series_title(*place)) for method in METHODS for place in places(setting)]
    for method, title in [*series, ("random", "")]:
        name = f"{method}, {title}" if title else method
        cells = [f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in (table.value(name, x) for x in shares)]
        yield f"| {method} | {title} | {' | '.join(cells)} |"


def _times(setting: Setting) -> Iterator[str]:
    found = _read(setting, "time")
    if found is None:
        return
    times = found["times"]
    epoch = sorted(one["epoch seconds"] for one in times.values())[len(times) // 2]
    yield (
        f"One thread. Seconds, and in brackets plain epochs (forward and backward in batches of {found['batch']}, "
        f"{epoch:.2f} s in the median). Scoring: every example against {found['queries']} queries at six checkpoints, "
        "query gradients included."
    )
    yield ""
    sizes = setting.sizes
    yield from _header(["stage", *[f"size {size}" for size in sizes]])
    rows = dict.fromkeys(key.rsplit(", ", 1)[0] if key.rsplit(", ", 1)[-1].isdigit() else key for key in times)
    for row in rows:
        whole = times.get(row)
        cells = [_seconds(whole or times.get(f"{row}, {size}")) for size in sizes]
        yield f"| {row} | {' | '.join([cells[0] + ', once', *[''] * (len(sizes) - 1)] if whole else cells)} |"


def _million() -> Iterator[str]:
    path = RESULTS / "million.json"
    if not path.exists():
        return
    found = json.loads(path.read_text())
    yield from (
        "## A million examples",
        "",
        "![Seconds and peak memory against the number of examples](million.png)",
        "",
    )
    yield (
        f"{found['features']} features, {found['groups']:,} groups, {found['queries']} queries, logistic regression, "
        f"TracIn at one checkpoint, one thread; each figure is of a process of its own."
    )
    yield ""
    yield from _header(["examples", "step", "seconds", "peak memory, GiB"])
    for row in found["found"]:
        yield f"| {row['examples']:,} | {row['step']} | {row['seconds']:.1f} | {row['GiB']:.2f} |"


def _header(cells: list[str]) -> Iterator[str]:
    yield f"| {' | '.join(cells)} |"
    yield "|---" * len(cells) + "|"


def _plus_minus(figures: dict[str, Any]) -> str:
    return f"{figures['mean']:.3f} ± {(figures['high'] - figures['low']) / 2:.3f}"


def _seconds(figures: dict[str, float] | None) -> str:
    return f"{figures['seconds']:.2f} ({figures['epochs']:.2f})" if figures else ""
