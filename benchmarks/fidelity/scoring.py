"""Scores of every method on every run of a row, and how far they agree with retraining: one JSON for each row."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import segflow as sf
from segflow.evaluation import (
    empirical_influence,
    linear_datamodeling_difference,
    linear_datamodeling_score,
    noise_ceiling,
)

from ..result_files import FOLDER, made, read_result, write_result
from .methods import METHODS, REFERENCE, Entry
from .rows import RUNS, STAGE_NAMES, Row
from .training import bank_names, folder_of, ground_truth, load_run, run_folder

RESULTS = FOLDER / "fidelity"
CEILING = "intraclass correlation of the retrainings, pooled over the queries"  # what `noise_ceiling` is, in words


@dataclass(frozen=True)
class Part:
    """One question of a row: the influence of one stage's examples.

    stage: the stage's name ("" where there is one stage); measurement: what is explained; subsets [M, N], measured
    [M, R, Q]: the retrainings.
    """

    row: Row
    stage: str
    measurement: str
    subsets: np.ndarray
    measured: np.ndarray


def parts_of(row: Row, measurement: str) -> Iterator[Part]:
    """The row's questions, each with its ground truth."""
    sizes = [len(inputs) for inputs, _ in row.load().stages]
    for bank in bank_names(row):
        if bank == "extra":
            continue
        stage = bank.removeprefix("bank").removeprefix("-")
        subsets, measured = ground_truth(row, bank, measurement)
        number = STAGE_NAMES.index(stage) if stage else 0
        start = sum(sizes[:number])
        yield Part(row, stage, measurement, subsets[:, start : start + sizes[number]], measured)


def evaluate(row: Row, only: str = "", measurement: str = "", reuse: bool = False, runs: int = 0) -> Path:
    """Score what is not scored yet, compare, and write the row's JSON.

    only: methods whose name holds one of these texts, "|" between (the others keep what an earlier evaluation on the
    same retrainings and as many runs found); runs: how many of the recorded runs (0: all); measurement: by default
    the row's first; reuse: take scores that another state of segflow's code made.
    """
    chosen, runs = measurement or row.measurements[0], runs or RUNS
    path = RESULTS / f"{row.name}{'' if chosen == row.measurements[0] else f'-{chosen}'}.json"
    earlier = (read_result(path) or {}) if only else {}
    found = {
        part.stage: _compare(part, only.split("|"), reuse, _earlier(earlier, part, runs), runs)
        for part in parts_of(row, chosen)
    }
    about = {"row": row.name, "measurement": chosen, "made": made(), "runs": runs}
    about |= {"examples": sum(len(i) for i, _ in row.load().stages), "queries": len(row.load().query[0])}
    about |= {"widths": row.widths, "recipes": [asdict(recipe) for recipe in row.recipes]}
    return write_result(path, about | {"parts": found})


def _earlier(found: dict[str, Any], part: Part, runs: int) -> dict[str, Any]:
    """What an earlier evaluation found on the same retrainings and as many runs: figures of others do not compare."""
    earlier = found.get("parts", {}).get(part.stage, {})
    if found.get("runs") == runs and earlier.get("retrainings") == _digest(part.measured):
        return dict(earlier["methods"])
    if earlier:
        print("  the figures that are there are of other retrainings or runs, and are not kept", flush=True)
    return {}


