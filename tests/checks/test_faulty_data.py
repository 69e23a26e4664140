"""Faulty data deep inside a dataset ends in an error that names the example, in every call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

import segflow as sf
from segflow.data.batch_faults import described, naming
from segflow.data.batches import Batch

from ..support.helpers import analyzer_of, mlp, trajectory_of, vectors

LONG, BAD = 150, 77  # no probe comes by example 77
CALLS = ("fit", "score", "features")
BATCH = r"the batch of 50 examples from 50 to 99"


def _call(folder: Path, call: str, train: Any, collate: Any = None, task: Any = None, query: Any = None) -> Any:
    model = mlp(torch.float32)
    trajectory = trajectory_of(folder / "run", [model.state_dict()], len(train))
    method = sf.InfluenceFunction(damping=0.1) if call == "fit" else sf.TracIn()
    task = task or sf.tasks.Classification()
    analyzer = analyzer_of(model, trajectory, folder / "store", task, method=method, collate_fn=collate)
    if call == "fit":
        return analyzer.fit(train, batch_size=50)
    if call == "features":
        return analyzer.features(train, batch_size=50)
    queries = query or vectors(3, torch.float32, seed=3)
    groups = sf.Groups.from_lists([range(start, start + 50) for start in range(0, len(train), 50)], len(train))
    return analyzer.score(groups, train, queries, batch_size=50)


def _data(change: Callable[[Tensor, Tensor], None]) -> TensorDataset:
    inputs, labels = (column.clone() for column in vectors(LONG, torch.float32).tensors)
    change(inputs, labels)
    return TensorDataset(inputs, labels)


VALUES: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "nan": (lambda x, y: x[BAD, 2:].fill_(torch.nan), r"example 77 holds NaN or infinity in \[0\]"),
    "infinity": (lambda x, y: x[BAD].fill_(torch.inf), r"example 77 holds NaN or infinity in \[0\]"),
    "too large a label": (lambda x, y: y[BAD].fill_(3), r"example 77: Classification: the label is 3, .* 0\.\.2"),
    "negative label": (lambda x, y: y[BAD].fill_(-1), r"example 77: Classification: the label is -1, .* 0\.\.2"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", VALUES)
def test_a_faulty_value_is_named_with_its_example(tmp_path: Path, fault: str, call: str) -> None:
    change, text = VALUES[fault]
    with pytest.raises(sf.SegflowError, match=text):
        _call(tmp_path, call, _data(change))


@pytest.mark.parametrize("fault", VALUES)
def test_a_faulty_value_of_a_query_is_named_with_its_example(tmp_path: Path, fault: str) -> None:
    change, text = VALUES[fault]
    with pytest.raises(sf.SegflowError, match=text):
        _call(tmp_path, "score", vectors(50, torch.float32), query=_data(change))


TYPES: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "numpy": (
        lambda x, y: (x.numpy(), y),
        r"\[0\]: a numpy array of float32 \[50, 5\], no tensor; \[1\]: int64 \[50\]",
    ),
    "list": (
        lambda x, y: (x.tolist(), y),
        r"the batch's inputs are a list of 50 tensors, which the model does not take",
    ),
    "float64": (lambda x, y: (x.double(), y), r"\[0\]: float64 \[50, 5\].*the model is in float32 on cpu"),
    "text": (lambda x, y: ("many words", y), r"\[0\]: str of 10, no tensor"),
    "float labels": (lambda x, y: (x, y.float()), r"expected integer labels, found torch\.float32"),
    "labels of another shape": (lambda x, y: (x, y[:, None]), r"labels \[B\], found \(50, 3\) and \(50, 1\)"),
    "one thing": (lambda x, y: x, r"expected a batch \(inputs, targets\) or a mapping, found Tensor"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", TYPES)
def test_a_batch_of_a_wrong_type_is_named(tmp_path: Path, fault: str, call: str) -> None:
    spoil, text = TYPES[fault]
    train = [(*example, number) for number, example in enumerate(vectors(LONG, torch.float32))]

    def collate(items: list[Any]) -> Any:
        if len(items[0]) == 2:
            return default_collate(items)  # queries
        x, y, numbers = default_collate(items)
        return spoil(x, y) if BAD in numbers else (x, y)

    with pytest.raises(sf.TaskError, match=f"Classification: the (train|sample) loss of {BATCH}.*{text}"):
        _call(tmp_path, call, train, collate)


def test_an_error_of_the_users_own_code_stays_the_cause() -> None:
    batch = Batch([4, 9], (torch.ones(2, 3), torch.tensor([0, 7])))
    with (
        pytest.raises(sf.TaskError, match=r"the loss of the batch of 2 examples from 4 to 9 raised KeyError") as caught,
        naming("the loss", batch, nn.Linear(3, 2)),
    ):
        raise KeyError("logits")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        KeyboardInterrupt(),
        sf.LayerError("layer 'a'"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:598] Connection closed by peer"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_machine_and_of_other_rooms_pass_as_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, naming("the loss", Batch([0], None)):
        raise error
    assert caught.value is error


def test_a_batch_is_described_by_its_parts() -> None:
    content = {"ids": torch.tensor([[1, 2], [3, 50]]), "mask": torch.ones(2, 2, dtype=torch.bool), "name": ["a", "b"]}
    text = "['ids']: int64 [2, 2] from 1 to 50; ['mask']: bool [2, 2]; ['name']: list of 2, no tensor"
    assert described(Batch([0, 1], content)) == text


def test_pseudo_labels_of_outputs_that_are_not_finite_name_the_outputs(tmp_path: Path) -> None:
    class Overflowing(sf.tasks.Classification):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            if not sample:
                return super().compute_train_loss(batch, model)
            logits = model(batch[0]) + torch.where(batch[0][:, :1] > 1, torch.inf, 0.0)
            labels = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(-1)
            return nn.functional.cross_entropy(logits, labels, reduction="sum")

    with pytest.raises(sf.TaskError, match=r"probabilities that labels are drawn from are not all finite.*row \d+ is"):
        _call(tmp_path, "fit", vectors(LONG, torch.float32), task=Overflowing())
