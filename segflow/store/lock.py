"""The lock that keeps two runs out of one store.

The operating system's lock on `lock` does the work, and ends with its process. `holder.json` says who holds it;
where that lock does not reach other machines (some network file systems), its beat tells whether one is at work.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock
import psutil

from ..errors import StoreError
from .files import read_json, write_json

_BEAT = 2.0  # seconds between two touches of holder.json
_NAMES = ("host", "pid", "born", "purpose", "since")


@dataclass(frozen=True)
class Held:
    """A lock that is held. took_over: the identity of a holder that died without letting go, if there was one."""

    took_over: dict[str, Any] | None


@contextmanager
def hold(folder: Path, purpose: str) -> Iterator[Held]:
    """Hold the folder's lock for a while.

    Raises StoreError, naming the holder, if another run holds it. A read-only folder cannot be locked; it is left to
    the first write to fail.
    """
    lock = filelock.FileLock(folder / "lock", timeout=0, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise _in_use(folder, holder(folder)) from None
    except OSError as problem:
        if os.access(folder, os.W_OK) or not folder.is_dir():
            raise StoreError(f"{folder}: cannot be locked ({problem}). Look at the folder's permissions.") from problem
        yield Held(None)
        return
    try:
        before = holder(folder)
        if before is not None and before["host"] != socket.gethostname() and _beats(folder):
            raise _in_use(folder, before)
        with _beating(folder, purpose):
            yield Held(before)
    finally:
        lock.release()


def holder(folder: Path) -> dict[str, Any] | None:
    """Who holds the folder's lock, or held it last and died; None if nobody did or the note cannot be read."""
    try:
        found = read_json(folder / "holder.json", StoreError)
    except StoreError:
        return None
    if not isinstance(found, dict) or not set(_NAMES) <= set(found):
        return None
    return {name: found[name] for name in _NAMES}


def is_alive(found: dict[str, Any]) -> bool:
    """Whether a holder on this machine is still at work."""
    try:
        return found["host"] == socket.gethostname() and bool(
            psutil.Process(found["pid"]).create_time() == found["born"]
        )
    except (psutil.Error, TypeError, ValueError):
        return False


def _in_use(folder: Path, found: dict[str, Any] | None) -> StoreError:
    who = "another process"
    if found is not None:
        who = f"process {found['pid']} on {found['host']} ({found['purpose']}, since {found['since']})"
    return StoreError(f"{folder}: in use by {who}. Wait until it has ended, or use another store folder.")


def _beats(folder: Path) -> bool:
    """Whether the holder's note is touched while we look on; clocks are not compared."""
    with suppress(OSError):
        before = (folder / "holder.json").stat().st_mtime_ns
        for _ in range(8):
            time.sleep(_BEAT / 4)
            if (folder / "holder.json").stat().st_mtime_ns != before:
                return True
    return False


@contextmanager
def _beating(folder: Path, purpose: str) -> Iterator[None]:
    """Say who holds the lock, and touch the note now and then."""
    path, done = folder / "holder.json", threading.Event()
    own = psutil.Process()
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    identity = {"host": socket.gethostname(), "pid": own.pid, "born": own.create_time()}
    write_json(path, identity | {"purpose": purpose, "since": since})

    def beat() -> None:
        while not done.wait(_BEAT):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name="segflow-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(OSError):
            path.unlink()
