"""Scores are labelled sums of their parts, rank both ways, and survive a file bit by bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import TensorDataset

import segflow as sf

from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors


@pytest.fixture
def scores() -> sf.Scores:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
    return sf.Scores(
        values.sum(0),
        ("Straße", 'say "hi"\n'),
        ("猫", "dog", "🦊"),
        (3, 1, 2),
        {"method": "Source", "segments": (10, 20), "terms": {"segment 1": [10]}, "damping": 0.1, "none": None},
        by_term={"segment 1": values[0], "segment 2": values[1]},
        by_layer={"fc.weird/名": values[0] + 1, "head": values[1] - 1},
    )


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory: pytest.TempPathFactory) -> sf.Analyzer:
    """Fitted, with a store that the tests of this file share."""
    folder, model = tmp_path_factory.mktemp("fitted"), mlp()
    trajectory = trajectory_of(folder / "run", perturbed_states(model, 4), 20)
    fitted = analyzer_of(model, trajectory, folder / "store", method=sf.Source(segments=2))
    fitted.fit(vectors(20))
    return fitted


# ---- parts ----


def test_kept_terms_and_layers_each_add_up_to_the_values(analyzer: sf.Analyzer) -> None:
    groups, query = sf.Groups.random(20, 3), vectors(3, seed=5)
    scores = analyzer.score(groups, vectors(20), query, keep=("term", "layer"))
    assert list(scores.by_term) == ["segment 1: steps 1-20", "segment 2: steps 21-40"]
    assert list(scores.by_layer) == ["0", "2", "4"]
    for parts in (scores.by_term, scores.by_layer):
        pieces = list(parts.values())
        assert all(piece.abs().max() > 0 for piece in pieces)
        assert not torch.allclose(pieces[0], pieces[1])
        torch.testing.assert_close(sum(pieces), scores.values, rtol=1e-12, atol=1e-15)
    assert scores.group_sizes == tuple(groups.sizes)
    assert scores.provenance["terms"] == {"segment 1: steps 1-20": [10, 20], "segment 2: steps 21-40": [30, 40]}
    assert scores.provenance["attributed_layers"] == ["0", "2", "4"]
    assert (scores.provenance["method"], scores.provenance["segments"]) == ("Source", 2)
    assert "additive" not in scores.provenance
    assert repr(scores) == "Scores(3 queries x 7 groups, Source)"


@pytest.mark.parametrize("keep", [(), ("term",), ["layer"], {"term", "layer"}, "layer"])
def test_keep_says_which_parts_are_kept(analyzer: sf.Analyzer, keep) -> None:
    scores = analyzer.score(sf.Groups.random(20, 9), vectors(20), vectors(2), keep=keep)
    assert bool(scores.by_term) == ("term" in keep)
    assert bool(scores.by_layer) == ("layer" in keep)


@pytest.mark.parametrize(("keep", "wrong"), [(("terms",), "terms"), ("layers", "layers")])
def test_an_unknown_part_to_keep_says_which_exist(analyzer: sf.Analyzer, keep, wrong: str) -> None:
    with pytest.raises(sf.ScoreError, match=rf"keep='{wrong}' is not known\. Choose one of: 'layer', 'run', 'term'"):
        analyzer.score(sf.Groups.random(20, 9), vectors(20), vectors(2), keep=keep)


@pytest.mark.parametrize("damping", ["Heuristic", "auto"])
def test_an_unknown_damping_says_which_exist(damping: str) -> None:
    with pytest.raises(sf.MethodError, match=rf"damping='{damping}' is not known\. Choose one of: 'heuristic'"):
        sf.InfluenceFunction(damping=damping)


def test_other_queries_with_the_same_row_and_column_sums_are_scored_anew(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2, bias=False).double()
    trajectory = trajectory_of(tmp_path / "run", [{"weight": torch.zeros(2, 2, dtype=torch.float64)}], 2)
    data = TensorDataset(torch.eye(2, dtype=torch.float64), torch.tensor([0, 0]))
    task = sf.tasks.Classification()
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", task, method=sf.TracIn())
    first, second = (
        analyzer.score(
            sf.Groups.singletons(2), data, TensorDataset(*(column[row : row + 1] for column in data.tensors))
        )
        for row in range(2)
    )
    torch.testing.assert_close(first.values, torch.tensor([[0.25, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(second.values, torch.tensor([[0.0, 0.25]], dtype=torch.float64))


# ---- reading ----


def test_total_sums_values_and_parts_over_the_queries(scores: sf.Scores) -> None:
    total = scores.total()
    assert total.query_labels == ("all queries",)
    assert total.group_labels == scores.group_labels
    torch.testing.assert_close(total.values, scores.values[:1] + scores.values[1:])
    torch.testing.assert_close(total.by_term["segment 2"], scores.by_term["segment 2"].sum(0, keepdim=True))
    torch.testing.assert_close(total.by_layer["head"], scores.by_layer["head"].sum(0, keepdim=True))


def _one_row(*values: float) -> sf.Scores:
    labels = tuple("abcdefgh"[: len(values)])
    return sf.Scores(torch.tensor([[0.0] * len(values), values]), ("p", "q"), labels, (1,) * len(values))


def test_top_ranks_in_both_directions_and_breaks_ties_by_place() -> None:
    scores = _one_row(1.0, -2.0, 3.0, 1.0, -2.0)
    assert [r.group for r in scores.top(1, k=4)] == [2, 0, 3, 1]
    assert [r.group for r in scores.top("q", k=4, largest=False)] == [1, 4, 0, 3]
    assert scores.top(-1, k=1) == [(2, "c", 3.0)]
    assert [r.group for r in scores.top(0, k=2)] == [0, 1], "query 0 is the default and another row"
    assert scores.top() == scores.top(0, k=10)
    assert len(scores.top(1, k=99)) == 5
    assert scores.top(1, k=0) == []


@pytest.mark.parametrize(
    ("query", "text"),
    [
        (2, "query=2: expected a whole number, -2 to 1. There are 2 queries"),
        (-3, "query=-3: expected a whole number"),
        ("r", r"no query 'r'; .*\['p', 'q'\]"),
    ],
)
def test_top_refuses_a_query_that_does_not_exist(query: int | str, text: str) -> None:
    with pytest.raises(sf.ScoreError, match=text):
        _one_row(1.0, 2.0).top(query)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"values": torch.zeros(3, 2)}, r"values: shape \(3, 2\), expected \(2, 3\) from the labels"),
        ({"by_term": {"t": torch.zeros(2, 2)}}, r"t: shape \(2, 2\), expected \(2, 3\)"),
        ({"by_layer": {"fc": torch.zeros(1, 3)}}, r"fc: shape \(1, 3\), expected \(2, 3\)"),
        ({"group_sizes": (1, 2)}, "2 group sizes for 3 groups"),
        ({"provenance": {"model": torch.nn.Identity()}}, "provenance: expected what JSON can hold"),
    ],
)
def test_parts_that_do_not_fit_are_refused(scores: sf.Scores, change: dict, text: str) -> None:
    with pytest.raises(sf.ScoreError, match=text):
        replace(scores, **change)


def test_to_pandas_has_the_labels_and_the_values(scores: sf.Scores) -> None:
    frame = scores.to_pandas()
    assert (frame.index.name, frame.columns.name) == ("query", "group")
    assert (tuple(frame.index), tuple(frame.columns)) == (scores.query_labels, scores.group_labels)
    np.testing.assert_array_equal(frame.to_numpy(), scores.numpy())
    assert frame.loc["Straße", "🦊"] == scores.values[0, 2].item()


def test_to_xarray_has_the_labels_the_values_the_sizes_and_the_parts(scores: sf.Scores) -> None:
    data = scores.to_xarray()
    assert float(data["values"].sel(query="Straße", group="猫")) == (scores.values[0, 0].item())
    assert data["group_size"].sel(group="🦊") == 2
    assert float(data["by_term"].sel(term="segment 2", query="Straße", group="dog")) == (
        scores.by_term["segment 2"][0, 1].item()
    )
    np.testing.assert_allclose(data["by_layer"].sum("layer"), data["values"])
    assert list(data["layer"].values) == list(scores.by_layer)
    assert json.loads(data.attrs["provenance"]) == scores.provenance
    bare = replace(scores, by_term={}, by_layer={}).to_xarray()
    assert set(bare.data_vars) == {"values", "group_size"}


# ---- files ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_file_gives_back_every_bit(scores: sf.Scores, tmp_path: Path, dtype: torch.dtype) -> None:
    def cast(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: part.to(dtype) for name, part in parts.items()}

    scores = replace(
        scores, values=scores.values.to(dtype), by_term=cast(scores.by_term), by_layer=cast(scores.by_layer)
    )
    path = tmp_path / "new folder" / "scores.safetensors"
    scores.save(path)
    loaded = sf.Scores.load(str(path))
    assert loaded.values.dtype == dtype
    assert loaded.values.equal(scores.values)
    for name in ("query_labels", "group_labels", "group_sizes", "provenance"):
        assert getattr(loaded, name) == getattr(scores, name), name
    for kind in ("by_term", "by_layer"):
        stored, given = getattr(loaded, kind), getattr(scores, kind)
        assert list(stored) == list(given)
        assert all(stored[name].equal(given[name]) for name in given)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing else is left behind"


def test_sizes_and_options_of_numpy_and_tuples_are_saved_as_plain_ones(tmp_path: Path) -> None:
    scores = sf.Scores(torch.zeros(1, 2), ("q",), ("a", "b"), tuple(np.array([3, 4])), {"segments": (1, 2)})
    scores.save(tmp_path / "s")
    assert sf.Scores.load(tmp_path / "s").group_sizes == scores.group_sizes == (3, 4)
    assert sf.Scores.load(tmp_path / "s").provenance == scores.provenance == {"segments": [1, 2]}


@pytest.mark.parametrize("path", [None, 3, b"s"])
def test_what_is_no_path_is_refused(scores: sf.Scores, path: Any) -> None:
    with pytest.raises(sf.ScoreError, match=f"path={path}: expected the path of a file"):
        scores.save(path)
    with pytest.raises(sf.ScoreError, match=f"path={path}: expected the path of a file"):
        sf.Scores.load(path)


def test_a_file_that_does_not_say_whether_scores_add_up_is_refused(scores: sf.Scores, tmp_path: Path) -> None:
    forged = copy.copy(scores)
    object.__setattr__(forged, "provenance", {"additive": "False"})
    forged.save(tmp_path / "s")
    with pytest.raises(sf.ScoreError, match=r"its labels make no sense .*additive='False'"):
        sf.Scores.load(tmp_path / "s")


def test_saving_over_a_file_replaces_it(scores: sf.Scores, tmp_path: Path) -> None:
    scores.save(tmp_path / "s")
    scores.total().save(tmp_path / "s")
    assert sf.Scores.load(tmp_path / "s").query_labels == ("all queries",)


def test_scores_of_an_analyzer_survive_a_file(analyzer: sf.Analyzer, tmp_path: Path) -> None:
    scores = analyzer.score(sf.Groups.random(20, 3), vectors(20), vectors(3, seed=5), keep=("term", "layer"))
    scores.save(tmp_path / "s")
    loaded = sf.Scores.load(tmp_path / "s")
    assert loaded.values.equal(scores.values)
    assert loaded.provenance == scores.provenance
    assert loaded.top("1") == scores.top(1)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _other_content(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


def _flip_a_value(path: Path) -> None:
    tensors = load_file(path)
    tensors["values"].view(torch.int64)[0, 0] ^= 1
    save_file(tensors, path)


def _flip_a_label(path: Path) -> None:
    content = path.read_bytes()
    assert content.count(b"dog") == 1
    path.write_bytes(content.replace(b"dog", b"dig"))


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (_truncate, "not a whole safetensors file"),
        (_empty, "not a whole safetensors file"),
        (_other_content, r"not a scores file \(tensors \['weight'\]\)\. Expected what Scores\.save wrote"),
        (_flip_a_value, "damaged, its content has another checksum"),
        (_flip_a_label, "damaged, its content has another checksum"),
        (_remove, "no such file"),
    ],
)
def test_a_harmed_file_is_refused_by_name(
    scores: sf.Scores, tmp_path: Path, harm: Callable[[Path], None], text: str
) -> None:
    scores.save(tmp_path / "mine.safetensors")
    harm(tmp_path / "mine.safetensors")
    with pytest.raises(sf.ScoreError, match=f"mine.safetensors: {text}"):
        sf.Scores.load(tmp_path / "mine.safetensors")


def test_every_flipped_byte_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    scores = sf.Scores(torch.tensor([[1.5, -2.0]]), ("q",), ("a", "b"), (1, 1), {"method": "TracIn"})
    scores.save(tmp_path / "s")
    content = (tmp_path / "s").read_bytes()
    for place in range(len(content)):
        (tmp_path / "s").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            loaded = sf.Scores.load(tmp_path / "s")
        except sf.ScoreError:
            continue
        assert loaded.values.equal(scores.values), place
        assert (loaded.group_labels, loaded.provenance) == (scores.group_labels, scores.provenance), place


def test_another_format_is_refused(scores: sf.Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("segflow.results.scores.FORMAT", 2)
        scores.save(tmp_path / "s")
    with pytest.raises(sf.ScoreError, match="scores format 2, this segflow reads format 1"):
        sf.Scores.load(tmp_path / "s")


@pytest.mark.parametrize("labels", [b"[]", b"{}", b"7", b"[" * 9999, b'{"format": 1, "query_labels": 3}', b"\xff"])
def test_labels_that_make_no_sense_are_refused(tmp_path: Path, labels: bytes) -> None:
    from segflow.data.fingerprints import digest
    from segflow.store.files import write_tensors

    text = torch.frombuffer(bytearray(labels), dtype=torch.uint8)
    tensors = {"values": torch.ones(1, 2), "labels": text}
    sha = torch.frombuffer(bytearray(digest(tensors).encode()), dtype=torch.uint8)
    write_tensors(tmp_path / "scores", tensors | {"sha256": sha})
    with pytest.raises(sf.ScoreError, match="its labels make no sense"):
        sf.Scores.load(tmp_path / "scores")


ONES = torch.ones(1, 2, dtype=torch.float64)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": ({"values": ONES * torch.nan}, "values: holds numbers that are not finite"),
    "infinite": ({"values": ONES * torch.inf}, "values: holds numbers that are not finite"),
    "complex": ({"values": ONES.to(torch.complex64)}, r"values: torch.complex64, expected a tensor of floating-point"),
    "whole": ({"values": ONES.long()}, "values: torch.int64, expected"),
    "0-d": ({"values": ONES[0, 0]}, r"values: shape \(\), expected \(1, 2\)"),
    "no tensor": ({"values": [[1.0, 2.0]]}, "values: list, expected a tensor"),
    "a spread of another shape": ({"spread": ONES[:, :1]}, "spread: shape"),
    "a negative spread": ({"spread": -ONES}, "spread: holds negative numbers"),
    "a negative size": ({"group_sizes": (1, -2)}, r"group_sizes\[1\]=-2: expected a whole number, at least 1"),
    "no example": ({"group_sizes": (1, 0)}, r"group_sizes\[1\]=0"),
    "a truth for a size": ({"group_sizes": (1, True)}, r"group_sizes\[1\]=True"),
    "half an example": ({"group_sizes": (1, 1.5)}, r"group_sizes\[1\]=1.5"),
    "too few sizes": ({"group_sizes": (1,)}, "1 group sizes for 2 groups"),
    "groups alike": ({"group_labels": ("a", "a")}, "group_labels: 'a' comes twice"),
    "queries alike": ({"query_labels": ("q", "q"), "values": torch.ones(2, 2)}, "query_labels: 'q' comes twice"),
    "a label that is no text": ({"group_labels": ("a", 1)}, "group_labels=.*expected a tuple of text"),
    "text for labels": ({"group_labels": "ab"}, "group_labels='ab': expected a tuple of text"),
    "terms that miss some": (
        {"by_term": {"t": ONES / 2}},
        "by_term: the sum of the parts is 0.5",
    ),
    "runs of another mean": ({"by_run": {"1": ONES, "2": 2 * ONES}}, "by_run: the mean of the runs is 1.5"),
    "additive is no truth": ({"provenance": {"additive": "no"}}, "provenance: additive='no': expected True or False"),
    "additive is a number": ({"provenance": {"additive": 0}}, "provenance: additive=0: expected True or False"),
    "infinite provenance": ({"provenance": {"damping": float("inf")}}, "provenance: expected what JSON can hold"),
}


@pytest.mark.parametrize("name", WRONG)
def test_scores_that_make_no_sense_are_refused(name: str) -> None:
    change, text = WRONG[name]
    fields = {"values": ONES, "query_labels": ("q",), "group_labels": ("a", "b"), "group_sizes": (1, 1)}
    assert sf.Scores(**fields).values.equal(ONES)
    with pytest.raises(sf.ScoreError, match=text):
        sf.Scores(**fields | change)


def test_parts_may_differ_from_the_values_by_rounding(scores: sf.Scores) -> None:
    off = {name: part * (1 + 1e-12) for name, part in scores.by_term.items()}
    assert replace(scores, by_term=off).values.equal(scores.values)


def test_a_query_is_found_by_its_label_or_by_its_place_also_where_labels_are_numbers() -> None:
    scores = sf.Scores(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), ("1", "0"), ("a", "b"), (1, 1))
    assert [scores.top(query, 1)[0].label for query in ("1", "0", 0, 1, -1, np.str_("0"))] == list("babaaa")
    with pytest.raises(sf.ScoreError, match="no query '2'"):
        scores.top("2")
    assert scores.to_pandas().loc["1"].tolist() == [1.0, 2.0]
    assert scores.to_xarray()["values"].sel(query="0", group="b").item() == 3.0


def test_scores_in_bfloat16_come_out_in_single_precision() -> None:
    values = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    scores = sf.Scores(values, ("q",), ("a", "b"), (1, 1), by_term={"t": values}, spread=values.abs())
    assert scores.numpy().dtype == np.float32
    assert scores.to_pandas().loc["q"].tolist() == [1.5, -2.0]
    assert scores.to_xarray()["by_term"].values.tolist() == [[[1.5, -2.0]]]
