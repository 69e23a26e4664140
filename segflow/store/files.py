"""Files: written whole or not at all, read in bounded memory and without trusting them.

All that the engine writes is written here: safetensors, JSON, and NumPy's arrays of numbers; never code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..arguments import shown
from ..errors import SegflowError, StoreError
from .json_form import Form, fitting, parse_json
from .replacement import beside, check_target, naming, put_in_place

Tensors = dict[str, Tensor]
Shape = Sequence[int | None]
Kind = Literal["real", "nonnegative", "whole"]
_ROUNDING = 1e-4  # by so much of the largest a number may be below 0 and count as 0
_LARGEST_JSON = 64 << 20  # bytes
_PIECE = 1 << 20
_MAKE_ANEW = "Restore it or make it anew."
_digests: dict[tuple[int, ...], str] = {}  # sha256 by what the file looked like: device, inode, size, times


def write_file(path: Path, content: bytes, error: type[SegflowError] = StoreError) -> None:
    """Write `content` so that `path` holds either its old content or all of the new one, also after a power cut."""

    def fill(partial: Path) -> None:
        partial.write_bytes(content)

    _replace(path, fill, len(content), error)


def write_json(path: Path, content: Any, error: type[SegflowError] = StoreError) -> None:
    """Write `content` as readable JSON, atomically; `error` for what `read_json` would refuse."""
    try:
        text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
        parse_json(text)
    except (TypeError, ValueError, RecursionError) as problem:
        raise error(f"{path}: not written, for JSON cannot hold it ({problem}).") from problem
    write_file(path, f"{text}\n".encode(), error)


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

    _replace(path, fill, expected, error, described_in)
    return {"bytes": path.stat().st_size, "sha256": file_digest(path, error)}


@contextmanager
def writing_array(
    path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], error: type[SegflowError] = StoreError
) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a NumPy file of rows that come a few at a time, atomically: `path` appears once all are there."""
    size = dtype.itemsize * int(np.prod(shape))
    check_target(path, error)
    with ExitStack() as until_done:
        with naming(path, size, error):
            partial = until_done.enter_context(beside(path))
            file = until_done.enter_context(open(partial, "wb"))
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_2_0(file, header)

        def write(rows: np.ndarray) -> None:
            with naming(path, size, error):
                file.write(np.ascontiguousarray(rows, dtype).tobytes())

        yield write
        with naming(path, size, error):
            file.close()
            put_in_place(partial, path)


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
        check_target(path, error)
        with naming(path, 0, error):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, line: str) -> None:
        """Append one line; what of it is on disk where that fails has no end of line."""
        content = line.encode() + b"\n"
        with naming(self._path, len(content), self._error):
            if os.write(self._descriptor, content) < len(content):
                raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        """Flush the file to disk and let go of it; nothing may be appended afterwards."""
        with suppress(OSError):
            os.fsync(self._descriptor)
        os.close(self._descriptor)


def read_content(path: Path, error: type[SegflowError], most: int | None = None) -> bytes:
    """The content of a regular file of up to `most` bytes."""
    size = _regular(path, error).st_size
    if most is not None and size > most:
        raise error(f"{path}: {size:,} bytes, expected at most {most:,}. Restore it or make it anew.")
    try:
        return path.read_bytes()
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem}). Restore it or make it anew.") from problem


def read_lines(path: Path, sha256: str | None, error: type[SegflowError]) -> list[str]:
    """The whole lines of a text file, its checksum verified where one is known; a rest without an end is left out."""
    _verify(path, sha256, error)
    try:
        return read_content(path, error).decode().split("\n")[:-1]
    except UnicodeDecodeError as problem:
        raise error(f"{path}: no text ({problem}). Restore it or make it anew.") from problem


def read_json(path: Path, error: type[SegflowError], form: Form = object) -> Any:
    """Read JSON of the form that is expected (see `json_form`); anything else raises `error` naming the file."""
    content = read_content(path, error, _LARGEST_JSON)
    try:
        found = parse_json(content)
    except ValueError as problem:
        raise error(f"{path}: not readable as JSON ({problem}). Restore it or make it anew.") from problem
    try:
        return fitting(found, form)
    except ValueError as problem:
        raise error(f"{path}: damaged ({problem}). Restore it or make it anew.") from problem


