"""The numbers of the fidelity benchmark, from scores and measurements that are made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf
from benchmarks.fidelity import committed, figures, methods, parts, scoring, table
from benchmarks.fidelity.blocks import KINDS, Block, shown_methods
from benchmarks.fidelity.rows import ROWS
from benchmarks.fidelity.verdicts import OTHERS, Verdict, verdict, verdict_table
from segflow.evaluation import linear_datamodeling_difference, linear_datamodeling_score, random_subsets

SLOPE = 0.25


def _scores(seed: int, truth: torch.Tensor, noise: float = 1.0) -> sf.Scores:
    Q, N = truth.shape
    drawn = torch.randn(Q, N, generator=torch.Generator().manual_seed(seed))
    labels = [tuple(map(str, range(count))) for count in (Q, N)]
    return sf.Scores((truth + noise * drawn).float(), labels[0], labels[1], (1,) * N)


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> parts.Part:
    """Retrainings of 40 subsets of 30 examples whose changes are a quarter of what `runs_of` predicts, and noise."""

    def truth_of(row: object, kind: str, stage: str, measurement: str) -> tuple[np.ndarray, np.ndarray]:
        kept, seed = {"bank": (0.5, 1), "tenth": (0.9, 2), "hundredth": (0.9, 3)}[kind]
        subsets = random_subsets(40, 30, kept, seed=seed)
        change = SLOPE * (~subsets).astype(float) @ _truth().numpy().T
        return subsets, change[:, None] + 0.1 * np.random.default_rng(seed).standard_normal((40, 3, 12))

    monkeypatch.setattr(parts, "truth_of", truth_of)
    row = replace(ROWS["concrete"], runs=3)
    return parts.Part(row, "", "loss", *truth_of(row, "bank", "", "loss"))


def _truth() -> torch.Tensor:
    return torch.randn(12, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def runs_of(noise: float, first: int = 10) -> list[sf.Scores]:
    return [_scores(first + seed, _truth(), noise) for seed in range(3)]


def test_one_run_is_the_mean_over_runs_and_all_runs_are_averaged_first(part: parts.Part) -> None:
    runs, measured = runs_of(1.0), part.measured.mean(1)
    found = figures.agreement(runs, part.subsets, part.measured)
    single = [linear_datamodeling_score(scores, part.subsets, measured) for scores in runs]
    mean = replace(runs[0], values=sum(scores.values for scores in runs) / 3)
    assert found["one"]["runs"] == [score.mean for score in single]
    for name in ("mean", "low", "high"):
        assert found["one"][name] == pytest.approx(np.mean([getattr(score, name) for score in single]))
        several = linear_datamodeling_score(mean, part.subsets, measured)
        assert found["all"][name] == pytest.approx(getattr(several, name), abs=1e-6)
    assert found["all"]["mean"] > found["one"]["mean"]


def test_differences_are_paired_run_by_run(part: parts.Part) -> None:
    runs, reference, measured = runs_of(0.5), runs_of(1.5, 20), part.measured.mean(1)
    found = figures.over_reference(part, runs, reference)
    pairs = [
        linear_datamodeling_difference(*pair, part.subsets, measured) for pair in zip(runs, reference, strict=True)
    ]
    for name in ("mean", "low", "high"):
        assert found["over_one"][name] == pytest.approx(np.mean([getattr(pair, name) for pair in pairs]))
    own, others = (figures.agreement(scores, part.subsets, part.measured) for scores in (runs, reference))
    for kind in KINDS:
        assert found[f"over_{kind}"]["mean"] == pytest.approx(own[kind]["mean"] - others[kind]["mean"])
    turned = figures.over_reference(part, runs, reference[::-1])
    assert turned["over_one"]["mean"] == pytest.approx(found["over_one"]["mean"])
    assert turned["over_one"]["low"] != found["over_one"]["low"]


def test_slopes_are_real_over_predicted_change_whatever_is_left_out(part: parts.Part) -> None:
    found = figures.slopes(part, runs_of(0.0))
    assert list(found) == ["halves", "tenth", "hundredth"]
    for slope in (own[kind] for own in found.values() for kind in KINDS):
        assert slope["low"] < SLOPE < slope["high"]
        assert slope["high"] - slope["low"] < 0.1
    assert len({own["one"]["mean"] for own in found.values()}) == 3  # each of its own retrainings
    noisy = figures.slopes(part, runs_of(1.0))
    assert noisy["halves"]["one"]["mean"] < noisy["halves"]["all"]["mean"] < SLOPE


def test_figures_follow_from_the_committed_file(part: parts.Part, tmp_path: Path) -> None:
    runs, path = runs_of(1.0), committed.committed_path(tmp_path, "concrete", "")
    committed.commit(path, part, runs)
    found = committed.figures_of(path)
    expected = figures.agreement(runs, part.subsets, part.measured)
    pairs = [(found["ceiling"], figures.ceiling(part.measured)), *((found[kind], expected[kind]) for kind in KINDS)]
    pairs += [(found["slope"][kind], figures.slopes(part, runs)["halves"][kind]) for kind in KINDS]
    for own, computed in pairs:
        for name in ("mean", "low", "high"):
            assert own[name] == pytest.approx(computed[name], abs=1e-5)
    assert found["retrainings"] == committed.digest(part.measured)
    arrays = committed.load_file(path)
    banks = {f"{what}.{name}" for what in parts.BANKS for name in ("kept", "measured")}
    assert set(arrays) == {"halves.predicted"} | banks
    np.testing.assert_array_equal(np.unpackbits(arrays["tenth.kept"], axis=1)[:, :30], part.left_out("tenth")[0])
    np.testing.assert_allclose(arrays["tenth.measured"], part.left_out("tenth")[1], rtol=1e-6)


def test_a_committed_file_that_is_too_large_is_refused(
    part: parts.Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committed, "LARGEST", 1000)
    with pytest.raises(AssertionError, match="expected less than 1,000"):
        committed.commit(tmp_path / "row.safetensors", part, runs_of(1.0))
    assert committed.committed_path(tmp_path, "row", "finetune").name == "row-finetune.safetensors"


# ---- what is read from result files ----


def _block(**over: dict[str, Any]) -> Block:
    """A block in which the reference is compared with others: {name: {kind: interval}}."""
    found = {"reference": "SOURCE", "methods": {"SOURCE": {"one": {"mean": 0.5}}, **over}}
    return Block("row", {"row": "row"}, found)


def _difference(mean: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high}


def test_verdicts_are_of_the_reference_minus_the_other_and_need_an_interval() -> None:
    over = {"over_one": _difference(-0.2, -0.3, -0.1), "over_all": _difference(0.1, -0.01, 0.2)}
    block = _block(TracIn=over, **{methods.EKFAC: {"over_one": _difference(0.1, 0.05, 0.2), "over_all": None}})
    assert verdict(block, "TracIn", "one") == Verdict(0.2, 0.1, 0.3)
    words = {
        (other, kind): found and found.word
        for other in OTHERS
        for kind in KINDS
        for found in [verdict(block, other, kind)]
    }
    assert [words["TracIn", kind] for kind in KINDS] == ["ahead", "level"]
    assert [words[methods.EKFAC, kind] for kind in KINDS] == ["behind", None]
    assert [words[methods.BEST, kind] for kind in KINDS] == [None, None]
    assert verdict(_block(TracIn={"over_one": _difference(0.1, None, None)}), "TracIn", "one") is None
    assert Verdict(0.0, 0.0, 0.1).word == "level"
    *_, line = verdict_table([block])
    assert line.startswith(
        "| row |  |  | behind, -0.100 [-0.200, -0.050] |  | ahead, +0.200 [+0.100, +0.300] | level, "
    )


def test_the_best_of_a_family_brings_its_own_differences() -> None:
    family = {
        f"damping {name}": {
            "best_of": "best",
            **{kind: {"mean": mean} for kind, mean in zip(KINDS, means, strict=True)},
        }
        for name, means in {"a": (0.3, 0.4), "b": (0.2, 0.5), "c": (0.1, 0.1)}.items()
    }
    for name, found in family.items():
        found |= {f"over_{kind}": {"mean": f"{name}, {kind}"} for kind in KINDS}
    best = shown_methods({"methods": family})["best"]
    assert [best[kind]["chosen"] for kind in KINDS] == ["a", "b"]
    assert [best[f"over_{kind}"]["mean"] for kind in KINDS] == ["damping a, one", "damping b, all"]
    assert table._note(best) == ": a, b"


def test_differences_from_a_reference_that_scored_otherwise_are_not_kept() -> None:
    kept = {"SOURCE": {"one": {"runs": [0.5, 0.25]}}, "TracIn": {"one": {"mean": 0.3}, "over_one": {"mean": -0.1}}}
    assert scoring._comparable(kept, [0.5, 0.25]) == kept
    for other in ([0.5, 0.2501], [0.5]):
        assert scoring._comparable(kept, other)["TracIn"] == {"one": {"mean": 0.3}}
    assert scoring._comparable({}, [0.5]) == {}


def test_the_source_of_a_row_that_was_read_back_is_the_default_of_its_day() -> None:
    found = {"reference": methods.EARLIER, "methods": {methods.EARLIER: {"one": {"mean": 0.5}}}}
    assert Block("row", {}, found).method(methods.REFERENCE) == {"one": {"mean": 0.5}}
    assert _block().method(methods.REFERENCE) == {"one": {"mean": 0.5}}


# ---- the methods ----


def test_the_reference_is_the_default_and_what_this_segflow_lacks_is_skipped() -> None:
    entries = {entry.name: entry for entry in methods.METHODS}
    assert entries[methods.REFERENCE].make() == sf.Source()
    assert set(methods.SIZED) <= set(entries)
    assert set(OTHERS) <= {entry.best_of or entry.name for entry in methods.METHODS}
    assert methods.made("Source", segments=3) == sf.Source(segments=3)
    assert methods.made("Source", no_such_option=1) is methods.made("NoSuchMethod") is None
    assert methods.made("Source", segments=-1) is None


def test_the_exactly_coupled_curvature_is_for_two_rows_and_diagonals_are_for_adamw() -> None:
    entries = {entry.name: entry for entry in methods.METHODS}
    suited = {name for name, row in ROWS.items() if entries[methods.EXACT].suits(row)}
    assert suited == {"digits-sgd-converged-clean", "digits-adamw-converged-clean"}
    diagonal = entries["SOURCE, diagonal preconditioner"]
    assert {name for name, row in ROWS.items() if diagonal.suits(row)} == {name for name in ROWS if "adamw" in name}
