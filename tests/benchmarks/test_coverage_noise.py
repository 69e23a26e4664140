"""The committed coverages of noise ceilings are those of the worlds that the file lists, and say what the docs say."""

from __future__ import annotations

import json

import pytest

from benchmarks.coverage import results
from benchmarks.coverage_noise import alike, worlds
from segflow.evaluation.noise import FEWEST_SUBSETS

FOUND = json.loads(results("noise").read_text())


def test_the_results_are_of_every_world() -> None:
    expected = [(function.__name__, world) for function, world in worlds()]
    assert [(entry["task"], entry["world"]) for entry in FOUND] == expected


def test_without_signal_the_reliability_is_zero_within_the_error_of_simulation() -> None:
    ratios = [e["coverage"]["bias"] / e["coverage"]["error of the bias"] for e in FOUND if not e["world"]["signal"]]
    assert max(map(abs, ratios)) < 4
    assert abs(sum(ratios)) / len(ratios) < 0.5


def test_normal_queries_intervals_hold_the_truth_as_often_as_they_say() -> None:
    alike = [entry for entry in FOUND if entry["task"] == "alike" and "interval holds" in entry["coverage"]]
    for entry in alike:
        error = (0.95 * 0.05 / entry["world"].get("draws", 200)) ** 0.5
        assert entry["coverage"]["interval holds"] >= 0.94 - 3 * error, entry
    assert 0.95 <= sum(entry["coverage"]["interval holds"] for entry in alike) / len(alike) <= 0.98


def test_the_docstrings_numbers_are_those_of_the_file() -> None:
    for subsets, expected in ((8, 0.98), (100, 0.94)):
        held = [
            entry["coverage"]["interval holds"]
            for entry in FOUND
            if entry["task"] == "alike" and entry["world"]["subsets"] == subsets and entry["world"]["signal"]
        ]
        assert sum(held) / len(held) == pytest.approx(expected, abs=0.005)
    heavy = [e["coverage"] for e in FOUND if e["task"] == "heavy_tails" and e["world"]["signal"]]
    assert max(found["estimate"] - found["reached"] for found in heavy) == pytest.approx(0.05, abs=0.005)
    assert min(found["interval holds what is reached"] for found in heavy) < 0.7


def test_few_subsets_have_no_interval() -> None:
    for entry in FOUND:
        assert ("interval holds" in entry["coverage"]) == (entry["world"]["subsets"] >= FEWEST_SUBSETS)


def test_a_result_can_be_made_again() -> None:
    world = {"subsets": 3, "repetitions": 2, "queries": 5, "signal": 0.5}
    entry = next(e for e in FOUND if e["world"] == world)
    found = alike(**world)
    for name, value in entry["coverage"].items():
        assert found[name] == pytest.approx(value, abs=1e-4)
