"""The benchmarks of groups: every step on a tiny synthetic setting, without downloads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import segflow as sf
from benchmarks.fidelity.rows import Recipe, network
from benchmarks.groups import data, detect, million, models, retrain, runs, settings, table, timing
from benchmarks.groups.settings import Setting
from segflow.evaluation import BatchedTraining, Table, detection_auc


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Setting]:
    """Two classes in six dimensions, whose cache and results are of this test alone."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(120, 6, generator=generator)
    labels = (inputs[:, 0] + 0.3 * torch.randn(120, generator=generator) > 0).long()
    made = data.Data(inputs[:90], labels[:90], inputs[90:], labels[90:], np.zeros(90, dtype=bool))
    monkeypatch.setitem(settings.LOADERS, "toy", lambda: made)
    monkeypatch.setitem(settings.CLASSES, "toy", 2)
    monkeypatch.setattr(runs, "CACHE", tmp_path / "cache")
    for module in (detect, table, million):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(retrain, "ONE_SIZE", 16)
    monkeypatch.setattr(table, "DOCUMENT", tmp_path / "GROUPS.md")
    monkeypatch.setattr(table, "NOTES", tmp_path / "notes.md")
    (tmp_path / "notes.md").write_text("No notes.\n")
    toy = Setting(
        "toy", "toy", "MLP", partial(network, (6, 5, 2)), Recipe("sgd", 0.05, 1e-3, 16, 2), retrained=True,
        together=8, runs=2, repetitions=2, dimension=8, rounds=1,
    )  # fmt: skip
    monkeypatch.setattr(table, "SETTINGS", {"toy": toy})
    yield toy
    settings._load.cache_clear()


def test_wrong_labels_are_about_a_fifth_and_flipped_of_two_classes(setting: Setting) -> None:
    clean, noisy = setting.load("clean"), setting.load("noisy")
    assert 0.1 < noisy.wrong.mean() < 0.3
    assert not clean.wrong.any()
    flipped = torch.where(torch.from_numpy(noisy.wrong), 1 - clean.labels, clean.labels)
    assert noisy.labels.equal(flipped)
    assert clean.query_labels.equal(noisy.query_labels)
    assert setting.sizes == (1, 4, 16)
    assert len(setting.tiny().load("noisy").query_labels) == 20


