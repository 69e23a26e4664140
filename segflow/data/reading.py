"""How one batch is read: each of its examples alike every time, with digests of them where they are wanted.

What reading and collating draw at random (augmentation, masked tokens) depends on (seed, view, example) only: not on
the batch, the pass, the process, or the number of workers.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

from torch.utils.data import default_collate

from ..errors import JoinError, SegflowError, TaskError
from .batches import Collate
from .draws import drawing
from .fingerprints import digest
from .generators import Generators, moved

DIGEST = 16  # bytes of an example's digest


class Request(NamedTuple):
    """Examples to read for one batch.

    view: which view of them; digested: those whose digest is wanted; joined: False where nothing else is.
    """

    examples: list[int]
    view: int = 0
    digested: Sequence[int] = ()
    joined: bool = True


class Answer(NamedTuple):
    """What was read: a batch's content, the digests that were asked for, and whether reading draws at random."""

    content: Any
    digests: list[bytes]
    draws: bool


class Reading:
    """Reads one batch at a time, here or in a worker of a DataLoader, for which this is the dataset.

    Whether reading draws at random is told by generators that have moved; a batch is then read again, each example
    from a seed of its own.
    """

    def __init__(self, dataset: Any, collate_fn: Collate | None, role: str, seed: int):
        self.dataset, self.collate_fn, self.role, self.seed = dataset, collate_fn, role, seed
        self.draws = self.keeps = False
        self.kept: dict[
            tuple[int, int], Any
        ] = {}  # examples that were read while `keeps` was set, and are not read again

    @cached_property
    def _generators(self) -> Generators:
        return Generators(self.dataset, self.collate_fn)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker, which finds the generators of its own copy of the dataset."""
        return {name: value for name, value in vars(self).items() if name != "_generators"} | {"kept": {}}

    def __getitem__(self, request: Request) -> Answer:
        """What one batch holds. Raises TaskError, naming the examples, where they cannot be read or joined."""
        before = self._generators.states()
        try:
            if not self.draws:
                answer = self._answer(request, self._as_they_come(request.examples))
                if not moved(before, self._generators.states()):
                    return answer
                self.draws = True
                self.kept.clear()
            return self._answer(request, [self._seeded(index, request.view) for index in request.examples])
        finally:
            if self.draws:
                self._generators.restore(before)

    def _answer(self, request: Request, examples: list[Any]) -> Answer:
        example_of = dict(zip(request.examples, examples, strict=True))
        digests = [self._digest(index, example_of[index], request.view) for index in request.digested]
        content = self._collated(request.examples, examples, request.view) if request.joined else None
        return Answer(content, digests, self.draws)

    def _as_they_come(self, indices: list[int]) -> list[Any]:
        """Examples without seeds; where the dataset reads several at once, so."""
        at_once = getattr(self.dataset, "__getitems__", None)
        if at_once is not None and not self.keeps:
            with suppress(Exception):  # which of them it was is found one by one
                return list(at_once(indices))
        return [self._example(index) for index in indices]

    def _seeded(self, index: int, view: int) -> Any:
        self._generators.seed(_number(self.seed, view, index))
        return self._example(index, view)

    def _example(self, index: int, view: int = 0) -> Any:
        if self.keeps and (view, index) in self.kept:
            return _shallow(self.kept[view, index])
        try:
            example = self.dataset[index]
        except SegflowError:
            raise
        except Exception as problem:
            raise TaskError(
                f"example {index} of the {self.role} data cannot be read ({type(problem).__name__}: {problem}). Look "
                "at what the dataset does there."
            ) from problem
        if self.keeps:
            self.kept[view, index] = example
        return _shallow(example) if self.keeps else example

    def _digest(self, index: int, example: Any, view: int) -> bytes:
        """Of what a batch of this one example holds; without a collate function of the user's, of the example."""
        content = example if self.collate_fn is None else self._collated([index], [_shallow(example)], view)
        try:
            return bytes.fromhex(digest(content))[:DIGEST]
        except TaskError as problem:
            raise TaskError(f"example {index} of the {self.role} data: {problem}") from problem

    def _collated(self, indices: list[int], examples: list[Any], view: int) -> Any:
        try:
            return self._joined(indices, examples, view)
        except SegflowError:
            raise
        except Exception as problem:
            few = f"{indices[:4]}{' and more' if len(indices) > 4 else ''}"
            raise JoinError(
                f"examples {few} of the {self.role} data cannot be joined into a batch "
                f"({type(problem).__name__}: {problem}). Give examples of tensors and numbers of one shape, or a "
                "collate_fn that joins others."
            ) from problem

    def _joined(self, indices: list[int], examples: list[Any], view: int) -> Any:
        collate = self.collate_fn or default_collate
        if not self.draws:
            return collate(examples)
        self._generators.seed(_number(self.seed, view, *indices))
        before = self._generators.states().others
        with drawing(self.seed, f"view {view}", indices, own_generators=True):
            content = collate(examples)
        if moved(before, self._generators.states().others):
            raise TaskError(
                f"the {self.role} data's collate_fn draws with Python's or NumPy's random functions for a batch at "
                "once, so that what becomes of an example would depend on the batch. Draw with torch's functions, "
                "whose draws are tied to the examples, or in the dataset's __getitem__."
            )
        return content


def _number(*numbers: int) -> int:
    """A seed in [0, 2^32) for these numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "little")


def _shallow(example: Any) -> Any:
    """A copy of an example's mapping or list, from which a collate function may take entries out."""
    return copy.copy(example) if isinstance(example, MutableMapping | list) else example
