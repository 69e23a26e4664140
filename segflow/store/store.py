"""Units of safetensors with a manifest, each bound to what it was made from. The format's rules: docs/STORE.md.

    manifest.json               {"format": 2}
    manifest/<name>.json        {"bytes", "sha256", "made_from", "inputs"} of one unit
    units/<name>.safetensors    its tensors; a name is words joined by "/"

A unit is committed by its tensors first and its entry last, each written, flushed to disk and renamed, so a unit that
has an entry is whole. `made_from` binds it to what it was computed from; reading it for something else is an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StoreError
from .comparison import agree, difference
from .files import TensorFile, Tensors, inside, read_json, write_json, write_tensors
from .json_form import COUNT, SHA256, fitting
from .lock import NOTE, Held, hold
from .replacement import partial_of

FORMAT = 2
MadeFrom = Mapping[str, Any]
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_ENTRY = {"bytes": COUNT, "sha256": SHA256, "made_from": {str: object}, "inputs": {str: SHA256}}
_OWN = {
    "": r"manifest\.json|" + re.escape(NOTE),
    "manifest": r".+\.json",
    "units": r".+\.safetensors",
}  # what is written
_OF_SAFETENSORS = re.compile(r"\.tmp\w{6}")  # the name under which safetensors writes a file
_REPAIR = "Run `segflow store repair` on the store to set it aside, or delete it to have it made anew."


@dataclass(frozen=True)
class Entry:
    """What the manifest says of a unit.

    bytes, sha256: of its file; made_from: what it was computed from; inputs: the sha256 of the units it was made of.
    """

    bytes: int
    sha256: str
    made_from: dict[str, Any]
    inputs: dict[str, str]


class Store:
    """A folder of named units, each bound to what it was made from.

    Args:
        root: the folder; it is created at the first write.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)

    @contextmanager
    def locked(self, purpose: str, tidy: bool = True) -> Iterator[Held]:
        """Keep other runs out, and remove what a killed run left half-written, unless not to `tidy`.

        Raises StoreError, naming the holder, if another run has the store.
        """
        with hold(self.root, purpose) as held:
            self._check_format()
            for leftover in self.leftovers() if tidy else []:
                with suppress(OSError):
                    leftover.unlink()
            yield held

    def names(self) -> list[str]:
        """The names of all committed units."""
        self._check_format()
        return sorted(self._listed("manifest", ".json"))

    def files(self) -> list[str]:
        """The names under which files of units are there, committed or not."""
        return sorted(self._listed("units", ".safetensors"))

    def leftovers(self) -> list[Path]:
        """Files that were never finished, of those that a store writes; others that end in `.partial` are not its."""
        below = [(path, _OWN[folder]) for folder in ("manifest", "units") for path in self._walk(folder)]
        at_root = [(path, _OWN[""]) for path in self.root.glob("*.partial") if not path.is_dir()]
        unfinished = [path for path, own in below + at_root if re.fullmatch(own, partial_of(path.name) or "")]
        return sorted([*unfinished, *(path for path in self._walk("units") if _OF_SAFETENSORS.fullmatch(path.name))])

    def entry(self, name: str) -> Entry | None:
        """What the manifest says of a unit, None if it has none; StoreError if that is damaged."""
        self._check_format()
        path = self.entry_path(name)
        return _entry(path) if path.exists() else None

    def __contains__(self, name: str) -> bool:
        """True if the unit is committed, its file is there whole, and no unit it was made of has changed since."""
        return self._current(name) is not None

    def _current(self, name: str) -> Entry | None:
        entry, path = self.entry(name), self.unit_path(name)
        if entry is None or not path.is_file() or path.stat().st_size != entry.bytes or self.is_stale(entry):
            return None
        return entry

    def is_stale(self, entry: Entry) -> bool:
        """True if a unit that this one was made of is there with other content."""
        return any((now := self.entry(name)) is not None and now.sha256 != sha for name, sha in entry.inputs.items())

    def is_committed(self, name: str) -> bool:
        """Whether the manifest has the unit, from whatever it was made."""
        return self.entry_path(name).exists()

    def holds(self, name: str, made_from: MadeFrom, replaceable: bool = False) -> bool:
        """Whether the unit is in the store, made from this; StoreError if it was made from something else.

        replaceable: say no instead, so that it is made anew in the other's place.
        """
        entry = self._current(name)
        if entry is None:
            return False
        if replaceable:
            return not self._differing(entry, made_from)
        self._check(name, entry, made_from)
        return True

    def open(self, name: str, made_from: MadeFrom, unasked: Collection[str] = ()) -> TensorFile:
        """The unit's file, its checksum verified.

        made_from: what the caller would make it from; it must agree with what was stored, key by key, and a key that
        only one side has counts as different, but for the `unasked` ones, which the caller does not know.
        Raises StoreError if the unit is absent, damaged, or was made from something else.
        """
        entry = self.entry(name)
        if entry is None or not self.unit_path(name).exists():
            raise StoreError(f"{self.root}: no unit {name!r}. Run Analyzer.fit() with this store first.")
        if self.is_stale(entry):
            raise StoreError(
                f"{self.root}: unit {name!r} was made of units that have changed since. "
                "Run Analyzer.fit() with this store first."
            )
        self._check(name, entry, made_from, unasked)
        return TensorFile(
            self.unit_path(name),
            entry.sha256,
            StoreError,
            f"Delete this file of unit {name!r} to have it made anew (`segflow store repair` sets units aside whose "
            "numbers are not finite).",
        )

    def write(self, name: str, tensors: Tensors, made_from: MadeFrom, inputs: Iterable[str] = ()) -> dict[str, Any]:
        """Commit one unit, replacing an older one of that name; returns {"bytes", "sha256"}.

        inputs: the units it was made of. An older unit's entry goes before its tensors change, so that a run killed
        on the way leaves the unit absent, never damaged.
        """
        if not self._check_format():
            write_json(self.root / "manifest.json", {"format": FORMAT})
        sources = {source: self.entry(source) for source in inputs}
        digests = {source: entry.sha256 for source, entry in sources.items() if entry is not None}
        written = write_tensors(self.unit_path(name), tensors, described_in=self.entry_path(name))
        write_json(self.entry_path(name), {**written, "made_from": dict(made_from), "inputs": digests})
        return written

    def unit_path(self, name: str) -> Path:
        """Where a unit's tensors are."""
        return self._path("units", name, ".safetensors")

    def entry_path(self, name: str) -> Path:
        """Where a unit's entry in the manifest is."""
        return self._path("manifest", name, ".json")

    def _path(self, folder: str, name: str, suffix: str) -> Path:
        if not _NAME.fullmatch(name):
            raise StoreError(f"{name!r} is not a unit's name: words of letters, digits, '.', '_', '-' joined by '/'.")
        return inside(self.root, folder, name + suffix)

    def _walk(self, folder: str) -> Iterator[Path]:
        for parent, _, names in os.walk(inside(self.root, folder)):  # does not follow links
            yield from (Path(parent, name) for name in names)

    def _listed(self, folder: str, suffix: str) -> set[str]:
        base = self.root / folder
        paths = (path.relative_to(base).as_posix() for path in self._walk(folder))
        names = {path.removesuffix(suffix) for path in paths if path.endswith(suffix)}
        return {name for name in names if _NAME.fullmatch(name)}

    def _check_format(self) -> bool:
        """Whether the store has its manifest.json yet; StoreError unless that is of the format this segflow reads."""
        path = inside(self.root, "manifest.json")
        if not path.exists():
            return False
        content = read_json(path, StoreError)
        stored = content.get("format") if isinstance(content, dict) else None
        if stored != FORMAT or isinstance(stored, bool):
            raise StoreError(
                f"{path}: store format {stored!r}, this segflow reads format {FORMAT}. "
                "Use another store folder, or the segflow version that made this one."
            )
        return True

    def _differing(self, entry: Entry, asked: MadeFrom, unasked: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
        """What the unit was made from and what is asked, under each key where they differ."""
        stored, now = entry.made_from, json.loads(json.dumps(asked))
        keys = [*now, *(key for key in stored if key not in now and key not in unasked)]
        return {
            key: (stored.get(key), now.get(key))
            for key in keys
            if key not in stored or key not in now or not agree(stored[key], now[key])
        }

    def _check(self, name: str, entry: Entry, asked: MadeFrom, unasked: Collection[str] = ()) -> None:
        """Raise StoreError, naming both sides, unless the unit was made from what is asked."""
        differing = self._differing(entry, asked, unasked)
        if differing:
            sides = "; ".join(f"{key}: {difference(*both)}" for key, both in differing.items())
            raise StoreError(
                f"{self.root}: unit {name!r} was made from something else ({sides}). "
                "Use another store folder for the new setting, or delete this one to make it anew."
            )


def _entry(path: Path) -> Entry:
    """An entry, read; StoreError unless it has the form that rule 5 of docs/STORE.md gives."""
    content = read_json(path, StoreError)
    try:
        fitting(content, _ENTRY)
    except ValueError as problem:
        raise StoreError(f"{path}: damaged, it does not describe a unit ({problem}). {_REPAIR}") from problem
    if len(content) > len(_ENTRY) or not all(_NAME.fullmatch(name) for name in content["inputs"]):
        raise StoreError(f"{path}: damaged, it does not describe a unit. {_REPAIR}")
    return Entry(**content)
