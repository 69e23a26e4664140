"""The few examples on which a loss is probed: distinct ones, for equal ones hide that a model mixes or sorts rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from ..data.batches import Batch, Collate, batches, evenly_spaced
from ..data.fingerprints import digest

MOST = 8  # examples of a batch
_LOOKED_AT = 64  # examples at most, among which distinct ones are looked for


@dataclass
class _Read:
    """A dataset whose every example is read once."""

    dataset: Any
    _examples: dict[int, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index not in self._examples:
            self._examples[index] = self.dataset[index]
        return self._examples[index]


@dataclass(frozen=True)
class ProbeExamples:
    """Some examples of a dataset: each alone, and together.

    alone: a batch for each, in the order in which `together` has them.
    """

    dataset: Any
    collate_fn: Collate | None
    device: torch.device
    alone: tuple[Batch, ...]

    @property
    def indices(self) -> list[int]:
        """Their places in the dataset."""
        return [int(batch.examples[0]) for batch in self.alone]

    def together(self, backwards: bool = False) -> Batch:
        """One batch of all of them."""
        indices = self.indices[::-1] if backwards else self.indices
        [batch] = batches(self.dataset, [indices], self.collate_fn, self.device)
        return batch


def probe_examples(dataset: Any, collate_fn: Collate | None, device: torch.device, most: int = MOST) -> ProbeExamples:
    """Up to `most` examples, spread over the dataset, of different content as far as there are any.

    They stand in no order that the dataset may be sorted in.
    """
    read = _Read(dataset)
    length = len(dataset)
    first = evenly_spaced(length, min(most, length))
    places = [*first, *(place for place in evenly_spaced(length, min(_LOOKED_AT, length)) if place not in set(first))]
    distinct: dict[str, Batch] = {}
    alike: list[Batch] = []
    for single in _singles(read, places, collate_fn, device):
        content = digest(single.content)
        if content in distinct:
            alike.append(single)
        distinct.setdefault(content, single)
        if len(distinct) == most:
            break
    chosen = [*distinct.values(), *islice(alike, max(0, most - len(distinct)))]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0)).tolist()
    return ProbeExamples(read, collate_fn, device, tuple(chosen[place] for place in order))


def _singles(dataset: Any, places: list[int], collate_fn: Collate | None, device: torch.device) -> Iterator[Batch]:
    return batches(dataset, [[place] for place in places], collate_fn, device)
