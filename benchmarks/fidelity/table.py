"""docs/FIDELITY.md from the rows' JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .methods import METHODS, REFERENCE
from .rows import REPETITIONS, ROWS, RUNS, SUBSETS
from .scoring import RESULTS

DOCUMENT = Path(__file__).parents[2] / "docs" / "FIDELITY.md"
EMPIRICAL = "empirical influence (retraining)"

_HEAD = f"""# How faithful is each method?

Linear datamodeling scores: the rank correlation, over {SUBSETS} random halves of the training examples, between what
a method predicts and what retraining on the half gives ({REPETITIONS} retrainings of each half, averaged), averaged
over the queries. In brackets: 95% bootstrap intervals, from resampling halves and queries. Written by
`python -m benchmarks.fidelity table` from the results of `python -m benchmarks.fidelity all`; do not edit.

- **one run**: scores from one recorded training run of all examples; the mean over {RUNS} runs of different seeds, of
  the scores and of their intervals. **five runs**: the scores averaged over the runs first.
- The two-stage row averages two runs, the Fashion-MNIST rows have one, with a part of the methods, and Fashion-MNIST
  with clean labels two retrainings of each half (its ceiling is lower for it). Without `--runs` and `--methods` the
  commands make them whole.
- **over SOURCE**: five runs, minus "{REFERENCE}", with the interval of the paired difference.
- **ceiling**: what a perfect predictor of the expected measurement would score, given the retrainings' own noise
  (split-half reliability, Spearman-Brown corrected).
- *best damping (upper bound)*: the best of {sum(bool(entry.best_of) for entry in METHODS)} dampings, chosen on this
  evaluation itself, for one run and for five separately: what tuning could reach at most.
- *empirical influence*: fitted to retrainings, not to a run: the mean measurement without an example minus the mean
  with it. It is compared on halves that it was not fitted to.
- Measured: the margin log p - log(1 - p) of the true class; for concrete the squared error.
"""


def write_table() -> Path:
    """Write docs/FIDELITY.md from the results that are there."""
    found = [json.loads(path.read_text()) for name in ROWS if (path := RESULTS / f"{name}.json").exists()]
    assert found, f"no results in {RESULTS}. Run `python -m benchmarks.fidelity all` first."
    blocks = [(_title(row["row"], stage), row, part) for row in found for stage, part in row["parts"].items()]
    lines = [_HEAD, "## All rows, one run", "", *_overview(blocks, "one"), "", "## All rows, five runs averaged", ""]
    lines += [*_overview(blocks, "five"), ""]
    for title, row, part in blocks:
        lines += [f"## {title}", "", _describe(row, part), "", *_block(part, row["runs"]), ""]
    lines.append((Path(__file__).parent / "notes.md").read_text())
    DOCUMENT.write_text("\n".join(lines).rstrip() + "\n")
    return DOCUMENT


def _title(row: str, stage: str) -> str:
    return f"{row}, {stage} data" if stage else row


def _describe(row: dict[str, Any], part: dict[str, Any]) -> str:
    recipes = "; then ".join(
        f"{r.optimizer.upper() if r.optimizer == 'sgd' else 'AdamW'}, learning rate {r.learning_rate:g}, weight decay "
        f"{r.weight_decay:g}, batches of {r.batch_size}, {r.epochs} epochs"
        for r in ROWS[row["row"]].recipes
    )
    widths = "-".join(map(str, ROWS[row["row"]].widths))
    return (
        f"{row['examples']:,} examples, {row['queries']} queries, {part['repetitions']} retrainings of each half, "
        f"{row['runs']} recorded {'run' if row['runs'] == 1 else 'runs'}, ReLU network {widths}; {recipes}. "
        f"Ceiling {part['ceiling']:.3f} (reliability {part['reliability']:.3f})."
    )


def _shown(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The methods of the table: a family by its best member, for one run and for five."""
    shown: dict[str, dict[str, Any]] = {}
    for name, figures in part["methods"].items():
        family = figures.get("best_of", "")
        if not family:
            shown[name] = figures
            continue
        best = shown.setdefault(family, {})
        for kind in ("one", "five"):
            if kind not in best or figures[kind]["mean"] > best[kind]["mean"]:
                best[kind] = figures[kind] | {"chosen": name.rsplit(" ", 1)[-1]}
                if kind == "five" and "over_reference" in figures:
                    best["over_reference"] = figures["over_reference"]
    return shown


def _block(part: dict[str, Any], runs: int) -> Iterator[str]:
    yield f"| method | one run | {_several(runs)} | over SOURCE |"
    yield "|---|---|---|---|"
    shown = _shown(part)
    whole = {name: figures for name, figures in shown.items() if "refused" not in figures}
    for name in sorted(whole, key=lambda name: -(whole[name].get("one") or whole[name]["five"])["mean"]):
        figures = whole[name]
        note = ""
        if "fitted_to" in figures:
            note = f", fitted to {figures['fitted_to']['subsets']} x {figures['fitted_to']['repetitions']} retrainings"
        elif "chosen" in figures.get("one", {}):
            note = f": {figures['one']['chosen']}, {figures['five']['chosen']}"
        cells = [_cell(figures.get(kind), kind == "over_reference") for kind in ("one", "five", "over_reference")]
        yield f"| {name}{note} | {' | '.join(cells)} |"
    refused = [name for name, figures in shown.items() if "refused" in figures]
    if refused:
        yield ""
        yield f"Not for this optimizer or data: {', '.join(refused)}."


def _several(runs: int) -> str:
    return "five runs" if runs == RUNS else "1 run" if runs == 1 else f"{runs} runs"


def _cell(figures: dict[str, Any] | None, signed: bool) -> str:
    if not figures:
        return ""
    sign = "+" if signed else ""
    return f"{figures['mean']:{sign}.3f} [{figures['low']:{sign}.3f}, {figures['high']:{sign}.3f}]"


def _overview(blocks: list[tuple[str, dict[str, Any], dict[str, Any]]], kind: str) -> Iterator[str]:
    """Methods down, rows across; the best of each row's methods that a user can choose in bold."""
    shown = [_shown(part) for _, _, part in blocks]
    names = [*dict.fromkeys(entry.best_of or entry.name for entry in METHODS), EMPIRICAL]
    present = [name for name in names if any(kind in part.get(name, {}) for part in shown)]
    yield f"| | {' | '.join(title for title, _, _ in blocks)} |"
    yield "|---" * (len(blocks) + 1) + "|"
    means = [{name: part[name][kind]["mean"] for name in present if kind in part.get(name, {})} for part in shown]
    free = [{n: m for n, m in column.items() if n != EMPIRICAL and "upper bound" not in n} for column in means]
    for name in present:
        cells = []
        for column, own in zip(means, free, strict=True):
            text = f"{column[name]:.3f}" if name in column else ""
            cells.append(f"**{text}**" if name in own and own[name] == max(own.values()) else text)
        yield f"| {name} | {' | '.join(cells)} |"
    yield f"| *ceiling* | {' | '.join(format(part['ceiling'], '.3f') for _, _, part in blocks)} |"