def _digest(values: np.ndarray) -> str:
    """What tells retrainings from others."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def _compare(part: Part, only: list[str], reuse: bool, earlier: dict[str, Any], count: int) -> dict[str, Any]:
    methods, reference = dict(earlier), None
    for entry in METHODS:
        if not entry.suits(part.row) or (not any(text in entry.name for text in only) and entry.name != REFERENCE):
            continue
        try:
            runs = [scores_of(part, entry, seed, reuse) for seed in range(count)]
        except sf.SegflowError as problem:
            methods[entry.name] = {"refused": str(problem)}
            continue
        whole = [scores for scores in runs if scores is not None]
        if len(whole) < count:
            continue  # this segflow does not have it
        reference = _mean(whole) if entry.name == REFERENCE else reference
        figures = _figures(part, whole, reference)
        methods[entry.name] = figures | ({"best_of": entry.best_of} if entry.best_of else {})
        print(f"  {entry.name}: one {figures['one']['mean']:.3f}, five {figures['five']['mean']:.3f}", flush=True)
    if part.stage == "":
        methods["empirical influence (retraining)"] = _empirical(part)
    about = {"subsets": len(part.measured), "repetitions": part.measured.shape[1]}
    return about | {"retrainings": _digest(part.measured), "ceiling": _ceiling(part), "methods": methods}


def _ceiling(part: Part) -> dict[str, Any]:
    """The noise ceiling, with what estimates it; no interval is given of it."""
    found = noise_ceiling(part.measured)
    return {
        "of": CEILING,
        "mean": found.ceiling,
        "low": found.low,
        "high": found.high,
        "reliability": found.reliability,
    }


def _figures(part: Part, runs: list[sf.Scores], reference: sf.Scores | None) -> dict[str, Any]:
    """The linear datamodeling scores of single runs and of their mean, and the paired difference from the reference."""
    measured = part.measured.mean(1)
    ensemble = _mean(runs)
    single = [linear_datamodeling_score(scores, part.subsets, measured) for scores in runs]
    several = linear_datamodeling_score(ensemble, part.subsets, measured)
    one = {name: float(np.mean([getattr(s, name) for s in single])) for name in ("mean", "low", "high")}
    figures: dict[str, Any] = {
        "one": one | {"runs": [score.mean for score in single]},
        "five": {"mean": several.mean, "low": several.low, "high": several.high},
    }
    if reference is not None and reference is not ensemble:
        found = linear_datamodeling_difference(ensemble, reference, part.subsets, measured)
        figures["over_reference"] = {"mean": found.mean, "low": found.low, "high": found.high}
    return figures


def _empirical(part: Part) -> dict[str, Any]:
    """The estimator fitted to other retrainings: to the second bank, or to the first half of the subsets."""
    if part.row.extra:
        fitted = empirical_influence(*ground_truth(part.row, "extra", part.measurement), centred=True)
        own = slice(None)
    else:
        half = len(part.subsets) // 2
        fitted = empirical_influence(part.subsets[:half], part.measured[:half], centred=True)
        own = slice(half, None)
    found = linear_datamodeling_score(fitted, part.subsets[own], part.measured[own].mean(1))
    note = {key: fitted.provenance[key] for key in ("subsets", "repetitions")}
    return {"five": {"mean": found.mean, "low": found.low, "high": found.high}, "fitted_to": note}


def scores_of(part: Part, entry: Entry, seed: int, reuse: bool = False) -> sf.Scores | None:
    """One method's scores of single examples on one run; from the cache if they are of this run and this code."""
    method = entry.make()
    if method is None:
        return None
    name = "-".join(word for word in (entry.slug, part.measurement, part.stage, str(seed)) if word)
    path = folder_of(part.row) / "scores" / f"{name}.safetensors"
    made_from = {"run": trajectory_digest(run_folder(part.row, seed)), "code": code_digest()}
    if path.exists():
        scores = sf.Scores.load(path)
        found: Any = scores.provenance["made_from"]
        if found["run"] == made_from["run"] and (reuse or found == made_from):
            return scores
    store = folder_of(part.row) / "stores" / str(seed)
    clear_stale(store, made_from)
    scores = _score(part, method, seed, store)
    scores = replace(scores, provenance=dict(scores.provenance) | {"made_from": made_from})
    scores.save(path)
    return scores


def _score(part: Part, method: Any, seed: int, store: Path) -> sf.Scores:
    model, trajectory = load_run(part.row, seed)
    trains, query = part.row.datasets()
    regression, measurement = part.row.is_regression, part.measurement
    task = sf.tasks.Regression(measurement=measurement) if regression else sf.tasks.Classification(measurement)
    analyzer = sf.Analyzer(model, task, trajectory, store=store, method=method, progress=False)
    data: Any = dict(zip(STAGE_NAMES, trains, strict=True)) if part.stage else trains[0]
    analyzer.fit(data, batch_size=256)
    number = STAGE_NAMES.index(part.stage) if part.stage else 0
    options: dict[str, Any] = {"stage": part.stage} if part.stage else {}
    groups = sf.Groups.singletons(len(trains[number]))
    return analyzer.score(groups, data, query, batch_size=256, **options)


def _mean(runs: list[sf.Scores]) -> sf.Scores:
    return replace(runs[0], values=torch.stack([scores.values for scores in runs]).mean(0), by_term={}, by_layer={})


def clear_stale(store: Path, made_from: dict[str, str]) -> None:
    """A store that another state of the code, or another run, made is made anew."""
    note = store.with_suffix(".json")
    if not note.exists() or json.loads(note.read_text()) != made_from:
        shutil.rmtree(store, ignore_errors=True)
        store.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(made_from))


def trajectory_digest(folder: Path) -> str:
    """What tells a recorded run from others."""
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("trajectory.json")):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


@cache
def code_digest() -> str:
    """A digest of segflow's engine as Python reads it: comments and layout do not count."""
    root = Path(sf.__file__).parent
    sha = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        sha.update(f"{path.relative_to(root)} {ast.dump(ast.parse(path.read_text()))}".encode())
    return sha.hexdigest()[:16]
