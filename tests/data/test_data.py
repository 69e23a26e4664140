"""Datasets as batches, and their fingerprints: any change of any example changes them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

import segflow as sf
from segflow.data.batches import dataset_length, in_order
from segflow.data.fingerprints import digest
from segflow.data.readers import Reader, batches
from segflow.runtime.ranks import Ranks

from ..support.helpers import vectors

CPU = torch.device("cpu")


class Examples(Dataset):
    """Any map-style dataset."""

    def __init__(self, items: list[Any]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


@dataclass
class Pair:
    x: torch.Tensor
    text: str


class Picture:
    """Shows its pixels as PIL images do."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.pixels.__array_interface__


KINDS: dict[str, Callable[[float], Any]] = {
    "tensor": lambda v: torch.tensor([1.0, v]),
    "scalar tensor": torch.tensor,
    "bfloat16": lambda v: torch.tensor([v], dtype=torch.bfloat16),
    "sparse": lambda v: torch.tensor([0.0, v]).to_sparse(),
    "transposed": lambda v: torch.tensor([[1.0, v], [2.0, 3.0]]).T,
    "nested dict": lambda v: {"a": {"b": [torch.ones(2), torch.tensor(v)]}, "c": "x"},
    "numpy": lambda v: np.array([1.0, v]),
    "strided numpy": lambda v: np.array([[1.0, v], [2.0, 3.0]])[:, ::-1],
    "numpy scalar": np.float32,
    "numpy texts": lambda v: np.array(["a", str(v)]),
    "numpy objects": lambda v: np.array(["a", str(v) * 9, None], dtype=object),
    "string": lambda v: (f"text {v}", 1),
    "bytes": lambda v: str(v).encode(),
    "float": lambda v: v,
    "bool": lambda v: v > 1,
    "tuple": lambda v: (1, (2, v)),
    "dataclass": lambda v: Pair(torch.tensor(v), "t"),
    "picture": lambda v: Picture(np.full((2, 2), v)),
}


def fingerprint(dataset: Any) -> dict[str, Any]:
    return Reader(dataset, role="training").fingerprint(Ranks())


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_follows_the_examples_content_of_every_kind(kind: str) -> None:
    def of_kind(value: float) -> dict[str, Any]:
        return fingerprint(Examples([KINDS[kind](v) for v in (0.0, 0.5, value)]))

    assert of_kind(1.0) == of_kind(1.0)
    assert of_kind(1.0)["length"] == 3
    assert of_kind(1.0) != of_kind(2.0)


def test_a_digest_tells_shapes_types_and_keys_apart() -> None:
    alike = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        np.zeros(4, dtype=np.float32),
        [torch.zeros(4)],
        {"a": torch.zeros(4)},
        {"b": torch.zeros(4)},
        1,
        1.0,
        True,
        "1",
        None,
        [],
        [[]],
        [1, [2]],
        [[1], 2],
        ["ab", "c"],
        ["a", "bc"],
    ]
    assert len({digest(content) for content in alike}) == len(alike)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


@pytest.mark.parametrize("changed", [0, 1, 13, 399])
@pytest.mark.parametrize("make", [lambda d: d, lambda d: Examples(list(d)), lambda d: Subset(d, range(400))])
def test_one_changed_label_changes_the_fingerprint(make: Callable, changed: int) -> None:
    data = vectors(400)
    before = fingerprint(make(data))
    data.tensors[1][changed] += 1
    assert fingerprint(make(data)) != before


def test_every_example_counts_in_a_fingerprint() -> None:
    data = TensorDataset(torch.zeros(20_000, 2))
    before = fingerprint(data)
    data.tensors[0][12_345, 1] = 1
    assert fingerprint(data) != before
    reads: list[int] = []

    class Counting(Examples):
        def __getitem__(self, index: int) -> Any:
            reads.append(index)
            return index

    fingerprint(Counting([0] * 20_000))
    assert set(reads) == set(range(20_000)) and len(reads) < 20_200


def test_a_dataset_without_length_or_indices_or_examples_is_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter([1])

    class Counted(Stream):
        def __len__(self) -> int:
            return 1

    with pytest.raises(sf.TaskError, match=r"the training dataset has no length\. Expected a map-style dataset"):
        dataset_length(Stream(), "training")
    with pytest.raises(sf.TaskError, match=r"the query dataset has no indices\. Expected a map-style dataset"):
        dataset_length(Counted(), "query")
    for nothing, called in ((None, "a NoneType, None"), (3, "an int, 3")):
        with pytest.raises(sf.TaskError, match=rf"the query dataset is {called}\. Expected a map-style dataset"):
            dataset_length(nothing, "query")
    with pytest.raises(sf.TaskError, match="the query dataset is empty"):
        dataset_length([], "query")


def test_batches_hold_the_examples_asked_for_in_that_order() -> None:
    data = vectors(10)
    lists = [np.array([3, 1]), [9], range(4, 7)]
    found = list(batches(data, lists, None, CPU))
    assert [(b.size, list(b.examples), b.idle) for b in found] == [
        (2, [3, 1], False),
        (1, [9], False),
        (3, [4, 5, 6], False),
    ]
    assert [b.idle for b in Reader(data).batches(lists, CPU, idle=2)] == [False] * 3 + [True] * 2
    for batch, chosen in zip(found, ([3, 1], [9], [4, 5, 6]), strict=True):
        assert torch.equal(batch.content[0], data.tensors[0][chosen])
        assert torch.equal(batch.content[1], data.tensors[1][chosen])


def test_batches_are_what_the_users_collate_makes_of_plain_indices() -> None:
    class Named(Examples):
        def __getitem__(self, index: int) -> Any:
            assert type(index) is int
            return {"name": f"n{index}", "x": index}

    found = batches(Named([0] * 4), [np.array([2, 3])], lambda items: [item["name"] for item in items], CPU)
    assert [batch.content for batch in found] == [["n2", "n3"]]


@pytest.mark.parametrize(
    ("length", "size", "expected"), [(7, 3, [[0, 1, 2], [3, 4, 5], [6]]), (2, 5, [[0, 1]]), (4, 2, [[0, 1], [2, 3]])]
)
def test_a_walk_in_order_sees_every_example_once(length: int, size: int, expected: list[list[int]]) -> None:
    assert [list(part) for part in in_order(length, size)] == expected


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(sf.SegflowError, match="batch_size=0: expected a whole number, at least 1"):
        in_order(4, 0)


def test_walking_data_draws_nothing_from_the_global_random_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    np_before, py_before = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    data = vectors(10)
    list(batches(data, in_order(10, 3), None, CPU))
    fingerprint(data)
    fingerprint(Examples(list(data)))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == np_before).all() and random.getstate() == py_before  # noqa: NPY002
