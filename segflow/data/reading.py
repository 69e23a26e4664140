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
        self.kept: dict[tuple[int, int], Any] = {}  # by view and index: what was read while `keeps` was set

    @cached_property
    def _generators(self) -> Generators:
        return Generators(self.dataset, self.collate_fn)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker, which finds the generators of its own copy of the dataset."""
        return {name: value for name, value in vars(self).items() if name != "_generators"} | {"kept": {}}

    def __getitem__(self, request: Request) -> Answer:
        """What one batch holds. Raises TaskError, naming the examples, where they cannot be read or joined."""
        before, unmoved = self._generators.states(), False
        try:
            if not self.draws and not self.keeps:
                answer = self._answer(request, self._as_they_come(request.examples))
                unmoved = not moved(before, self._generators.states())
                if unmoved:
                    return answer
                self.draws = True
                self.kept.clear()
            return self._answer(request, [self._seeded(index, request.view) for index in request.examples])
        finally:
            if not unmoved:
                self._generators.restore(before)

    def _answer(self, request: Request, examples: list[Any]) -> Answer:
        example_of = dict(zip(request.examples, examples, strict=True))
        digests = [self._digest(index, example_of[index], request.view) for index in request.digested]
        content = self._collated(request.examples, examples, request.view) if request.joined else None
        return Answer(content, digests, self.draws)

    def _as_they_come(self, indices: list[int]) -> list[Any]:
        """Examples without seeds; where the dataset reads several at once, so."""
        at_once = getattr(self.dataset, "__getitems__", None)
        if at_once is not None:
            with suppress(Exception):  # which of them it was is found one by one
                examples = at_once(indices)
                if isinstance(examples, list | tuple) and len(examples) == len(indices):
                    return list(examples)
        return [self._example(index) for index in indices]

    def _seeded(self, index: int, view: int) -> Any:
        """An example read from its own seed, or kept; where that is not known yet, whether it drew is found out."""
        if self.keeps and (view, index) in self.kept:
            return _copied(self.kept[view, index], self.collate_fn)
        self._generators.seed(_number(self.seed, view, index))
        before = None if self.draws else self._generators.states()
        example = self._example(index)
        self.draws = self.draws or moved(before, self._generators.states())
        if self.keeps:
            self.kept[view, index] = example
        return _copied(example, self.collate_fn) if self.keeps else example

    def look_for_generators(self) -> None:
        """Look for generators once more, and let go of what was read without them."""
        vars(self).pop("_generators", None)
        self.kept.clear()

    def _example(self, index: int) -> Any:
        """One example. Raises TaskError, naming it."""
        try:
            return self.dataset[index]
        except SegflowError:
            raise
        except Exception as problem:
            raise TaskError(
                f"example {index} of the {self.role} data cannot be read ({type(problem).__name__}: {problem}). Look "
                "at what the dataset does there."
            ) from problem

    def _digest(self, index: int, example: Any, view: int) -> bytes:
        """Of what a batch of this one example holds; without a collate function of the user's, of the example."""
        single = [_copied(example, self.collate_fn)]
        content = example if self.collate_fn is None else self._collated([index], single, view)
        try:
            return bytes.fromhex(digest(content))[:DIGEST]
        except (TaskError, RecursionError) as problem:
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
        if not self.draws and not self.keeps:
            return collate(examples)
        self._generators.seed(_number(self.seed, view, *indices))
        with drawing(self.seed, f"view {view}", indices, own_generators=True):
            before = self._generators.states()
            content = collate(examples)
            after = self._generators.states()
        if moved(before, after):
            raise TaskError(
                f"the {self.role} data's collate_fn draws random numbers for a batch at once, so that what becomes of "
                "an example would depend on the batch. Draw in the dataset's __getitem__, or in the collate_fn with "
                "torch's rand, randn, randint, bernoulli or multinomial, in a shape that has the examples first."
            )
        return content


def _number(*numbers: int) -> int:
    """A seed in [0, 2^32) for these numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "little")


def _copied(example: Any, collate_fn: Collate | None) -> Any:
    """A copy of an example that a collate function of the user's may change; torch's own changes none."""
    if collate_fn is None:
        return example
    try:
        return copy.deepcopy(example)
    except Exception:  # noqa: BLE001 it holds what has no copy
        return copy.copy(example) if isinstance(example, MutableMapping | list) else example


class InWorker:
    """A Reading for the workers of a DataLoader, whose errors come back as they are, not in a worker's traceback."""

    def __init__(self, reading: Reading):
        self._reading = reading

    def __getitem__(self, request: Request) -> Answer | SegflowError:
        try:
            return self._reading[request]
        except SegflowError as problem:
            return problem.with_traceback(None)
