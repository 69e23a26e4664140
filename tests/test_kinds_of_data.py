"""Data, labels and names of kinds that users have: each works as it reads, or is refused by a message that says why."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import segflow as sf
from segflow.data.batches import dataset_length

from .support.helpers import vectors
from .test_numbers import DATA, LABELS, MODEL, N, _analyzer, told


def test_a_plain_string_in_keep_is_one_name(tmp_path: Path) -> None:
    analyzer, groups = _analyzer(tmp_path, method=sf.methods.GradientDot()), sf.Groups.by(LABELS)
    scores = analyzer.score(groups, vectors(N), vectors(1), keep="layer", query_labels="the query")
    assert scores.by_layer and not scores.by_term and scores.query_labels == ("the query",)
    with pytest.raises(sf.ScoreError, match=r"keep=3: expected a name or a sequence of names"):
        analyzer.score(groups, vectors(N), vectors(1), keep=3)  # type: ignore[arg-type]


def test_query_labels_are_text_whatever_the_kind_of_number(tmp_path: Path) -> None:
    analyzer = _analyzer(tmp_path, method=sf.methods.GradientDot())
    for labels in ([7, 8], np.array([7, 8]), torch.tensor([7, 8])):
        scores = analyzer.score(sf.Groups.by(LABELS), vectors(N), vectors(2), query_labels=labels)  # type: ignore[arg-type]
        assert scores.query_labels == ("7", "8")


def test_a_mapping_of_datasets_is_no_dataset(tmp_path: Path) -> None:
    analyzer = _analyzer(tmp_path)
    text = r"the training dataset is a dict with the keys \['train', 'test'\]. Expected one dataset"
    with pytest.raises(sf.TaskError, match=text):
        analyzer.fit({"train": vectors(N), "test": vectors(2)})
    analyzer.fit(vectors(N))
    with pytest.raises(sf.TaskError, match=r"the query dataset is a dict with the keys \['test'\]"):
        analyzer.score(sf.Groups.by(LABELS), vectors(N), {"test": vectors(2)})


X, Y = vectors(N).tensors
NO_DATASETS: dict[str, tuple[Any, str]] = {
    "loader": (DataLoader(vectors(N)), r"a DataLoader\. Give loader\.dataset, and .*collate_fn=loader\.collate_fn"),
    "one example": (
        (X[0], torch.tensor(1)),
        r"a tuple of 2 tensors, which looks like one example\. Give a list of examples, \[example\]",
    ),
    "pair": ((X, Y), r"a tuple of 2 tensors, a column each.*TensorDataset\(\*columns\)"),
    "alike": ((X, X), r"a tuple of 2 tensors"),
    "arrays": ((X.numpy(), Y.numpy()), r"a tuple of 2 tensors"),
    "list": ([X, Y], r"a list of 2 tensors, a column each"),
    "columns": ({"inputs": X, "labels": Y}, r"a dict with the keys .*a list of examples, each a mapping of one"),
    "splits": (
        {"train": vectors(N), "test": vectors(N)},
        r"a dict with the keys .*Expected one .*one of the mapping's",
    ),
    "text": ("run", r"a str, 'run'\. Expected a map-style dataset"),
    "number": (3, r"an int, 3\. Expected a map-style dataset"),
}


@pytest.mark.parametrize("role", ["training", "query"])
@pytest.mark.parametrize("kind", NO_DATASETS)
def test_what_is_no_dataset_is_refused_with_what_to_give(kind: str, role: str, tmp_path: Path) -> None:
    given, words = NO_DATASETS[kind]
    analyzer = _analyzer(tmp_path, method=sf.methods.GradientDot())
    train, query = (given, vectors(2)) if role == "training" else (vectors(N), given)
    with pytest.raises(sf.TaskError, match=f"the {role} dataset is {words}"):
        analyzer.score(sf.Groups.by(LABELS), train, query)


def test_a_list_of_tensors_of_one_shape_is_a_dataset() -> None:
    assert dataset_length([X[0], X[1]], "query") == 2 and dataset_length([X[0], X[0, :3]], "query") == 2
    assert dataset_length(X, "query") == len(X)


@pytest.mark.parametrize("path", ["run", Path("run")], ids=["text", "Path"])
def test_a_path_is_no_trajectory_and_the_error_says_how_to_load_it(path: Any, tmp_path: Path) -> None:
    with pytest.raises(sf.TrajectoryError, match=r"found a path\. Give segflow\.Trajectory\.load\('run'\)"):
        sf.Analyzer(MODEL, sf.tasks.Classification(), path, store=tmp_path)


def test_a_dict_of_numbered_examples_is_a_dataset(tmp_path: Path) -> None:
    examples = dict(enumerate(vectors(N)))
    plain, numbered = (_analyzer(tmp_path / name) for name in ("plain", "numbered"))
    plain.fit(vectors(N))
    numbered.fit(examples)
    groups = sf.Groups.by(LABELS)
    expected = plain.score(groups, vectors(N), vectors(2))
    assert numbered.score(groups, examples, vectors(2)).values.equal(expected.values)


@pytest.mark.parametrize("task", [sf.tasks.Classification(), sf.tasks.Regression()], ids=["classes", "numbers"])
def test_examples_of_lists_of_numbers_are_named(task: sf.Task) -> None:
    rows = [{"inputs": x.tolist(), "labels": int(label)} for x, label in DATA]
    batch = torch.utils.data.default_collate(rows)
    with pytest.raises(
        sf.TaskError, match=r"inputs are a list of 4 tensors.*with_format\(\"torch\"\).*or a collate_fn"
    ):
        task.compute_train_loss(batch, MODEL)
    with pytest.raises(sf.TaskError, match=r"inputs are a list of 4 tensors"):
        sf.properties.SoftAccuracy(rows).evaluate(MODEL)


def test_a_model_that_takes_a_list_is_given_one() -> None:
    class Joined(nn.Linear):
        def forward(self, columns: list[torch.Tensor]) -> torch.Tensor:
            return super().forward(torch.stack(columns, 1).float())

    rows = [(x.tolist(), int(label)) for x, label in DATA]
    batch = torch.utils.data.default_collate(rows)
    assert sf.tasks.Classification().compute_train_loss(batch, Joined(4, 3)).shape == ()


@pytest.mark.parametrize("given", [np.array(["loss"]), 3, None, ["loss"]], ids=repr)
def test_a_choice_that_is_no_text_is_refused(given: Any) -> None:
    with pytest.raises(sf.TaskError, match=r"measurement=.* is not known. Choose one of: 'log_probability', 'loss'"):
        sf.tasks.Classification(given)


def test_a_mapping_of_lists_names_its_groups() -> None:
    lists = {"web": np.array([0, 2]), 7: torch.tensor([1])}
    assert told(sf.Groups.from_lists(lists, 3)) == told(sf.Groups.from_lists([[0, 2], [1]], 3, labels=["web", 7]))
    assert sf.Groups.from_lists(lists, 3, labels=["a", "b"]).labels == ("a", "b")
    for wrong in ("web", 3):
        with pytest.raises(sf.GroupError, match=r"lists=.*: expected a list of example indices for each group"):
            sf.Groups.from_lists(wrong, 3)  # type: ignore[arg-type]


def test_a_mapping_of_columns_counts_as_its_columns() -> None:
    source, year = ["web", "book", "web"], [1, 2, 2]
    assert told(sf.Groups.by({"source": source, "year": year})) == told(sf.Groups.by(source, year))
    assert sf.GroupTree.by({"source": source, "year": year}).finest.labels == sf.Groups.by(source, year).labels
    for wrong in ("web", {"source": "web"}):
        with pytest.raises(sf.GroupError, match=r"labels='web': expected a list, with one label for each example"):
            sf.Groups.by(wrong)


class TestFrames:
    """What pandas holds, as columns of labels."""

    def test_a_frame_counts_as_its_columns(self) -> None:
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame({"source": ["web", "book", "web"], "kind": pandas.Categorical(["x", "y", "y"])})
        assert told(sf.Groups.by(frame)) == told(sf.Groups.by(["web", "book", "web"], ["x", "y", "y"]))
        assert told(sf.Groups.by(frame["kind"])) == told(sf.Groups.by(["x", "y", "y"]))
        indices = frame.groupby("kind", observed=True).indices
        assert told(sf.Groups.from_lists(indices, 3)) == told(sf.Groups.by(["x", "y", "y"]))

    @pytest.mark.parametrize("values", [["a", "b", None, "c", None], [1.0, 2.0, math.nan] * 3], ids=["text", "numbers"])
    def test_a_missing_label_is_named_with_its_example(self, values: list[Any]) -> None:
        pandas = pytest.importorskip("pandas")
        column = pandas.Series(values, dtype="str" if values[0] == "a" else None)
        with pytest.raises(sf.GroupError, match=r"example 2's label is nan, which stands for none.*as pandas' fillna"):
            sf.Groups.by(column)

    def test_missing_dates_and_missing_values_are_named(self) -> None:
        pandas = pytest.importorskip("pandas")
        dates, numbers = pandas.to_datetime(["2020-01-01", None]), pandas.array([1, None], dtype="Int64")
        for column, shown in ((pandas.Series(dates), "NaT"), (pandas.Series(numbers), "<NA>")):
            with pytest.raises(sf.GroupError, match=f"example 1's label is {shown}, which stands for none"):
                sf.Groups.by(column)
