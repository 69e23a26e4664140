"""Coverages of the intervals of segflow.evaluation: `python -m benchmarks.coverage [tasks lds slope noise]`.

Simulates those that are named, by default all that are there, into `coverage_*.json`, and writes the tables of
docs/STATISTICS.md from the files. `python -m benchmarks.coverage tables` writes the tables alone.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "STATISTICS.md"
NAMES = tuple(name for name in ("tasks", "lds", "slope", "noise") if (HERE / f"coverage_{name}.py").exists())
_BESIDE = ("none", "reliability", "bias", "error of the bias", "ceiling", "reached", "estimate")  # no coverages
_SIZES = ("wrongs", "groups", "subsets", "count", "queries")  # the first that a world has is how many cases there are


def results(name: str) -> Path:
    """The file of one simulation's results."""
    return HERE / f"coverage_{name}.json"


def simulate(name: str) -> None:
    """Write the coverages of every world of one simulation."""
    found = []
    for task, world in import_module(f"benchmarks.coverage_{name}").worlds():
        coverage = {key: round(value, 4) for key, value in task(**world).items() if np.isfinite(value)}
        found.append({"task": task.__name__, "world": world, "coverage": coverage})
        print(task.__name__, world, coverage, flush=True)
    results(name).write_text(json.dumps(found, indent=1) + "\n")


def table(entries: list[dict[str, Any]]) -> str:
    """A markdown table: the lowest, median and highest coverage of each interval over the worlds of one size."""
    found: dict[tuple[str, str, str, int], list[float]] = {}
    for entry in entries:
        size = next((name for name in _SIZES if name in entry["world"]), next(iter(entry["world"])))
        for measure, coverage in entry["coverage"].items():
            if measure not in _BESIDE:
                found.setdefault((entry["task"], measure, size, entry["world"][size]), []).append(coverage)
    lines = ["| simulation | interval | cases | worlds | lowest | median | highest |", "|---|---|---|---|---|---|---|"]
    for (task, measure, size, count), all_of in sorted(found.items()):
        ends = " | ".join(f"{number:.3f}" for number in (min(all_of), np.median(all_of), max(all_of)))
        lines.append(f"| {task.replace('_', ' ')} | {measure} | {count} {size} | {len(all_of)} | {ends} |")
    return "\n".join(lines)


def written(document: str) -> str:
    """The document with the tables of the files between their markers."""
    for name in filter(lambda name: results(name).exists(), NAMES):
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, rest = document.split(begin)
        document = before + begin + table(json.loads(results(name).read_text())) + end + rest.split(end)[1]
    return document


def main() -> None:
    for name in [name for name in NAMES if name in sys.argv[1:] or len(sys.argv) == 1]:
        simulate(name)
    DOCUMENT.write_text(written(DOCUMENT.read_text()))


if __name__ == "__main__":
    main()
