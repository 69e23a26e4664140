"""A file is old or new, whoever writes it and whenever they are killed; nothing but segflow's own names is removed."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf
from segflow import cli
from segflow.report import Table
from segflow.report.row import Row
from segflow.store import files
from segflow.store.files import LineFile, write_json, writing_array
from segflow.store.maintenance import BROKEN, survey
from segflow.store.replacement import beside, partial_of
from segflow.store.store import Store

from .test_store import MADE, read, same, tensors, written

CALLS = ("open", "rename", "replace", "unlink", "fsync", "close", "mkdir", "listdir")


def _counting(monkeypatch: pytest.MonkeyPatch, act: Callable[[int, Callable[[], Any]], Any]) -> None:
    """Have `act` make the calls to the system, each with its number from 0."""
    count = iter(range(10_000))

    def wrapped(real: Any) -> Any:
        return lambda *given, **named: act(next(count), lambda: real(*given, **named))

    for name in CALLS:
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))


def _kills(tmp_path: Path, after: bool) -> Iterator[tuple[Store, int]]:
    """A store whose unit was being replaced by a process that ended before, or after, its call number k."""
    for k in range(200):
        root = tmp_path / f"{k}-{after}"
        written(root)
        child = os.fork()
        if child == 0:
            patch = pytest.MonkeyPatch()

            def act(number: int, call: Callable[[], Any], k: int = k) -> Any:
                if number == k and not after:
                    os._exit(9)
                try:
                    return call()
                finally:
                    if number == k:
                        os._exit(9)

            _counting(patch, act)
            Store(root).write("unit", tensors(1), MADE)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended in (0, 9)
        yield Store(root), k
        if ended == 0:
            return
    raise AssertionError("the replacement never came to its end")


@pytest.mark.parametrize("after", [False, True])
def test_killed_between_any_two_calls_a_replacement_leaves_a_unit_whole_or_absent(tmp_path: Path, after: bool) -> None:
    seen = set()
    for store, k in _kills(tmp_path, after):
        assert not [finding for finding in survey(store, thorough=True) if finding.state in BROKEN], k
        found = read(store) if store.holds("unit", MADE) else {}
        contents = {"absent": {}, "old": tensors(), "new": tensors(1)}
        seen |= {name for name, content in contents.items() if same(found, content)}
        assert any(same(found, content) for content in contents.values()), k
        with store.locked("go on"):
            store.write("unit", tensors(1), MADE)
        assert same(read(store), tensors(1)) and not store.leftovers(), k
    assert seen == {"absent", "old", "new"}


@pytest.mark.parametrize("problem", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [False, True])
def test_a_replacement_that_fails_at_any_call_leaves_a_unit_whole_or_absent(
    tmp_path: Path, problem: BaseException, after: bool
) -> None:
    for k in range(200):
        store, patch, reached = written(tmp_path / str(k)), pytest.MonkeyPatch(), []

        def act(number: int, call: Callable[[], Any], k: int = k, reached: list[int] = reached) -> Any:
            if number == k:
                reached.append(k)
                with suppress(OSError):
                    _ = call() if after else None
                raise problem
            return call()

        with patch.context() as patched:
            _counting(patched, act)
            with suppress(sf.StoreError, KeyboardInterrupt):
                store.write("unit", tensors(1), MADE)
        assert not [finding for finding in survey(store, thorough=True) if finding.state in BROKEN], k
        assert not store.holds("unit", MADE) or same(read(store), tensors()) or same(read(store), tensors(1)), k
        if not reached:
            return
    raise AssertionError("the replacement never came to its end")


# Files of the user's own


def _scores(path: Path) -> None:
    sf.Scores(torch.ones(1, 2), ("q",), ("a", "b"), (1, 1)).save(path)


def _table(path: Path) -> None:
    Table("title", "x", "y", (Row("s", 0.0, 1.0, 1.0, 1.0),)).save(path)


def _features(path: Path) -> None:
    with writing_array(path, np.dtype(np.float32), (1, 2), sf.ScoreError) as write:
        write(np.ones((1, 2)))


WRITERS = {"scores": _scores, "table": _table, "features": _features}
TARGETS: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a symbolic link": lambda path: path.symlink_to("elsewhere"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", TARGETS)
def test_what_is_no_file_is_not_replaced(tmp_path: Path, writer: str, kind: str) -> None:
    path = tmp_path / "mine"
    TARGETS[kind](path)
    before = path.lstat()
    with pytest.raises(sf.ScoreError, match=f"mine: is {kind}, which is not written to"):
        WRITERS[writer](path)
    assert path.lstat().st_ino == before.st_ino and os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_device_is_not_replaced(writer: str) -> None:
    before = os.stat("/dev/null")
    with pytest.raises(sf.ScoreError, match="/dev/null: is a device"):
        WRITERS[writer](Path("/dev/null"))
    assert os.stat("/dev/null").st_ino == before.st_ino


def test_a_log_of_steps_is_not_appended_to_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "steps.jsonl")
    with pytest.raises(sf.TrajectoryError, match=r"steps.jsonl: is a pipe"):
        LineFile(tmp_path / "steps.jsonl", sf.TrajectoryError)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "file/below"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_path_that_cannot_be_is_an_error_of_ours(tmp_path: Path, writer: str, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(sf.ScoreError, match="cannot be written"):
        WRITERS[writer](tmp_path / name)


HOLDER = """
import sys
from pathlib import Path
from segflow.store.replacement import beside
with beside(Path(sys.argv[1])) as partial:
    partial.write_bytes(b"half")
    print(partial.name, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("writer", WRITERS)
def test_the_next_save_removes_what_a_killed_one_left_of_that_file_and_nothing_else(
    tmp_path: Path, writer: str
) -> None:
    path = tmp_path / "mine"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    under_way = process.stdout.readline().strip()
    others = ["mine.partial", "mine.0123ABCD.partial", "other.01234567.partial", "mine.2.01234567.partial"]
    for name in (*others, "mine.01234567.partial"):
        (tmp_path / name).write_bytes(b"half")
    WRITERS[writer](path)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "mine", under_way])  # the one under way stays
    process.kill()
    process.communicate()
    WRITERS[writer](path)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "mine"])


