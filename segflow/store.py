"""Units of safetensors with a manifest: the only module that writes to disk for the engine.

Layout of a store:

    manifest.json               {"format": 1, "units": {name: {"bytes", "sha256", "made_from"}}}
    units/<name>.safetensors    the tensors of one unit; a name is words joined by "/"

A unit is committed by write, flush to disk, rename, and the manifest last, so a unit named in the manifest is
whole. `made_from` binds it to what it was computed from; reading it for something else is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import SegflowError, StoreError

FORMAT = 1
_ROUNDING = 1e-4
Tensors = dict[str, Tensor]
MadeFrom = Mapping[str, Any]
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


def write_file(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds either its old content or all of the new one, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as readable JSON, atomically."""
    write_file(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, error: type[SegflowError]) -> Any:
    """Read JSON; a file that is missing or is not JSON raises `error` naming it."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise error(f"{path}: no such file.") from None
    except (OSError, ValueError) as problem:
        raise error(f"{path}: not readable as JSON ({problem}). Restore it or make it anew.") from problem


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> dict[str, Any]:
    """Write tensors atomically as safetensors; returns {"bytes", "sha256"} of the file."""
    cpu = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    content = safetensors.torch.save(cpu, metadata)
    write_file(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_tensors(path: Path, sha256: str | None, error: type[SegflowError]) -> Tensors:
    """Read a safetensors file, verifying its checksum where one is known."""
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem}). Restore it or make it anew.") from problem
    if sha256 is not None:
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise error(
                f"{path}: damaged, its {len(content)} bytes have sha256 {found[:16]}..., "
                f"expected {sha256[:16]}.... Delete the file to have it made anew, or restore it."
            )
    try:
        return safetensors.torch.load(content)
    except SafetensorError as problem:
        raise error(f"{path}: not a whole safetensors file ({problem}). Restore it or make it anew.") from problem


def file_digest(path: Path, error: type[SegflowError]) -> str:
    """sha256 of a file's bytes, read in pieces."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem}).") from problem
    return digest.hexdigest()


class Store:
    """A folder of named units, each bound to what it was made from.

    Args:
        root: the folder; it is created at the first write.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)
        self._manifest = self.root / "manifest.json"
        # The manifest's units as last read, with what the file looked like then.
        self._read: tuple[tuple[int, ...], dict[str, dict[str, Any]]] | None = None

    def units(self) -> dict[str, dict[str, Any]]:
        """Every committed unit with its size, checksum and what it was made from."""
        try:
            stat = self._manifest.stat()
        except OSError:
            return {}
        look = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._read is None or self._read[0] != look:
            self._read = (look, self._parsed())
        return self._read[1]

    def _parsed(self) -> dict[str, dict[str, Any]]:
        content = read_json(self._manifest, StoreError)
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT or not isinstance(content.get("units"), dict):
            raise StoreError(
                f"{self._manifest}: store format {found!r}, this segflow reads format {FORMAT}. "
                "Use another store folder, or the segflow version that made this one."
            )
        units: dict[str, dict[str, Any]] = content["units"]
        for name, entry in units.items():
            if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256", "made_from"}:
                raise StoreError(f"{self._manifest}: damaged at unit {name!r}. Delete the store, or restore the file.")
        return units

    def __contains__(self, name: str) -> bool:
        """True if the unit was committed and its file is still there."""
        return name in self.units() and self._path(name).exists()

    def read(self, name: str, made_from: MadeFrom) -> Tensors:
        """The unit's tensors, on the CPU.

        made_from: what the caller would make it from; each key that is given must agree with what was stored.
        Raises StoreError if the unit is absent, damaged, or was made from something else.
        """
        units = self.units()
        if name not in units:
            raise StoreError(f"{self.root}: no unit {name!r}. Run Analyzer.fit() with this store first.")
        self._check(name, units[name]["made_from"], made_from)
        return read_tensors(self._path(name), str(units[name]["sha256"]), StoreError)

    def write(self, name: str, tensors: Tensors, made_from: MadeFrom) -> None:
        """Commit one unit; an older unit of that name is replaced."""
        entry = write_tensors(self._path(name), tensors)
        units = dict(self.units())
        units[name] = {**entry, "made_from": dict(made_from)}
        write_json(self._manifest, {"format": FORMAT, "units": units})

    def get_or_make(self, name: str, made_from: MadeFrom, make: Callable[[], Tensors]) -> Tensors:
        """The committed unit if there is one made from the same, else what `make()` returns, committed."""
        if name not in self:
            self.write(name, make(), made_from)
        return self.read(name, made_from)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise StoreError(f"{name!r} is not a unit's name: words of letters, digits, '.', '_', '-' joined by '/'.")
        return self.root / "units" / f"{name}.safetensors"

    def _check(self, name: str, stored: Any, asked: MadeFrom) -> None:
        now = json.loads(json.dumps(asked))
        if not isinstance(stored, dict):
            raise StoreError(f"{self._manifest}: damaged at unit {name!r}. Delete the store, or restore the file.")
        differing = [key for key in now if not _agree(stored.get(key), now[key])]
        if differing:
            sides = "; ".join(f"{key}: {_difference(stored.get(key), now[key])}" for key in differing)
            raise StoreError(
                f"{self.root}: unit {name!r} was made from something else ({sides}). "
                "Use another store folder for the new setting, or delete this one to make it anew."
            )


def _agree(stored: Any, now: Any) -> bool:
    """Equal, numbers up to what another machine or thread count may round differently."""
    if isinstance(now, float) and isinstance(stored, float):
        return math.isclose(stored, now, rel_tol=_ROUNDING, abs_tol=_ROUNDING)
    if isinstance(now, list) and isinstance(stored, list) and len(stored) == len(now):
        return all(_agree(*pair) for pair in zip(stored, now, strict=True))
    return bool(stored == now)


def _difference(stored: Any, now: Any) -> str:
    """Both sides; of long lists only how many entries differ, and the first that do."""
    if isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now) > 3:
        pairs = [pair for pair in zip(stored, now, strict=True) if not _agree(*pair)]
        return f"{len(pairs)} of {len(now)} differ, the first: {_difference(*pairs[0])}"
    return f"stored {stored!r}, now {now!r}"
