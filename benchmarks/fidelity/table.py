"""docs/FIDELITY.md from the rows' JSON files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..prose import filled
from ..result_files import observed, read_result, short_made, shown_estimate, shown_interval, shown_made
from .blocks import KINDS, Block, blocks, free, shown_methods
from .classes import RESULT as CLASSES
from .explore import EXPLORED, VARIANTS
from .methods import BEST, METHODS, REFERENCE, SIZED
from .parts import BANKS
from .rows import ROWS, SUBSETS, TUNING
from .scoring import EMPIRICAL
from .verdicts import verdict_table

DOCUMENT = Path(__file__).parents[2] / "docs" / "FIDELITY.md"
NOTES = Path(__file__).parent / "notes.md"

_DAMPINGS = sum(entry.best_of == BEST for entry in METHODS)
_HEAD = f"""# How faithful is each method?

Linear datamodeling scores: the rank correlation, over {SUBSETS} random halves of the training examples, between what
a method predicts and what retraining on the half gives (the mean of several retrainings), averaged over the queries. In
brackets: 95% intervals, for other halves and queries (`docs/STATISTICS.md`; in rows that were read back by a bootstrap
of both). Written by `python -m benchmarks.fidelity table` from the results of `python -m benchmarks.fidelity all`; do
not edit.

- Coupled layers and queries along the run, SOURCE's defaults, were found in an independent study (other retrainings of
  digits and of Fashion-MNIST). Here options are explored on the rows whose names begin with "{TUNING}", and on no
  others; the other rows report the default as it is.
- **one run**: scores from one recorded training run of all examples; the mean over the runs, which have different
  seeds, of the scores and of their intervals. **all runs**: the scores averaged over the runs first.
- How many runs and retrainings a row has, and when it was made, stands with it. With fewer retrainings its ceiling is
  lower. A row with fewer runs or methods is made whole by `row NAME` without `--runs` and `--methods`.
- **over SOURCE**: the method minus "{REFERENCE}" (the default), with the interval of the paired difference; for one run
  the mean over the runs of both.
- **ceiling**: what a perfect predictor of the expected measurement would score, given the retrainings' own noise; what
  estimates it stands with each row. Ceilings by different estimators do not compare.
- **made**: rows that say "read back" were made before results were kept as files, by an earlier way of counting
  learning rates (`CHANGELOG.md`); their figures are those of the table of that day, to its digits. All that is named
  SOURCE there has layers apart and the final query, as the default of that day had.
- *best damping (upper bound)*: the best of {_DAMPINGS} dampings, chosen on this evaluation itself, for one run and for
  all separately: what tuning could reach at most.
- *empirical influence*: fitted to retrainings, not to a run: the mean measurement without an example minus the mean
  with it. It is compared on halves that it was not fitted to.
- Measured: the margin log p - log(1 - p) of the true class; for concrete the squared error.
- Beside each row's result file lie the measurements of its retrained models, from which a test computes the ceiling and
  SOURCE's figures anew (`benchmarks/fidelity/committed.py`).
