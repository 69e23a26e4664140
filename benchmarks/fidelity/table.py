"""docs/FIDELITY.md from the rows' JSON files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..prose import filled
from ..result_files import observed, read_result, short_made, shown_estimate, shown_interval, shown_made
from .explore import EXPLORED, VARIANTS
from .methods import METHODS, REFERENCE
from .rows import REPETITIONS, ROWS, RUNS, SUBSETS
from .scoring import RESULTS

DOCUMENT = Path(__file__).parents[2] / "docs" / "FIDELITY.md"
NOTES = Path(__file__).parent / "notes.md"
EXPLORED_ROWS = (
    "digits-adamw-converged-clean",
    "digits-sgd-converged-clean",
    "digits-sgd-converged-relabelled",
    "digits-sgd-early-clean",
)
EMPIRICAL = "empirical influence (retraining)"

_HEAD = f"""# How faithful is each method?

Linear datamodeling scores: the rank correlation, over {SUBSETS} random halves of the training examples, between what
a method predicts and what retraining on the half gives ({REPETITIONS} retrainings of each half, averaged), averaged
over the queries. In brackets: 95% intervals, for other halves and queries (`docs/STATISTICS.md`; in rows that were read
back by a bootstrap of both). Written by
`python -m benchmarks.fidelity table` from the results of `python -m benchmarks.fidelity all`; do not edit.

- **one run**: scores from one recorded training run of all examples; the mean over {RUNS} runs of different seeds, of
  the scores and of their intervals. **five runs**: the scores averaged over the runs first.
- How many runs and retrainings a row has, and when it was made, stands with it. With fewer retrainings its ceiling is
  lower. A row with fewer runs or methods is made whole by `row NAME` without `--runs` and `--methods`.
- **over SOURCE**: five runs, minus "{REFERENCE}", with the interval of the paired difference.
- **ceiling**: what a perfect predictor of the expected measurement would score, given the retrainings' own noise; what
  estimates it stands with each row. Ceilings by different estimators do not compare.
- **made**: rows that say "read back" were made before results were kept as files, by an earlier way of counting
  learning rates (`CHANGELOG.md`); their figures are those of the table of that day, to its digits.
- *best damping (upper bound)*: the best of {sum(bool(entry.best_of) for entry in METHODS)} dampings, chosen on this
  evaluation itself, for one run and for five separately: what tuning could reach at most.
- *empirical influence*: fitted to retrainings, not to a run: the mean measurement without an example minus the mean
  with it. It is compared on halves that it was not fitted to.
- Measured: the margin log p - log(1 - p) of the true class; for concrete the squared error.
"""


def write_table() -> Path:
    """Write docs/FIDELITY.md from the results that are there."""
    found = results()
    assert found, f"no results in {RESULTS}. Run `python -m benchmarks.fidelity all` first."
    blocks = [(title(row["row"], stage), row, part) for row in found for stage, part in row["parts"].items()]
    lines = [_HEAD, "## All rows, one run", "", *_overview(blocks, "one"), "", "## All rows, five runs averaged", ""]
    lines += [*_overview(blocks, "five"), ""]
    for name, row, part in blocks:
        lines += [f"## {name}", "", _describe(row, part), "", *_block(part, row["runs"]), ""]
    lines.append(filled(NOTES.read_text(), figure))
    DOCUMENT.write_text("\n".join(lines).rstrip() + "\n")
    return DOCUMENT


def results() -> list[dict[str, Any]]:
    """The results that are there, in the order of the rows."""
    return [found for name in ROWS if (found := read_result(RESULTS / f"{name}.json"))]


def title(row: str, stage: str) -> str:
    return f"{row}, {stage} data" if stage else row


def shown_methods(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The methods of the table: a family by its best member, for one run and for five."""
    shown: dict[str, dict[str, Any]] = {}
    for name, figures in part["methods"].items():
        family = figures.get("best_of", "")
        if not family:
            shown[name] = figures
            continue
        best = shown.setdefault(family, {})
        for kind in ("one", "five"):
            if kind in figures and (kind not in best or figures[kind]["mean"] > best[kind]["mean"]):
                best[kind] = figures[kind] | {"chosen": name.rsplit(" ", 1)[-1]}
                if kind == "five" and "over_reference" in figures:
                    best["over_reference"] = figures["over_reference"]
    return shown


def figure(*words: str) -> str:
    """What stands at a place of the notes.

    {{ROW | METHOD | one}} (or "five", "over") and {{ROW | ceiling}}, where ROW is a block's title; with "interval" at
    the end, the interval. {{explored | ROW | VARIANT}}, {{explored}} for the whole table, {{observed | NAME}}.
    """
    if words == ("explored",):
        return "\n".join(_explored())
    if words[0] == "explored":
        return f"{read_result(EXPLORED / f'{words[1]}.json')['variants'][words[2]]:.3f}"
    if words[0] == "observed":
        return observed(words[1])
    [part] = [part for row in results() for stage, part in row["parts"].items() if title(row["row"], stage) == words[0]]
    if words[1] == "ceiling":
        return f"{part['ceiling']['mean']:.3f}"
    found = shown_methods(part)[words[1]][{"over": "over_reference"}.get(words[2], words[2])]
    sign = "+" if words[2] == "over" else ""
    return shown_interval(found, sign) if words[3:] == ("interval",) else f"{found['mean']:{sign}.3f}"


