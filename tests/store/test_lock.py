"""One run at a time has a store; who has it is named, and who died with it is taken over."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import segflow as sf
from segflow.store import lock
from segflow.store.lock import hold, holder

HOLD = """
import sys, time
from pathlib import Path
from segflow.store.lock import hold
with hold(Path(sys.argv[1]), "fit"):
    print("held", flush=True)
    time.sleep(60)
"""


def _held_elsewhere(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
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
        assert held.took_over is not None and held.took_over["pid"] == process.pid
        now = holder(tmp_path)
        assert now is not None and now["pid"] == os.getpid() and lock.is_alive(now)
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


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"pid": 3}', "\x00" * 100])
def test_a_damaged_note_does_not_stop_anybody(tmp_path: Path, content: str) -> None:
    (tmp_path / "holder.json").write_text(content)
    with hold(tmp_path, "fit") as held:
        assert held.took_over is None


def _foreign(folder: Path) -> None:
    note = {"host": "elsewhere", "pid": 7, "born": 1.0, "purpose": "fit", "since": "2026"}
    (folder / "holder.json").write_text(json.dumps(note))


def test_a_holder_on_another_machine_counts_as_long_as_it_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_BEAT", 0.1)
    _foreign(tmp_path)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.02):
            os.utime(tmp_path / "holder.json")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(sf.StoreError, match="in use by process 7 on elsewhere"), hold(tmp_path, "fit"):
            pass
    finally:
        done.set()
        thread.join()
    with hold(tmp_path, "fit") as held:
        assert held.took_over is not None and held.took_over["host"] == "elsewhere"
    assert socket.gethostname() != "elsewhere"


def test_the_holder_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_BEAT", 0.02)
    with hold(tmp_path, "fit"):
        first = (tmp_path / "holder.json").stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while (tmp_path / "holder.json").stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
        (tmp_path / "holder.json").unlink()  # a vanished note is no reason to fail
        time.sleep(0.1)