"""
_VERDICTS = """SOURCE minus the other method: "ahead" and "behind" where the 95% interval of the paired difference
excludes 0, "level" where it holds 0. Nothing stands where no interval was kept."""
_SIZES = """The slope of real on predicted change of the measurement, over subsets and queries, each centred within its
query (`segflow.evaluation.slope_of_change`): 1 where predicted changes have the right size, below 1 where they are too
large. By what retraining leaves out, in brackets 95% intervals for other subsets and queries."""
_LEFT_OUT = dict(zip(BANKS, ("halves", "a tenth", "a hundredth"), strict=True))


def write_table() -> Path:
    """Write docs/FIDELITY.md from the results that are there."""
    found = blocks()
    assert found, "there are no results. Run `python -m benchmarks.fidelity all` first."
    lines = [_HEAD, "## All rows, one run", "", *_overview(found, "one"), ""]
    lines += ["## All rows, all runs averaged", "", *_overview(found, "all"), ""]
    lines += ["## Ahead, level or behind", "", _VERDICTS, "", *verdict_table(found), ""]
    lines += ["## How far sizes can be trusted", "", _SIZES, "", *_sizes(found), ""]
    for block in found:
        lines += [f"## {block.title}", "", _describe(block), "", *_block(block), ""]
    lines.append(filled(NOTES.read_text(), figure))
    DOCUMENT.write_text("\n".join(lines).rstrip() + "\n")
    return DOCUMENT


def figure(*words: str) -> str:
    """What stands at a place of the notes.

    {{ROW | METHOD | one}} (or "all", "over one", "over all", and "halves", "tenth" or "hundredth" for one run's slope)
    and {{ROW | ceiling}}, where ROW is a block's title; with "interval" at the end, the interval.
    {{explored | ROW | VARIANT}}, {{explored}} for the whole table, {{observed | NAME}}, and {{classes | plain or batch
    normalisation | METHOD | whole classes or random tenths}}.
    """
    if words == ("explored",):
        return "\n".join(_explored())
    if words[0] == "explored":
        return f"{read_result(EXPLORED / f'{words[1]}.json')['variants'][words[2]]:.3f}"
    if words[0] == "observed":
        return observed(words[1])
    if words[0] == "classes":
        return f"{read_result(CLASSES)['slopes'][words[1]][words[2]][words[3]]['value']:.2f}"
    [block] = [block for block in blocks() if block.title == words[0]]
    if words[1] == "ceiling":
        return f"{block.part['ceiling']['mean']:.3f}"
    method, kind = block.method(words[1]), words[2].replace(" ", "_")
    found = method["slopes"][kind]["one"] if kind in BANKS else method[kind]
    sign = "+" if kind.startswith("over") else ""
    return shown_interval(found, sign) if words[3:] == ("interval",) else f"{found['mean']:{sign}.3f}"


def _describe(block: Block) -> str:
    row, part = block.row, block.part
    recipes = "; then ".join(
        f"{'SGD' if r['optimizer'] == 'sgd' else 'AdamW'}, learning rate {r['learning_rate']:g}, weight decay "
        f"{r['weight_decay']:g}, batches of {r['batch_size']}, {r['epochs']} epochs"
        for r in row["recipes"]
    )
    ceiling, reference = part["ceiling"], part["reference"]
    return (
        f"{row['examples']:,} examples, {row['queries']} queries, {part['repetitions']} retrainings of each half"
        f"{_small_groups(part)}, {row['runs']} recorded {'run' if row['runs'] == 1 else 'runs'}, ReLU network "
        f"{'-'.join(map(str, row['widths']))}; {recipes}. "
        f"Ceiling {shown_estimate(ceiling)} (reliability {ceiling['reliability']:.3f}; {ceiling['of']}). "
        f"{shown_made(row)}" + ("" if reference == REFERENCE else f' Differences are from "{reference}".')
    )


def _small_groups(part: Mapping[str, Any]) -> str:
    """The retrainings that leave out small groups, in words."""
    counts = part.get("left_out", {}).items()
    return "".join(
        f", {found['repetitions']} of each of {found['subsets']} subsets without {_LEFT_OUT[what]}"
        for what, found in counts
    )


def _block(block: Block) -> Iterator[str]:
    several = "1 run" if block.row["runs"] == 1 else f"{block.row['runs']} runs"
    yield f"| method | one run | {several} | over SOURCE, one run | over SOURCE, {several} |"
    yield "|---|---|---|---|---|"
    whole = block.methods
    for name in sorted(whole, key=lambda name: -(whole[name].get("one") or whole[name]["all"])["mean"]):
        figures = whole[name]
        cells = [shown_estimate(figures.get(kind)) for kind in KINDS]
        cells += [shown_estimate(figures.get(f"over_{kind}"), "+") for kind in KINDS]
        yield f"| {name}{_note(figures)} | {' | '.join(cells)} |"
    refused = [name for name in shown_methods(block.part) if name not in whole]
    if refused:
        yield ""
        yield f"Not for this optimizer or data: {', '.join(refused)}."


def _note(figures: Mapping[str, Any]) -> str:
    """What a method's name leaves open."""
    if "fitted_to" in figures:
        return f", fitted to {figures['fitted_to']['subsets']} x {figures['fitted_to']['repetitions']} retrainings"
    chosen = [figures[kind]["chosen"] for kind in KINDS if "chosen" in figures.get(kind, {})]
    return f": {', '.join(chosen)}" if chosen else ""


def _overview(found: Sequence[Block], kind: str) -> Iterator[str]:
    """Methods down, rows across; the best of each row's methods that a user can choose in bold, as far as digits go."""
    names = [*dict.fromkeys(entry.best_of or entry.name for entry in METHODS), EMPIRICAL]
    present = [name for name in names if any(kind in block.methods.get(name, {}) for block in found)]
    yield f"| | {' | '.join(block.title for block in found)} |"
    yield "|---" * (len(found) + 1) + "|"
    means = [
        {n: f"{block.methods[n][kind]['mean']:.3f}" for n in present if kind in block.methods.get(n, {})}
        for block in found
    ]
    best = [max(float(m) for n, m in column.items() if free(n)) for column in means]
    for name in present:
        pairs = [(column.get(name, ""), most) for column, most in zip(means, best, strict=True)]
        cells = [f"**{text}**" if text and free(name) and float(text) == most else text for text, most in pairs]
        yield f"| {name} | {' | '.join(cells)} |"
    ceilings = [block.part["ceiling"] for block in found]
    yield f"| *ceiling* | {' | '.join(format(ceiling['mean'], '.3f') for ceiling in ceilings)} |"
    yield f"| *ceiling by* | {' | '.join(ceiling['of'].partition(',')[0] for ceiling in ceilings)} |"
    yield f"| *made* | {' | '.join(short_made(block.row) for block in found)} |"


def _sizes(found: Sequence[Block]) -> Iterator[str]:
    """Blocks and methods down; what is left out across, for one run and for all."""
    sized = [(block, name) for block in found for name in SIZED if "slopes" in block.methods.get(name, {})]
    if not sized:
        yield "No row has been compared in this way yet."
        return
    heads = [f"{words}, {'one run' if kind == 'one' else 'all runs'}" for kind in KINDS for words in _LEFT_OUT.values()]
    yield f"| | method | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 2) + "|"
    for block, name in sized:
        slopes = block.methods[name]["slopes"]
        cells = [shown_estimate(slopes[what][kind]) for kind in KINDS for what in _LEFT_OUT]
        yield f"| {block.title} | {name} | {' | '.join(cells)} |"


def _explored() -> Iterator[str]:
    """Variants down, the rows that were looked at across; nothing where a variant does not suit a row."""
    read = [read_result(EXPLORED / f"{name}.json") for name in ROWS if name.startswith(TUNING)]
    found = [one for one in read if one]
    yield f"| | {' | '.join(short_title(one['row']) for one in found)} |"
    yield "|---" * (len(found) + 1) + "|"
    for name in VARIANTS:
        cells = [f"{one['variants'][name]:.3f}" if name in one["variants"] else "" for one in found]
        yield f"| {name} | {' | '.join(cells)} |"
    yield f"| *made* | {' | '.join(map(short_made, found))} |"


def short_title(row: str) -> str:
    """A digits row's name in words."""
    words = {"sgd": "SGD", "adamw": "AdamW"}
    return ", ".join(words.get(word, word) for word in row.split("-") if word != "clean")
