"""Scores of every method on every run of a row, and how far they agree with retraining: one JSON for each row."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

import segflow as sf

from ..result_files import FOLDER, made, read_result, write_result
from .committed import commit, committed_path, digest
from .figures import agreement, ceiling, empirical, over_reference, slopes
from .methods import METHODS, REFERENCE, SIZED, Entry
from .parts import Part, parts_of
from .rows import REMOVED, STAGE_NAMES, Row
from .training import folder_of, load_run, run_folder

RESULTS = FOLDER / "fidelity"
EMPIRICAL = "empirical influence (retraining)"
Scored = Callable[[Entry], list[sf.Scores] | None]  # a method's scores of each run


def evaluate(row: Row, only: str = "", measurement: str = "", reuse: bool = False, runs: int = 0) -> Path:
    """Score what is not scored yet, compare, and write the row's JSON and what is committed beside it.

    only: methods whose name holds one of these texts, "|" between (the others keep what an earlier evaluation on the
    same retrainings and as many runs found); runs: how many of the recorded runs (0: all); measurement: by default
    the row's first; reuse: take scores that another state of segflow's code made.
    """
    chosen, runs = measurement or row.measurements[0], runs or row.runs
    is_first = chosen == row.measurements[0]
    path = RESULTS / f"{row.name}{'' if is_first else f'-{chosen}'}.json"
    earlier, found = (read_result(path) or {}) if only else {}, {}
    RESULTS.mkdir(parents=True, exist_ok=True)
    for part in parts_of(row, chosen):
        scored = partial(_runs_of, part, reuse, runs)
        [reference] = (scored(entry) for entry in METHODS if entry.name == REFERENCE)
        assert reference is not None
        kept = _earlier(earlier, part, runs)
        found[part.stage] = _compare(part, only.split("|"), scored, reference, kept)
        if is_first:
            commit(committed_path(RESULTS, row.name, part.stage), part, reference)
    about = {"row": row.name, "measurement": chosen, "made": made(), "runs": runs}
    about |= {"examples": sum(len(i) for i, _ in row.load().stages), "queries": len(row.load().query[0])}
    about |= {"widths": row.widths, "recipes": [asdict(recipe) for recipe in row.recipes]}
    return write_result(path, about | {"parts": found})


def _earlier(found: dict[str, Any], part: Part, runs: int) -> dict[str, Any]:
    """What an earlier evaluation found on the same retrainings and as many runs: figures of others do not compare."""
    earlier = found.get("parts", {}).get(part.stage, {})
    if found.get("runs") == runs and earlier.get("retrainings") == digest(part.measured):
        return dict(earlier["methods"])
    if earlier:
        print("  the figures that are there are of other retrainings or runs, and are not kept", flush=True)
    return {}


def _comparable(earlier: dict[str, Any], runs: list[float]) -> dict[str, Any]:
    """What an earlier evaluation found; without differences from the reference, if that scored otherwise then."""
    then = earlier.get(REFERENCE, {}).get("one", {}).get("runs", [])
    if len(then) == len(runs) and np.allclose(then, runs, rtol=1e-5, atol=1e-6):
        return dict(earlier)
    return {
        name: {key: value for key, value in figures.items() if not key.startswith("over_")}
        for name, figures in earlier.items()
    }


def _compare(
    part: Part, only: list[str], scored: Scored, reference: list[sf.Scores], earlier: dict[str, Any]
) -> dict[str, Any]:
    """A part's figures: of the methods whose names hold one of these texts, and what is kept of the others."""
    own = agreement(reference, part.subsets, part.measured)
    methods = _comparable(earlier, own["one"]["runs"])
    for entry in METHODS:
        if entry.suits(part.row) and (entry.name == REFERENCE or any(text in entry.name for text in only)):
            figures = _figures(part, entry, scored, reference)
            if figures is not None:  # or this segflow does not have it
                methods[entry.name] = figures
    if part.stage == "":
        methods[EMPIRICAL] = empirical(part)
    about: dict[str, Any] = {**_counts(part.measured)}
    about["left_out"] = {what: _counts(part.left_out(what)[1]) for what in REMOVED}
    about |= {"retrainings": digest(part.measured), "ceiling": ceiling(part.measured), "reference": REFERENCE}
    return about | {"methods": methods}


def _counts(measured: np.ndarray) -> dict[str, int]:
    return {"subsets": len(measured), "repetitions": measured.shape[1]}


def _figures(part: Part, entry: Entry, scored: Scored, reference: list[sf.Scores]) -> dict[str, Any] | None:
    """A method's figures, or why it refuses; None where this segflow does not have it."""
    try:
        runs = scored(entry)
    except sf.SegflowError as problem:
        return {"refused": str(problem)}
    if runs is None:
        return None
    figures = agreement(runs, part.subsets, part.measured)
    if entry.name != REFERENCE:
        figures |= over_reference(part, runs, reference)
    if entry.name in SIZED:
        figures["slopes"] = slopes(part, runs)
    one, every = figures["one"]["mean"], figures["all"]["mean"]
    print(f"  {entry.name}: one {one:.3f}, all {every:.3f}", flush=True)
    return figures | ({"best_of": entry.best_of} if entry.best_of else {})


def _runs_of(part: Part, reuse: bool, count: int, entry: Entry) -> list[sf.Scores] | None:
    """A method's scores of each run; None where this segflow does not have it."""
    runs = [scores_of(part, entry, seed, reuse) for seed in range(count)]
    whole = [scores for scores in runs if scores is not None]
    return whole if len(whole) == count else None


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
