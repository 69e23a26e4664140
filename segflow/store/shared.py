"""Units as every rank sees them: rank 0 alone reads and writes the store, the other ranks receive from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.ranks import Ranks
from ..runtime.signals import shielded
from .files import TensorFile, Tensors
from .journal import Journal
from .store import MadeFrom, Store


@dataclass(frozen=True)
class StoredUnit:
    """One committed unit, read tensor by tensor.

    file: on rank 0 only.
    """

    file: TensorFile | None
    ranks: Ranks

    def tensor(self, name: str, shape: tuple[int, ...] | None, device: torch.device | None = None) -> Tensor:
        """One tensor on every rank; every rank must call it. StoreError if it has another shape (None: any)."""
        tensor = None if self.file is None else self.file.tensor(name, shape)
        return self.ranks.broadcast(tensor, device=device)


class UnitRecipe(NamedTuple):
    """A unit that can be made: its kind and name, what binds it, the units it is made of, and how to make it.

    examples: how many of them this rank walks to make it. make: runs on every rank; rank 0's result counts.
    """

    kind: str
    name: str
    made_from: MadeFrom
    inputs: tuple[str, ...]
    examples: int
    make: Callable[[], Tensors]


@dataclass(frozen=True)
class SharedStore:
    """The store's units, shared by all ranks; every rank must make the same calls in the same order."""

    local: Store
    ranks: Ranks
    journal: Journal

    def held(self, planned: Iterable[UnitRecipe]) -> set[str]:
        """The names of those units that the store holds; StoreError for one that was made from something else."""
        found = [u.name for u in planned if self.local.holds(u.name, u.made_from)] if self.ranks.main else None
        return set(self.ranks.same(found))

    def open(self, name: str, made_from: MadeFrom, unasked: Collection[str] = ()) -> StoredUnit:
        """A committed unit; StoreError (on rank 0) if it is absent, damaged, or was made from something else.

        unasked: keys of what it was made from that the reader does not know.
        """
        return StoredUnit(self.local.open(name, made_from, unasked) if self.ranks.main else None, self.ranks)

    def make(self, planned: UnitRecipe) -> None:
        """Make and commit a unit."""
        with self.journal.unit(planned.kind, planned.name) as facts:
            tensors = planned.make()
            if self.ranks.main:
                with shielded():
                    written = self.local.write(planned.name, tensors, planned.made_from, planned.inputs)
                facts.update(written)

    def settle(self, planned: Sequence[UnitRecipe], held: Container[str]) -> bool:
        """Make, in order, those units that are not among the `held`; True if there were any."""
        missing = [unit for unit in planned if unit.name not in held]
        for unit in planned:
            if unit.name in held:
                self.journal.found(unit.kind, unit.name, unit.examples)
        for unit in missing:
            self.make(unit)
        return bool(missing)
