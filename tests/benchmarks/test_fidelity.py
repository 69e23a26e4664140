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
from benchmarks.fidelity import blocks, data, explore, methods, parts, scoring, table, training
from benchmarks.fidelity.committed import committed_path, digest, figures_of
from benchmarks.fidelity.rows import ROWS, Row, margin_and_loss
from segflow.evaluation import Bank

DIGITS = "digits-sgd-early-relabelled"


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Row:
    """A digits row of one epoch, whose cache and results are of this test alone."""
    monkeypatch.setattr(training, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(scoring, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(blocks, "RESULTS", tmp_path / "results")
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


@pytest.fixture
def two_stages(monkeypatch: pytest.MonkeyPatch) -> Row:
    """A row of two stages, of 300 and of 200 examples."""
    row = ROWS["rotated-mnist-two-stage"]
    inputs, targets = torch.zeros(300, 784), torch.zeros(300, dtype=torch.long)
    stages = ((inputs, targets), (inputs[:200], targets[:200]))
    made = data.Data(stages, (inputs[:6], targets[:6]), np.zeros(300, dtype=bool))
    monkeypatch.setattr(type(row), "load", lambda self: made)
    return row


def test_two_stage_banks_vary_one_stage_and_keep_the_other(two_stages: Row) -> None:
    kept = {name: training.bank_of(two_stages, name).subsets for name in training.bank_names(two_stages)}
    kinds = ("bank", "tenth", "hundredth")
    assert list(kept) == [f"{kind}-{stage}" for kind in kinds for stage in ("pretrain", "finetune")]
    for kind, share in zip(kinds, (0.5, 0.1, 0.01), strict=True):
        assert ((~kept[f"{kind}-pretrain"][:, :300]).sum(1) == 300 * share).all()
        assert kept[f"{kind}-pretrain"][:, 300:].all()
        assert kept[f"{kind}-finetune"][:, :300].all()
        assert ((~kept[f"{kind}-finetune"][:, 300:]).sum(1) == 200 * share).all()


def test_the_parts_of_two_stages_are_each_of_its_own_banks_and_examples(
    two_stages: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def truth(row: Row, bank: str, measurement: str) -> tuple[np.ndarray, np.ndarray]:
        asked.append(bank)
        return training.bank_of(row, bank).subsets, np.full((100, 5, 6), len(asked))

    monkeypatch.setattr(parts, "ground_truth", truth)
    first, second = parts.parts_of(two_stages, "margin")
    assert asked == ["bank-pretrain", "bank-finetune"]  # banks of small groups are read when they are asked for
    assert (first.stage, second.stage) == ("pretrain", "finetune")
    np.testing.assert_array_equal(first.subsets, training.bank_of(two_stages, "bank-pretrain").subsets[:, :300])
    for what, bank in (("halves", "bank-finetune"), ("tenth", "tenth-finetune"), ("hundredth", "hundredth-finetune")):
        subsets, measured = second.left_out(what)
        np.testing.assert_array_equal(subsets, training.bank_of(two_stages, bank).subsets[:, 300:])
        assert (measured == asked.index(bank) + 1).all()


def _small(monkeypatch: pytest.MonkeyPatch, row: Row) -> Row:
    """The row with two runs, few retrainings and few methods."""
    plain = training.bank_of

    def few(row: Row, name: str) -> Bank:
        bank = plain(row, name)
        return replace(bank, subsets=bank.subsets[: 60 if name.startswith("bank") else 20], repetitions=2)

    monkeypatch.setattr(training, "bank_of", few)
    row = replace(row, runs=2)
    best = [methods.Entry(f"damping {d}", "InfluenceFunction", {"damping": d}, "best") for d in (0.01, 0.1)]
    absent = methods.Entry("absent", "NoSuchMethod"), methods.Entry("later", "TracIn", {"no_such_option": 1})
    reference = next(entry for entry in methods.METHODS if entry.name == methods.REFERENCE)
    monkeypatch.setattr(scoring, "METHODS", (reference, *best, *absent, methods.Entry("TracIn", "TracIn")))
    training.fill(row)
    return row


@pytest.mark.slow
def test_a_row_is_scored_compared_and_written(
    row: Row, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = _small(monkeypatch, row)
    content = json.loads(scoring.evaluate(row).read_text())
    part: dict[str, Any] = content["parts"][""]
    assert list(part["methods"]) == [methods.REFERENCE, "damping 0.01", "damping 0.1", "TracIn", scoring.EMPIRICAL]
    assert 0 < part["ceiling"]["reliability"] < part["ceiling"]["mean"] < 1
    figures = part["methods"]["TracIn"]
    assert len(figures["one"]["runs"]) == 2
    assert figures["one"]["mean"] == pytest.approx(np.mean(figures["one"]["runs"]), abs=1e-5)
    reference = part["methods"][methods.REFERENCE]
    for kind in blocks.KINDS:
        difference = figures[kind]["mean"] - reference[kind]["mean"]
        assert figures[f"over_{kind}"]["mean"] == pytest.approx(difference, abs=1e-5)
        assert figures[f"over_{kind}"]["low"] < difference < figures[f"over_{kind}"]["high"]
    assert part["methods"][scoring.EMPIRICAL]["fitted_to"] == {"subsets": 30, "repetitions": 2}
    assert list(reference["slopes"]) == ["halves", "tenth", "hundredth"]
    assert part["left_out"]["tenth"] == {"subsets": 20, "repetitions": 2}
    follow(committed_path(scoring.RESULTS, row.name, ""), part)

    monkeypatch.setattr(scoring, "_score", None)  # everything is in the cache now
    assert json.loads(scoring.evaluate(row, only="TracIn").read_text()) == content
    text = table.write_table().read_text()
    assert "| method | one run | 2 runs | over SOURCE, one run | over SOURCE, 2 runs |" in text
    assert "2 retrainings of each half, 2 of each of 20 subsets without a tenth, 2 of each" in text
    assert f"| {row.name} | SOURCE | {reference['slopes']['halves']['one']['mean']:.3f} [" in text
    assert f"| TracIn | {figures['one']['mean']:.3f} [" in text
    assert f"\nTracIn: {figures['one']['mean']:.3f}.\n" in text
    assert f"Made {content['made']['date']} with segflow {sf.__version__}." in text
    best = max(part["methods"][f"damping {d}"]["one"]["mean"] for d in (0.01, 0.1))
    assert f"{best:.3f} [" in text
    assert "| best: " in text


@pytest.mark.slow
def test_a_row_of_two_stages_is_scored_part_by_part(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data.digits()
    inputs, targets = whole.stages[0]
    halved = replace(whole, stages=((inputs[:500], targets[:500]), (inputs[500:], targets[500:])))
    monkeypatch.setitem(data.LOADERS, "two digits", lambda: halved)
    row = replace(row, data="two digits", noisy=0.0, recipes=row.recipes * 2)
    content = json.loads(scoring.evaluate(_small(monkeypatch, row)).read_text())
    assert list(content["parts"]) == ["pretrain", "finetune"]
    for stage, part in content["parts"].items():
        assert list(part["methods"]) == [methods.REFERENCE, "damping 0.01", "damping 0.1", "TracIn"]
        assert list(part["methods"][methods.REFERENCE]["slopes"]) == ["halves", "tenth", "hundredth"]
        follow(committed_path(scoring.RESULTS, row.name, stage), part)
    assert len({part["retrainings"] for part in content["parts"].values()}) == 2
    table.NOTES.write_text(f"{{{{{row.name}, pretrain data | SOURCE | tenth}}}}")
    text = table.write_table().read_text()
    assert all(f"| {row.name}, {stage} data | SOURCE |" in text for stage in content["parts"])


def follow(path: Path, part: dict[str, Any]) -> None:
    """The figures of a part follow from the file that is committed with it, to the digits that are printed."""
    found, reference = figures_of(path), part["methods"][part["reference"]]
    assert found["retrainings"] == part["retrainings"]
    pairs = [(found["ceiling"], part["ceiling"]), *((found[kind], reference[kind]) for kind in blocks.KINDS)]
    pairs += [(found["slope"][kind], reference["slopes"]["halves"][kind]) for kind in blocks.KINDS]
    for own, written in pairs:
        for name in ("mean", "low", "high"):
            assert own[name] == pytest.approx(written[name], abs=5e-5)


COMMITTED = [
    pytest.param(path, part, id=path.stem)
    for row in blocks.results()
    for stage, part in row["parts"].items()
    if (path := committed_path(scoring.RESULTS, row["row"], stage)).exists()
]


@pytest.mark.parametrize(("path", "part"), COMMITTED)
def test_the_figures_of_a_row_follow_from_the_measurements_beside_it(path: Path, part: dict[str, Any]) -> None:
    follow(path, part)


def test_figures_of_other_retrainings_or_runs_are_not_kept_beside_new_ones(row: Row) -> None:
    part = scoring.Part(row, "", "margin", np.zeros((0, 800)), np.arange(6.0).reshape(3, 2, 1))
    kept = {"TracIn": {"one": {"mean": 0.5}}}
    found = {"runs": 2, "parts": {"": {"retrainings": digest(part.measured), "methods": kept}}}
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
    monkeypatch.setattr(explore, "agreement", lambda _, variant: getattr(variant, "source", sf.Source(1)).segments / 8)
    row = replace(row, recipes=(replace(row.recipes[0], optimizer=optimizer),))
    content = json.loads(explore.explore(row).read_text())
    assert content["variants"]["3 segments"] == 0.375
    assert ("each checkpoint's own P" in content["variants"]) == (optimizer == "adamw")
    assert content["made"]["segflow"] == sf.__version__


def test_variants_exchange_the_parts_that_they_name(row: Row) -> None:
    row = replace(row, recipes=(replace(row.recipes[0], optimizer="adamw"),))
    training.record_run(row, 0)
    trajectory = training.load_run(row, 0)[1]
    plans = {name: variant.plan(trajectory) for name, variant in explore.VARIANTS.items() if variant.suits(row)}

    def curvatures(name: str) -> set[Any]:
        return {op.curvature for term in plans[name] for op in term.operators if hasattr(op, "curvature")} - {None}

    def trained_at(name: str) -> list[int]:
        return [len(term.train) for term in plans[name]]

    one, three = "1 segment (the default)", "3 segments"
    assert plans[one] == sf.Source().plan(trajectory)
    assert plans[three] == sf.Source(segments=3).plan(trajectory)
    assert (trained_at(one), trained_at(three)) == ([6], [2, 2, 2])
    assert trained_at(f"{three}, each with the gradients of the whole run") == [6, 6, 6]
    assert curvatures(f"{three}, each with the gradients of the whole run") == curvatures(three)
    assert trained_at(f"{three}, each with the curvature of the whole run") == [2, 2, 2]
    assert curvatures(f"{three}, each with the curvature of the whole run") == curvatures(one) != curvatures(three)
    assert trained_at("1 segment, last checkpoint's gradients") == [1]
    [influence], [along], [coupled] = (
        plans[f"influence function{part}"] for part in (" (EK-FAC)", ", queries along the run", ", layers coupled")
    )
    assert influence == sf.InfluenceFunction().plan(trajectory)[0]
    assert replace(along, query=influence.query, query_weights=influence.query_weights) == influence != along
    assert [op.trace_shares.curvature for op in coupled.operators] == [op.curvature for op in influence.operators]
    assert [len(curvature.points) for curvature in curvatures("1 segment, last checkpoint's curvature")] == [1]
    assert trained_at("each checkpoint's own P") == [1] * 6
    assert plans["1 segment, checkpoints weigh the same"] != plans[one]


def test_only_rows_for_tuning_are_explored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["explore", "concrete"])
    with pytest.raises(SystemExit):
        explore.main()


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
