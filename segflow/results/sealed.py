"""Tensors in a file of the user's, with a checksum of all of them inside it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ..arguments import shown
from ..data.fingerprints import digest
from ..errors import ScoreError
from ..store.files import Tensors, read_tensors, write_tensors

_SEAL = "sha256"


def write_sealed(path: str | os.PathLike[str], tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write tensors and their checksum, atomically; ScoreError where the file cannot be written."""
    sealed = tensors | {_SEAL: as_bytes(digest(tensors))}
    write_tensors(_checked(path), sealed, metadata, ScoreError)


def read_sealed(path: str | os.PathLike[str], expected: set[str], what: str, writer: str) -> Tensors:
    """The tensors that `write_sealed` wrote; ScoreError where the file is damaged or lacks one that is expected.

    what: the kind of file, and writer: who writes it, for the message.
    """
    tensors = read_tensors(_checked(path), None, ScoreError)
    if not {*expected, _SEAL} <= set(tensors):
        raise ScoreError(f"{path}: not {what} (tensors {shown(sorted(tensors)[:4])}). Expected what {writer} wrote.")
    seal = tensors.pop(_SEAL)
    if seal.dtype != torch.uint8 or seal.tolist() != as_bytes(digest(tensors)).tolist():
        raise ScoreError(f"{path}: damaged, its content has another checksum. Restore it or make it anew.")
    return tensors


def _checked(path: object) -> Path:
    """The path; ScoreError where it is none."""
    try:
        return Path(path)  # type: ignore[arg-type]
    except TypeError as problem:
        raise ScoreError(f"path={shown(path)}: expected the path of a file, as text or a pathlib.Path.") from problem


def as_bytes(text: str) -> Tensor:
    """A text as a tensor of bytes."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
