"""The study of fine-tuning MiniLM: every step on a tiny encoder and made-up states, without downloads."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import minilm
from benchmarks.fidelity.methods import BEST, EKFAC, REFERENCE, TRACIN
from benchmarks.groups.data import Data
from benchmarks.groups.models import EncoderHead
from benchmarks.result_files import read_result


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> minilm.Problem:
    """Forty examples of up to six positions, a class shown by the first; results and cache are of this test alone."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(52, 6, 12, generator=generator)
    states[torch.arange(6) >= torch.randint(2, 6, (52, 1), generator=generator)] = 0
    labels = (states[:, 0, 0] > 0).long()
    data = Data(states[:40], labels[:40], states[40:], labels[40:], np.zeros(40, dtype=bool))
    build = partial(EncoderHead, width=12, heads=3)
    made = minilm.Problem(data, build(2).layers.state_dict())
    monkeypatch.setattr(minilm, "EncoderHead", build)
    monkeypatch.setattr(minilm, "problem", lambda: made)
    monkeypatch.setattr(minilm, "RECIPE", minilm.RECIPE | {"batch": 8, "epochs": 2, "rate": 0.01})
    for name, value in {
        "TRAIN": 40,
        "QUERIES": 12,
        "HALVES": 12,
        "REPETITIONS": 2,
        "RUNS": 1,
        "CHECKPOINTS": 2,
    }.items():
        monkeypatch.setattr(minilm, name, value)
    few = [entry for entry in minilm.METHODS if not entry.best_of or entry.name.endswith(("0.1", " 1"))]
    monkeypatch.setattr(minilm, "METHODS", few)
    monkeypatch.setattr(minilm, "WORK", tmp_path / "work")
    monkeypatch.setattr(minilm, "RESULT", tmp_path / "minilm.json")
    return made


@pytest.mark.slow
def test_the_study_retrains_scores_compares_and_goes_on_where_it_was_stopped(
    tiny: minilm.Problem, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["minilm"])
    minilm.main()

    def made_at() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in minilm.WORK.rglob("*") if path.is_file()}

    found = read_result(minilm.RESULT)
    assert (found["halves"], found["repetitions"]) == (12, 2)
    methods = found["methods"]
    assert {REFERENCE, EKFAC, TRACIN, "gradient dot product"} < set(methods)
    assert -1 <= methods[REFERENCE]["one"]["low"] <= methods[REFERENCE]["one"]["mean"]
    best = max(figures["one"]["mean"] for figures in methods.values() if figures.get("best_of") == BEST)
    assert f"| {BEST} | {best:.3f} [" in minilm.table(found)
    assert "averaged" not in minilm.table(found)
    assert "| 2 runs averaged | over SOURCE |" in minilm.table(found | {"runs": 2})
    before = made_at()
    minilm.main()
    assert made_at() == before  # nothing was trained, recorded or scored again
    assert read_result(minilm.RESULT) == found
    assert minilm.table(found) in capsys.readouterr().out


def test_cutting_padding_changes_no_number_and_seeds_do(tiny: minilm.Problem) -> None:
    states = tiny.data.inputs[:4] * (torch.arange(6) < 4)[:, None]
    model, _ = tiny.new(0)
    assert minilm.cut(states).shape == (4, 4, 12)
    torch.testing.assert_close(model(minilm.cut(states)), model(states))
    half = np.arange(20)
    again, other = minilm.retrain(tiny, half, 3), minilm.retrain(tiny, half, 4)
    np.testing.assert_array_equal(minilm.retrain(tiny, half, 3), again)
    assert again.shape == (2, 12)
    assert not np.allclose(again, other)


def test_the_learning_rate_rises_from_above_zero_to_its_peak_and_falls_to_above_zero() -> None:
    shares = np.array([minilm.share_of_rate(96, step) for step in range(96)])
    assert shares.argmax() == 9
    assert shares[9] == 1
    np.testing.assert_allclose(np.diff(shares[:10]), 0.1)
    np.testing.assert_allclose(np.diff(shares[9:]), -1 / 87)
    np.testing.assert_allclose(shares[-1], 1 / 87)