def test_where_there_are_no_locks_nothing_is_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with beside(tmp_path / "mine") as partial:
        write_json(tmp_path / "mine", {})
        assert partial.exists() and partial_of(partial.name) == "mine"


def test_files_of_the_users_in_a_store_stay_whatever_they_are_called(tmp_path: Path) -> None:
    store = written(tmp_path)
    for name in ("notes.partial", "x.12345678.partial", "units/x.npy.12345678.partial", "manifest/x.12345678.partial"):
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "holder.json.12345678.partial").mkdir()
    assert not store.leftovers()
    with store.locked("test"):
        pass
    assert cli.main(["store", "gc", str(tmp_path)]) == 0
    assert len(list(tmp_path.rglob("*.partial"))) == 5


# A disk without room, for every call that writes


def test_without_a_free_byte_the_tools_start_whatever_call_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = written(tmp_path)
    store.write("orphan", tensors(), MADE)
    store.entry_path("orphan").unlink()
    with store.locked("fit"):
        pass  # makes the lock's file

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    real = os.open
    monkeypatch.setattr(
        os, "open", lambda p, flags, *m: full() if flags & os.O_EXCL and not os.path.exists(p) else real(p, flags, *m)
    )
    for name in ("write", "fsync", "rename", "replace"):
        monkeypatch.setattr(files.os, name, full)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert [cli.main(["store", tool, str(tmp_path)]) for tool in ("ls", "verify", "gc", "verify")] == [0] * 4
    assert "1 removed" in capsys.readouterr().out and not store.unit_path("orphan").exists()
    assert same(read(store), tensors())
