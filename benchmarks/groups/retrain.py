"""Removing what a method calls important, and pruning what it calls unimportant, by groups; then retraining."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn import functional

import segflow as sf
from segflow.evaluation import BatchedTraining, Stage, Table, dataset_pruning, retraining_score
from segflow.report.row import Estimate

from ..fidelity.rows import margin_and_loss
from .detect import write
from .runs import folder_of, groups_of, say, shared_out, singles_of
from .settings import GROUPINGS, TITLES, Setting

METHODS = ("SOURCE", "TracIn")
EVERY_SIZE = ("random", "gradient")  # groupings that are compared at every size; the others at ONE_SIZE only
ONE_SIZE = 64
SEED = 1000  # retrainings share no initialisation with the recorded runs
MARGIN, LOSS = 0, 1  # what margin_and_loss measures


def retrain(setting: Setting, reuse: bool = False) -> list[Path]:
    """The retraining score on clean labels and pruning on noisy ones, each as a table of its own in the results."""
    return [_removal(setting, reuse), *_pruning(setting, reuse)]


def _removal(setting: Setting, reuse: bool) -> Path:
    scores = _series(setting, "clean", reuse)
    training, folder = training_of(setting, "clean"), folder_of(setting) / "retrained-clean"
    table = retraining_score(
        scores, training, folder, repetitions=setting.repetitions, seed=SEED, measurement=LOSS, progress=True
    )
    return _save(setting, "removal", table)


def _pruning(setting: Setting, reuse: bool) -> Iterator[Path]:
    """The loss of the queries, and the share of them that is right, from the same retrainings."""
    scores = _series(setting, "noisy", reuse)
    training, folder = training_of(setting, "noisy"), folder_of(setting) / "retrained-noisy"
    pruned = partial(
        dataset_pruning, scores, training, folder, repetitions=setting.repetitions, seed=SEED, progress=True
    )
    yield _save(setting, "pruning", pruned(measurement=LOSS))
    yield _save(setting, "pruning-accuracy", pruned(measurement=MARGIN, summary="positive"))


def training_of(setting: Setting, variant: str) -> BatchedTraining:
    """The recipe of the recorded runs, for many models."""
    data, recipe = setting.load(variant), setting.recipe
    make = partial(recipe.make, fused=True)
    stage = Stage(data.inputs, data.labels, functional.cross_entropy, make, recipe.epochs, recipe.batch_size)
    queries = (data.query_inputs, data.query_labels)
    return BatchedTraining(setting.build, (stage,), *queries, margin_and_loss, setting.together)


def _series(setting: Setting, variant: str, reuse: bool) -> dict[str, list[sf.Scores]]:
    """The scores of single examples that each method has under each grouping, for each run."""
    found = {}
    for method in METHODS:
        singles = [singles_of(setting, variant, seed, method, reuse) for seed in range(setting.runs)]
        for grouping, size in places(setting):
            title = f"{method}, {series_title(grouping, size)}"
            groups = [groups_of(setting, variant, seed, grouping, size) for seed in range(setting.runs)]
            found[title] = [shared_out(*pair) for pair in zip(singles, groups, strict=True)]
    return found


def places(setting: Setting) -> list[tuple[str, int]]:
    """The groupings and sizes that are compared; single examples once."""
    return [
        (grouping, size)
        for grouping in GROUPINGS
        for size in setting.sizes
        if (size == 1 and grouping == "random") or (size > 1 and (grouping in EVERY_SIZE or size == ONE_SIZE))
    ]


def series_title(grouping: str, size: int) -> str:
    """A series's name without its method."""
    return "single examples" if size == 1 else f"{TITLES.get(grouping, grouping)}, {size}"


def _save(setting: Setting, step: str, table: Table) -> Path:
    """The table itself is kept with the retrainings; its numbers are the result."""
    table.save(folder_of(setting) / f"{step}.json")
    references = {name: Estimate(*ends)._asdict() for name, ends in table.references.items()}
    path = write(setting, step, {"references": references, "figures": numbers(table)})
    say(f"{setting.name}: {path.name}")
    return path


def numbers(table: Table) -> dict[str, dict[str, Any]]:
    """{series: {share removed: its number, interval and runs}}."""
    found: dict[str, dict[str, Any]] = {}
    for row in table.rows:
        shown = {"mean": row.mean, "low": row.low, "high": row.high, "values": row.values}
        found.setdefault(row.series, {})[f"{row.x:.0%}"] = shown
    return found
