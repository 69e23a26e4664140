"""Units as every rank sees them: rank 0 alone reads and writes the store, the other ranks receive from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.ranks import Ranks
from ..runtime.signals import shielded
from .files import Kind, Shape, TensorFile, Tensors
from .journal import Journal
from .store import MadeFrom, Store


@dataclass(frozen=True)
class StoredUnit:
    """One committed unit, read tensor by tensor; its file is open on rank 0 only."""

    file: TensorFile | None
    ranks: Ranks

    def tensor(self, name: str, shape: Shape, device: torch.device | None = None, kind: Kind = "real") -> Tensor:
        """One tensor on every rank; every rank must call it. StoreError unless it has this shape and such numbers."""
        tensor = None if self.file is None else self.file.tensor(name, shape, kind)
        return self.ranks.broadcast(tensor, device=device)


class UnitRecipe(NamedTuple):
    """A unit that can be made: its kind and name, what binds it, the units it is made of, and how to make it.

    made_from: entries may be functions, which every rank calls when the store compares or writes. examples: how many
    this rank walks to make it. make: runs on every rank; rank 0's result counts. replaceable: whether it may take the
    place of one that was made from something else, as scores may; for others that is an error.
    """

    kind: str
    name: str
    made_from: MadeFrom
    inputs: tuple[str, ...]
    examples: int
    make: Callable[[], Tensors]
    replaceable: bool = False


@dataclass(frozen=True)
class SharedStore:
    """The store's units, shared by all ranks; every rank must make the same calls in the same order.

    on_rank_0: the store itself, which only rank 0 reads and writes.
    """

    on_rank_0: Store
    ranks: Ranks
    journal: Journal

    def held(self, recipes: Iterable[UnitRecipe]) -> set[str]:
        """The names of those units that the store holds; StoreError for one that was made from something else."""
        there = {recipe.name: recipe for recipe in recipes}
        if not self.ranks.same(any(self.on_rank_0.is_committed(name) for name in there) if self.ranks.main else None):
            return set()
        made_from = {name: called(recipe.made_from) for name, recipe in there.items()}
        names = None
        if self.ranks.main:
            recipe_of = there.items()
            names = [n for n, recipe in recipe_of if self.on_rank_0.holds(n, made_from[n], recipe.replaceable)]
        return set(self.ranks.same(names))

    def open(self, name: str, made_from: MadeFrom, unasked: Collection[str] = ()) -> StoredUnit:
        """A committed unit; StoreError (on rank 0) if it is absent, damaged, or was made from something else.

        unasked: keys of what it was made from that the reader does not know.
        """
        made_from = called(made_from)
        return StoredUnit(self.on_rank_0.open(name, made_from, unasked) if self.ranks.main else None, self.ranks)

    def make(self, recipe: UnitRecipe) -> None:
        """Make and commit a unit."""
        with self.journal.unit(recipe.kind, recipe.name) as facts:
            tensors, made_from = recipe.make(), called(recipe.made_from)
            if self.ranks.main:
                with shielded():
                    written = self.on_rank_0.write(recipe.name, tensors, made_from, recipe.inputs)
                facts.update(written)

    def settle(self, recipes: Sequence[UnitRecipe], held: Container[str]) -> bool:
        """Make, in order, those units that are not among the `held`; True if there were any."""
        missing = [recipe for recipe in recipes if recipe.name not in held]
        for recipe in recipes:
            if recipe.name in held:
                self.journal.found(recipe.kind, recipe.name, recipe.examples)
        for recipe in missing:
            self.make(recipe)
        return bool(missing)


def called(made_from: MadeFrom) -> dict[str, Any]:
    """What a unit is made from, where functions among it have been called."""
    return {key: value() if callable(value) else value for key, value in made_from.items()}
