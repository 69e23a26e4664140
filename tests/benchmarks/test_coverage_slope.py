"""The committed coverages of slopes are of their worlds, and no interval is much too narrow."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.coverage import results
from benchmarks.coverage_slope import slopes, worlds

FOUND = json.loads(results("slope").read_text())
LEAST = {"slopes": 0.91, "uneven_queries": 0.87}  # of 400 data sets, whose share errs by .011


def test_the_results_are_of_every_world() -> None:
    assert [(entry["task"], entry["world"]) for entry in FOUND] == [(task.__name__, world) for task, world in worlds()]


@pytest.mark.parametrize("task", sorted(LEAST))
def test_no_interval_holds_the_truth_much_less_often_than_it_says(task: str) -> None:
    for entry in FOUND:
        if entry["task"] == task:
            assert entry["coverage"]["slope"] >= LEAST[task], entry


def test_intervals_hold_in_95_of_100_cases_on_the_whole() -> None:
    assert 0.94 < np.mean([entry["coverage"]["slope"] for entry in FOUND]) < 0.98


def test_a_result_can_be_made_again() -> None:
    world = {"subsets": 10, "queries": 20, "removed": 0.5, "agreement": 0.7, "spread": 0.3, "sizes": 0.5}
    entry = next(e for e in FOUND if e["world"] == world)
    assert slopes(**world) == pytest.approx(entry["coverage"], abs=3e-3)  # type: ignore[arg-type]
