"""Which method and grouping finds wrong labels? The area under the detection curve, over training runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import segflow as sf
from segflow.evaluation import noisy_label_detection
from segflow.evaluation.statistics import student_interval

from ..result_files import FOLDER, made, write_result
from .runs import accuracy, groups_of, say, shared_out, singles_of
from .settings import GROUPINGS, Setting

RESULTS = FOLDER / "groups"


def detect(setting: Setting, reuse: bool = False) -> Path:
    """Score what is not scored yet on the noisy variant, and write {setting}-detect.json."""
    wrong = setting.load("noisy").wrong
    found: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    for name in setting.methods():
        try:
            singles = [singles_of(setting, "noisy", seed, name, reuse) for seed in range(setting.runs)]
        except sf.SegflowError as problem:
            found[name] = {"refused": str(problem)}
            say(f"{setting.name}, {name}: refused: {problem}")
            continue
        batched = [run.provenance["batching_error"][0] for run in singles if "batching_error" in run.provenance]
        errors |= {name: batched} if batched else {}
        places = [(grouping, size) for grouping in GROUPINGS for size in setting.sizes]
        series = {
            json.dumps(place): [
                shared_out(run, groups_of(setting, "noisy", seed, *place)) for seed, run in enumerate(singles)
            ]
            for place in places
        }
        table = noisy_label_detection(series, wrong, resamples=1).auc
        found[name] = {grouping: {} for grouping in GROUPINGS}
        for grouping, size in places:
            values = table.value(json.dumps((grouping, size))).values
            found[name][grouping][str(size)] = student_interval(values)._asdict() | {"values": values}
        say(f"{setting.name}, {name}: AUC of single examples {found[name]['random']['1']['mean']:.3f}")
    [perfect] = [reference for title, reference in table.references.items() if "perfect" in title]
    content = {
        "examples": len(wrong),
        "queries": len(setting.load("noisy").query_inputs),
        "wrong": int(wrong.sum()),
        "runs": setting.runs,
        "perfect": perfect[0],
        "accuracy": [accuracy(setting, "noisy", seed) for seed in range(setting.runs)],
        "batching_error": errors,
        "figures": found,
    }
    return write(setting, "detect", content)


def write(setting: Setting, step: str, content: dict[str, Any]) -> Path:
    """Write a step's result."""
    return write_result(RESULTS / f"{setting.name}-{step}.json", {"setting": setting.name, "made": made()} | content)