@pytest.mark.slow
def test_what_examples_get_from_summed_singles_is_what_real_group_scores_give(setting: Setting) -> None:
    groups = runs.groups_of(setting, "noisy", 0, "gradient", 4)
    given = setting.load("noisy")
    methods = {name: method for name, method in setting.methods().items() if name != "LiSSA"}  # it diverges here
    for name, method in methods.items():
        found = runs.shared_out(runs.singles_of(setting, "noisy", 0, name), groups)
        analyzer = runs.analyzer_of(setting, "noisy", 0, method)
        query = sf.properties.MeanMeasurement(given.query, setting.task())
        real = analyzer.score(groups, given.train, query).by_example(groups)
        torch.testing.assert_close(found.values, real.values, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_detection_writes_each_methods_area_by_grouping_and_size(setting: Setting) -> None:
    content = json.loads(detect.detect(setting).read_text())
    assert set(content["figures"]) == set(setting.methods())
    wrong = setting.load("noisy").wrong
    share = wrong.mean()
    for grouping, size in (("random", 1), ("raw", 4), ("representation", 16), ("gradient", 4)):
        cell = content["figures"]["TracIn"][grouping][str(size)]
        for seed, value in enumerate(cell["values"]):
            groups = runs.groups_of(setting, "noisy", seed, grouping, size)
            scores = runs.shared_out(runs.singles_of(setting, "noisy", seed, "TracIn"), groups)
            roc = detection_auc(scores.values[0], wrong)
            assert value == pytest.approx(share / 2 + (1 - share) * roc, abs=1e-6)  # the curve's area, of the ROC's
        assert cell["mean"] == pytest.approx(np.mean(cell["values"]))
        assert cell["low"] <= cell["mean"] <= cell["high"]
    assert content["perfect"] == pytest.approx(1 - share / 2, abs=0.01)


def test_groupings_and_scores_come_from_the_cache_and_another_recipe_trains_anew(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = runs.singles_of(setting, "noisy", 0, "TracIn")
    groups = runs.groups_of(setting, "noisy", 0, "raw", 4)
    with monkeypatch.context() as patch:
        patch.setattr(sf, "Analyzer", None)
        assert runs.singles_of(setting, "noisy", 0, "TracIn").values.equal(scores.values)
        again = runs.groups_of(setting, "noisy", 0, "raw", 4)
        assert np.array_equal(again.membership(), groups.membership())
        monkeypatch.setattr(runs, "code_digest", lambda: "other")
        assert runs.singles_of(setting, "noisy", 0, "TracIn", reuse=True).values.equal(scores.values)
        with pytest.raises(TypeError):
            runs.singles_of(setting, "noisy", 0, "TracIn")
    [kept] = (runs.folder_of(setting) / "groupings").glob("noisy-0-*")
    longer = replace(setting, recipe=replace(setting.recipe, epochs=3))
    assert not runs.singles_of(longer, "noisy", 0, "TracIn").values.equal(scores.values)
    assert not kept.exists()


def test_seeds_and_variants_are_runs_of_their_own(setting: Setting) -> None:
    found = [runs.singles_of(setting, *which, "TracIn").values for which in (("noisy", 0), ("noisy", 1), ("clean", 0))]
    assert not found[0].equal(found[1])
    assert not found[0].equal(found[2])
    grouped = [runs.groups_of(setting, "noisy", seed, "random", 4).membership() for seed in (0, 1)]
    assert not np.array_equal(*grouped)


@pytest.mark.slow
def test_removal_and_pruning_are_retrained_once_and_every_series_is_in_the_table(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = retrain.retrain(setting)
    assert [path.stem for path in paths] == ["toy-removal", "toy-pruning", "toy-pruning-accuracy"]
    tables = [runs.folder_of(setting) / f"{step}.json" for step in ("removal", "pruning", "pruning-accuracy")]
    removal, pruning, accuracy = map(Table.load, tables)
    expected = ["single examples", "random, 4", "random, 16", "raw k-means, 16", "representation k-means, 16"]
    expected += ["gradient k-means, 4", "gradient k-means, 16", "weight gradient k-means, 16"]
    names = {row.series for row in removal.rows}
    assert names == {f"{method}, {title}" for method in ("SOURCE", "TracIn") for title in expected} | {"random"}
    assert {row.x for row in removal.rows} == {0.01, 0.05, 0.1, 0.2}
    assert {row.x for row in pruning.rows} == {0.25, 0.5, 0.75}
    assert len(removal.value("SOURCE, random, 4", 0.1).values) == setting.runs
    assert all(0 <= row.mean <= 1 for row in accuracy.rows)
    monkeypatch.setattr(BatchedTraining, "run", lambda *_: pytest.fail("trained again"))
    results = [path.read_text() for path in paths]
    assert [path.read_text() for path in retrain.retrain(setting)] == results
    assert list(map(Table.load, tables)) == [removal, pruning, accuracy]
    text, row = table.write_table().read_text(), removal.value("SOURCE, gradient k-means, 4", 0.2)
    assert "| SOURCE | gradient k-means, 4 |" in text
    assert table.figure("toy-removal", "SOURCE, gradient k-means, 4", "20%") == f"{row.mean:.3f}"
    assert f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}] |" in text
    assert "nothing removed: " in text
    assert "20% removed" in text


def test_the_retrained_models_are_trained_as_the_recorded_runs_are(setting: Setting) -> None:
    runs.record_run(setting, "clean", 7)
    model, trajectory = runs.load_run(setting, "clean", 7)
    trajectory.load_into(model, len(trajectory) - 1)
    given = setting.load("clean")
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(given.query_inputs), given.query_labels, reduction="none")
    found = retrain.training_of(setting, "clean").run([(np.arange(90), 7)])[0, retrain.LOSS]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_stage_is_timed_once_and_the_tables_show_what_was_found(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "ONE_SIZE", 16)
    times = json.loads(timing.measure(setting).read_text())["figures"]
    expected = {"factors, SOURCE", "features, gradient", "clustering, raw, 16", "scoring, TracIn, random, 1"}
    expected |= {"scoring, SOURCE, gradient, 16", "scoring, SOURCE, random, 4"}
    assert expected <= set(times)
    assert "scoring, SOURCE, gradient, 4" not in times
    with monkeypatch.context() as patch:
        patch.setattr(timing, "interleaved", None)
        assert json.loads(timing.measure(setting).read_text())["figures"] == times
    content = json.loads(detect.detect(setting).read_text())
    text = table.write_table().read_text()
    cell = content["figures"]["SOURCE"]["gradient"]["4"]
    assert "| SOURCE | gradient k-means |" in text
    assert f"{cell['mean']:.3f} ± {(cell['high'] - cell['low']) / 2:.3f}" in text
    assert f"| factors, SOURCE | {times['factors, SOURCE']['seconds']:.2f} (" in text
    assert "Pruning" not in text.split("## What it takes")[1]


