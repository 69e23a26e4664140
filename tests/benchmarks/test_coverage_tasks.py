"""The committed coverages are those of the worlds that the file lists, and no interval holds much too seldom."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.coverage import results
from benchmarks.coverage_tasks import correlations_over_groups, worlds

FOUND = json.loads(results("tasks").read_text())


def test_the_results_are_of_every_world() -> None:
    expected = [(task.__name__, world) for task, world in worlds()]
    assert [(entry["task"], entry["world"]) for entry in FOUND] == expected


@pytest.mark.parametrize("task", sorted({entry["task"] for entry in FOUND}))
def test_no_interval_holds_the_truth_much_less_often_than_it_says(task: str) -> None:
    for entry in FOUND:
        heavy = {"pearson"} if "freedom" in entry["world"] else set()  # as its docstring says
        for measure, coverage in entry["coverage"].items():
            if entry["task"] == task and measure != "none":
                assert coverage >= (0.89 if measure in heavy else 0.915), entry


def test_a_result_can_be_made_again() -> None:
    entry = next(e for e in FOUND if e["world"] == {"groups": 8, "correlation": 0.5})
    found = correlations_over_groups(**entry["world"])
    assert all(math.isclose(entry["coverage"][kind], found[kind], abs_tol=5e-4) for kind in found)
