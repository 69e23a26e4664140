"""The store: what is read is what was written, for the same purpose and from the same inputs, or an error."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import segflow as sf
from segflow.errors import StoreError
from segflow.store import files
from segflow.store.maintenance import BROKEN, survey
from segflow.store.store import Store

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


def written(root: Path, names: tuple[str, ...] = ("unit",)) -> Store:
    store = Store(root)
    for name in names:
        store.write(name, tensors(), MADE)
    return store


def read(store: Store, name: str = "unit", made_from: Any = MADE) -> dict[str, torch.Tensor]:
    file = store.open(name, made_from)
    return {key: file.tensor(key) for key in file.names()}


# Units


def test_a_unit_reads_back_bit_for_bit_in_another_process_s_store_object(tmp_path: Path) -> None:
    odd = {
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "expanded": torch.ones(1).expand(4),
        "none": torch.zeros(0, 2),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    odd["again"] = odd["half"]  # one memory under two names
    Store(tmp_path / "new" / "folder").write("a/b-1/c.d_e", odd | tensors(), MADE)
    again = Store(tmp_path / "new" / "folder")
    assert same(read(again, "a/b-1/c.d_e"), odd | tensors())
    assert "a/b-1/c.d_e" in again and "a/b-1" not in again
    assert again.names() == again.files() == ["a/b-1/c.d_e"]


def test_a_committed_unit_is_held_and_an_absent_or_shortened_one_is_not(tmp_path: Path) -> None:
    store = written(tmp_path)
    assert Store(tmp_path).holds("unit", MADE) and not store.holds("other", MADE)
    path = store.unit_path("unit")
    path.write_bytes(path.read_bytes()[:-1])
    assert not store.holds("unit", MADE)
    path.unlink()
    assert not store.holds("unit", MADE)


def test_an_absent_unit_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(sf.StoreError, match=r"no unit 'unit'\. Run Analyzer.fit\(\) with this store first"):
        Store(tmp_path).open("unit", MADE)


@pytest.mark.parametrize(
    ("key", "now", "sides"),
    [
        ("batch_size", 8, r"batch_size: stored 7, now 8"),
        ("model", {"0": [1, 3, 5]}, r"model: 0: stored \[1, 3, 6\], now \[1, 3, 5\]"),
        ("options", {"a": 0, "b": (1, 2)}, r"options: a: stored None, now 0.*"),
        ("unheard of", 1, r"unheard of: stored None, now 1"),
    ],
)
def test_a_unit_made_from_something_else_is_refused_naming_both_sides(
    tmp_path: Path, key: str, now: Any, sides: str
) -> None:
    store = written(tmp_path)
    for call in (store.open, store.holds):
        with pytest.raises(sf.StoreError, match=rf"unit 'unit' was made from something else \({sides}\)\. Use another"):
            call("unit", {**MADE, key: now})
    assert same(read(store), tensors())


def test_a_unit_whose_input_changed_is_stale_and_one_whose_input_is_gone_is_not(tmp_path: Path) -> None:
    store = written(tmp_path, ("first",))
    store.write("second", tensors(), MADE, ("first",))
    assert store.holds("second", MADE)
    store.write("first", tensors(1), MADE)
    assert not store.holds("second", MADE)
    with pytest.raises(sf.StoreError, match="'second' was made of units that have changed since"):
        store.open("second", MADE)
    store.write("first", tensors(), MADE)  # the same bytes again
    assert store.holds("second", MADE)
    store.entry_path("first").unlink()
    assert store.holds("second", MADE)


@pytest.mark.parametrize(
    "name", ["../x", "a/../x", "/x", "a//b", "a/", "", ".", "..", ".hidden", "a b", "a\\b", "x\n", "a/.b", "ä"]
)
def test_a_name_that_could_leave_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(sf.StoreError, match="is not a unit's name"):
        Store(tmp_path / "store").write(name, tensors(), MADE)
    assert not list(tmp_path.rglob("*.safetensors*"))


@pytest.mark.parametrize("link", ["units", "units/deep", "units/deep/unit.safetensors", "manifest/deep/unit.json"])
def test_a_link_out_of_the_folder_is_neither_read_nor_written_through(tmp_path: Path, link: str) -> None:
    store, outside = written(tmp_path / "store", ("deep/unit",)), tmp_path / "outside"
    inner = tmp_path / "store" / link
    inner.rename(outside)
    inner.symlink_to(outside)
    before = {path: path.read_bytes() for path in [outside, *outside.rglob("*")] if path.is_file()}
    for call in (lambda: store.open("deep/unit", MADE), lambda: store.write("deep/unit", tensors(1), MADE)):
        with pytest.raises(sf.StoreError, match=r"leads out of .*store \(to .*outside"):
            call()
    assert before == {path: path.read_bytes() for path in [outside, *outside.rglob("*")] if path.is_file()}


# Damage


def test_a_unit_file_damaged_anywhere_is_refused_and_never_read(tmp_path: Path) -> None:
    store = written(tmp_path)
    path = store.unit_path("unit")
    whole = path.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    for content in (*flipped, *[whole[:length] for length in range(0, len(whole), 5)], whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(
            sf.StoreError, match=rf"unit.safetensors: damaged, its {len(content)} bytes .*Delete the file"
        ):
            store.open("unit", MADE)
    path.unlink()  # as the error says
    assert not store.holds("unit", MADE)
    store.write("unit", tensors(), MADE)
    assert path.read_bytes() == whole


def test_an_entry_with_any_bit_flipped_never_yields_other_tensors(tmp_path: Path) -> None:
    """It is refused, or the unit is made again; what is read is always what was written."""
    store = written(tmp_path)
    path = store.entry_path("unit")
    whole = path.read_bytes()
    outcomes = {"read": 0, "refused": 0}
    for at in range(len(whole)):
        for bit in (0, 2, 5):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            try:
                found = read(store)
            except sf.StoreError:
                outcomes["refused"] += 1
            else:
                assert same(found, tensors())
                outcomes["read"] += 1
    assert outcomes["refused"] > outcomes["read"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": 2, '])
def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    store = written(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    for call in (lambda: store.open("unit", MADE), lambda: store.write("other", tensors(), MADE), store.names):
        with pytest.raises(sf.StoreError, match=r"manifest.json: not readable as JSON"):
            call()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"format": 3}, "store format 3, this segflow reads format 2"),
        ({"format": 1, "units": {}}, "store format 1, this segflow reads format 2"),
        ({"format": True}, "store format True"),
        ({"units": {}}, "store format None, this segflow reads format 2"),
        ([], "store format None"),
    ],
)
def test_a_manifest_of_another_format_or_shape_is_refused(tmp_path: Path, content: Any, text: str) -> None:
    store = written(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for call in (lambda: store.open("unit", MADE), lambda: store.write("other", tensors(), MADE), store.names):
        with pytest.raises(sf.StoreError, match=text):
            call()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


# Interrupted writes


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_unit_and_a_rerun_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = written(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, call, full)
        for name in ("unit", "other"):
            with pytest.raises(StoreError, match=r"the disk is full: .* bytes are needed, .* committed before is kept"):
                store.write(name, tensors(1), MADE)
    assert same(read(store), tensors()) and "other" not in store
    assert not list(tmp_path.rglob("*.partial"))
    store.write("unit", tensors(1), MADE)
    store.write("other", tensors(2), MADE)
    assert same(read(store), tensors(1)) and same(read(store, "other"), tensors(2))


def test_a_unit_whose_file_was_written_but_not_its_entry_is_not_held(tmp_path: Path) -> None:
    store = written(tmp_path, ("unit", "other"))
    store.entry_path("other").unlink()
    assert "other" not in store and "unit" in store


def test_a_unit_whose_replacement_is_killed_at_any_moment_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each moment is a copy of the files as a kill before that call to the system would leave them."""
    store, moments = written(tmp_path / "store"), list[Path]()

    def after_a_copy(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            moments.append(tmp_path / f"moment-{len(moments)}")
            shutil.copytree(store.root, moments[-1])
            return real(*arguments)

        return call

    with monkeypatch.context() as patched:
        for name in ("fsync", "replace", "rename"):
            patched.setattr(files.os, name, after_a_copy(getattr(os, name)))
        store.write("unit", tensors(1), MADE)
    outcomes = set()
    for moment in map(Store, moments):
        assert not [finding for finding in survey(moment, thorough=True) if finding.state in BROKEN]
        held = moment.holds("unit", MADE)
        outcomes.add(held)
        assert not held or same(read(moment), tensors()) or same(read(moment), tensors(1))
        with moment.locked("go on"):
            moment.write("unit", tensors(1), MADE)
        assert same(read(moment), tensors(1)) and not moment.leftovers()
    assert len(moments) == 8 and outcomes == {True, False}


def test_what_a_killed_run_left_half_written_is_removed_under_the_lock_and_nothing_else(tmp_path: Path) -> None:
    store = written(tmp_path)
    names = ("units/x.safetensors.0123abcd.partial", "manifest/x.json.89abcdef.partial", "holder.json.00000000.partial")
    others = ("units/x.partial", "units/x.safetensors.ab.partial", "notes.partial", "manifest/x.0123ABCD.partial")
    for name in (*names, *others):
        (tmp_path / name).write_bytes(b"half")
    assert store.leftovers() == sorted(tmp_path / name for name in names)
    with store.locked("test"):
        assert not store.leftovers()
    assert all((tmp_path / name).exists() for name in others)
    assert same(read(store), tensors())


def test_the_store_syncs_a_file_before_it_is_named_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (events.append("sync"), real_sync(fd))[1])
    monkeypatch.setattr(files.os, "replace", lambda a, b: (events.append(Path(b).name), real_replace(a, b))[1])
    written(tmp_path, ("first",))
    events.clear()
    written(tmp_path)
    assert events == ["sync", "unit.safetensors", "sync", "sync", "unit.json", "sync"]


def test_numbers_that_bind_a_unit_may_differ_by_rounding_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("unit", {"x": torch.ones(1)}, {"losses": {"probes": [1.0, 2.0]}, "eps": [0.1]})
    store.open("unit", {"losses": {"probes": [1.0 + 1e-6, 2.0]}, "eps": [0.1 + 1e-12]})
    for other in ([1.01, 2.0], [1.0], [1.0, "2.0"]):
        with pytest.raises(sf.StoreError, match=r"losses: .*stored"):
            store.open("unit", {"losses": {"probes": other}, "eps": [0.1]})
    with pytest.raises(sf.StoreError, match=r"eps: stored \[0.1\], now \[0.1000001\]"):
        store.open("unit", {"losses": {"probes": [1.0, 2.0]}, "eps": [0.1000001]})
