"""The lock that keeps two runs out of one store.

The system's lock on `lock` ends with its process; `holder.json`, the note, says who that is. Where the file system has
no locks, or keeps them to one machine, the note is the lock as well: its holder touches it every two seconds, and who
finds the note of a process that it cannot see watches for a while whether it is touched.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock
import psutil

from ..errors import StoreError
from ..runtime.process import ProcessIdentity
from .files import read_json, write_json
from .json_form import LINE
from .replacement import NO_ROOM

_BEAT = 2.0  # seconds between two touches of a note that is the lock
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_LOCAL_LOCKS = {"nolock", "local_lock=all", "local_lock=flock", "localflock", "nobrl"}  # options of NFS, Lustre and SMB
NOTE = "holder.json"
_FORM = {"host": LINE, "pid": range(1, 2**31), "born": float, "purpose": LINE, "since": LINE}
# Newer versions of filelock would lock softly, by a file that outlives its process, where the system has no locks.
_HARD = {"fallback_to_soft": False}
_OPTIONS: Any = _HARD if _HARD.keys() <= inspect.signature(filelock.BaseFileLock.__init__).parameters.keys() else {}


@dataclass(frozen=True)
class Holder:
    """Who holds a folder's lock, for what, and since when (UTC)."""

    process: ProcessIdentity
    purpose: str
    since: str

    def as_json(self) -> dict[str, Any]:
        """The note, as `holder` reads it."""
        return {**asdict(self.process), "purpose": self.purpose, "since": self.since}

    def __str__(self) -> str:
        return f"{self.process} ({self.purpose}, since {self.since})"


@dataclass(frozen=True)
class Held:
    """A lock that is held. took_over: the holder that died without letting go, if there was one."""

    took_over: Holder | None


@contextmanager
def hold(folder: Path, purpose: str) -> Iterator[Held]:
    """Hold the folder's lock for a while.

    Raises StoreError, naming the holder, if another run holds it. A read-only folder cannot be locked; it is left to
    the first write to fail.
    """
    with ExitStack() as until_done:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            locked = _lock(folder, until_done)
        except filelock.Timeout:
            raise _in_use(folder, holder(folder)) from None
        except OSError as problem:
            if os.access(folder, os.W_OK) or not folder.is_dir():
                raise StoreError(
                    f"{folder}: cannot be locked ({problem}). Look at the folder's permissions."
                ) from problem
            yield Held(None)
            return
        suffices = locked and _locks_reach_other_machines(folder)
        before = holder(folder)
        noted = os.path.lexists(folder / NOTE)  # whose note cannot be read, may be at work as well
        if noted and not suffices and _is_at_work(folder, before, locked):
            raise _in_use(folder, before)
        until_done.enter_context(_noted(folder, purpose) if suffices else _locked_by_note(folder, purpose))
        yield Held(before)


def holder(folder: Path) -> Holder | None:
    """Who holds the folder's lock, or held it last and died; None if nobody did or the note cannot be read."""
    try:
        note = read_json(folder / NOTE, StoreError, _FORM)
    except StoreError:
        return None
    return Holder(ProcessIdentity(note["pid"], note["host"], note["born"]), note["purpose"], note["since"])


def _lock(folder: Path, until_done: ExitStack) -> bool:
    """Take the system's lock; False where the file system has none. Raises filelock.Timeout if another holds it."""
    lock = filelock.FileLock(folder / "lock", timeout=0, thread_local=False, **_OPTIONS)
    try:
        lock.acquire()
    except NotImplementedError:  # how older versions of filelock say ENOSYS
        return False
    except OSError as problem:
        if problem.errno in _NO_LOCKS:
            return False
        raise
    until_done.callback(lock.release)
    return True


def _locks_reach_other_machines(folder: Path) -> bool:
    """False where the mount says that other machines do not see its locks, or may not (file systems in user space)."""
    real = folder.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if real.is_relative_to(mount.mountpoint)]
    if not mounts:
        return True
    mount = max(reversed(mounts), key=lambda mount: len(mount.mountpoint))  # the last of those on one folder
    return not mount.fstype.startswith("fuse") and not _LOCAL_LOCKS & set(mount.opts.split(","))


def _is_at_work(folder: Path, before: Holder | None, locked: bool) -> bool:
    """Whether a holder that the system's lock, if this process has it, does not tell of is still at work."""
    if before is not None and locked and before.process.is_here():
        return False
    return (before is not None and before.process.is_alive()) or _is_touched(folder)


def _is_touched(folder: Path) -> bool:
    """Whether the holder's note is touched while we look on; clocks are not compared."""
    with suppress(OSError):
        before = (folder / NOTE).stat().st_mtime_ns
        for _ in range(8):
            time.sleep(_BEAT / 4)
            if (folder / NOTE).stat().st_mtime_ns != before:
                return True
    return False


def _in_use(folder: Path, by: Holder | None) -> StoreError:
    return StoreError(
        f"{folder}: in use by {by or 'another process'}. Wait until it has ended, or use another store folder."
    )


@contextmanager
def _noted(folder: Path, purpose: str) -> Iterator[None]:
    """Say who holds the lock. That there is no room for the note stops nothing: `segflow store gc` makes room."""
    try:
        try:
            _write_note(folder, purpose)
        except StoreError as problem:
            if getattr(problem.__cause__, "errno", None) not in NO_ROOM:
                raise
            _remove_note(folder)  # of a holder that died
        yield
    finally:
        _remove_note(folder)


@contextmanager
def _locked_by_note(folder: Path, purpose: str) -> Iterator[None]:
    """Hold the lock by the note: it is touched until the block ends."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT):
            with suppress(OSError):
                os.utime(folder / NOTE)

    this_run, legible = _claim(folder, purpose)
    time.sleep(_BEAT / 4)
    if (now := holder(folder)) != this_run and legible:  # two began at once, and the note that was written last counts
        raise _in_use(folder, now)
    thread = threading.Thread(target=beat, name="segflow-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if holder(folder) in (this_run, None):
            _remove_note(folder)


def _claim(folder: Path, purpose: str) -> tuple[Holder, bool]:
    """Make the note of this run in place of a dead one's; StoreError where another run was quicker.

    Returns the holder, and whether the note tells it: on a full disk an empty note is the lock.
    """
    this_run = _this_run(purpose)
    _remove_note(folder)
    try:
        descriptor = os.open(folder / NOTE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise _in_use(folder, holder(folder)) from None
    except OSError as problem:
        raise StoreError(f"{folder}: cannot be locked ({problem}). Make room, or look at the permissions.") from problem
    content = json.dumps(this_run.as_json()).encode()
    try:
        with suppress(OSError):
            return this_run, os.write(descriptor, content) == len(content)
        return this_run, False
    finally:
        os.close(descriptor)


def _write_note(folder: Path, purpose: str) -> None:
    write_json(folder / NOTE, _this_run(purpose).as_json())


def _this_run(purpose: str) -> Holder:
    return Holder(ProcessIdentity.own(), purpose, datetime.now(timezone.utc).isoformat(timespec="seconds"))


def _remove_note(folder: Path) -> None:
    with suppress(OSError):
        (folder / NOTE).unlink()
