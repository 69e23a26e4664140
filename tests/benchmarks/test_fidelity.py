"""The fidelity benchmark: its data, its recipes' two ways of training, and its table, on what needs no download."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf
from benchmarks.fidelity import data, explore, methods, scoring, table, training
from benchmarks.fidelity.rows import ROWS, Row, margin_and_loss
from segflow.evaluation import Bank

DIGITS = "digits-sgd-early-relabelled"


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Row:
    """A digits row of one epoch, whose cache and results are of this test alone."""
    monkeypatch.setattr(training, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(scoring, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(table, "DOCUMENT", tmp_path / "FIDELITY.md")
    monkeypatch.setattr(table, "NOTES", tmp_path / "notes.md")
    (tmp_path / "notes.md").write_text(f"TracIn: {{{{{DIGITS} | TracIn | one}}}}.\n")
    plain = ROWS[DIGITS]
    return replace(plain, recipes=(replace(plain.recipes[0], epochs=1),), extra=0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_bank_trains_as_the_recorded_runs_do(row: Row, optimizer: str) -> None:
    row = replace(row, recipes=(replace(row.recipes[0], optimizer=optimizer),))
    training.record_run(row, 3)
    model, trajectory = training.load_run(row, 3)
    trajectory.load_into(model, len(trajectory) - 1)
    queries, labels = row.load().query
    with torch.no_grad():
        expected = row.measure(model(queries), labels).double().numpy()
    found = training._training(row).run([(np.arange(800), 3)])[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_margins_are_log_odds_and_what_the_task_measures(row: Row) -> None:
    queries, labels = row.load().query
    model = row.build()
    with torch.no_grad():
        found = row.measure(model(queries), labels)
        for number, measurement in enumerate(row.measurements):
            task = sf.tasks.Classification(measurement)
            total = task.compute_measurement((queries, labels), model)
            torch.testing.assert_close(found[number].sum(), total)
    p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    assert margin_and_loss(p.log(), torch.tensor([0]))[0].item() == pytest.approx(np.log(0.7 / 0.3))


def test_relabelling_moves_about_that_share_to_another_class_and_nothing_else() -> None:
    clean, noisy = data.digits(), data.digits(0.3)
    moved = (clean.stages[0][1] != noisy.stages[0][1]).numpy()
    assert np.array_equal(moved, noisy.wrong)
    assert 0.25 < moved.mean() < 0.35
    assert clean.stages[0][0].equal(noisy.stages[0][0])
    assert noisy.stages[0][1].max() <= 9


def test_idx_files_are_read_and_others_refused() -> None:
    content = b"\0\0\x08\x02" + b"\0\0\0\x02" + b"\0\0\0\x03" + bytes(range(6))
    assert data._idx(content).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(AssertionError, match="not an IDX file"):
        data._idx(b"\x1f\x8b" + content)


def test_images_are_turned_by_the_angle() -> None:
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 4:8, 10:13] = 255
    plain = data._turned(image, 0.0)
    torch.testing.assert_close(plain.view(28, 28), (image[0].float() / 255 - 0.1307) / 0.3081)
    quarter = data._turned(image, 90.0).view(28, 28)
    torch.testing.assert_close(quarter, plain.view(28, 28).rot90(), atol=1e-4, rtol=1e-4)


def test_two_stage_banks_vary_one_stage_and_keep_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS["rotated-mnist-two-stage"]
    few = [torch.zeros(6, 784), torch.zeros(6, dtype=torch.long)]
    made = data.Data(((few[0], few[1]), (few[0][:4], few[1][:4])), (few[0], few[1]), np.zeros(6, dtype=bool))
    monkeypatch.setattr(type(row), "load", lambda self: made)
    kept = {name: training.bank_of(row, name).subsets for name in training.bank_names(row)}
    assert list(kept) == ["bank-pretrain", "bank-finetune"]
    assert (kept["bank-pretrain"][:, :6].sum(1) == 3).all()
    assert kept["bank-pretrain"][:, 6:].all()
    assert kept["bank-finetune"][:, :6].all()
    assert (kept["bank-finetune"][:, 6:].sum(1) == 2).all()


def _small(monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    """Few retrainings, runs and methods."""
    plain = training.bank_of

    def few(row: Row, name: str) -> Bank:
        bank = plain(row, name)
        return replace(bank, subsets=bank.subsets[:30], repetitions=2)

    monkeypatch.setattr(training, "bank_of", few)
    for module in (training, scoring):
        monkeypatch.setattr(module, "RUNS", 2)
    best = [methods.Entry(f"damping {d}", "InfluenceFunction", {"damping": d}, "best") for d in (0.01, 0.1)]
    absent = methods.Entry("absent", "NoSuchMethod"), methods.Entry("later", "TracIn", {"no_such_option": 1})
    reference = next(entry for entry in methods.METHODS if entry.name == methods.REFERENCE)
    monkeypatch.setattr(scoring, "METHODS", (reference, *best, *absent, methods.Entry("TracIn", "TracIn")))
    training.fill(row)


@pytest.mark.slow
def test_a_row_is_scored_compared_and_written(
    row: Row, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _small(monkeypatch, row)
    content = json.loads(scoring.evaluate(row).read_text())
    part: dict[str, Any] = content["parts"][""]
    assert list(part["methods"]) == [methods.REFERENCE, "damping 0.01", "damping 0.1", "TracIn", table.EMPIRICAL]
    assert 0 < part["ceiling"]["reliability"] < part["ceiling"]["mean"] < 1
    figures = part["methods"]["TracIn"]
    assert len(figures["one"]["runs"]) == 2
    assert figures["one"]["mean"] == pytest.approx(np.mean(figures["one"]["runs"]), abs=1e-5)
    reference = part["methods"][methods.REFERENCE]["five"]["mean"]
    assert figures["over_reference"]["mean"] == pytest.approx(figures["five"]["mean"] - reference, abs=1e-5)
    assert part["methods"][table.EMPIRICAL]["fitted_to"] == {"subsets": 15, "repetitions": 2}

    monkeypatch.setattr(scoring, "_score", None)  # everything is in the cache now
    assert json.loads(scoring.evaluate(row, only="TracIn").read_text()) == content
    text = table.write_table().read_text()
    assert f"| TracIn | {figures['one']['mean']:.3f} [" in text
    assert f"\nTracIn: {figures['one']['mean']:.3f}.\n" in text
    assert f"Made {content['made']['date']} with segflow {sf.__version__}." in text
    best = max(part["methods"][f"damping {d}"]["one"]["mean"] for d in (0.01, 0.1))
    assert f"{best:.3f} [" in text
    assert "| best: " in text


def test_figures_of_other_retrainings_or_runs_are_not_kept_beside_new_ones(row: Row) -> None:
    part = scoring.Part(row, "", "margin", np.zeros((0, 800)), np.arange(6.0).reshape(3, 2, 1))
    kept = {"TracIn": {"one": {"mean": 0.5}}}
    found = {"runs": 2, "parts": {"": {"retrainings": scoring._digest(part.measured), "methods": kept}}}
    assert scoring._earlier(found, part, 2) == kept
    assert scoring._earlier(found, part, 1) == {}
    assert scoring._earlier(found, replace(part, measured=part.measured + 1), 2) == {}
    del found["parts"][""]["retrainings"]  # as in what is read back
    assert scoring._earlier(found, part, 2) == {}
    assert scoring._earlier({}, part, 2) == {}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_exploring_writes_a_result_of_each_variant_that_suits(
    row: Row, optimizer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(explore, "EXPLORED", tmp_path)
    monkeypatch.setattr(explore, "agreement", lambda _, variant: variant.scale / 8)
    row = replace(row, recipes=(replace(row.recipes[0], optimizer=optimizer),))
    content = json.loads(explore.explore(row).read_text())
    assert content["variants"]["lr_steps times 2"] == 0.25
    assert ("each checkpoint's own P" in content["variants"]) == (optimizer == "adamw")
    assert content["made"]["segflow"] == sf.__version__


def test_scores_of_another_run_or_of_other_code_are_made_anew(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    training.record_run(row, 0)
    part = scoring.Part(
        row, "", "margin", np.zeros((0, 800)), np.zeros(0)
    )  # the ground truth does not enter the scores
    entry = methods.Entry("TracIn", "TracIn")
    scored: list[int] = []
    inner = scoring._score
    monkeypatch.setattr(scoring, "_score", lambda *given: scored.append(1) or inner(*given))

    def times() -> int:
        scored.clear()
        assert scoring.scores_of(part, entry, 0) is not None
        return len(scored)

    assert (times(), times()) == (1, 0)
    monkeypatch.setattr(scoring, "code_digest", lambda: "other")
    assert scoring.scores_of(part, entry, 0, reuse=True) is not None
    assert len(scored) == 0
    assert (times(), times()) == (1, 0)
    file = training.run_folder(row, 0) / "trajectory.json"
    file.write_text(file.read_text() + "\n")
    assert (times(), times()) == (1, 0)


def test_every_entry_has_a_name_and_files_of_its_own() -> None:
    names = [entry.slug for entry in methods.METHODS]
    assert len(set(names)) == len(names)
    assert methods.REFERENCE in [entry.name for entry in methods.METHODS]
