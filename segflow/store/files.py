"""Files: written whole or not at all, read in bounded memory and without trusting them.

All that the engine writes is written here: safetensors, JSON, and NumPy's arrays of numbers; never code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import SegflowError, StoreError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
Tensors = dict[str, Tensor]
_LARGEST_JSON = 64 << 20  # bytes
_PIECE = 1 << 20
_PARTIAL = re.compile(r".+\.[0-9a-f]{8}\.partial")  # the name of a file that is being written
_digests: dict[tuple[int, ...], str] = {}  # sha256 by what the file looked like: device, inode, size, times


def is_partial(name: str) -> bool:
    """Whether this module gave a file its name while it wrote it."""
    return _PARTIAL.fullmatch(name) is not None


def write_file(path: Path, content: bytes, error: type[SegflowError] = StoreError) -> None:
    """Write `content` so that `path` holds either its old content or all of the new one, also after a power cut."""

    def fill(partial: Path) -> None:
        partial.write_bytes(content)

    _commit(path, fill, len(content), error)


def write_json(path: Path, content: Any, error: type[SegflowError] = StoreError) -> None:
    """Write `content` as readable JSON, atomically."""
    write_file(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode(), error)


def write_tensors(
    path: Path,
    tensors: Tensors,
    metadata: dict[str, str] | None = None,
    error: type[SegflowError] = StoreError,
    described_in: Path | None = None,
) -> dict[str, Any]:
    """Write tensors atomically as safetensors; returns {"bytes", "sha256"} of the file.

    described_in: a file that says what `path` holds; it goes before `path` changes, and the caller writes it anew.
    """
    separate = _in_separate_memory(tensors)
    expected = sum(tensor.nbytes for tensor in separate.values())

    def fill(partial: Path) -> None:
        safetensors.torch.save_file(separate, partial, metadata)

    _commit(path, fill, expected, error, described_in)
    return {"bytes": path.stat().st_size, "sha256": file_digest(path, error)}


@contextmanager
def writing_array(
    path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], error: type[SegflowError] = StoreError
) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a NumPy file of rows that come a few at a time, atomically: `path` appears once all are there."""
    partial = _partial(path)
    size = dtype.itemsize * int(np.prod(shape))

    @contextmanager
    def naming_the_file() -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise error(_reason(path, size, problem)) from problem

    def write(rows: np.ndarray) -> None:
        with naming_the_file():
            file.write(np.ascontiguousarray(rows, dtype).tobytes())

    try:
        with naming_the_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(partial, "wb")  # noqa: SIM115
        with file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_2_0(file, header)
            yield write
        with naming_the_file():
            _flush(partial)
            os.replace(partial, path)
            _flush(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """Append one JSON object as a line of its own; OSError if that fails."""
    line = (json.dumps(content, sort_keys=True) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        end = os.lseek(descriptor, 0, os.SEEK_END)
        torn = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"  # the writer before was killed
        os.write(descriptor, b"\n" * torn + line)
    finally:
        os.close(descriptor)


class LineFile:
    """A file that grows by whole lines; `append` hands each to the system, so that it outlives the process.

    Raises `error` naming the file where it cannot be written.
    """

    def __init__(self, path: Path, error: type[SegflowError] = StoreError) -> None:
        self._path, self._error = path, error
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as problem:
            raise error(_reason(path, 0, problem)) from problem

    def append(self, line: str) -> None:
        """Append one line; what of it is on disk where that fails has no end of line."""
        content = line.encode() + b"\n"
        try:
            if os.write(self._descriptor, content) < len(content):
                raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as problem:
            raise self._error(_reason(self._path, len(content), problem)) from problem

    def close(self) -> None:
        """Flush the file to disk and let go of it; nothing may be appended afterwards."""
        with suppress(OSError):
            os.fsync(self._descriptor)
        os.close(self._descriptor)


def read_lines(path: Path, sha256: str | None, error: type[SegflowError]) -> list[str]:
    """The whole lines of a text file, its checksum verified where one is known; a rest without an end is left out."""
    _regular(path, error)
    _verify(path, sha256, error)
    try:
        return path.read_text().split("\n")[:-1]
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be read ({problem}). Restore it or make it anew.") from problem


def read_json(path: Path, error: type[SegflowError]) -> Any:
    """Read JSON; a file that is missing, huge, no regular file or not JSON raises `error` naming it."""
    size = _regular(path, error).st_size
    if size > _LARGEST_JSON:
        raise error(f"{path}: {size:,} bytes of JSON, expected at most {_LARGEST_JSON:,}. Restore it or make it anew.")
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path}: not readable as JSON ({problem}). Restore it or make it anew.") from problem


class TensorFile:
    """A safetensors file whose checksum was verified, read tensor by tensor.

    Args:
        sha256: the expected checksum, where one is known.
        error: the kind of error that a bad file raises.
    """

    def __init__(self, path: Path, sha256: str | None, error: type[SegflowError]):
        self.path, self._error = path, error
        _regular(path, error)
        _verify(path, sha256, error)
        with self._reading():
            self._file: Any = safetensors.safe_open(str(path), framework="pt")

    def names(self) -> list[str]:
        """The tensors' names, in order."""
        return sorted(self._file.keys())

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """One tensor, on the CPU; one that is absent or of another shape than expected is an error."""
        if name not in self._file.keys():  # noqa: SIM118
            raise self._error(
                f"{self.path}: holds no tensor {name!r}, only {self.names()[:4]}. Restore it or make it anew."
            )
        with self._reading():
            stored = tuple(self._file.get_slice(name).get_shape())
            if shape is None or stored == tuple(shape):
                tensor: Tensor = self._file.get_tensor(name).clone()
                return tensor
        raise self._error(
            f"{self.path}: {name!r} has shape {stored}, expected {tuple(shape)}. Restore it or make it anew."
        )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as problem:
            raise self._error(
                f"{self.path}: not a whole safetensors file ({problem}). Restore it or make it anew."
            ) from problem


def read_tensors(path: Path, sha256: str | None, error: type[SegflowError]) -> Tensors:
    """Read a whole safetensors file, verifying its checksum where one is known."""
    file = TensorFile(path, sha256, error)
    return {name: file.tensor(name) for name in file.names()}


def file_digest(path: Path, error: type[SegflowError]) -> str:
    """sha256 of a file's bytes, read in pieces; remembered as long as the file looks the same."""
    status = _regular(path, error)
    look = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if look not in _digests:
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
        except OSError as problem:
            raise error(f"{path}: cannot be read ({problem}). Restore it or make it anew.") from problem
        _digests[look] = digest.hexdigest()
    return _digests[look]


def _verify(path: Path, sha256: str | None, error: type[SegflowError]) -> None:
    """Raise `error` unless the file has this checksum, where one is known."""
    if sha256 is not None and (now := file_digest(path, error)) != sha256:
        raise error(
            f"{path}: damaged, its {path.stat().st_size:,} bytes have sha256 {now[:16]}..., expected {sha256[:16]}.... "
            "Delete the file to have it made anew, or restore it."
        )


def inside(root: Path, *parts: str, error: type[SegflowError] = StoreError) -> Path:
    """The path below `root`; an error if it leaves the folder, by its name or by a symbolic link."""
    path = root.joinpath(*parts)
    real, base = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if ".." in path.relative_to(root).parts or real != base / path.relative_to(root):
        raise error(f"{path}: leads out of {root} (to {real}). Remove the link, or restore the folder.")
    return path


def _regular(path: Path, error: type[SegflowError]) -> os.stat_result:
    """The stat of a file; an error if it is missing or no regular file (a pipe would block its reader)."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise error(f"{path}: no such file. Restore it or make it anew.") from None
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be read ({problem}). Restore it or make it anew.") from problem
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path}: not a regular file. Restore it or make it anew.")
    return status


def _in_separate_memory(tensors: Tensors) -> Tensors:
    """The tensors on the CPU, none sharing memory with another, as safetensors wants them."""
    separate: Tensors = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        if plain.untyped_storage().nbytes() != plain.numel() * plain.element_size() or plain.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.data_ptr())
        separate[name] = plain
    return separate


def _partial(path: Path) -> Path:
    """A name of its own for what will be `path`, or was."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


def _commit(
    path: Path,
    fill: Callable[[Path], None],
    size: int,
    error: type[SegflowError],
    described_in: Path | None = None,
) -> None:
    """Have `fill` write a file beside `path`, flush it to disk, and put it in `path`'s place."""
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(partial)
        _flush(partial)
        with _withdrawn(described_in):
            os.replace(partial, path)
        _flush(path.parent)
    except BaseException as problem:
        with suppress(OSError):
            partial.unlink()
        if isinstance(problem, OSError | SafetensorError):
            raise error(_reason(path, size, problem)) from problem
        raise


@contextmanager
def _withdrawn(path: Path | None) -> Iterator[None]:
    """Remove a file before the block, also on disk; if the block fails it comes back, if the process is killed not."""
    if path is None or not path.exists():
        yield
        return
    aside = _partial(path)
    os.rename(path, aside)
    try:
        _flush(path.parent)
        yield
    except BaseException:
        os.rename(aside, path)
        raise
    with suppress(OSError):  # who holds the lock next removes it
        aside.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(path: Path, size: int, problem: Exception) -> str:
    """Why a file could not be written, and what to do."""
    if getattr(problem, "errno", None) in NO_ROOM or "No space left" in str(problem) or "quota" in str(problem):
        folder = next(parent for parent in path.parents if parent.exists())
        free = shutil.disk_usage(folder).free
        advice = f"the disk is full: {size:,} bytes are needed, {free:,} are free. Make room"
    elif getattr(problem, "errno", None) == errno.EROFS or "Read-only" in str(problem):
        advice = "the file system is read-only. Use a folder that can be written to"
    else:
        advice = "Look at the folder's permissions and at the disk"
    return f"{path}: cannot be written ({problem}); {advice}, and start again: what was committed before is kept."
