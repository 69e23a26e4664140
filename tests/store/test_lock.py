"""One run at a time has a store; who has it is named, and who died with it is taken over."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import pytest

import segflow as sf
from segflow.store import files, lock
from segflow.store.lock import hold, holder

HOLD = """
import errno, sys, time
from pathlib import Path
import filelock
from segflow.store import lock
from segflow.store.lock import hold
def without_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")
if sys.argv[2:] == ["without locks"]:
    filelock.FileLock.acquire, lock._BEAT = without_locks, 0.1
with hold(Path(sys.argv[1]), "fit"):
    print("held", flush=True)
    time.sleep(60)
"""


def _held_elsewhere(folder: Path, *how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_another_process_is_refused_by_the_holders_name_and_a_dead_one_is_taken_over(tmp_path: Path) -> None:
    process = _held_elsewhere(tmp_path)
    try:
        for _ in range(2):
            with (
                pytest.raises(sf.StoreError, match=rf"in use by process {process.pid} on .* \(fit, since 20"),
                hold(tmp_path, "score"),
            ):
                pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    with hold(tmp_path, "score") as held:
        assert held.took_over is not None and held.took_over.process.pid == process.pid
        now = holder(tmp_path)
        assert now is not None and now.process.pid == os.getpid() and now.process.is_alive()
    assert holder(tmp_path) is None
    with hold(tmp_path, "score") as held:
        assert held.took_over is None


def test_the_same_process_is_refused_too_also_from_a_thread(tmp_path: Path) -> None:
    problems: list[BaseException] = []

    def again() -> None:
        try:
            with hold(tmp_path, "again"):
                pass
        except sf.StoreError as problem:
            problems.append(problem)

    with hold(tmp_path, "fit"):
        again()
        thread = threading.Thread(target=again)
        thread.start()
        thread.join()
    assert len(problems) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"pid": 3}', "\x00" * 100, "WRONG KINDS"])
def test_a_damaged_note_does_not_stop_anybody(tmp_path: Path, content: str) -> None:
    wrong_kinds = json.dumps({"host": [], "pid": "x", "born": None, "purpose": 3, "since": {}})
    (tmp_path / "holder.json").write_text(wrong_kinds if content == "WRONG KINDS" else content)
    with hold(tmp_path, "fit") as held:
        assert held.took_over is None


def _foreign(folder: Path) -> None:
    note = {"host": "elsewhere", "pid": 7, "born": 1.0, "purpose": "fit", "since": "2026"}
    (folder / "holder.json").write_text(json.dumps(note))
    assert socket.gethostname() != "elsewhere"


def _without_locks(*_: object) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


def _in_older_filelock(*_: object) -> None:
    raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")


def _mounted(fstype: str, opts: str) -> Callable[..., list[Any]]:
    return lambda **_: [SimpleNamespace(mountpoint="/", fstype=fstype, opts=opts)]


# How a system may be without locks, or with locks that other machines do not see.
WEAK: dict[str, tuple[Any, str, Any]] = {
    "none": (filelock.FileLock, "acquire", _without_locks),
    "none, as older versions of filelock say it": (filelock.FileLock, "acquire", _in_older_filelock),
    "NFS that keeps locks to itself": (lock.psutil, "disk_partitions", _mounted("nfs4", "rw,hard,local_lock=flock")),
    "Lustre that keeps locks to itself": (lock.psutil, "disk_partitions", _mounted("lustre", "rw,localflock")),
    "in user space": (lock.psutil, "disk_partitions", _mounted("fuse.sshfs", "rw")),
}


@contextlib.contextmanager
def _touched(note: Path) -> Iterator[None]:
    done = threading.Event()

    def touch() -> None:
        while not done.wait(0.02):
            os.utime(note)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("system", WEAK)
def test_where_locks_are_weak_a_holder_on_another_machine_counts_as_long_as_it_touches_its_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setattr(lock, "_BEAT", 0.1)
    monkeypatch.setattr(*WEAK[system])
    _foreign(tmp_path)
    refused = pytest.raises(sf.StoreError, match="in use by process 7 on elsewhere")
    with _touched(tmp_path / "holder.json"), refused, hold(tmp_path, "fit"):
        pass
    with hold(tmp_path, "fit") as held:
        assert held.took_over is not None and held.took_over.process.host == "elsewhere"
        first = (tmp_path / "holder.json").stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while (tmp_path / "holder.json").stat().st_mtime_ns == first:  # this holder touches its own
            assert time.monotonic() < deadline
        (tmp_path / "holder.json").unlink()  # a vanished note is no reason to fail
        time.sleep(0.15)
    assert holder(tmp_path) is None


def test_where_locks_reach_other_machines_their_dead_holder_is_taken_over_at_once_and_nothing_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_is_touched", None)
    _foreign(tmp_path)
    threads = threading.active_count()
    with hold(tmp_path, "fit") as held:
        assert held.took_over is not None and held.took_over.process.host == "elsewhere"
        assert threading.active_count() == threads


def test_without_locks_a_process_is_refused_by_the_holders_name_and_a_dead_one_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_BEAT", 0.1)
    monkeypatch.setattr(*WEAK["none"])
    process = _held_elsewhere(tmp_path, "without locks")
    try:
        with (
            pytest.raises(sf.StoreError, match=rf"in use by process {process.pid} on .* \(fit, since 20"),
            hold(tmp_path, "score"),
        ):
            pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    with hold(tmp_path, "score") as held:
        assert held.took_over is not None and held.took_over.process.pid == process.pid
        with pytest.raises(sf.StoreError, match=f"in use by process {os.getpid()}"), hold(tmp_path, "again"):
            pass
        assert holder(tmp_path) is not None
    assert holder(tmp_path) is None


def test_of_two_that_begin_at_once_without_locks_the_later_note_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_BEAT", 0.1)
    monkeypatch.setattr(*WEAK["none"])
    monkeypatch.setattr(lock.time, "sleep", lambda _seconds: _foreign(tmp_path))  # the other writes its note now
    with pytest.raises(sf.StoreError, match="in use by process 7 on elsewhere"), hold(tmp_path, "fit"):
        pass
    assert holder(tmp_path) is not None


def test_without_locks_who_finds_no_note_and_is_slow_to_write_its_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_BEAT", 0.1)
    monkeypatch.setattr(*WEAK["none"])
    real, first = lock._claim, contextlib.ExitStack()

    def after_another(folder: Path, purpose: str) -> Any:
        monkeypatch.setattr(lock, "_claim", real)
        monkeypatch.setattr(lock, "_remove_note", lambda _folder: None)  # there was none to remove
        first.enter_context(hold(folder, "quick"))
        return real(folder, purpose)

    monkeypatch.setattr(lock, "_claim", after_another)
    with first, pytest.raises(sf.StoreError, match=r"in use by process .*quick"), hold(tmp_path, "slow"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_whatever_a_system_without_locks_says_the_note_is_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def without(*_: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(lock, "_BEAT", 0.05)
    monkeypatch.setattr(fcntl, "flock", without)
    with hold(tmp_path, "fit"), pytest.raises(sf.StoreError, match="in use by process"), hold(tmp_path, "score"):
        pass
    assert holder(tmp_path) is None


def test_without_locks_and_without_room_an_empty_note_is_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock, "_BEAT", 0.05)
    monkeypatch.setattr(*WEAK["none"])
    _foreign(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "write", full)
        with hold(tmp_path, "gc"), pytest.raises(sf.StoreError, match="in use by"), hold(tmp_path, "fit"):
            pass
    assert not (tmp_path / "holder.json").exists()


def test_other_errors_of_the_lock_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(filelock.FileLock, "acquire", broken)
    with pytest.raises(sf.StoreError, match=r"cannot be locked .*Input/output error"), hold(tmp_path, "fit"):
        pass


def test_a_disk_without_room_for_the_note_is_locked_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    _foreign(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        with hold(tmp_path, "gc") as held:
            assert held.took_over is not None and holder(tmp_path) is None  # the dead holder's note is not left there
            with pytest.raises(sf.StoreError, match="in use by another process"), hold(tmp_path, "fit"):
                pass
    assert not list(tmp_path.glob("*.partial"))