def test_the_encoder_layer_is_that_of_torch_and_ignores_padding() -> None:
    torch.manual_seed(0)
    head = models.EncoderHead(width=12, heads=3).double().eval()
    exact = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "gelu", 1e-12, batch_first=True).double().eval()
    [layer] = head.layers
    with torch.no_grad():
        exact.self_attn.in_proj_weight.copy_(torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]))
        exact.self_attn.in_proj_bias.copy_(torch.cat([layer.query.bias, layer.key.bias, layer.value.bias]))
        pairs = {exact.self_attn.out_proj: layer.output, exact.norm1: layer.output_norm, exact.norm2: layer.down_norm}
        for theirs, own in (pairs | {exact.linear1: layer.up, exact.linear2: layer.down}).items():
            theirs.load_state_dict(own.state_dict())
        states = torch.randn(2, 7, 12, dtype=torch.float64)
        states[0, 4:] = 0
        padding = ~models.padding_mask(states)
        found, expected = head.encode(states), exact(states, src_key_padding_mask=padding)
        torch.testing.assert_close(found[~padding], expected[~padding])
        torch.testing.assert_close(head(states)[:1], head(states[:1, :4]))
    assert padding.sum() == 3
    assert settings.Padded().get_attention_mask((states, None)).equal(~padding)


def test_the_resnet_halves_twice_and_mixes_no_examples() -> None:
    torch.manual_seed(0)
    model = models.resnet((8, 16, 24), blocks=2)
    shapes: list[tuple[int, ...]] = []
    for block in [module for module in model if isinstance(module, models.Block)]:
        block.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape[1:])))
    images = torch.randn(3, 3, 32, 32)
    logits = model(images)
    assert logits.shape == (3, 10)
    assert shapes == [(8, 32, 32)] * 2 + [(16, 16, 16)] * 2 + [(24, 8, 8)] * 2
    torch.testing.assert_close(model(images[:1]), logits[:1])


def test_pictures_of_rows_become_images() -> None:
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(images.transpose(0, 2, 3, 1).reshape(4, 1024, 3)).save(file, "png")
    assert np.array_equal(data._png_rows(file.getvalue()).numpy(), images)
    small = BytesIO()
    Image.fromarray(np.zeros((4, 10, 3), dtype=np.uint8)).save(small, "png")
    with pytest.raises(AssertionError, match="rows of 1024"):
        data._png_rows(small.getvalue())


def test_the_million_examples_run_at_small_size_and_are_drawn() -> None:
    found = [million.run(size, step) for size in (200, 400) for step in ("data", "scoring", "k-means")]
    assert all(row["seconds"] >= 0 and 0 < row["GiB"] < 64 for row in found)
    left, right = million.draw(found).axes
    assert len(left.lines) == 4
    assert len(right.lines) == 4
    assert right.lines[0].get_xdata().tolist() == [200 / 1e6, 400 / 1e6]