def _describe(row: dict[str, Any], part: dict[str, Any]) -> str:
    recipes = "; then ".join(
        f"{'SGD' if r['optimizer'] == 'sgd' else 'AdamW'}, learning rate {r['learning_rate']:g}, weight decay "
        f"{r['weight_decay']:g}, batches of {r['batch_size']}, {r['epochs']} epochs"
        for r in row["recipes"]
    )
    ceiling = part["ceiling"]
    return (
        f"{row['examples']:,} examples, {row['queries']} queries, {part['repetitions']} retrainings of each half, "
        f"{row['runs']} recorded {'run' if row['runs'] == 1 else 'runs'}, ReLU network "
        f"{'-'.join(map(str, row['widths']))}; {recipes}. "
        f"Ceiling {shown_estimate(ceiling)} (reliability {ceiling['reliability']:.3f}; {ceiling['of']}). "
        f"{shown_made(row)}"
    )


def _block(part: dict[str, Any], runs: int) -> Iterator[str]:
    yield f"| method | one run | {_several(runs)} | over SOURCE |"
    yield "|---|---|---|---|"
    shown = shown_methods(part)
    whole = {name: figures for name, figures in shown.items() if "refused" not in figures}
    for name in sorted(whole, key=lambda name: -(whole[name].get("one") or whole[name]["five"])["mean"]):
        figures = whole[name]
        note = ""
        if "fitted_to" in figures:
            note = f", fitted to {figures['fitted_to']['subsets']} x {figures['fitted_to']['repetitions']} retrainings"
        elif "chosen" in figures.get("one", {}):
            note = f": {figures['one']['chosen']}, {figures['five']['chosen']}"
        cells = [shown_estimate(figures.get(kind)) for kind in ("one", "five")]
        cells.append(shown_estimate(figures.get("over_reference"), "+"))
        yield f"| {name}{note} | {' | '.join(cells)} |"
    refused = [name for name, figures in shown.items() if "refused" in figures]
    if refused:
        yield ""
        yield f"Not for this optimizer or data: {', '.join(refused)}."


def _several(runs: int) -> str:
    return "five runs" if runs == RUNS else "1 run" if runs == 1 else f"{runs} runs"


def _overview(blocks: list[tuple[str, dict[str, Any], dict[str, Any]]], kind: str) -> Iterator[str]:
    """Methods down, rows across; the best of each row's methods that a user can choose in bold, as far as digits go."""
    shown = [shown_methods(part) for _, _, part in blocks]
    names = [*dict.fromkeys(entry.best_of or entry.name for entry in METHODS), EMPIRICAL]
    present = [name for name in names if any(kind in part.get(name, {}) for part in shown)]
    yield f"| | {' | '.join(name for name, _, _ in blocks)} |"
    yield "|---" * (len(blocks) + 1) + "|"
    means = [{n: f"{part[n][kind]['mean']:.3f}" for n in present if kind in part.get(n, {})} for part in shown]
    best = [max(float(m) for n, m in column.items() if free(n)) for column in means]
    for name in present:
        pairs = [(column.get(name, ""), most) for column, most in zip(means, best, strict=True)]
        cells = [f"**{text}**" if text and free(name) and float(text) == most else text for text, most in pairs]
        yield f"| {name} | {' | '.join(cells)} |"
    ceilings = [part["ceiling"] for _, _, part in blocks]
    yield f"| *ceiling* | {' | '.join(format(ceiling['mean'], '.3f') for ceiling in ceilings)} |"
    yield f"| *ceiling by* | {' | '.join(ceiling['of'].partition(',')[0] for ceiling in ceilings)} |"
    yield f"| *made* | {' | '.join(short_made(row) for _, row, _ in blocks)} |"


def free(name: str) -> bool:
    """Whether a user can choose the method: neither chosen on this evaluation, nor fitted to retrainings."""
    return name != EMPIRICAL and "upper bound" not in name


def _explored() -> Iterator[str]:
    """Variants down, rows across."""
    found = [read_result(EXPLORED / f"{row}.json") for row in EXPLORED_ROWS]
    yield f"| | {' | '.join(short_title(one['row']) for one in found)} |"
    yield "|---" * (len(found) + 1) + "|"
    for name in (name for name, variant in VARIANTS.items() if not variant.apart):
        yield f"| {name} | {' | '.join(format(one['variants'][name], '.3f') for one in found)} |"
    yield f"| *made* | {' | '.join(map(short_made, found))} |"


def short_title(row: str) -> str:
    """A digits row's name in words."""
    words = {"sgd": "SGD", "adamw": "AdamW"}
    return ", ".join(words.get(word, word) for word in row.split("-") if word != "clean")
