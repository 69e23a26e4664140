"""How a file is replaced: written beside its place, flushed to disk, and renamed, so that it is old or new, never half.

While it is written it is called like the file, a point, 8 hexadecimal digits and `.partial`, and its writer holds the
system's lock on it, which ends with the process: the next write of the same file removes those that nobody holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import SegflowError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_PARTIAL = re.compile(r"(.+)\.[0-9a-f]{8}\.partial")
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def partial_of(name: str) -> str | None:
    """The name of the file that one of this name is, or was, to become; None for a name that is not given here."""
    match = _PARTIAL.fullmatch(name)
    return match[1] if match else None


@contextmanager
def naming(path: Path, size: int, error: type[SegflowError]) -> Iterator[None]:
    """Errors of the system inside the block become `error`, which says that `path` cannot be written, and why."""
    try:
        yield
    except (OSError, SafetensorError) as problem:
        raise error(_reason(path, size, problem)) from problem


def check_target(path: Path, error: type[SegflowError]) -> None:
    """Raise `error` unless `path` is free, or a regular file: a link, a folder, a pipe or a device is not replaced."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as problem:
        raise error(_reason(path, 0, problem)) from problem
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise error(f"{path}: is {kind}, which is not written to or replaced. Give the path of a file.")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A new file beside `path`, to be written and put in its place; it is removed if the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    partial, descriptor = _begun(path)
    try:
        yield partial
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, path: Path, described_in: Path | None = None) -> None:
    """Flush a file to disk and rename it to `path`.

    described_in: a file that says what `path` holds. It is withdrawn before `path` changes, also on disk, and comes
    back if `path` does not change after all; who is killed on the way leaves `path` without it.
    """
    flush(partial)
    aside = None
    try:
        if described_in is not None and described_in.exists():
            aside = _partial(described_in)
            os.rename(described_in, aside)
            flush(aside.parent)
        os.replace(partial, path)
    except BaseException:
        if aside is not None and described_in is not None and partial.exists() and aside.exists():
            os.rename(aside, described_in)
        raise
    finally:
        if aside is not None and not partial.exists():
            with suppress(OSError):  # whoever holds the store's lock next removes it
                aside.unlink()
    flush(path.parent)


def flush(path: Path) -> None:
    """Have the system put a file's content, or a folder's list of names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial(path: Path) -> Path:
    """A name of its own for what will be `path`, or was."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


def _begun(path: Path) -> tuple[Path, int]:
    """A new, empty file beside `path`, and the descriptor through which this process holds the lock on it."""
    while True:
        partial = _partial(path)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # without locks nobody removes it either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(partial)):
                return partial, descriptor
        os.close(descriptor)  # it was taken for abandoned before its lock was held


def _remove_abandoned(path: Path) -> None:
    """Remove what killed writers of `path` left beside it; files that a living one writes, or others', stay."""
    with suppress(OSError):
        for name in os.listdir(path.parent):
            if partial_of(name) == path.name:
                _remove_if_abandoned(path.with_name(name))


def _remove_if_abandoned(partial: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()
        finally:
            os.close(descriptor)


def _reason(path: Path, size: int, problem: Exception) -> str:
    """Why a file could not be written, and what to do."""
    if getattr(problem, "errno", None) in NO_ROOM or "No space left" in str(problem) or "quota" in str(problem):
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        free = shutil.disk_usage(folder).free
        advice = f"the disk is full: {size:,} bytes are needed, {free:,} are free. Make room"
    elif getattr(problem, "errno", None) == errno.EROFS or "Read-only" in str(problem):
        advice = "the file system is read-only. Use a folder that can be written to"
    else:
        advice = "Look at the path, the folder's permissions and the disk"
    return f"{path}: cannot be written ({problem}); {advice}, and start again: what was committed before is kept."
