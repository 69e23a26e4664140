"""The store and the data's fingerprints: what is read is what was written, for the same purpose, or an error."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

import segflow as sf
from segflow import store as store_module
from segflow.data import batches, dataset_fingerprint, dataset_length, digest, in_order
from segflow.store import Store

from .helpers import vectors

CPU = torch.device("cpu")
MADE = {"model": {"0": [1, 3, 6]}, "batch_size": 7, "options": {"a": None, "b": (1, 2)}}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "0.a": torch.randn(3, 4, generator=generator, dtype=torch.float64),
        "0.rows": torch.tensor(5.0),
        "kinds": torch.tensor([1, 2], dtype=torch.int8),
    }


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[k], expected[k]) and found[k].dtype == expected[k].dtype for k in expected
    )


def never() -> dict[str, torch.Tensor]:
    raise AssertionError("made again")


def written(root: Path, names: tuple[str, ...] = ("unit",)) -> Store:
    store = Store(root)
    for name in names:
        store.write(name, tensors(), MADE)
    return store


# Units


def test_a_unit_reads_back_bit_for_bit_in_another_process_s_store_object(tmp_path: Path) -> None:
    odd = {
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "expanded": torch.ones(1).expand(4),
        "none": torch.zeros(0, 2),
    }
    Store(tmp_path / "new" / "folder").write("a/b-1/c.d_e", odd | tensors(), MADE)
    again = Store(tmp_path / "new" / "folder")
    assert same(again.read("a/b-1/c.d_e", MADE), odd | tensors())
    assert "a/b-1/c.d_e" in again and "a/b-1" not in again


def test_a_unit_is_made_once_and_then_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert same(store.get_or_make("unit", MADE, tensors), tensors())
    assert same(store.get_or_make("unit", MADE, never), tensors())
    assert same(Store(tmp_path).get_or_make("unit", MADE, never), tensors())


def test_an_absent_unit_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(sf.StoreError, match=r"no unit 'unit'\. Run Analyzer.fit\(\) with this store first"):
        Store(tmp_path).read("unit", MADE)


@pytest.mark.parametrize(
    ("key", "now", "sides"),
    [
        ("batch_size", 8, r"batch_size: stored 7, now 8"),
        ("model", {"0": [1, 3, 5]}, r"model: stored \{'0': \[1, 3, 6\]\}, now \{'0': \[1, 3, 5\]\}"),
        ("options", {"a": 0, "b": (1, 2)}, r"options: stored .*None.*now .*0.*"),
        ("unheard of", 1, r"unheard of: stored None, now 1"),
    ],
)
def test_a_unit_made_from_something_else_is_refused_naming_both_sides(
    tmp_path: Path, key: str, now: Any, sides: str
) -> None:
    store = written(tmp_path)
    for read in (store.read, lambda name, made_from: store.get_or_make(name, made_from, never)):
        with pytest.raises(sf.StoreError, match=rf"unit 'unit' was made from something else \({sides}\)\. Use another"):
            read("unit", {**MADE, key: now})
    assert same(store.read("unit", MADE), tensors())


@pytest.mark.parametrize(
    "name", ["../x", "a/../x", "/x", "a//b", "a/", "", ".", "..", ".hidden", "a b", "a\\b", "x\n", "a/.b", "ä"]
)
def test_a_name_that_could_leave_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(sf.StoreError, match="is not a unit's name"):
        Store(tmp_path / "store").write(name, tensors(), MADE)
    assert not list(tmp_path.rglob("*.safetensors*"))


def test_a_manifest_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    store = written(tmp_path / "store")
    outside = tmp_path / "x.safetensors"
    outside.write_bytes((tmp_path / "store" / "units" / "unit.safetensors").read_bytes())
    manifest = tmp_path / "store" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"unit"', '"../../x"'))
    with pytest.raises(sf.StoreError, match="is not a unit's name"):
        store.read("../../x", MADE)


# Damage


def test_a_unit_file_damaged_anywhere_is_refused_and_never_read(tmp_path: Path) -> None:
    store = written(tmp_path)
    path = tmp_path / "units" / "unit.safetensors"
    whole = path.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    for content in (*flipped, *[whole[:length] for length in range(0, len(whole), 5)], whole + b"\0"):
        path.write_bytes(content)
        for read in (store.read, lambda name, made_from: store.get_or_make(name, made_from, never)):
            with pytest.raises(
                sf.StoreError, match=rf"unit.safetensors: damaged, its {len(content)} bytes .*Delete the file"
            ):
                read("unit", MADE)
    path.unlink()  # as the error says
    assert same(store.get_or_make("unit", MADE, tensors), tensors())
    assert path.read_bytes() == whole


def test_a_manifest_with_any_bit_flipped_never_yields_other_tensors(tmp_path: Path) -> None:
    """It is refused, or the unit is made again; what is read is always what was written."""
    store = written(tmp_path)
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    outcomes = {"read": 0, "refused": 0, "absent": 0}
    for at in range(len(whole)):
        for bit in (0, 2, 5):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            try:
                found = store.read("unit", MADE)
            except sf.StoreError as problem:
                outcomes["absent" if "no unit" in str(problem) else "refused"] += 1
            else:
                assert same(found, tensors())
                outcomes["read"] += 1
    assert outcomes["refused"] > outcomes["read"] and outcomes["absent"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{}"[:1], b'{"format": 1, "units": {'])
def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    store = written(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    for call in (lambda: store.read("unit", MADE), lambda: store.write("other", tensors(), MADE), store.units):
        with pytest.raises(sf.StoreError, match=r"manifest.json: not readable as JSON"):
            call()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"format": 2, "units": {}}, "store format 2, this segflow reads format 1"),
        ({"units": {}}, "store format None, this segflow reads format 1"),
        ([], "store format None"),
        ({"format": 1, "units": []}, "store format 1"),
        ({"format": 1, "units": {"unit": 3}}, "manifest.json: damaged at unit 'unit'"),
        ({"format": 1, "units": {"unit": {"bytes": 1, "made_from": {}}}}, "manifest.json: damaged at unit 'unit'"),
        ({"format": 1, "units": {"unit": {"bytes": 1, "sha256": "", "made_from": 1}}}, "damaged at unit 'unit'"),
    ],
)
def test_a_manifest_of_another_format_or_shape_is_refused(tmp_path: Path, content: Any, text: str) -> None:
    store = written(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(sf.StoreError, match=text):
        store.read("unit", MADE)


# Interrupted writes


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_unit_and_a_rerun_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = written(tmp_path)

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store_module.os, call, full)
        with pytest.raises(OSError, match="no space left"):
            store.write("unit", tensors(1), MADE)
        with pytest.raises(OSError, match="no space left"):
            store.write("other", tensors(1), MADE)
    assert same(store.read("unit", MADE), tensors()) and "other" not in store
    assert list(tmp_path.rglob("*.partial"))  # what the failed write left behind is harmless
    store.write("unit", tensors(1), MADE)
    store.write("other", tensors(2), MADE)
    assert same(store.read("unit", MADE), tensors(1)) and same(store.read("other", MADE), tensors(2))


def test_a_unit_whose_file_was_written_but_not_its_manifest_is_made_again(tmp_path: Path) -> None:
    store = written(tmp_path, ("unit", "other"))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["units"]["other"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert "other" not in store
    assert same(store.get_or_make("other", MADE, lambda: tensors(3)), tensors(3))


# Datasets


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_follows_the_examples_content_of_every_kind(kind: str) -> None:
    def fingerprint(value: float) -> dict[str, Any]:
        return dataset_fingerprint(Examples([KINDS[kind](v) for v in (0.0, 0.5, value)]), "training")

    assert fingerprint(1.0) == fingerprint(1.0)
    assert fingerprint(1.0)["length"] == 3 and fingerprint(1.0)["examples"] != "random"
    assert fingerprint(1.0) != fingerprint(2.0)


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
    before = dataset_fingerprint(make(data), "training")
    data.tensors[1][changed] += 1
    assert dataset_fingerprint(make(data), "training") != before


def test_every_example_counts_in_a_fingerprint() -> None:
    data = TensorDataset(torch.zeros(20_000, 2))
    before = dataset_fingerprint(data, "training")
    data.tensors[0][12_345, 1] = 1
    assert dataset_fingerprint(data, "training") != before
    reads: list[int] = []

    class Counting(Examples):
        def __getitem__(self, index: int) -> Any:
            reads.append(index)
            return index

    dataset_fingerprint(Counting([0] * 20_000), "training")
    assert set(reads) == set(range(20_000)) and len(reads) < 20_200


def test_an_augmented_dataset_is_random_and_blocks_nothing() -> None:
    class Flipped(Examples):
        def __getitem__(self, index: int) -> Any:
            return -self.items[index] if random.random() < 0.5 else self.items[index]

    data = Flipped([torch.ones(2)] * 40)
    prints = [dataset_fingerprint(data, "training") for _ in range(5)]
    assert prints == [{"length": 40, "examples": "random"}] * 5


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
    with pytest.raises(sf.TaskError, match="the query dataset is empty"):
        dataset_length([], "query")


def test_batches_hold_the_examples_asked_for_in_that_order() -> None:
    data = vectors(10)
    lists = [np.array([3, 1]), [9], range(4, 7)]
    found = list(batches(data, lists, None, CPU))
    assert [(b.number, b.size) for b in found] == [(0, 2), (1, 1), (2, 3)]
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
    with pytest.raises(sf.SegflowError, match="batch_size=0: expected at least 1"):
        in_order(4, 0)


def test_walking_data_draws_nothing_from_the_global_random_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    np_before, py_before = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    data = vectors(10)
    list(batches(data, in_order(10, 3), None, CPU))
    dataset_fingerprint(data, "training")
    dataset_fingerprint(Examples(list(data)), "training")
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == np_before).all() and random.getstate() == py_before  # noqa: NPY002


def test_the_store_syncs_a_file_before_it_is_named_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(store_module.os, "fsync", lambda fd: (events.append("sync"), real_sync(fd))[1])
    monkeypatch.setattr(store_module.os, "replace", lambda a, b: (events.append(Path(b).name), real_replace(a, b))[1])
    Store(tmp_path).write("unit", tensors(), MADE)
    assert events == ["sync", "unit.safetensors", "sync", "sync", "manifest.json", "sync"]


def test_numbers_that_bind_a_unit_may_differ_by_rounding_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("unit", {"x": torch.ones(1)}, {"losses": [1.0, 2.0]})
    store.read("unit", {"losses": [1.0 + 1e-6, 2.0]})
    for other in ([1.01, 2.0], [1.0], [1.0, "2.0"]):
        with pytest.raises(sf.StoreError, match=r"losses: stored \[1.0, 2.0\], now"):
            store.read("unit", {"losses": other})
