"""Looking after a store: what is in it, whether it is whole, and removing only what may go."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import StoreError
from .files import TensorFile, first_link, read_json, write_json
from .lock import hold
from .store import FORMAT, Entry, Store

BROKEN = ("damaged", "missing")


@dataclass(frozen=True)
class Finding:
    """One unit, or a file that belongs to none.

    state: "ok"; "stale" (a unit it was made of has changed since); "damaged" (its file or entry is not what was
    committed); "missing" (it has no file any more); "orphan" (a file without entry); "leftover" (a file not finished).
    why: what is wrong, for a damaged one.
    """

    name: str
    state: str
    bytes: int
    entry: Entry | None = None
    why: str = ""

    @property
    def made_from(self) -> str:
        """What the unit was made from, in short."""
        if self.entry is None:
            return self.why
        made_from = self.entry.made_from
        data = made_from.get("dataset")
        length = data.get("length") if isinstance(data, dict) else None
        facts = {
            "checkpoint": str(made_from["checkpoint"])[:8] if "checkpoint" in made_from else None,
            "examples": length,
            "seed": made_from.get("seed"),
            "dtype": str(made_from["dtype"]).removeprefix("torch.") if "dtype" in made_from else None,
        }
        short = ", ".join(f"{key} {str(value)[:80]}" for key, value in facts.items() if value is not None)
        return f"{short}; {self.why}" if self.why else short

    def as_json(self) -> dict[str, Any]:
        """All that is known, as JSON can hold it."""
        return {"name": self.name, "state": self.state, "bytes": self.bytes, "why": self.why} | (
            {} if self.entry is None else {key: value for key, value in asdict(self.entry).items() if key != "bytes"}
        )


def survey(store: Store, thorough: bool = False) -> list[Finding]:
    """Everything in a store; `thorough` reads every file, verifies its checksum, and looks at its numbers."""
    if not store.root.is_dir():
        raise StoreError(f"{store.root}: no such folder. Give the folder that was passed as store= to the Analyzer.")
    names = store.names()
    findings = [_unit(store, name, thorough) for name in names]
    orphans = sorted(set(store.files()) - set(names))
    findings += [Finding(name, "orphan", _size(store.root / "units" / f"{name}.safetensors")) for name in orphans]
    leftovers = [(path, path.relative_to(store.root).as_posix()) for path in store.leftovers()]
    return findings + [Finding(name, "leftover", _size(path)) for path, name in leftovers]


def _unit(store: Store, name: str, thorough: bool) -> Finding:
    entry, size = None, _size(store.root / "units" / f"{name}.safetensors")
    try:
        path = store.unit_path(name)
        entry = store.entry(name)
        if entry is None or not path.exists():
            return Finding(name, "missing", 0, entry)
        if size != entry.bytes:
            return Finding(name, "damaged", size, entry, f"{size:,} bytes, expected {entry.bytes:,}")
        if thorough:
            _check_numbers(TensorFile(path, entry.sha256, StoreError))
        return Finding(name, "stale" if _is_stale(store, entry) else "ok", size, entry)
    except StoreError as problem:
        return Finding(name, "damaged", size, entry, str(problem))


def _check_numbers(file: TensorFile) -> None:
    """Raise StoreError unless every tensor holds whole numbers or finite real ones."""
    for name in file.names():
        tensor = file.tensor(name)
        if tensor.is_complex() or not torch.isfinite(tensor).all():
            raise StoreError(f"{file.path}: {name!r} holds numbers that are not real and finite.")


def _is_stale(store: Store, entry: Entry) -> bool:
    """Whether an input has changed; one whose own entry is damaged is found as such, and repaired, by itself."""
    try:
        return store.is_stale(entry)
    except StoreError:
        return False


def collect_garbage(store: Store, scores: bool = False, dry_run: bool = False) -> list[Finding]:
    """Remove what no run will read again: leftovers, orphans, stale units and, with `scores`, all scores.

    Returns what was removed (with `dry_run`: would be).
    """

    def may_go(finding: Finding) -> bool:
        return finding.state in ("stale", "orphan", "leftover") or (
            scores and finding.state == "ok" and finding.name.startswith("scores/")
        )

    if dry_run:
        return list(filter(may_go, survey(store)))
    with store.locked("gc", tidy=False):
        going = list(filter(may_go, survey(store)))
        for finding in going:
            _remove([store.root / finding.name] if finding.state == "leftover" else _paths(store, finding.name))
    return going


def repair(store: Store) -> list[Finding]:
    """Set damaged and missing units aside, in `quarantine/`, so that the next run makes them anew; returns them.

    A manifest.json that tells no format is among them, and made anew.
    """
    with hold(store.root, "repair"):
        broken = _restore_marker(store)
        for finding in [finding for finding in survey(store, thorough=True) if finding.state in BROKEN]:
            for path in _paths(store, finding.name):
                _set_aside(store, path)
            broken.append(finding)
    return broken


def _restore_marker(store: Store) -> list[Finding]:
    """Set a manifest.json aside that tells no format, and write it anew; one of another format is left alone."""
    path, found = store.root / "manifest.json", list[Finding]()
    try:
        if path.exists():
            read_json(path, StoreError, {"format": int})
            return found
    except StoreError as problem:
        found = [Finding(path.name, "damaged", _size(path), why=str(problem))]
    _set_aside(store, path)
    write_json(path, {"format": FORMAT})
    return found


def _set_aside(store: Store, path: Path) -> None:
    """Move a file to `quarantine/`; of one that a link leads to, the link."""
    path = first_link(store.root, path) or path
    if not os.path.lexists(path):
        return
    aside = store.root / "quarantine" / path.relative_to(store.root)
    with _changing(path):
        if first_link(store.root, aside) is not None:
            raise OSError("quarantine/ is, or holds, a symbolic link")
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, aside)


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Errors of the system inside the block become StoreError naming the file that cannot be moved or removed."""
    try:
        yield
    except OSError as problem:
        raise StoreError(f"{path}: cannot be moved or removed ({problem}). Look at the permissions.") from problem


def _paths(store: Store, name: str) -> list[Path]:
    """A unit's entry and its tensors, in the order in which they may be removed."""
    return [store.root / "manifest" / f"{name}.json", store.root / "units" / f"{name}.safetensors"]


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with _changing(path):
            path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    """The size of a file, 0 where there is none."""
    try:
        return path.lstat().st_size
    except (OSError, ValueError):
        return 0