class TensorFile:
    """A safetensors file whose checksum was verified, read tensor by tensor.

    Args:
        sha256: the expected checksum, where one is known.
        error: the kind of error that a bad file raises.
        advice: what to do where a tensor is absent or other than expected.
    """

    def __init__(self, path: Path, sha256: str | None, error: type[SegflowError], advice: str = _MAKE_ANEW):
        self.path, self.advice, self._error = path, advice, error
        _regular(path, error)
        _verify(path, sha256, error)
        with self._reading():
            self._file: Any = safetensors.safe_open(str(path), framework="pt")

    def names(self) -> list[str]:
        """The tensors' names, in order."""
        return sorted(self._file.keys())

    def layout(self, name: str) -> tuple[tuple[int, ...], str]:
        """A tensor's shape, and its dtype as the format writes it ("F32"), without reading its numbers."""
        with self._reading():
            held = self._file.get_slice(name)
            return tuple(held.get_shape()), str(held.get_dtype())

    def tensor(self, name: str, shape: Shape | None = None, kind: Kind | None = None) -> Tensor:
        """One tensor, on the CPU; one that is absent, or other than expected, is an error.

        shape: None for any; a None in it is any size. kind: "real" for finite floating-point numbers, "nonnegative"
        for such that are at least 0 to rounding, "whole" for whole ones, None for any.
        """
        if name not in self._file.keys():  # noqa: SIM118
            raise self._error(f"{self.path}: holds no tensor {name!r}, only {shown(self.names()[:4])}. {self.advice}")
        with self._reading():
            stored = tuple(self._file.get_slice(name).get_shape())
            if shape is None or _agrees(stored, shape):
                tensor: Tensor = self._file.get_tensor(name).clone()
                self._check_kind(name, tensor, kind)
                return tensor
        raise self._error(f"{self.path}: {name!r} has shape {stored}, expected {tuple(shape)}. {self.advice}")

    def _check_kind(self, name: str, tensor: Tensor, kind: Kind | None) -> None:
        real = tensor.is_floating_point()
        whole = not real and not tensor.is_complex() and tensor.dtype != torch.bool
        found = ""
        if kind is not None and not (whole if kind == "whole" else real):
            found = f"is {tensor.dtype}"
        elif kind in ("real", "nonnegative") and not torch.isfinite(tensor).all():
            found = "holds numbers that are not finite"
        elif kind == "nonnegative" and tensor.numel() and tensor.min() < -_ROUNDING * tensor.abs().max():
            found = f"holds {tensor.min().item():g}"
        if found:
            raise self._error(f"{self.path}: {name!r} {found}, expected {kind} numbers. {self.advice}")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError, AttributeError, KeyError) as problem:
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
    if not all(isinstance(part, str) for part in parts):
        raise error(f"{root}: {shown(parts)} is no path below it. Restore the folder.")
    path = root.joinpath(*parts)
    if path.is_relative_to(root) and ".." not in path.relative_to(root).parts:
        link = first_link(root, path, error)
        if link is None:
            return path
        raise error(f"{link}: leads out of {root} (to {os.readlink(link)}). Remove the link, or restore the folder.")
    raise error(f"{path}: leads out of {root}. Restore the folder.")


def first_link(root: Path, path: Path, error: type[SegflowError] = StoreError) -> Path | None:
    """The first symbolic link on the way from `root` to a path below it; None if there is none."""
    place = root
    for part in path.relative_to(root).parts:
        place /= part
        try:
            if stat.S_ISLNK(place.lstat().st_mode):
                return place
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as problem:
            raise error(f"{shown(str(place))}: cannot be looked at ({problem}). Restore the folder.") from problem
    return None


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


def _agrees(stored: tuple[int, ...], shape: Shape) -> bool:
    return len(stored) == len(shape) and all(want in (None, size) for size, want in zip(stored, shape, strict=True))


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


def _replace(
    path: Path,
    fill: Callable[[Path], None],
    size: int,
    error: type[SegflowError],
    described_in: Path | None = None,
) -> None:
    """Have `fill` write a file beside `path`, and put it in `path`'s place."""
    check_target(path, error)
    with naming(path, size, error), beside(path) as partial:
        fill(partial)
        put_in_place(partial, path, described_in)
