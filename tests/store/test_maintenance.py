"""`segflow store`: what is there, whether it is whole, and nothing removed that must stay."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import segflow as sf
from segflow import cli
from segflow.store.maintenance import collect_garbage, repair, survey
from segflow.store.store import Store

from ..support.helpers import analyzer_of, mlp, trajectory_of, vectors
from .test_store import MADE, read, same, tensors, written

GOLDEN = Path(__file__).parent / "golden"


def _mixed(root: Path) -> Store:
    """A store with a unit in every state."""
    store = written(root, ("fine", "input", "hurt", "short", "gone"))
    store.write("derived", tensors(), MADE, ("input",))
    store.write("scores/x/step-1", tensors(), MADE, ("derived",))
    store.write("input", tensors(1), MADE)
    store.write("orphan", tensors(), MADE)
    store.entry_path("orphan").unlink()
    for name, change in (("hurt", lambda c: c[:-1] + bytes([c[-1] ^ 1])), ("short", lambda c: c[:-1])):
        store.unit_path(name).write_bytes(change(store.unit_path(name).read_bytes()))
    store.unit_path("gone").unlink()
    (root / "units" / "x.safetensors.0a1b2c3d.partial").write_bytes(b"half")
    (root / "notes.txt").write_text("mine")
    return store


STATES = {
    "derived": "stale",
    "fine": "ok",
    "gone": "missing",
    "hurt": "damaged",
    "input": "ok",
    "scores/x/step-1": "ok",
    "short": "damaged",
    "orphan": "orphan",
    "units/x.safetensors.0a1b2c3d.partial": "leftover",
}


def test_every_state_is_found_and_hidden_damage_only_by_reading(tmp_path: Path) -> None:
    store = _mixed(tmp_path)
    assert {f.name: f.state for f in survey(store, thorough=True)} == STATES
    assert {f.name: f.state for f in survey(store)} == STATES | {"hurt": "ok"}


def test_garbage_goes_and_nothing_else(tmp_path: Path) -> None:
    store = _mixed(tmp_path)
    going = {"derived", "orphan", "units/x.safetensors.0a1b2c3d.partial"}
    assert {f.name for f in collect_garbage(store, dry_run=True)} == going
    assert {f.name for f in survey(store)} == set(STATES)
    assert {f.name for f in collect_garbage(store)} == going
    assert {f.name for f in survey(store)} == set(STATES) - going
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert {f.name for f in collect_garbage(store, scores=True)} == {"scores/x/step-1"}
    assert same(read(store, "fine"), tensors())


def test_repair_sets_the_broken_aside_and_leaves_the_rest(tmp_path: Path) -> None:
    store = _mixed(tmp_path)
    hurt = store.unit_path("hurt").read_bytes()
    assert {f.name for f in repair(store)} == {"hurt", "short", "gone"}
    assert {f.name for f in survey(store, thorough=True)} == set(STATES) - {"hurt", "short", "gone"}
    assert not store.holds("hurt", MADE) and (tmp_path / "quarantine/units/hurt.safetensors").read_bytes() == hurt
    assert same(read(store, "fine"), tensors())


def test_repair_restores_a_format_marker_that_cannot_be_read_but_not_another_format(tmp_path: Path) -> None:
    store = written(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff")
    repair(store)
    assert same(read(store), tensors())
    (tmp_path / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(sf.StoreError, match="store format 9"):
        repair(store)


@pytest.mark.parametrize("content", ["[]", "7", "{}", '{"format": "2"}', '{"format": true}', '{"format": Infinity}'])
def test_repair_restores_a_format_marker_that_tells_no_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    store = written(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    assert _run(capsys, "ls", str(tmp_path))[0] == 1
    status, out, _ = _run(capsys, "repair", str(tmp_path))
    assert status == 0 and f"1 set aside in quarantine/, {len(content)} bytes" in out
    assert same(read(store), tensors()) and (tmp_path / "quarantine/manifest.json").read_text() == content


def test_repair_says_how_large_is_what_it_sets_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = written(tmp_path)
    size = store.unit_path("unit").stat().st_size
    store.unit_path("unit").write_bytes(bytes(size))
    assert f"1 set aside in quarantine/, {size:,} bytes" in _run(capsys, "repair", str(tmp_path))[1]


@pytest.mark.parametrize("folder", ["units", "units/deep", "manifest"])
def test_nothing_outside_is_listed_moved_or_removed_through_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    written(tmp_path / "store", ("deep/unit",))
    (tmp_path / "store" / folder).rename(tmp_path / "outside")
    (tmp_path / "store" / folder).symlink_to(tmp_path / "outside")
    before = _files(tmp_path / "outside")
    for tool in ("ls", "verify", "gc", "repair"):
        assert _run(capsys, tool, str(tmp_path / "store"))[0] in (0, 1)
    assert _files(tmp_path / "outside") == before


def test_a_unit_whose_input_has_a_damaged_entry_is_not_set_aside_with_it(tmp_path: Path) -> None:
    store = written(tmp_path, ("input",))
    store.write("derived", tensors(), MADE, ("input",))
    store.entry_path("input").write_text("{}")
    assert [finding.name for finding in repair(store)] == ["input"]
    assert same(read(store, "derived"), tensors())


def test_what_cannot_be_moved_or_removed_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _mixed(tmp_path)
    (tmp_path / "quarantine").write_text("a file")
    status, _, err = _run(capsys, "repair", str(tmp_path))
    assert status == 1 and "quarantine" in err and "Not a directory" in err

    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", forbidden)
        status, _, err = _run(capsys, "gc", str(tmp_path))
    assert status == 1 and "cannot be moved or removed" in err


def test_a_damaged_entry_is_set_aside(tmp_path: Path) -> None:
    store = written(tmp_path, ("unit", "other"))
    store.entry_path("unit").write_text('{"bytes": "many"}')
    assert {f.name: f.state for f in survey(store)} == {"unit": "damaged", "other": "ok"}
    repair(store)
    assert "unit" not in store and "other" in store


def _run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["store", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_command_line_shows_and_cleans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _mixed(tmp_path)
    status, out, _ = _run(capsys, "ls", str(tmp_path))
    assert status == 0 and "stale" in out and "9 in all" in out
    status, out, _ = _run(capsys, "verify", str(tmp_path), "--json")
    assert status == 1
    assert {line["name"]: line["state"] for line in map(json.loads, out.splitlines())} == STATES
    assert "3 would be removed" in _run(capsys, "gc", "--dry-run", str(tmp_path))[1]
    assert "3 removed" in _run(capsys, "gc", str(tmp_path))[1]
    assert "3 set aside in quarantine/" in _run(capsys, "repair", str(tmp_path))[1]
    assert _run(capsys, "verify", str(tmp_path))[0] == 0
    status, _, err = _run(capsys, "ls", str(tmp_path / "nowhere"))
    assert status == 1 and "no such folder" in err and err.count("\n") == 1


def test_tools_that_change_a_store_wait_for_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = written(tmp_path)
    with store.locked("fit"):
        for tool in ("gc", "repair"):
            status, _, err = _run(capsys, tool, str(tmp_path))
            assert status == 1 and "in use by process" in err
        assert "in use by process" in _run(capsys, "ls", str(tmp_path))[1]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="a small file system needs root")
def test_on_a_disk_without_a_free_byte_the_tools_start_and_garbage_makes_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], check=True)
    try:
        root = tmp_path / "store"
        store = _mixed(root)
        with store.locked("fit", tidy=False):
            pass
        with pytest.raises(OSError, match="No space left"), open(tmp_path / "rest", "wb", buffering=0) as rest:
            while True:
                rest.write(bytes(4096))
        assert shutil.disk_usage(root).free == 0
        assert _run(capsys, "ls", str(root))[0] == 0 and _run(capsys, "verify", str(root))[0] == 1
        status, out, err = _run(capsys, "gc", str(root))
        assert status == 0 and "3 removed" in out and not err
        assert shutil.disk_usage(root).free > 0
    finally:
        gc.collect()  # closes what a damaged file left open
        subprocess.run(["umount", str(tmp_path)], check=True)


# Golden files


def _files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def golden(root: Path) -> Store:
    store = written(root, ("covariance/step-10",))
    store.write("eigenbasis/steps-10", tensors(1), MADE, ("covariance/step-10",))
    return store


def test_the_format_on_disk_is_byte_for_byte_the_golden_one(tmp_path: Path) -> None:
    golden(tmp_path)
    assert _files(tmp_path) == _files(GOLDEN / "format-2")


if __name__ == "__main__":  # makes the golden files
    golden(GOLDEN / "format-2")


@pytest.mark.parametrize("numbers", [[1.0, float("nan")], [float("inf"), 0.0], [1.0 + 0j, 2.0]])
def test_numbers_that_no_unit_holds_are_found_and_set_aside(tmp_path: Path, numbers: list[Any]) -> None:
    store = written(tmp_path, ("fine",))
    store.write("odd", {"x": torch.tensor(numbers)}, MADE)
    with pytest.raises(
        sf.StoreError, match=r"units/odd\.safetensors: 'x' .*Delete this file of unit 'odd'.*store repair"
    ):
        store.open("odd", MADE).tensor("x", (2,), "real")
    assert {f.name: f.state for f in survey(store, thorough=True)} == {"fine": "ok", "odd": "damaged"}
    assert cli.main(["store", "verify", str(tmp_path)]) == 1
    assert [f.name for f in repair(store)] == ["odd"]
    assert not store.holds("odd", MADE) and store.holds("fine", MADE)


def test_a_misshapen_unit_is_named_and_made_anew_once_its_file_is_deleted(tmp_path: Path) -> None:
    store = written(tmp_path, ("odd",))
    with pytest.raises(sf.StoreError, match=r"has shape .*Delete this file of unit 'odd' to have it made anew"):
        store.open("odd", MADE).tensor("0.a", (4, 4))
    store.unit_path("odd").unlink()
    assert not store.holds("odd", MADE)


def test_an_eigenbasis_that_is_not_orthonormal_is_refused(tmp_path: Path) -> None:
    model, train = mlp(), vectors(12)
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], 12)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", method=sf.InfluenceFunction(damping=0.1))
    analyzer.fit(train)
    store = Store(tmp_path / "store")
    [basis] = [name for name in store.names() if any(key.endswith(".outputs") for key in _tensors(store, name))]
    derived = [name for name in store.names() if basis in store.entry(name).inputs]
    changed = {key: t * 1.01 if key.endswith(".outputs") else t for key, t in _tensors(store, basis).items()}
    for name, content in [(basis, changed), *((name, _tensors(store, name)) for name in derived)]:
        entry = store.entry(name)
        store.write(name, content, entry.made_from, entry.inputs)
    with pytest.raises(sf.StoreError, match=rf"{basis}.*not orthonormal \(off by .*Delete this file of unit '{basis}'"):
        analyzer.score(sf.Groups.random(12, 3), train, vectors(2, seed=3))


def _tensors(store: Store, name: str) -> dict[str, torch.Tensor]:
    return load_file(store.unit_path(name))


def test_what_safetensors_left_of_a_killed_write_is_a_leftover(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("covariance/step-1", {"x": torch.ones(2)}, {})
    for name in (".tmp1ImKV3", ".tmp-of-mine"):
        (tmp_path / "units" / "covariance" / name).write_bytes(b"half")
    assert [path.name for path in store.leftovers()] == [".tmp1ImKV3"]
    with store.locked("test"):
        pass
    assert sorted(path.name for path in (tmp_path / "units" / "covariance").iterdir()) == [
        ".tmp-of-mine",
        "step-1.safetensors",
    ]
